"""Sockets: the receiver names blocks, the holder answers with their bytes, straight from pool to pool.

A request is a sequence number, a count and that many block ids; the answer repeats the number and says whether the
blocks follow. All numbers are little-endian. Collectives speak the same requests and send the bytes another way.
"""

from __future__ import annotations

import struct
import sys
import time
from array import array
from collections.abc import Sequence

from twinpool.errors import TransferError
from twinpool.workers.transfer.channel import Channel, Geometry, close_fds
from twinpool.workers.transfer.order import Order
from twinpool.workers.transfer.pool import KvPool
from twinpool.workers.transfer.runs import coalesce

RUN_BYTES = 1 << 20
SERVE_S = 60.0  # longest that answering one request may take; STALL_S ends it sooner when nothing moves

_REQUEST = struct.Struct("<II")
_ANSWER = struct.Struct("<IB")
_SENT, _REFUSED = 0, 1
_VIEWS = 64  # runs to a system call


class TcpSource:
    """The receiver's end."""

    def __init__(self, channel: Channel, geometry: Geometry, fds: list[int], pool: KvPool) -> None:
        close_fds(fds)
        self.channel = channel
        self._blocks = geometry.blocks
        self._sequence = 0

    def fetch(self, order: Order) -> None:
        """Ask for all blocks at once and verify each run as it arrives."""
        order.check_source(self._blocks)
        self._sequence += 1
        request_blocks(self.channel, self._sequence, order.source)
        for run in order.runs(RUN_BYTES):
            view = order.pool.incoming(run.target, run.length)
            self.channel.recv_into(view)
            order.pool.landed(run.target, run.length, view)
            order.verify(run.offset, run.targets)

    def close(self) -> None:
        """Hang up."""
        self.channel.close()


def serve_tcp(channel: Channel, pool: KvPool) -> None:
    """Holder's end: answer requests until the receiver hangs up. Raises ``TransferError`` when it misbehaves."""
    while channel.wait_for_request():
        channel.deadline = time.monotonic() + SERVE_S
        blocks = receive_request(channel, pool.blocks)
        runs = coalesce(blocks, blocks, max(1, RUN_BYTES // pool.block_bytes))
        for start in range(0, len(runs), _VIEWS):
            channel.send(*(pool.outgoing(run.source, run.length) for run in runs[start : start + _VIEWS]))


def request_blocks(channel: Channel, sequence: int, blocks: Sequence[int]) -> None:
    """Ask for blocks; returns when the holder has agreed to send them. Raises ``TransferError`` when it refuses."""
    channel.send(_REQUEST.pack(sequence & 0xFFFFFFFF, len(blocks)), _little_endian(array("I", blocks)).tobytes())
    answered, status = _ANSWER.unpack(channel.recv(_ANSWER.size))
    if status != _SENT or answered != sequence & 0xFFFFFFFF:
        raise TransferError("the KV peer refuses to send these blocks", reason="REFUSED")


def receive_request(channel: Channel, pool_blocks: int) -> list[int]:
    """Holder's side of :func:`request_blocks`: the blocks to send, all in the pool.

    Raises ``TransferError``, having refused, for more blocks than there are or one that is not.
    """
    sequence, count = _REQUEST.unpack(channel.recv(_REQUEST.size))
    blocks = array("I")
    if count <= pool_blocks:
        blocks.frombytes(channel.recv(4 * count))
    if count > pool_blocks or any(block >= pool_blocks for block in _little_endian(blocks)):
        channel.send(_ANSWER.pack(sequence, _REFUSED))
        raise TransferError("a KV peer asked for blocks that are not", reason="BAD_BLOCK")
    channel.send(_ANSWER.pack(sequence, _SENT))
    return blocks.tolist()


def _little_endian(blocks: array[int]) -> array[int]:
    if sys.byteorder == "big":
        blocks.byteswap()
    return blocks
