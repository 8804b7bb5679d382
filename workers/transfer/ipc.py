"""CUDA IPC: the receiver maps the pool of a peer on the same host and copies blocks out of it with its own GPU.

As with shared memory on the host, the peer takes no part while blocks move, and its channel, a Unix socket that both
ends have proved the secret on, is what its handle goes over, once, and what tells of its end. One kernel reads all that
is asked for, heads or whole blocks, writes it where it belongs and sums it; :meth:`gather` is the one place where
something else could do that. The kernel reads what is mapped whoever lives: the sums say whether it was what was meant.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch

from twinpool.errors import TransferError
from twinpool.workers.transfer import moves
from twinpool.workers.transfer.channel import Channel, Geometry, close_fds
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.order import Order
from twinpool.workers.transfer.pool import DevicePool, KvPool
from twinpool.workers.transfer.share import MOST_SAID, SHARES, Share

PIECE_BYTES = 1 << 30  # copied before looking whether anybody still wants the rest

_SAYS = struct.Struct("<BH")  # whether it shares, and the length of the share or of the reason why not
_SHARED, _REFUSED = 0, 1


class IpcSource:
    """The receiver's end. Raises ``TransferError`` where the peer's memory cannot be mapped."""

    def __init__(self, channel: Channel, geometry: Geometry, fds: list[int], pool: KvPool) -> None:
        close_fds(fds)
        self.channel = channel
        self._pool = _shareable(pool)
        held = range(*geometry.held)
        self._cut = self._pool.cut_of(held) if isinstance(self._pool, HeadPool) else self._pool.cut
        self._blocks = geometry.blocks
        device = self._pool.memory.device
        self._mapped = _share_of(device).open(_receive(channel), geometry.blocks * geometry.block_bytes, device)
        self._rows: torch.Tensor | None = self._mapped.memory.view(geometry.blocks, geometry.block_bytes)

    def fetch(self, order: Order) -> None:
        """Copy and sum, by pieces."""
        peer = self._rows
        if peer is None:
            raise TransferError("the KV peer was dropped", reason="PEER_GONE")
        order.check_source(self._blocks)
        step = max(1, PIECE_BYTES // order.pool.block_bytes)
        for first in range(0, len(order.source), step):
            if order.abandoned:
                return
            order.check_time()
            some = slice(first, first + step)
            order.found[some] = self.gather(peer, order.source[some], order.target[some])

    def gather(self, peer: torch.Tensor, source: Sequence[int], target: Sequence[int]) -> list[int]:
        """Bring blocks and return their sums, when nothing writes to them any more."""
        return moves.gather(self._pool, peer, self._cut, source, target)

    def close(self) -> None:
        """Unmap and hang up. Idempotent."""
        if self._rows is not None:
            self._rows = None
            self._mapped.close()
        self.channel.close()


def serve_ipc(channel: Channel, pool: KvPool) -> None:
    """Holder's end: say how to map the pool; the connection stays open as a sign of life."""
    memory = _shareable(pool).memory
    try:
        said = _share_of(memory.device).export(memory)
    except TransferError as error:
        why = error.message.encode()[:MOST_SAID]
        channel.send(_SAYS.pack(_REFUSED, len(why)), why)
        raise
    channel.send(_SAYS.pack(_SHARED, len(said)), said)
    channel.wait_for_request()


def _receive(channel: Channel) -> bytes:
    """What the holder says of its memory. Raises ``TransferError`` with its reason where it does not share it."""
    status, size = _SAYS.unpack(channel.recv(_SAYS.size))
    if size > MOST_SAID:
        raise TransferError("the KV peer sends nonsense", reason="REFUSED")
    said = channel.recv(size)
    if status != _SHARED:
        raise TransferError(f"the KV peer does not share: {said.decode('utf-8', 'replace')}", reason="REFUSED")
    return said


def _shareable(pool: KvPool) -> DevicePool | HeadPool:
    if not isinstance(pool, DevicePool | HeadPool):
        raise TransferError("CUDA IPC needs a pool on a GPU at both ends", reason="REFUSED")
    return pool


def _share_of(device: torch.device) -> Share:
    share = SHARES.get(device.type)
    if share is None:
        raise TransferError(f"memory of {device.type} cannot be shared with CUDA IPC", reason="REFUSED")
    return share
