"""One rank's KV transfers: its heads of each block, from whichever ranks of another worker hold them.

A worker of several ranks says its addresses in one text for each backend, rank by rank with commas between; how many
there are tells how its heads are split (transfer/layout.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from twinpool.errors import TransferError
from twinpool.kernels.reference import MASK_64
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import reshard
from twinpool.workers.transfer.service import KVService, TransferConfig


class Identity(NamedTuple):
    """Of which worker this is a rank; the secret is shared by all of them."""

    worker: str
    epoch: int
    secret: bytes


class RankPulled(NamedTuple):
    """What one rank pulled."""

    backend: str
    bytes: int
    seconds: float
    sums: list[int]  # of our heads of each block


def join_addresses(ranks: Sequence[dict[str, str]]) -> dict[str, str]:
    """Addresses of a worker from those of its ranks."""
    return {backend: ",".join(rank[backend] for rank in ranks) for backend in ranks[0]}


def split_addresses(peer: Peer) -> list[dict[str, str]]:
    """Addresses of a worker's ranks. Raises TransferError where backends have different numbers of them."""
    columns = {backend: text.split(",") for backend, text in peer.addresses.items()}
    counts = {len(column) for column in columns.values()}
    if len(counts) != 1:
        raise TransferError(f"{peer.worker} has addresses of {sorted(counts)} ranks", reason="REFUSED")
    return [{backend: column[rank] for backend, column in columns.items()} for rank in range(counts.pop())]


class RankKv:
    """Serves one rank's pool and pulls into it. Owns the :class:`KVService` below."""

    def __init__(self, pool: HeadPool, rank: int, ranks: int, config: TransferConfig, identity: Identity) -> None:
        self._pool, self._rank, self._ranks = pool, rank, ranks
        self._service = KVService(pool, config, *identity)
        self._peers: dict[str, set[str]] = {}  # worker -> names of its ranks

    async def start(self) -> dict[str, str]:
        """Listen; the addresses. Raises ConfigError when they cannot be had."""
        await self._service.start()
        return self._service.addresses

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Sums of our heads of each block."""
        return self._pool.checksums(blocks)

    async def pull(self, peer: Peer, source: Sequence[int], target: Sequence[int], timeout_s: float) -> RankPulled:
        """Bring our heads of the peer's blocks ``source`` into our blocks ``target``; see ``KVTransfer.pull``."""
        ranks = split_addresses(peer)
        pulls = []
        for move in reshard(self._pool.layout.kv_heads, len(ranks), self._ranks):
            if move.target == self._rank:
                name = f"{peer.worker}/{move.source}"
                self._peers.setdefault(peer.worker, set()).add(name)
                heads = (move.heads.start, move.heads.stop)
                sender = Peer(name, peer.epoch, peer.secret, ranks[move.source], heads)
                pulls.append(self._service.pull(sender, source, target, None, timeout_s))
        return _together(await asyncio.gather(*pulls, return_exceptions=True))

    def drop(self, worker: str) -> None:
        """A peer is gone. Idempotent."""
        for name in self._peers.pop(worker, ()):
            self._service.drop(name)

    async def close(self) -> None:
        """Idempotent."""
        await self._service.close()


def _together(outcomes: Sequence[Pulled | BaseException]) -> RankPulled:
    """One outcome of pulls of disjoint heads. Raises the first error, once none of them writes any more."""
    pulled = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        pulled.append(outcome)
    sums = [sum(parts) & MASK_64 for parts in zip(*(part.found for part in pulled), strict=True)]
    seconds = max(part.seconds for part in pulled)
    return RankPulled(pulled[0].backend, sum(part.bytes for part in pulled), seconds, sums)
