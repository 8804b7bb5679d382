"""``router`` and ``worker``: one process each, from the same YAML. ``up``, containers and Ray start nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from twinpool.cli.common import ConfigFile, SetOptions, loaded, log_to_stderr, reporting
from twinpool.config import ClusterConfig, split_address
from twinpool.deploy.local import write_atomically
from twinpool.deploy.process import die_with
from twinpool.errors import ConfigError

ParentOption = Annotated[int, typer.Option("--parent", hidden=True, help="End when this process does.")]


class RoleName(StrEnum):
    """Pools a worker starts in."""

    prefill = "prefill"
    decode = "decode"
    both = "both"


def router(
    config_file: ConfigFile = None,
    sets: SetOptions = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON of addresses, written once a request went through both pools.")
    ] = None,
    addresses_file: Annotated[
        Path | None, typer.Option(help="The same with the address for workers, written once all ports are open.")
    ] = None,
    parent: ParentOption = 0,
) -> None:
    """Run one router. Workers dial link.listen; SIGTERM drains and exits."""
    with reporting():
        config = _prepare(config_file, sets, parent)
        from twinpool.router import main  # here, so that other commands need not load it

        public: dict[str, str] = {}

        def started(addresses: main.RouterAddresses) -> None:
            public.update(asdict(addresses))
            _write(addresses_file, public)
            del public["workers"]

        def ready() -> None:
            _write(ready_file, public)

        token = config.link.token
        _run(lambda stop: main.serve(config, token=token, stop=stop, started=started, ready=ready))


def worker(
    role: Annotated[RoleName, typer.Option(help="Pool it starts in.")],
    join: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the router listens for workers.")],
    name: Annotated[str, typer.Option(help="Unlike that of any other worker; empty: role, host, process id.")] = "",
    config_file: ConfigFile = None,
    sets: SetOptions = None,
    parent: ParentOption = 0,
) -> None:
    """Run one worker. SIGTERM finishes what runs there and exits."""
    with reporting():
        try:
            split_address(join)
        except ValueError as error:
            raise ConfigError(f"--join {join}: {error}") from None
        config = _prepare(config_file, sets, parent)
        from twinpool.workers import (
            main,  # here, because it loads torch; before signals are handled, so it can be ended
        )

        own = name or f"{role.value}-{socket.gethostname()}-{os.getpid()}"
        token = config.link.token
        _run(lambda stop: main.serve(config, role=role.value, name=own, join=join, token=token, stop=stop))


def _prepare(config_file: Path | None, sets: list[str] | None, parent: int) -> ClusterConfig:
    if parent:
        die_with(parent)
    config = loaded(config_file, sets).config
    log_to_stderr(config.log_level)
    return config


def _run(serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
    async def until_told() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await serve(stop)

    uvloop.run(until_told())


def _write(file: Path | None, addresses: dict[str, str]) -> None:
    if file is not None:
        write_atomically(file, json.dumps(addresses) + "\n")
