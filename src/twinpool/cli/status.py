"""``status``: the workers of a router, its queue and its counters."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated

import typer
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from twinpool.cli.common import Address, ConfigFile, SetOptions, loaded, reporting
from twinpool.client import AsyncAdminClient
from twinpool.deploy.local import dialable
from twinpool.proto.twinpool.v1.admin_pb2 import Status

PIPE_WIDTH = 120
_COUNTERS = ("queued", "active", "completed", "refused", "cancelled", "resumed")


def status(
    address: Address = None,
    config_file: ConfigFile = None,
    sets: SetOptions = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show workers, queue and counters (--address is that of edge.admin)."""
    with reporting():
        target = address or dialable(loaded(config_file, sets).config.edge.admin)
        answer = asyncio.run(_ask(target))
        if as_json:
            typer.echo(json.dumps(plain(answer) | {"workers": [plain(worker) for worker in answer.workers]}))
        else:
            _print(answer)


def plain(message: Message) -> dict[str, object]:
    """A flat protobuf message as JSON values, defaults included; messages inside it are left out."""
    fields = [field for field in message.DESCRIPTOR.fields if field.message_type is None]
    values = {field.name: getattr(message, field.name) for field in fields}
    return {name: value if isinstance(value, str | int | float) else list(value) for name, value in values.items()}


async def _ask(address: str) -> Status:
    async with AsyncAdminClient(address) as client:
        return await client.status()


def _print(answer: Status) -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    state = "ready" if answer.ready else "not ready"
    console.print(f"router {answer.router}: {state}, model {answer.model or 'not known yet'}")
    console.print(", ".join(f"{name} {getattr(answer, name)}" for name in _COUNTERS))
    table = Table("worker", "pools", "state", box=None, padding=(0, 1, 0, 0))
    for title in ("free/blocks", "cached", "leaked", "run+wait", "step ms", "seen ms", "pid"):
        table.add_column(title, justify="right")
    for worker in answer.workers:
        memory = (f"{worker.free_blocks}/{worker.blocks}", str(worker.cached_blocks), str(worker.leaked_blocks))
        work = (f"{worker.running}+{worker.waiting}", f"{worker.step_ms:.1f}", f"{worker.last_seen_ms:.0f}")
        table.add_row(worker.worker, ",".join(worker.roles), worker.state, *memory, *work, str(worker.pid))
    console.print(table)
