"""One supervised process: restarts with growing pauses, gives up, stops in order, and never outlives its supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from twinpool.deploy.process import CONFIG_EXIT, MAX_LINE, Child, ChildLost, ChildRefused, RestartPolicy, how_it_ended

FAST = RestartPolicy(first_s=0.001, max_s=30.0, max_restarts=3)
READY = "import time; print('ready', flush=True); time.sleep(600)"


class Lines(list[str]):
    """A log that can be waited for."""

    def log(self, process: str, line: str) -> None:
        self.append(line)

    async def until(self, done: Callable[[list[str]], bool]) -> None:
        async with asyncio.timeout(30):
            while not done(self):  # noqa: ASYNC110 (what is waited for may be in /proc)
                await asyncio.sleep(0.01)


def child(lines: Lines, code: str, policy: RestartPolicy = FAST) -> Child:
    return Child("child", (sys.executable, "-S", "-c", code), policy, lines.log)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def gone(pid: int) -> bool:
    """No such process, or one that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


async def test_a_dead_child_starts_again_until_it_is_given_up() -> None:
    lines = Lines()
    with pytest.raises(ChildLost, match="child ended with status 3 and was restarted 3 times in a row: given up"):
        await child(lines, "print('hello'); raise SystemExit(3)").run()
    assert lines.count("hello") == 4
    assert [line for line in lines if line != "hello"] == [
        f"ended with status 3; restart {number} of 3 in {pause} s"
        for number, pause in ((1, 0.001), (2, 0.002), (3, 0.004))
    ]


async def test_a_wrong_configuration_is_told_once() -> None:
    lines = Lines()
    with pytest.raises(ChildRefused) as caught:
        await child(lines, f"print('no such model'); raise SystemExit({CONFIG_EXIT})").run()
    assert caught.value.tail == ("no such model",)
    assert lines == ["no such model"]


async def test_a_long_life_resets_the_count() -> None:
    lines = Lines()
    policy = RestartPolicy(first_s=0.001, max_s=0.0, max_restarts=1)  # any life is long enough
    supervised = child(lines, "print('hello'); raise SystemExit(3)", policy)
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: seen.count("hello") >= 3)
    await supervised.stop(5)
    await run


async def test_one_that_left_in_good_order_is_not_started_again() -> None:
    lines = Lines()
    supervised = child(lines, "print('hello')")
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: any("left in good order" in line for line in seen))
    assert not run.done()
    await supervised.stop(5)
    await run


async def test_stop_ends_it_with_sigterm() -> None:
    lines = Lines()
    supervised = child(lines, READY)
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: "ready" in seen)
    assert supervised.pid is not None
    await supervised.stop(30)
    await run
    assert supervised.pid is None
    assert lines == ["ready"]


async def test_what_ignores_sigterm_is_killed_with_all_it_started() -> None:
    lines = Lines()
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "grandchild = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
        "print(grandchild.pid, flush=True);" + READY
    )
    supervised = child(lines, code)
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: "ready" in seen)
    await supervised.stop(0.1)
    await run
    assert lines[-1] == "still running after 0.1 s: killed"
    await lines.until(lambda seen: gone(int(seen[0])))


async def test_stop_during_a_pause_does_not_wait() -> None:
    lines = Lines()
    supervised = child(lines, "raise SystemExit(1)", RestartPolicy(600.0, 600.0, 3))
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: bool(seen))
    await supervised.stop(5)
    async with asyncio.timeout(10):
        await run


async def test_a_cancelled_run_leaves_no_process() -> None:
    lines = Lines()
    supervised = child(lines, READY)
    run = asyncio.create_task(supervised.run())
    await lines.until(lambda seen: "ready" in seen)
    pid = supervised.pid
    assert pid is not None
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    assert not exists(pid)  # not even as one that waits to be reaped


async def test_lines_without_end_and_without_text() -> None:
    lines = Lines()
    code = f"import sys; sys.stdout.buffer.write(b'\\xff' * {3 * MAX_LINE} + b'\\r\\nlast'); raise SystemExit(2)"
    with pytest.raises(ChildRefused):
        await child(lines, code).run()
    assert lines[-1] == "last"
    assert all(len(line) <= MAX_LINE for line in lines)


def test_pauses_double_up_to_a_limit() -> None:
    policy = RestartPolicy(first_s=0.5, max_s=3.0, max_restarts=9)
    assert [policy.pause(number) for number in (1, 2, 3, 4, 99)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_how_it_ended() -> None:
    assert how_it_ended(3) == "ended with status 3"
    assert how_it_ended(-signal.SIGKILL) == "was killed by SIGKILL"
    assert how_it_ended(-250) == "was killed by signal 250"


async def test_a_child_dies_with_its_parent() -> None:
    inner = (
        "import os, time; from twinpool.deploy.process import die_with; die_with(os.getppid());"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}]).wait()"
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", outer, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    await Lines().until(lambda seen: gone(pid))
    assert await parent.stdout.read() == b""
