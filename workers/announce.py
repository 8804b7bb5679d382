"""What a worker says of blocks that others may copy: where they are, and their checksums."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from twinpool.blockhash import token_bytes
from twinpool.proto import frames
from twinpool.workers.blocks import BlockPool
from twinpool.workers.scheduler import Scheduler


class Sums(Protocol):
    """Checksums of pool blocks."""

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """64-bit sum of each block's bytes."""
        ...


def blocks_ready(attempt: int, first: int, blocks: list[int], pool: BlockPool, sums: Sums) -> frames.BlocksReady:
    """Announces ``blocks``, of which the last may be partly filled. Sums of those that are final are kept."""
    known = {block: value for block in blocks if (value := pool.sums[block]) is not None}
    unknown = [block for block in blocks if block not in known]
    for block, value in zip(unknown, sums.checksums(unknown) if unknown else (), strict=True):
        known[block] = value
        if pool.sealed(block):  # else tokens may still be added to it
            pool.sums[block] = value
    column = array("Q", [known[block] for block in blocks])
    places = token_bytes(array("I", blocks))
    return frames.BlocksReady(attempt=attempt, first=first, blocks=places, sums=column.tobytes())


def lend(frame: frames.Lend, scheduler: Scheduler, sums: Sums) -> frames.BlocksReady:
    """Holds the leading blocks of these hashes that are cached, for another worker to pull; the answer says which.

    With none of them nothing is held. Raises ValueError where the number is in use here.
    """
    hashes = array("Q")
    hashes.frombytes(frame.hashes)
    count = scheduler.pool.match(hashes)
    blocks: list[int] = []
    if count:
        scheduler.reserve(frame.attempt, hashes[:count], count)
        holding = scheduler.holding(frame.attempt)
        assert holding is not None, f"loan {frame.attempt} holds cached blocks, for which there is always room"
        blocks = holding.table
    return blocks_ready(frame.attempt, 0, blocks, scheduler.pool, sums)
