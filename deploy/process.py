"""Keeps one child process alive: starts it, passes its lines on, restarts it when it dies, stops it in order.

A child gets a process group of its own, so that Ctrl-C at a terminal reaches only the supervisor, and kills itself when
the supervisor is gone (:func:`die_with`), however that went.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from twinpool.errors import ConfigError, Unavailable

CONFIG_EXIT = 2  # exit status of a process whose configuration is wrong: starting it again cannot help
TAIL_LINES = 20
MAX_LINE = 8192
_PR_SET_PDEATHSIG = 1

Log = Callable[[str, str], None]  # (process, line)


class RestartPolicy(NamedTuple):
    """Pauses double from ``first_s`` to ``max_s``; a process that lived for ``max_s`` starts again from the first."""

    first_s: float
    max_s: float
    max_restarts: int

    def pause(self, failures: int) -> float:
        """Seconds before restart number ``failures`` (from 1) in a row."""
        return min(self.max_s, self.first_s * 2.0 ** min(failures - 1, 60))


class ChildRefused(ConfigError):
    """A child process says that its configuration is wrong; ``tail`` is the last it wrote."""

    def __init__(self, name: str, tail: Sequence[str]) -> None:
        super().__init__(f"{name} cannot start with this configuration: see what it says above")
        self.tail = tuple(tail)


class ChildLost(Unavailable):
    """A child process died too often; ``tail`` is the last it wrote."""

    def __init__(self, message: str, tail: Sequence[str]) -> None:
        super().__init__(message, reason="PROCESS_LOST")
        self.tail = tuple(tail)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, process ``parent``, ends. The child calls it at its start."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


class Child:
    """One supervised process. ``run`` ends after ``stop`` or raises; both belong to one event loop."""

    def __init__(self, name: str, command: Sequence[str], policy: RestartPolicy, log: Log) -> None:
        self.name = name
        self._command = tuple(command)
        self._policy = policy
        self._log = log
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        alive = self._process is not None and self._process.returncode is None
        return self._process.pid if alive and self._process else None

    async def run(self) -> None:
        """Keep it running until ``stop``. Raises ChildRefused or ChildLost."""
        failures = 0
        clock = asyncio.get_running_loop().time
        while not self._stopping.is_set():
            started = clock()
            status = await self._run_once()
            if self._stopping.is_set():
                return
            if status == CONFIG_EXIT:
                raise ChildRefused(self.name, self._tail)
            if status == 0:  # drained by its operator: starting it again would undo that
                self._log(self.name, "left in good order; it is not started again")
                await self._stopping.wait()
                return
            failures = 1 if clock() - started >= self._policy.max_s else failures + 1
            await self._pause(failures, how_it_ended(status))

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after ``grace_s``; returns when the process is gone."""
        self._stopping.set()
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace_s)
        except TimeoutError:
            self._log(self.name, f"still running after {grace_s:g} s: killed")
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """SIGKILL to the process and all it started; it is not started again."""
        self._stopping.set()
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _run_once(self) -> int:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        if self._stopping.is_set():  # while it was being started
            self.kill()
        assert self._process.stdout is not None
        lines = asyncio.create_task(self._forward(self._process.stdout))
        try:
            return await self._process.wait()
        finally:
            if self.pid is not None:  # this coroutine was cancelled
                self._signal(signal.SIGKILL)
                await self._process.wait()  # else the loop may close over a process that nobody waited for
            await asyncio.wait({lines}, timeout=1.0)  # a grandchild may hold the pipe open
            lines.cancel()

    async def _forward(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(65536):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)

    def _say(self, line: bytes) -> None:
        text = line.rstrip(b"\r").decode("utf-8", "replace")[:MAX_LINE]
        self._tail.append(text)
        self._log(self.name, text)

    async def _pause(self, failures: int, how: str) -> None:
        if failures > self._policy.max_restarts:
            raise ChildLost(f"{self.name} {how} and was restarted {failures - 1} times in a row: given up", self._tail)
        pause = self._policy.pause(failures)
        self._log(self.name, f"{how}; restart {failures} of {self._policy.max_restarts} in {pause:g} s")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause)


def how_it_ended(status: int) -> str:
    """An exit status of a child, in words."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"
