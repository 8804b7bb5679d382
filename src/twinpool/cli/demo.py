"""``demo``: a cluster of two workers on this CPU, one streamed answer, and what happened to the request on its way."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twinpool.cli.cluster import passed, print_log
from twinpool.cli.common import SetOptions, loaded, reporting
from twinpool.client import AsyncClient, ChatMessage, request
from twinpool.config_load import Override
from twinpool.deploy.local import LocalCluster
from twinpool.deploy.process import ChildLost, ChildRefused
from twinpool.proto.twinpool.v1.inference_pb2 import Finished, Tokens

MAX_TOKENS = 80
CHAT = (
    ChatMessage(
        "user",
        "Write a short story of five sentences about two lighthouse keepers who live on opposite shores, one who reads "
        "the ships' signals and one who writes the replies, and about the small boat that carries the notes between "
        "them every night.",
    ),
)
_DEMO = {
    "edge.inference": "127.0.0.1:0",
    "edge.vllm.listen": "127.0.0.1:0",
    "edge.admin": "127.0.0.1:0",
    "edge.metrics": "127.0.0.1:0",
    "scheduling.path": "split",
}


def demo(
    sets: SetOptions = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the log of each process.")] = False,
) -> None:
    """Start a prefill and a decode worker, stream one answer, show its route and its times, and stop."""
    with reporting():
        config = loaded(None, sets, tuple(Override(key, value, "demo") for key, value in _DEMO.items())).config
        console = Console(highlight=False)
        try:
            asyncio.run(_demo(LocalCluster(config, _log(console, verbose)), console))
        except (ChildLost, ChildRefused) as error:
            if not verbose:
                console.print("\n".join(error.tail), markup=False)
            raise


def _log(console: Console, verbose: bool) -> Callable[[str, str], None]:
    if verbose:
        return print_log
    return lambda process, line: console.print(f"  {line}", style="dim", markup=False) if process == "up" else None


async def _demo(cluster: LocalCluster, console: Console) -> None:
    began = time.monotonic()
    console.print("Starting a router, a prefill worker and a decode worker on this CPU ...")
    async with cluster:
        addresses = await cluster.start()
        console.print(f"  router listens on {addresses.inference}; workers load the model", style="dim")
        proof = await cluster.ready(addresses)
        console.print(f"Ready after {time.monotonic() - began:.1f} s: {passed(proof)}.\n", soft_wrap=True)
        console.print(f"[bold]> {CHAT[-1].content}[/bold]\n")
        finished = await _ask(addresses.inference, console)
        processes = cluster.processes
        console.print(_table(finished, processes))
        await cluster.stop()
    console.print(f"Drained and stopped after {time.monotonic() - began:.1f} s. Next: `twinpool up`.")


async def _ask(address: str, console: Console) -> Finished:
    finished = Finished()
    asked = request(messages=CHAT, max_tokens=MAX_TOKENS, temperature=0.0)
    async with AsyncClient(address) as client:
        async for event in client.generate(asked):
            if isinstance(event, Tokens):
                console.print(event.text, end="", markup=False, soft_wrap=True)
            elif isinstance(event, Finished):
                finished = event
    console.print("\n")
    return finished


def _table(end: Finished, processes: dict[str, int]) -> Table:
    route, usage, timing = end.route, end.usage, end.timing
    tokens = f"{usage.prompt_tokens} in the prompt ({usage.cached_tokens} cached), {usage.completion_tokens} written"
    table = Table(title="What happened", show_header=False, title_justify="left")
    rows = {
        "prefill worker": _process(route.prefill_worker, processes),
        "decode worker": _process(route.decode_worker, processes),
        "path": route.path,
        "KV moved": f"{route.kv_bytes:,} bytes over {route.backend or 'nothing'}",
        "tokens": tokens,
        "TTFT": f"{timing.ttft_ms:.1f} ms",
        "ITL": f"{timing.itl_ms:.1f} ms",
        "queue": f"{timing.queue_ms:.1f} ms",
        "reserve": f"{timing.reserve_ms:.1f} ms",
        "prefill": f"{timing.prefill_ms:.1f} ms ({timing.compute_ms:.1f} ms computing)",
        "transfer": f"{timing.transfer_ms:.1f} ms after the first token",
        "total": f"{timing.total_ms:.1f} ms",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _process(worker: str, processes: dict[str, int]) -> str:
    pid = processes.get(worker)
    return f"{worker} (process {pid})" if pid and pid != os.getpid() else worker or "none"
