"""The pool of one rank seen by KV heads, so that any range of heads moves between workers of different ranks.

What is moved is, of each block, the lines of some heads: a strided view of the pool, packed and unpacked on the way by
whatever moves it. Its checksum is part of the block's: ``sum-64`` (kernels/reference.py) weighs each word by its place
in the whole model's block and adds up, so the sums of disjoint heads add up to that of the block, on whatever ranks
they are. Both ends know a block's one sum, and neither needs to know how the other has split it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from twinpool.errors import ConfigError
from twinpool.kernels.reference import HeadRange, Place
from twinpool.workers.transfer import moves
from twinpool.workers.transfer.layout import BlockLayout
from twinpool.workers.transfer.pool import Bytes2D, DevicePool, HostPool

WORD = 8  # bytes


class HeadPool:
    """Implements :class:`~twinpool.workers.transfer.pool.KvPool` for ``heads`` of a pool that holds ``held``.

    Borrows ``pool``. ``data`` is uint8 [blocks, lines, heads, line_bytes], not contiguous.
    """

    sum_kind = DevicePool.sum_kind

    def __init__(self, pool: HostPool | DevicePool, layout: BlockLayout, held: range, heads: range) -> None:
        """Raises ConfigError where lines are not whole 64-bit words; ``heads`` must be among ``held``."""
        if layout.line_bytes % WORD:
            raise ConfigError(f"worker.block_size: {layout.line_bytes} bytes of a head are not whole 64-bit words")
        self.blocks, self.block_bytes = pool.blocks, layout.block_bytes(len(heads))
        self.layout, self.held, self.heads = layout, held, heads
        self._pool = pool
        self._parts: dict[range, HeadPool] = {}
        self.fd = pool.fd if isinstance(pool, HostPool) else None
        self.memory = pool.data  # all of the pool: uint8 [blocks, bytes of the held heads]
        lines = pool.data.view(pool.blocks, layout.lines, len(held), layout.line_bytes)
        self.data = lines[:, :, heads.start - held.start : heads.stop - held.start]
        self.cut = self.cut_of(held)
        self.place = Place(layout.kv_heads * layout.line_bytes, heads.start * layout.line_bytes)
        self._weights: moves.Weights | None = None
        if pool.data.is_cuda:
            moves.device_sums(self, [0])  # compiles the kernel, before the event loop needs it
        else:
            self._weights = moves.host_weights(self.cut, self.place)

    def part(self, heads: range) -> HeadPool:
        """The same pool by fewer heads. Raises ValueError for heads that it does not hold."""
        if heads not in self._parts:
            if not self.has(heads):
                raise ValueError(f"KV heads {heads} are not among {self.held}")
            self._parts[heads] = HeadPool(self._pool, self.layout, self.held, heads)
        return self._parts[heads]

    def has(self, heads: range) -> bool:
        """Whether all of ``heads`` are held here."""
        return self.held.start <= heads.start < heads.stop <= self.held.stop

    def cut_of(self, held: range) -> HeadRange:
        """Our heads in a row of a pool that holds ``held``, all of ours among them."""
        line = self.layout.line_bytes
        return HeadRange(self.layout.lines, (self.heads.start - held.start) * line, len(self.heads) * line)

    def rows_of(self, rows: Bytes2D, held: range) -> npt.NDArray[np.uint8]:
        """Our heads in a peer's pool: its ``rows`` uint8 [blocks, bytes] hold ``held``, all of ours among them."""
        lines = rows.reshape(len(rows), self.layout.lines, len(held), self.layout.line_bytes)
        return lines[:, :, self.heads.start - held.start : self.heads.stop - held.start]

    @property
    def rows(self) -> npt.NDArray[np.uint8]:
        """``data`` for numpy; only of a pool in host memory."""
        rows: npt.NDArray[np.uint8] = self.data.numpy()
        return rows

    def checksum(self, block: int) -> int:
        """The heads' part of one block's sum."""
        return self.checksums([block])[0]

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """The heads' part of the sums of several blocks."""
        if self._weights is None:
            return moves.device_sums(self, blocks)
        rows = self.memory.numpy().reshape(self.blocks, self.cut.parts, -1)
        return moves.host_sums(rows[:, :, self.cut.first : self.cut.first + self.cut.length], blocks, self._weights)

    def outgoing(self, first: int, count: int) -> memoryview:
        """A packed copy in host memory, the caller's own."""
        with moves.side_stream(self.data.device):
            packed = self.data[first : first + count].contiguous().cpu()
        return packed.view(-1).numpy().data

    def incoming(self, first: int, count: int) -> memoryview:
        """A landing buffer in host memory, the caller's own."""
        return memoryview(bytearray(count * self.block_bytes))

    def landed(self, first: int, count: int, view: memoryview) -> None:
        """Unpack the landing buffer into the blocks."""
        place = self.data[first : first + count]
        with moves.side_stream(self.data.device):
            place.copy_(torch.frombuffer(view, dtype=torch.uint8).view(place.shape))

    def pack(self, blocks: Sequence[int], slot: torch.Tensor) -> None:
        """See :class:`~twinpool.workers.transfer.pool.KvPool`."""
        moves.pack(self, blocks, slot)

    def unpack(self, slot: torch.Tensor, blocks: Sequence[int]) -> list[int]:
        """See :class:`~twinpool.workers.transfer.pool.KvPool`."""
        if self._weights is None:
            return moves.unpack(self, slot, blocks)
        packed = slot[: len(blocks) * self.block_bytes].view(len(blocks), *self.data.shape[1:])
        self.data.index_copy_(0, torch.tensor(blocks), packed)
        return self.checksums(blocks)
