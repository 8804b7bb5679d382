"""A process that holds a pool of known bytes on the GPU and serves it; see tests/workers/kv_holder.py."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch

from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import BlockLayout
from twinpool.workers.transfer.pool import DevicePool
from twinpool.workers.transfer.service import KVService, TransferConfig

BLOCKS, LAYOUT = 64, BlockLayout(lines=8, kv_heads=4, line_bytes=4096)


def contents(seed: int) -> torch.Tensor:
    """What a holder's pool is filled with."""
    shape = (BLOCKS, LAYOUT.block_bytes(LAYOUT.kv_heads))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make_pool(first: int = 0, end: int = LAYOUT.kv_heads, device: str = "cuda:0") -> HeadPool:
    """An empty pool that holds these heads."""
    held = range(first, end)
    return HeadPool(DevicePool(BLOCKS, LAYOUT.block_bytes(len(held)), device), LAYOUT, held, held)


class CudaHolder:
    """The process; killed on exit. ``peer``, ``sums`` and ``data`` are what a test needs."""

    def __init__(self, *backends: str, seed: int = 1, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, __file__, json.dumps({"backends": backends, "seed": seed})]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **(environment or {})}
        )
        assert self._process.stdout is not None
        said: dict[str, Any] = json.loads(self._process.stdout.readline())
        secret = bytes.fromhex(said["secret"])
        self.peer = Peer("holder", seed, secret, said["addresses"], (0, LAYOUT.kv_heads))
        self.sums: list[int] = said["sums"]
        self.data = contents(seed)

    def kill(self) -> None:
        """Returns when it is gone. Idempotent."""
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


async def _serve(backends: list[str], seed: int) -> None:
    pool = make_pool()
    pool.memory.copy_(contents(seed))
    service = KVService(pool, TransferConfig(backends=tuple(backends)), "holder", seed)
    await service.start()
    said = {"secret": service.secret.hex(), "addresses": service.addresses, "sums": pool.checksums(range(BLOCKS))}
    print(json.dumps(said), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until whoever started us is gone
    await service.close()


if __name__ == "__main__":
    asyncio.run(_serve(**json.loads(sys.argv[1])))
