"""Real processes of one cell on this host, as ``twinpool router`` and ``twinpool worker`` start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from tests.integration.client import Client, until

START_S = 90.0
STOP_S = 20.0
LOG_LINES = 25
TOKEN = "integration"
COMMAND = ("-m", "twinpool.cli")

EMULATED = {
    "worker.engine": "emulated",
    "worker.kv_memory_mib": 1,
    "worker.emulated.block_bytes": 256,
    "worker.emulated.profile": "zero",
    "link.heartbeat_ms": 100,
    "link.dead_after_ms": 3_000,
}
TORCH = {
    "worker.engine": "torch",
    "worker.kv_memory_mib": 512,
    "link.dead_after_ms": 20_000,
    "transfer.timeout_ms": 30_000,
    "scheduling.classes.realtime.max_queue_ms": 600_000,  # all prompts at once, on a machine that may be busy
}


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


class Process:
    """One process with a group and a log of its own."""

    def __init__(self, name: str, args: list[str], log: Path) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as out:
            self._popen = subprocess.Popen(
                [sys.executable, *COMMAND, *args, "--parent", str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Signal its whole group, if there is one."""
        if self.alive:
            os.killpg(self._popen.pid, number)

    def wait(self, wait_s: float = STOP_S) -> int:
        """Exit status."""
        return self._popen.wait(wait_s)

    def pause(self) -> None:
        """SIGSTOP: it hangs."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Gone for sure, whatever state it is in."""
        self.signal(signal.SIGKILL)
        self.wait()

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


class Cluster:
    """A router, ``prefill`` workers p0.., ``decode`` workers d0.., ``both`` workers b0...; a context manager."""

    def __init__(
        self, folder: Path, settings: Mapping[str, object], *, prefill: int = 1, decode: int = 1, both: int = 0
    ) -> None:
        inference, vllm, admin, metrics, link = (f"127.0.0.1:{port}" for port in free_ports(5))
        self.link = link
        self.folder = folder
        self.settings: dict[str, object] = {
            **settings, "link.token": TOKEN, "link.listen": link, "edge.inference": inference,
            "edge.vllm.listen": vllm, "edge.admin": admin, "edge.metrics": metrics,
        }  # fmt: skip
        self.client = Client(inference, admin)
        self.workers: dict[str, Process] = {}
        self.roles = {f"p{i}": "prefill" for i in range(prefill)} | {f"d{i}": "decode" for i in range(decode)}
        self.roles |= {f"b{i}": "both" for i in range(both)}
        self.router: Process | None = None

    def __enter__(self) -> Cluster:
        try:
            self.start_router()
            for name in self.roles:
                self.start_worker(name)
            self.wait_ready()
        except BaseException:
            self.close()
            print(self.report())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if kind is None:
            self.check_logs()

    # --- processes ----------

    def start_router(self) -> None:
        """The router, at the same addresses each time."""
        self.router = Process("router", ["router", *self._flags({})], self.folder / "router.log")

    def start_worker(self, name: str, **over: Any) -> Process:
        """A worker under the role of its name. ``over`` overrides settings (with "__" for ".")."""
        self.workers[name] = self.spawn_worker(name, name, self.roles[name], over)
        return self.workers[name]

    def spawn_worker(self, label: str, name: str, role: str, over: Mapping[str, object]) -> Process:
        """A worker that the cluster does not count as its own, but will kill."""
        args = ["worker", "--role", role, "--join", self.link, "--name", name]
        process = Process(label, [*args, *self._flags(over)], self.folder / f"{label}.log")
        self.workers[label] = process
        return process

    def spawn_router(self, label: str, over: Mapping[str, object], *flags: str) -> Process:
        """A router that the cluster does not count as its own, but will kill."""
        process = Process(label, ["router", *self._flags(over), *flags], self.folder / f"{label}.log")
        self.workers[label] = process
        return process

    def _flags(self, over: Mapping[str, object]) -> list[str]:
        settings = self.settings | {key.replace("__", "."): value for key, value in over.items()}
        return [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]

    def wait_ready(self) -> None:
        """All workers connected, and a real request has passed."""
        until(self._is_ready, "a ready cluster", START_S)

    def _is_ready(self) -> bool:
        for process in (self.router, *self.workers.values()):
            assert process is None or process.alive, f"{process.name} ended with {process.wait()}:\n{process.text()}"
        try:
            status = self.client.status()
        except grpc.RpcError:
            return False  # its port is not open yet
        return status.ready and {worker.worker for worker in status.workers} >= set(self.roles)

    def wait_worker(self, name: str, connected: bool = True) -> None:
        """Until the router knows the worker, or knows it no more."""
        until(lambda: (self.client.worker(name) is not None) == connected, f"{name} connected: {connected}", START_S)

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self.workers.pop(name).kill()

    def restart(self, name: str) -> None:
        """Start it again and wait until it is in."""
        self.wait_worker(name, connected=False)
        self.start_worker(name)
        self.wait_worker(name)

    def pause(self, name: str) -> None:
        """SIGSTOP: it hangs."""
        self.workers[name].pause()

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self.workers[name].resume()

    def restore(self) -> None:
        """Kill what is not the cluster's own, start what is missing, wait until all is as it was at first."""
        for name, process in list(self.workers.items()):
            process.resume()
            if name not in self.roles or not process.alive:
                process.kill()
                del self.workers[name]
        if self.router is None:
            self.start_router()
        for name in self.roles.keys() - self.workers.keys():
            self.start_worker(name)
        self.wait_ready()
        self.client.wait_idle()

    def kill_router(self) -> None:
        """SIGKILL."""
        assert self.router is not None
        self.router.kill()
        self.router = None

    def close(self) -> None:
        """Kill everything that is left."""
        self.client.close()
        for process in (self.router, *self.workers.values()):
            if process is not None:
                process.kill()

    # --- what it says ----------

    def check_logs(self) -> None:
        """No process wrote a traceback."""
        for log in sorted(self.folder.glob("*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            assert "Traceback" not in text, f"{log.name}:\n{text[text.index('Traceback') - 500 :][:4000]}"

    def report(self) -> str:
        """The ends of all logs."""
        logs = (
            (log.name, log.read_text(encoding="utf-8", errors="replace")) for log in sorted(self.folder.glob("*.log"))
        )
        return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-LOG_LINES:]) for name, text in logs)
