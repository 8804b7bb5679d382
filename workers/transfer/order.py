"""One pull as the thread that performs it sees it, and what performs it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from twinpool.errors import TransferError
from twinpool.workers.transfer.channel import Channel
from twinpool.workers.transfer.pool import KvPool
from twinpool.workers.transfer.runs import Run, coalesce


class Order:
    """Which blocks to bring where by when, and the checksums of what arrived.

    ``sums`` is None where the caller verifies: it has only parts of the blocks here.
    Raises ValueError for lists of different lengths and for targets that are not in our pool: a fault of the caller.
    """

    def __init__(
        self, pool: KvPool, source: Sequence[int], target: Sequence[int], sums: Sequence[int] | None, timeout_s: float
    ) -> None:
        if not len(source) == len(target) == len(source if sums is None else sums):
            raise ValueError(f"{len(source)} source blocks, {len(target)} targets and {len(sums or ())} checksums")
        if any(not 0 <= block < pool.blocks for block in target):
            raise ValueError(f"a target is not one of the {pool.blocks} blocks of this pool")
        self.pool, self.source, self.target, self.sums = pool, source, target, sums
        self.deadline = time.monotonic() + timeout_s
        self.found = [0] * len(source)  # checksums, by offset into source
        self.abandoned = False  # set by another thread: nobody wants the result

    def runs(self, longest_bytes: int) -> list[Run]:
        """The order's blocks as runs of at most that many bytes (or of one block)."""
        return coalesce(self.source, self.target, max(1, longest_bytes // self.pool.block_bytes))

    def check_time(self) -> None:
        """Raises ``TransferError`` past the deadline."""
        if time.monotonic() >= self.deadline:
            raise TransferError("the time for this KV transfer ran out", reason="TIMEOUT")

    def check_source(self, blocks: int) -> None:
        """Raises ``TransferError`` when a source block is not one of the peer's ``blocks``."""
        if any(not 0 <= block < blocks for block in self.source):
            raise TransferError(f"a KV block outside the peer's {blocks} was asked for", reason="BAD_BLOCK")

    def verify(self, offset: int, blocks: Sequence[int]) -> None:
        """Sum blocks that have just arrived (best while they are in the cache).

        ``blocks`` is ``target[offset : offset + len(blocks)]``.
        """
        self.found[offset : offset + len(blocks)] = self.pool.checksums(blocks)

    @property
    def bad(self) -> tuple[int, ...]:
        """Offsets into ``source`` of blocks whose checksum differs."""
        if self.sums is None:
            return ()
        return tuple(i for i, (found, said) in enumerate(zip(self.found, self.sums, strict=True)) if found != said)


class Source(Protocol):
    """An open way to one peer's blocks; used by one thread."""

    channel: Channel

    def fetch(self, order: Order) -> None:
        """Bring and verify the blocks. After a ``TransferError`` the source is good for nothing but :meth:`close`.

        It may return early, with blocks missing, when the order is abandoned.
        """
        ...

    def close(self) -> None:
        """Let go of the peer's memory and the channel. Idempotent."""
        ...
