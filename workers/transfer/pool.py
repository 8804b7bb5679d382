"""A worker's KV memory: rows of equal size, one row a block, checksummed.

``HostPool`` is one sealed memfd. A peer that is handed its descriptor can map it for reading, but can neither write to
it nor truncate it, and an owner that is killed leaves nothing behind. ``DevicePool`` is a plain tensor on any torch
device; its checksum is one parallel reduction instead of xxh3.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from twinpool.errors import ConfigError
from twinpool.kernels.reference import HeadRange, Place
from twinpool.workers.transfer import moves
from twinpool.workers.transfer.memory import available_bytes, format_bytes

Bytes2D = npt.NDArray[np.uint8]

_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # not in the fcntl module before Python 3.13
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW, _SEAL_FUTURE_WRITE = 1, 2, 4, 16


class KvPool(Protocol):
    """What transfer code needs of a pool; ``data`` is uint8 [blocks, block_bytes], contiguous."""

    data: torch.Tensor
    blocks: int
    block_bytes: int
    sum_kind: str  # both ends of a transfer must use the same checksum

    def checksum(self, block: int) -> int:
        """64-bit sum of one block's bytes."""
        ...

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Sums of several blocks."""
        ...

    def outgoing(self, first: int, count: int) -> memoryview:
        """Bytes of consecutive blocks, to be sent at once: the pool itself where it is in host memory, else a copy."""
        ...

    def incoming(self, first: int, count: int) -> memoryview:
        """Host memory to receive consecutive blocks into; :meth:`landed` then brings them to where they belong."""
        ...

    def landed(self, first: int, count: int, view: memoryview) -> None:
        """``view``, got from :meth:`incoming` of the same blocks, is filled."""
        ...

    def pack(self, blocks: Sequence[int], slot: torch.Tensor) -> None:
        """Copy blocks one after another to the front of ``slot`` uint8 [bytes], on the pool's device."""
        ...

    def unpack(self, slot: torch.Tensor, blocks: Sequence[int]) -> list[int]:
        """The reverse of :meth:`pack`; returns the sums of what is there now."""
        ...


class HostPool:
    """KV memory in a sealed memfd that peers on the same host may map for reading; owns the descriptor.

    Raises ``ConfigError`` when the memory is not there: better at the start than by SIGBUS or the OOM killer later.
    """

    sum_kind = "xxh3-64"

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.blocks, self.block_bytes = blocks, block_bytes
        self.fd, mapping = _create(_checked_size(blocks, block_bytes))
        self.data = torch.frombuffer(mapping, dtype=torch.uint8).view(blocks, block_bytes)
        self.rows: Bytes2D = np.frombuffer(mapping, dtype=np.uint8).reshape(blocks, block_bytes)
        self._bytes = memoryview(mapping)

    def checksum(self, block: int) -> int:
        """xxh3-64 of one block's bytes; releases the GIL for blocks of usual size."""
        return xxhash.xxh3_64_intdigest(self.incoming(block, 1))

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Sums of several blocks."""
        return [self.checksum(block) for block in blocks]

    def outgoing(self, first: int, count: int) -> memoryview:
        """The blocks' own memory."""
        return self.incoming(first, count)

    def incoming(self, first: int, count: int) -> memoryview:
        """The blocks' own memory."""
        return self._bytes[first * self.block_bytes : (first + count) * self.block_bytes]

    def landed(self, first: int, count: int, view: memoryview) -> None:
        """Nothing to do: the bytes were received in place."""

    def pack(self, blocks: Sequence[int], slot: torch.Tensor) -> None:
        """See :class:`KvPool`."""
        torch.index_select(self.data, 0, torch.tensor(blocks), out=self._in_slot(slot, len(blocks)))

    def unpack(self, slot: torch.Tensor, blocks: Sequence[int]) -> list[int]:
        """See :class:`KvPool`."""
        self.data.index_copy_(0, torch.tensor(blocks), self._in_slot(slot, len(blocks)))
        return self.checksums(blocks)

    def _in_slot(self, slot: torch.Tensor, count: int) -> torch.Tensor:
        return slot[: count * self.block_bytes].view(count, self.block_bytes)

    def close(self) -> None:
        """Close the descriptor; the memory goes when the last tensor, view and peer let go of it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DevicePool:
    """KV memory in one tensor on a torch device, checksummed there. ``block_bytes`` must be a multiple of 8."""

    sum_kind = "sum-64"

    def __init__(self, blocks: int, block_bytes: int, device: str) -> None:
        if block_bytes % 8:
            raise ValueError(f"a block of {block_bytes} bytes is not made of 64-bit words")
        self.blocks, self.block_bytes = blocks, block_bytes
        size = _checked_size(blocks, block_bytes)
        try:
            self.data = torch.zeros(blocks, block_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"{device} has no {format_bytes(size)} for KV: lower kv_memory") from error
        self.memory = self.data
        self.cut, self.place = HeadRange(1, 0, block_bytes), Place(block_bytes, 0)
        if self.data.is_cuda:
            torch.cuda.synchronize(self.data.device)  # zeroed before a transfer's stream writes to it
            moves.warm(self)

    def checksum(self, block: int) -> int:
        """``sum-64`` of one block."""
        return self.checksums([block])[0]

    def checksums(self, blocks: Sequence[int]) -> list[int]:
        """Sums of several blocks, with one wait for the device."""
        return moves.device_sums(self, blocks)

    def outgoing(self, first: int, count: int) -> memoryview:
        """A copy in host memory, the caller's own."""
        with moves.side_stream(self.data.device):
            return self.data[first : first + count].cpu().view(-1).numpy().data

    def incoming(self, first: int, count: int) -> memoryview:
        """A landing buffer in host memory, the caller's own."""
        return memoryview(bytearray(count * self.block_bytes))

    def landed(self, first: int, count: int, view: memoryview) -> None:
        """Copy the landing buffer into the blocks."""
        with moves.side_stream(self.data.device):
            self.data[first : first + count].view(-1).copy_(torch.frombuffer(view, dtype=torch.uint8))

    def pack(self, blocks: Sequence[int], slot: torch.Tensor) -> None:
        """See :class:`KvPool`."""
        moves.pack(self, blocks, slot)

    def unpack(self, slot: torch.Tensor, blocks: Sequence[int]) -> list[int]:
        """See :class:`KvPool`."""
        return moves.unpack(self, slot, blocks)


def open_pool(blocks: int, block_bytes: int, device: str = "cpu") -> HostPool | DevicePool:
    """The pool of a worker: shareable host memory for ``cpu``, a tensor on the device otherwise."""
    return HostPool(blocks, block_bytes) if device == "cpu" else DevicePool(blocks, block_bytes, device)


def attach(fd: int, blocks: int, block_bytes: int) -> Bytes2D:
    """Map a peer's pool for reading: uint8 [blocks, block_bytes]. Takes ``fd`` over and closes it.

    Raises ValueError when the memory is not of that size, or is not sealed against truncation by its owner (reading it
    could then kill us). Unmapped when the array and all views of it are gone.
    """
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        if seals & (_SEAL_SHRINK | _SEAL_GROW) != _SEAL_SHRINK | _SEAL_GROW:
            raise ValueError("the peer's KV memory is not sealed")
        size = os.fstat(fd).st_size
        if size != blocks * block_bytes:
            raise ValueError(f"the peer's KV memory has {size} bytes, not {blocks} blocks of {block_bytes}")
        mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ)
    finally:
        os.close(fd)
    return np.frombuffer(mapping, dtype=np.uint8).reshape(blocks, block_bytes)


def _checked_size(blocks: int, block_bytes: int) -> int:
    if blocks < 1 or block_bytes < 1:
        raise ValueError(f"a pool of {blocks} blocks of {block_bytes} bytes cannot be")
    return blocks * block_bytes


def _create(size: int) -> tuple[int, mmap.mmap]:
    free = available_bytes()
    if size > free:  # a memfd over the limit is not refused by the kernel: it kills somebody when the pages are written
        raise ConfigError(f"KV wants {format_bytes(size)} but {format_bytes(free)} of memory are free: lower kv_memory")
    fd = os.memfd_create("twinpool-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        mapping = mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        fcntl.fcntl(fd, _F_ADD_SEALS, _SEAL_SHRINK | _SEAL_GROW | _SEAL_FUTURE_WRITE | _SEAL_SEAL)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"no {format_bytes(size)} for KV ({error.strerror}): lower kv_memory") from error
    return fd, mapping
