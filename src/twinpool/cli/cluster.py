"""``up``: router and workers of one host in the foreground, until a signal."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from twinpool.cli.common import FAILED, ConfigFile, SetOptions, loaded, reporting
from twinpool.config import ClusterConfig
from twinpool.config_load import Override
from twinpool.deploy.local import Addresses, LocalCluster, write_atomically
from twinpool.proto.twinpool.v1.inference_pb2 import Finished

_COLOURS = {"router": 36, "prefill": 33, "decode": 32, "both": 35, "up": 1}
_NAME_WIDTH = 10


class DType(StrEnum):
    """Of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def up(
    config_file: ConfigFile = None,
    prefill: Annotated[int | None, typer.Option(help="Prefill workers (pools.prefill.workers).")] = None,
    decode: Annotated[int | None, typer.Option(help="Decode workers (pools.decode.workers).")] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of weights, and KV without model.kv_dtype (model.dtype).")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder or GGUF file (model.path).")] = None,
    sets: SetOptions = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="JSON of addresses, written once a request went through both pools.")
    ] = None,
) -> None:
    """Run a cluster on this host: a router and its workers, restarted when they die.

    SIGTERM or Ctrl-C drains and exits 0; a second one ends everything at once.
    """
    with reporting():
        config = loaded(config_file, sets, flags(prefill, decode, dtype, model)).config
        try:
            _forget(ready_file)
            if asyncio.run(_up(config, ready_file)):
                raise typer.Exit(FAILED)
        finally:
            _forget(ready_file)


def flags(prefill: int | None, decode: int | None, dtype: DType | None, model: Path | None) -> tuple[Override, ...]:
    """The flags that are short for a key of the YAML."""
    given = (
        Override("pools.prefill.workers", prefill, "--prefill"),
        Override("pools.decode.workers", decode, "--decode"),
        Override("model.dtype", None if dtype is None else dtype.value, "--dtype"),
        Override("model.path", None if model is None else str(model), "--model"),
    )
    return tuple(flag for flag in given if flag.value is not None)


def print_log(process: str, line: str) -> None:
    """One line of a process on stderr, with its name in front."""
    name = f"{process:<{_NAME_WIDTH}}"
    if sys.stderr.isatty():
        name = f"\033[{_COLOURS.get(process.partition('-')[0], 0)}m{name}\033[0m"
    print(f"{name} | {line}", file=sys.stderr, flush=True)


def passed(finished: Finished) -> str:
    """The proof of readiness in words."""
    route = finished.route
    if route.path != "split":
        return f"a request passed through {route.decode_worker or route.prefill_worker}"
    moved = f"{route.kv_bytes:,} bytes of KV over {route.backend}"
    return f"a request passed through {route.prefill_worker} and {route.decode_worker}, {moved}"


class _Signals:
    """The first signal asks to drain, the second kills."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.first = asyncio.Event()
        self.second = False
        self._cluster = cluster
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._got)

    def _got(self) -> None:
        if self.first.is_set():
            self.second = True
            self._cluster.kill()
        self.first.set()


async def _up(config: ClusterConfig, ready_file: Path | None) -> bool:
    """Whether it was cut short by a second signal. Raises ConfigError or Unavailable."""
    async with LocalCluster(config, print_log) as cluster:
        signals = _Signals(cluster)
        serving = asyncio.create_task(_serve(cluster, ready_file))
        told = asyncio.create_task(signals.first.wait())
        try:
            await asyncio.wait({serving, told}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            serving.cancel()
            print_log("up", "draining; once more to end at once")
            await cluster.stop()
        finally:
            serving.cancel()
            told.cancel()
        return signals.second


async def _serve(cluster: LocalCluster, ready_file: Path | None) -> None:
    began = time.monotonic()
    addresses = await cluster.start()
    for name, address in addresses.public().items():
        print_log("up", f"{name} on {address}")
    finished = await cluster.ready(addresses)
    print_log("up", f"ready after {time.monotonic() - began:.1f} s: {passed(finished)}")
    _tell(addresses, ready_file)
    await cluster.watch()


def _forget(ready_file: Path | None) -> None:
    """Nobody must take the addresses of a cluster that is gone."""
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)


def _tell(addresses: Addresses, ready_file: Path | None) -> None:
    if ready_file is not None:
        write_atomically(ready_file, json.dumps(addresses.public()) + "\n")
