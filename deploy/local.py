"""One host's cluster: ``twinpool router`` and ``twinpool worker`` as real processes, supervised. What ``up`` runs.

Start: the router; then, with the ports it got, all workers; then a request through both pools. Stop: the router drains
first, because what it still streams needs the workers. The configuration, link token included, travels in a file that
only its owner can read, never on a command line.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from twinpool.config import ClusterConfig, split_address
from twinpool.config_load import to_yaml
from twinpool.deploy.devices import deal, visible_gpus, worker_names
from twinpool.deploy.process import Child, Log, RestartPolicy
from twinpool.deploy.readiness import until_ready
from twinpool.errors import ConfigError, Unavailable
from twinpool.proto.twinpool.v1.inference_pb2 import Finished

GRACE_S = 5.0  # beyond draining: to close ports and leave
POLL_S = 0.02

T = TypeVar("T")


class Addresses(NamedTuple):
    """HOST:PORT of what a cluster listens on; ``workers`` is what workers dial."""

    inference: str
    vllm: str
    admin: str
    metrics: str
    workers: str

    def public(self) -> dict[str, str]:
        """What a ready file holds."""
        return {name: address for name, address in self._asdict().items() if name != "workers"}


class LocalCluster:
    """Use it as an async context manager: on leaving, however that comes, no process is left."""

    def __init__(self, config: ClusterConfig, log: Log, command: tuple[str, ...] = ()) -> None:
        if not worker_names(config):
            raise ConfigError("pools: no workers at all; give pools.prefill.workers and pools.decode.workers")
        self._devices = deal(config, visible_gpus)
        self._config = _with_token(config)
        self._log = log
        self._command = command or (sys.executable, "-P", "-m", "twinpool.cli")
        self._folder = Path()
        self._children: list[Child] = []
        self._runs: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="twinpool-"))
        self._write_config()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.kill()
        await asyncio.gather(*self._runs, return_exceptions=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def processes(self) -> dict[str, int]:
        """Process id of each running process, by name."""
        return {child.name: child.pid for child in self._children if child.pid is not None}

    async def start(self) -> Addresses:
        """Start everything; returns once the router listens. Raises ConfigError, or Unavailable when a process dies."""
        self._supervise("router", ("router", "--addresses-file", str(self._addresses_file)))
        addresses = await self._unless_lost(self._router_listens())
        self._config = _with_addresses(self._config, addresses)  # a router that is restarted keeps its ports
        self._write_config()
        for name, role in worker_names(self._config).items():
            device = ("--set", f"worker.device={self._devices[name]}") if self._devices else ()
            join = ("--role", role, "--name", name, "--join", dialable(addresses.workers))
            self._supervise(name, ("worker", *join, *device))
        return addresses

    async def ready(self, addresses: Addresses) -> Finished:
        """Wait until a request went through both pools. Raises ConfigError or Unavailable."""
        limit_s = self._config.up.ready_timeout_ms / 1000
        proof = until_ready(
            dialable(addresses.inference), dialable(addresses.admin), self._config, lambda line: self._log("up", line)
        )
        try:
            return await self._unless_lost(asyncio.wait_for(proof, limit_s))
        except TimeoutError:
            raise Unavailable(f"not ready after {limit_s:g} s (up.ready_timeout_ms)", reason="NOT_READY") from None

    async def watch(self) -> None:
        """Runs until a process is given up, which raises ConfigError or Unavailable."""
        await self._unless_lost(asyncio.Event().wait())

    async def stop(self) -> None:
        """Drain the router, then end the workers."""
        router = [child for child in self._children if child.name == "router"]
        workers = [child for child in self._children if child.name != "router"]
        for group, grace_s in ((router, self._config.edge.drain_ms / 1000 + GRACE_S), (workers, GRACE_S)):
            await asyncio.gather(*(child.stop(grace_s) for child in group))

    def kill(self) -> None:
        """End every process now."""
        for child in self._children:
            child.kill()

    @property
    def _addresses_file(self) -> Path:
        return self._folder / "addresses.json"

    def _write_config(self) -> None:
        write_atomically(self._folder / "cluster.yaml", to_yaml(self._config))

    def _supervise(self, name: str, arguments: tuple[str, ...]) -> None:
        up = self._config.up
        policy = RestartPolicy(up.restart_first_ms / 1000, up.restart_max_ms / 1000, up.max_restarts)
        shared = ("-c", str(self._folder / "cluster.yaml"), "--parent", str(os.getpid()))
        child = Child(name, (*self._command, *arguments, *shared), policy, self._log)
        self._children.append(child)
        self._runs.append(asyncio.create_task(child.run(), name=f"supervise {name}"))

    async def _router_listens(self) -> Addresses:
        while True:
            with contextlib.suppress(FileNotFoundError):
                return Addresses(**json.loads(self._addresses_file.read_text(encoding="utf-8")))
            await asyncio.sleep(POLL_S)

    async def _unless_lost(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, or the error of the first process that is given up meanwhile."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, *self._runs}, return_when=asyncio.FIRST_COMPLETED)
            for run in self._runs:
                if run.done():
                    run.result()
            return await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def dialable(address: str) -> str:
    """Where a process of this host reaches a listener: loopback for one that listens on all interfaces."""
    host, port = split_address(address)
    if host in ("0.0.0.0", "::"):
        return f"127.0.0.1:{port}" if host == "0.0.0.0" else f"[::1]:{port}"
    return address


def write_atomically(path: Path, text: str) -> None:
    """A file that is either absent or whole, readable by its owner only."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _with_token(config: ClusterConfig) -> ClusterConfig:
    if config.link.token:
        return config
    return config.model_copy(update={"link": config.link.model_copy(update={"token": secrets.token_hex(16)})})


def _with_addresses(config: ClusterConfig, real: Addresses) -> ClusterConfig:
    vllm = config.edge.vllm.model_copy(update={"listen": real.vllm})
    ports = {"inference": real.inference, "vllm": vllm, "admin": real.admin, "metrics": real.metrics}
    edge = config.edge.model_copy(update=ports)
    link = config.link.model_copy(update={"listen": real.workers})
    return config.model_copy(update={"edge": edge, "link": link})
