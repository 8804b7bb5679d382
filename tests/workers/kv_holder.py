"""Processes that hold a pool of known bytes and serve it, to be pulled from, stopped and killed by tests.

Importing torch takes seconds, so one child imports it, and forks a holder for each line on its input (see ``_main``).
"""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import BlockLayout
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.transfer.service import KVService, TransferConfig
from twinpool.workers.transfer.share import SHARES, Mapped

LINES, HEADS = 4, 4  # of blocks that are held by heads


def by_heads(pool: HostPool, first: int = 0, end: int = HEADS) -> HeadPool:
    """A pool as ``cuda_ipc`` takes it on a host: by heads, of which it holds some."""
    held = range(first, end)
    return HeadPool(pool, BlockLayout(LINES, HEADS, pool.block_bytes // (LINES * len(held))), held, held)


class MemfdShare:
    """Implements :class:`twinpool.workers.transfer.share.Share` for pools on a host: a handle names a memfd.

    Like CUDA's, it is opened by another process without its owner's help, and good for nothing once that is gone.
    """

    def __init__(self, *pools: HostPool) -> None:
        self._fds = {pool.data.data_ptr(): pool.fd for pool in pools}
        self.mapped = 0  # and not closed

    def export(self, memory: torch.Tensor) -> bytes:
        """See ``Share``."""
        path = f"/proc/{os.getpid()}/fd/{self._fds[memory.data_ptr()]}"
        return f"{path} {os.stat(path).st_ino}".encode()  # noqa: PTH116 - of what it leads to

    def open(self, said: bytes, size: int, device: torch.device) -> Mapped:
        """See ``Share``."""
        path, _, inode = said.decode().partition(" ")
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TransferError(f"a handle that leads nowhere: {error.strerror}", reason="REFUSED") from error
        try:
            if os.fstat(fd).st_ino != int(inode):
                raise TransferError("a handle of something else", reason="REFUSED")
            mapping = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        finally:
            os.close(fd)
        self.mapped += 1
        return Mapped(torch.frombuffer(mapping, dtype=torch.uint8), self._close)

    def _close(self) -> None:
        self.mapped -= 1


def contents(blocks: int, block_bytes: int, seed: int) -> torch.Tensor:
    """What a holder's pool is filled with: uint8 [blocks, block_bytes], no byte zero, no two blocks (of 255) equal."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 256, (block_bytes,), dtype=torch.uint8, generator=generator)
    return (first + torch.arange(blocks, dtype=torch.uint8).unsqueeze(1)).clamp(min=1)


class Holder:
    """A holder process; ``peer`` is what a receiver needs, ``sums`` the checksum of each block, ``data`` its bytes."""

    def __init__(self, told: dict[str, Any], said: dict[str, Any]) -> None:
        self.peer = Peer("holder", told["epoch"], bytes.fromhex(said["secret"]), said["addresses"])
        self.sums: list[int] = said["sums"]
        self.data = contents(told["blocks"], told["block_bytes"], told["seed"])
        self._pid: int | None = said["pid"]

    def by(self, *backends: str) -> Peer:
        """The peer, reachable by these backends only."""
        return self.peer._replace(addresses={name: self.peer.addresses[name] for name in backends})

    def signal(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        assert self._pid is not None
        os.kill(self._pid, number)

    def kill(self) -> None:
        """End the process as the OOM killer would; returns when it is gone. Idempotent."""
        while self._pid is not None:
            try:
                self.signal(signal.SIGKILL)
                time.sleep(0.001)
            except ProcessLookupError:
                self._pid = None


class Holders:
    """Starts holders; kills them all on exit."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._started: list[Holder] = []

    def start(self, blocks: int, block_bytes: int, backends: Sequence[str], epoch: int = 1, seed: int = 1) -> Holder:
        """A new holder, ready to be pulled from."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {"blocks": blocks, "block_bytes": block_bytes, "backends": backends, "epoch": epoch, "seed": seed}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        self._started.append(Holder(told, json.loads(self._process.stdout.readline())))
        return self._started[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for holder in self._started:
            holder.kill()
        self._process.communicate()


async def _serve(blocks: int, block_bytes: int, backends: list[str], epoch: int, seed: int) -> None:
    pool = HostPool(blocks, block_bytes)
    pool.data.copy_(contents(blocks, block_bytes, seed))
    SHARES["cpu"] = MemfdShare(pool)
    seen = by_heads(pool) if "cuda_ipc" in backends else pool
    service = KVService(seen, TransferConfig(backends=tuple(backends)), "holder", epoch)
    await service.start()
    said = {"pid": os.getpid(), "secret": service.secret.hex(), "addresses": service.addresses}
    print(json.dumps(said | {"sums": seen.checksums(range(blocks))}), flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # whoever started us may be killed, too  # noqa: ASYNC110
        await asyncio.sleep(0.5)
    await service.close()


def _main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need no burying
    for line in sys.stdin:
        if os.fork() == 0:
            asyncio.run(_serve(**json.loads(line)))
            os._exit(0)


if __name__ == "__main__":
    _main()
