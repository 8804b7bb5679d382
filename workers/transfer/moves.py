"""Blocks of a pool in bulk: packed, unpacked, copied out of a peer's memory and summed, whole or by some heads.

CUDA work goes to a stream of the calling thread, beside the engine's. It need not wait for the engine's: blocks are
announced, and asked for, only after the step that wrote them has been reported, and the engine reports what the device
has finished. For the same reason a caller that has the sums in its hands knows that the copy is done.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from twinpool.kernels import ops
from twinpool.kernels.reference import MASK_64, HeadRange, Place, Rows, sum_weights, unsigned

HALF = 4  # bytes
_threads = threading.local()

Bytes = npt.NDArray[np.uint8]
Weights = npt.NDArray[np.int64]


class CutPool(Protocol):
    """A pool summed by ``sum-64`` (kernels/reference.py); what it holds of a block is ``cut`` of a row."""

    memory: torch.Tensor  # uint8 [blocks, bytes of a row]
    cut: HeadRange
    place: Place  # of it in the whole model's block


def side_stream(device: torch.device) -> AbstractContextManager[object]:
    """While it is entered, CUDA work of this thread for ``device`` goes to the thread's own stream; nothing on CPUs."""
    if device.type != "cuda":
        return nullcontext()
    streams: dict[torch.device, torch.cuda.Stream] = _threads.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(streams[device])


def pack(pool: CutPool, blocks: Sequence[int], slot: torch.Tensor) -> None:
    """Copy blocks one after another to the front of ``slot`` uint8 [bytes], on the thread's stream."""
    with side_stream(pool.memory.device):
        packed = _packed(pool, blocks, slot)
        if packed.is_cuda:
            ops.gather_blocks(pool.memory, _numbers(pool, blocks), pool.cut, packed)
        else:
            packed.view(len(blocks), pool.cut.parts, pool.cut.length).copy_(_parts(pool)[list(blocks)])


def unpack(pool: CutPool, slot: torch.Tensor, blocks: Sequence[int]) -> list[int]:
    """The reverse of :func:`pack`; the sums of what was written, once it is."""
    parts, _, length = pool.cut
    with side_stream(pool.memory.device):
        source = Rows(_packed(pool, blocks, slot), None, HeadRange(parts, 0, length))
        target = Rows(pool.memory, _numbers(pool, blocks), pool.cut)
        return unsigned(ops.copy_blocks(source, target, len(blocks), pool.place))


def gather(
    pool: CutPool, peer: torch.Tensor, cut: HeadRange, source: Sequence[int], target: Sequence[int]
) -> list[int]:
    """Copy ``cut`` of blocks ``source`` of a peer's mapped memory into ``target``, in one kernel.

    Returns their sums, when nothing writes any more.
    """
    with side_stream(pool.memory.device):
        there = Rows(peer, _numbers(pool, source), cut)
        here = Rows(pool.memory, _numbers(pool, target), pool.cut)
        return unsigned(ops.copy_blocks(there, here, len(source), pool.place))


def device_sums(pool: CutPool, blocks: Sequence[int]) -> list[int]:
    """Sums of blocks on a GPU, with one wait for all of them."""
    with side_stream(pool.memory.device):
        rows = Rows(pool.memory, _numbers(pool, blocks), pool.cut)
        return unsigned(ops.sum_blocks(rows, len(blocks), pool.place))


def warm(pool: CutPool) -> None:
    """Compile what transfers of an empty pool on a GPU will run, before anybody waits for it."""
    device_sums(pool, [0])
    gather(pool, pool.memory, pool.cut, [0], [0])


def host_weights(cut: HeadRange, place: Place) -> Weights:
    """Weights of the halves of a cut: int64 [parts, halves], for :func:`host_sums`."""
    words = ((cut.parts - 1) * place.stride + place.first + cut.length) // 8
    places = sum_weights(words, "cpu").as_strided(
        (cut.parts, cut.length // HALF), (place.stride // HALF, 1), place.first // HALF
    )
    weights: Weights = places.contiguous().numpy()
    return weights


def host_sums(rows: Bytes, blocks: Sequence[int], weights: Weights) -> list[int]:
    """Sums of blocks in host memory: ``rows`` uint8 [blocks, parts, bytes], with bytes that lie side by side.

    numpy widens, weighs and adds in one pass without a copy, lets other threads run meanwhile, and starts none.
    """
    halves = rows.view(np.int32)
    return [int(np.einsum("ph,ph->", halves[block], weights, dtype=np.int64)) & MASK_64 for block in blocks]


def _numbers(pool: CutPool, blocks: Sequence[int]) -> torch.Tensor:
    return torch.tensor(blocks, dtype=torch.int64, device=pool.memory.device)


def _packed(pool: CutPool, blocks: Sequence[int], slot: torch.Tensor) -> torch.Tensor:
    size = pool.cut.packed_bytes
    return slot[: len(blocks) * size].view(len(blocks), size)


def _parts(pool: CutPool) -> torch.Tensor:
    cut = pool.cut
    return pool.memory.view(len(pool.memory), cut.parts, -1)[:, :, cut.first : cut.first + cut.length]
