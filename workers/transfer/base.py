"""The seam for KV bytes: copy blocks of a peer's pool into ours, and verify each on arrival.

Every transfer is a *pull* by the receiver, whatever moves the bytes. Two workers keep one authenticated *KV channel*
per directed pair (a Unix or TCP connection dialled by the receiver): shared memory and CUDA IPC hand their handle over
it once and copy one-sided ever after; TCP sends the bytes through it; collectives (gloo, NCCL) use it to rendezvous and
to post both sides in one order. A dead peer is therefore seen at once, by its closed channel, on every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

WHOLE = (0, 0)


class Peer(NamedTuple):
    """Who holds the blocks: a worker's one incarnation and the ways to reach its pool."""

    worker: str
    epoch: int
    secret: bytes  # proves to the peer that the router sent us
    addresses: dict[str, str]  # backend name -> address, e.g. {"shm": "/run/.../kv.sock", "tcp": "127.0.0.1:40123"}
    heads: tuple[int, int] = WHOLE  # first and end of the KV heads that are wanted of it; WHOLE: blocks as they are


class Pulled(NamedTuple):
    """What one pull did."""

    backend: str
    bytes: int
    seconds: float
    bad: tuple[int, ...]  # offsets into ``source`` of blocks whose checksum differs; empty: all verified
    found: tuple[int, ...] = ()  # the checksums of what arrived


class BlockPool(Protocol):
    """A worker's KV memory as transfer code sees it: ``data`` is uint8 [blocks, block_bytes], contiguous."""

    data: torch.Tensor

    def checksum(self, block: int) -> int:
        """64-bit sum of one block's bytes (xxh3-64 on CPUs)."""
        ...


class KVTransfer(Protocol):
    """All backends of one worker behind one door; owns a thread, the listening sockets and the connections."""

    addresses: dict[str, str]  # what others need to reach us: goes into Hello
    secret: bytes  # 32 random bytes of this incarnation: goes into Hello, given by the router to whoever may pull

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int], timeout_s: float
    ) -> Pulled:
        """Copy the peer's blocks ``source`` into ours ``target`` and compare each with ``sums``.

        Pulls from one peer run in the order of the calls; pulls from several peers do not wait for each other. Raises
        ``TransferError`` when no backend that both ends have worked, the peer died or the time ran out; then nothing
        may be assumed of the target blocks. A cancelled pull is finished or dropped before its target is used again:
        ``await`` returns only then.
        """
        ...

    def drop(self, worker: str) -> None:
        """Forget a peer that is gone: closes its channels, fails its pulls. Idempotent."""
        ...

    async def close(self) -> None:
        """Stop serving, close everything. Idempotent."""
        ...
