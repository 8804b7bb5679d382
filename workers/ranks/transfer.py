"""KV transfers of a worker of several ranks: each pulls its own heads, and the first verifies whole blocks.

A block's checksum is the sum of its heads' (transfer/heads.py), so the first rank adds up what the ranks found and
compares it with what the sender announced. Replicas of a head must be equal to each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from twinpool.kernels.reference import MASK_64
from twinpool.workers.ranks.crew import Crew
from twinpool.workers.ranks.kv import RankKv, RankPulled, join_addresses
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.layout import held_heads, originals


class RankedTransfer:
    """Implements :class:`~twinpool.workers.transfer.base.KVTransfer` over all ranks, and sums their blocks."""

    def __init__(self, own: RankKv, crew: Crew | None, kv_heads: int, secret: bytes) -> None:
        """``crew``: the other ranks; None where there is one rank, but other workers of the cell have more."""
        self._own, self._crew = own, crew
        self._others = crew.others if crew is not None else range(0)
        ranks = 1 + len(self._others)
        held = [held_heads(kv_heads, rank, ranks) for rank in range(ranks)]
        self._originals = originals(kv_heads, ranks)
        self._original_of = [held.index(heads) for heads in held]
        self.secret = secret
        self.addresses: dict[str, str] = {}

    async def start(self) -> None:
        """Listen; ``addresses`` is filled when it returns. Raises ConfigError when an address cannot be had."""
        own = await self._own.start()
        others = self._crew.addresses if self._crew is not None else []
        self.addresses = join_addresses([own, *others])

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Sums of whole blocks. Raises EngineError when a rank is gone."""
        if self._crew is None:
            return self._own.checksums(blocks)
        asked = self._crew.ask_sums(blocks, self._originals[1:])
        own = self._own.checksums(blocks)  # while the others sum theirs
        return _added([own, *self._crew.sums(asked)])

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int], timeout_s: float
    ) -> Pulled:
        """See ``KVTransfer``."""
        pulls = [self._own.pull(peer, source, target, timeout_s)]
        if self._crew is not None:
            pulls += [self._crew.pull(rank, peer, source, target, timeout_s) for rank in self._others]
        parts: list[RankPulled] = []
        for outcome in await asyncio.gather(*pulls, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome
            parts.append(outcome)
        found = _added([parts[rank].sums for rank in self._originals])
        bad = {i for i, (have, said) in enumerate(zip(found, sums, strict=True)) if have != said}
        for rank, part in enumerate(parts):
            original = parts[self._original_of[rank]].sums
            bad |= {i for i, (one, other) in enumerate(zip(part.sums, original, strict=True)) if one != other}
        moved, seconds = sum(part.bytes for part in parts), max(part.seconds for part in parts)
        return Pulled(parts[0].backend, moved, seconds, tuple(sorted(bad)), tuple(found))

    def drop(self, worker: str) -> None:
        """See ``KVTransfer``."""
        self._own.drop(worker)
        if self._crew is not None:
            self._crew.drop(worker)

    async def close(self) -> None:
        """Stop serving the first rank's heads; the others stop with their processes. Idempotent."""
        await self._own.close()


def _added(parts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) & MASK_64 for column in zip(*parts, strict=True)]
