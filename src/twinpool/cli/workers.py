"""``twinpool drain`` and ``twinpool role``: take a worker out, or put it into another pool, while requests run."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Literal

import typer

from twinpool.cli.common import Address, ConfigFile, SetOptions, loaded, reporting
from twinpool.client import AsyncAdminClient
from twinpool.deploy.local import dialable
from twinpool.errors import DeadlineExceeded
from twinpool.proto.twinpool.v1.admin_pb2 import WorkerStatus

POLL_S = 0.2
ROLES = {"prefill": ["prefill"], "decode": ["decode"], "both": ["prefill", "decode"]}
Name = Annotated[str, typer.Argument(metavar="WORKER", help="As `twinpool status` names it.")]


def drain(
    worker: Name,
    address: Address = None,
    config_file: ConfigFile = None,
    sets: SetOptions = None,
    timeout: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for it to leave; 0: do not wait.")] = 600.0,
) -> None:
    """Take a worker out: nothing new goes there, what decodes there goes on elsewhere, then it leaves."""
    with reporting():
        target = address or dialable(loaded(config_file, sets).config.edge.admin)
        asyncio.run(_drain(target, worker, timeout))


def role(
    worker: Name,
    pool: Annotated[Literal["prefill", "decode", "both"], typer.Argument(help="Where it is to work.")],
    address: Address = None,
    config_file: ConfigFile = None,
    sets: SetOptions = None,
) -> None:
    """Put a worker into another pool: prompts it has go on there, what decodes there goes on elsewhere."""
    with reporting():
        target = address or dialable(loaded(config_file, sets).config.edge.admin)
        asyncio.run(_set_role(target, worker, pool))


async def _set_role(address: str, worker: str, pool: str) -> None:
    async with AsyncAdminClient(address) as client:
        await client.set_role(worker, ROLES[pool])
    typer.echo(f"{worker}: {pool}")


async def _drain(address: str, worker: str, timeout_s: float) -> None:
    async with AsyncAdminClient(address) as client:
        before = _of(list((await client.status()).workers), worker)
        await client.drain(worker)
        give_up, told = time.monotonic() + timeout_s, ""
        while timeout_s > 0.0:
            left = _of(list((await client.status()).workers), worker)
            if left is None or before is None or left.pid != before.pid:
                typer.echo(f"{worker} has left")
                return
            state = f"{worker}: {left.running} decoding, {left.waiting} with prompts"
            if state != told:
                typer.echo(state)
                told = state
            if time.monotonic() > give_up:
                raise DeadlineExceeded(f"after {timeout_s:g} s {state}; it leaves when these have ended")
            await asyncio.sleep(POLL_S)
    typer.echo(f"{worker} drains")


def _of(workers: list[WorkerStatus], name: str) -> WorkerStatus | None:
    return next((each for each in workers if each.worker == name), None)
