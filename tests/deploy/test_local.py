"""``twinpool up`` as an operator runs it: real processes, emulated engines, loopback ports that nobody else has."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from twinpool.client import Client, request
from twinpool.config import ClusterConfig
from twinpool.deploy.local import Addresses, LocalCluster, dialable, write_atomically
from twinpool.errors import ConfigError
from twinpool.proto.twinpool.v1.inference_pb2 import Finished

YAML = """
worker: {engine: emulated, kv_memory_mib: 1, emulated: {profile: zero}}
edge: {inference: "127.0.0.1:0", vllm: {listen: "127.0.0.1:0"}, admin: "127.0.0.1:0", metrics: "127.0.0.1:0"}
"""
COMMAND = (sys.executable, "-P", "-m", "twinpool.cli", "up")
WAIT_S = 50.0

pytestmark = pytest.mark.timeout(180)


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Up:
    """A running ``twinpool up``."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.ready_file = folder / "ready.json"
        self.log = folder / "log"
        config = folder / "cluster.yaml"
        config.write_text(YAML)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                (*COMMAND, "-c", str(config), "--ready-file", str(self.ready_file), *arguments), stderr=log
            )

    def ready(self) -> dict[str, str]:
        """Its addresses, once it is ready."""
        until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        addresses: dict[str, str] = json.loads(self.ready_file.read_text())
        return addresses

    def children(self) -> dict[str, int]:
        """Live processes it started: router, and workers by name."""
        found = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, parent = stat.read_text().rpartition(")")[2].split()[:2]
                words = stat.with_name("cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if int(parent) == self.process.pid and state != "Z":
                name = words[words.index("--name") + 1] if "--name" in words else "router"
                found[name] = int(stat.parent.name)
        return found


@contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Up]:
    up = Up(folder, *arguments)
    try:
        yield up
    finally:
        up.process.kill()
        up.process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def generate(address: str) -> Finished:
    with Client(address) as client:
        events = list(client.generate(request(token_ids=[1, 2, 3], max_tokens=4, ignore_eos=True), timeout_s=20))
    assert isinstance(events[-1], Finished)
    return events[-1]


def test_up_serves_restarts_a_dead_worker_and_drains(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        addresses = up.ready()
        assert addresses.keys() == {"inference", "vllm", "admin", "metrics"}
        end = generate(addresses["inference"])
        assert (end.route.prefill_worker, end.route.decode_worker) == ("prefill-0", "decode-0")
        before = up.children()
        assert before.keys() == {"router", "prefill-0", "decode-0"}
        command_lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in before.values()]
        assert not any(b"token" in line for line in command_lines)

        os.kill(before["decode-0"], signal.SIGKILL)
        until(lambda: up.children().get("decode-0", before["decode-0"]) != before["decode-0"])
        until(lambda: up.log.read_text().count("worker decode-0 joined") == 2)
        assert generate(addresses["inference"]).route.decode_worker == "decode-0"
        assert "decode-0   | was killed by SIGKILL; restart 1 of 8 in 0.5 s" in up.log.read_text()

        after = up.children()
        up.process.send_signal(signal.SIGTERM)
        assert up.process.wait(WAIT_S) == 0
        assert not any(alive(pid) for pid in after.values())
        assert not up.ready_file.exists()


def test_nothing_outlives_a_killed_up(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        up.ready()
        children = up.children()
        up.process.kill()
        up.process.wait()
        until(lambda: not any(alive(pid) for pid in children.values()))


def test_a_signal_before_it_is_ready(tmp_path: Path) -> None:
    with running(tmp_path) as up:
        until(lambda: len(up.children()) == 3)
        children = up.children()
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(WAIT_S) == 0
        assert not any(alive(pid) for pid in children.values())


def test_a_port_in_use_ends_it_with_status_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with running(tmp_path, "--set", f"edge.inference={address}") as up:
            assert up.process.wait(WAIT_S) == 2
    text = up.log.read_text()
    assert f"edge.inference: cannot listen on {address}" in text
    assert "Traceback" not in text


def test_a_worker_that_can_not_run_ends_it_with_status_2(tmp_path: Path) -> None:
    with running(tmp_path, "--set", "worker.emulated.block_bytes=1000000") as up:
        assert up.process.wait(WAIT_S) == 2
    text = up.log.read_text()
    assert "worker.kv_memory_mib: 0.95 MiB of KV memory are not enough" in text
    assert "cannot start with this configuration" in text


def test_no_workers_is_refused() -> None:
    pools = {"prefill": {"workers": 0}, "decode": {"workers": 0}}
    with pytest.raises(ConfigError, match="no workers at all"):
        LocalCluster(ClusterConfig.model_validate({"pools": pools}), lambda process, line: None)


def test_where_to_dial_what_listens_everywhere() -> None:
    assert dialable("0.0.0.0:5") == "127.0.0.1:5"
    assert dialable("[::]:5") == "[::1]:5"
    assert dialable("10.0.0.1:5") == "10.0.0.1:5"


def test_files_are_private_and_whole(tmp_path: Path) -> None:
    file = tmp_path / "f"
    write_atomically(file, "one")
    write_atomically(file, "two")
    assert file.read_text() == "two"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [file]


def test_the_ready_file_has_no_address_for_workers() -> None:
    assert Addresses("a", "b", "c", "d", "e").public() == {"inference": "a", "vllm": "b", "admin": "c", "metrics": "d"}
