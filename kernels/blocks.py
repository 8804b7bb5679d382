"""Triton: KV blocks from one memory to another, paged or packed, with the checksum of every block in the same pass.

Everything is moved as 64-bit words, so any dtype will do, quantised caches and their scales included. The words that
move are seen as *rows*: one row is the run of bytes that a (block, part) contributes, as :class:`HeadRange` cuts it. A
program moves ``ROWS`` rows by ``COLS`` columns of them, so that short runs of many blocks share a program and long ones
are spread over several, each thread with 16 bytes at a time. What lies side by side in memory (all heads of a block,
neighbouring blocks) is read side by side. The memory read may be that of another process or GPU, mapped here.

The checksum is that of reference.py: each program adds its share with an atomic, and as addition modulo 2**64 does not
care about order, the sum is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinpool.kernels.reference import GOLDEN, MASK_32, Place, Rows

_TILE_WORDS = 2048  # 16 KiB a program: 256 threads with four 16-byte accesses each in flight
_WARPS = 8
_GOLDEN = tl.constexpr(GOLDEN)
_TWICE = tl.constexpr(2 * GOLDEN + (1 << 64))  # signed, too
_MASK_32 = tl.constexpr(MASK_32)


@triton.jit
def _odd(x: tl.tensor) -> tl.tensor:
    """Weights of halves: see ``sum_weights`` in reference.py."""
    return (x ^ ((x >> 32) & _MASK_32)) | 1


@triton.jit(do_not_specialize=["rows"])
def _move(
    source: tl.tensor,  # int64 words
    target: tl.tensor,  # int64 words
    source_blocks: tl.tensor,  # [rows / parts]; read only where the source is paged, the next only where the target is
    target_blocks: tl.tensor,
    sums: tl.tensor,  # int64 [rows / parts], zeroed
    rows: int,
    parts: int,
    length: int,  # of a row; this and the rest in units of UNIT words
    source_stride: int,  # from part to part of a block,
    source_first: int,  # before a part's run; for the next pairs likewise
    target_stride: int,
    target_first: int,
    place_stride: int,
    place_first: int,
    UNIT: tl.constexpr,
    FROM_PAGES: tl.constexpr,
    TO_PAGES: tl.constexpr,
    STORE: tl.constexpr,  # else only the sums are made
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Move one tile of rows and add its words to the sums of their blocks."""
    width = length * UNIT
    across = tl.cdiv(width, COLS)
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % across) * COLS + tl.arange(0, COLS)
    inside = row < rows
    mask = inside[:, None] & (column < width)[None, :]
    index = row // parts
    part = row % parts
    block = index
    if FROM_PAGES:
        block = tl.load(source_blocks + index, mask=inside, other=0).to(tl.int64)
    begin = ((block * parts + part) * source_stride + source_first) * UNIT
    words = tl.load(source + begin[:, None] + column[None, :], mask=mask, other=0)
    if STORE:
        block = index
        if TO_PAGES:
            block = tl.load(target_blocks + index, mask=inside, other=0).to(tl.int64)
        begin = ((block * parts + part) * target_stride + target_first) * UNIT
        tl.store(target + begin[:, None] + column[None, :], words, mask=mask)
    place = (part * place_stride + place_first) * UNIT  # of a row's first word; a word w has halves 2 w and 2 w + 1
    x = (place * _TWICE)[:, None] + (column.to(tl.int64) * _TWICE + _GOLDEN)[None, :]
    lower = words.to(tl.int32).to(tl.int64) * _odd(x)
    upper = (words >> 32) * _odd(x + _GOLDEN)
    tl.atomic_add(sums + index, tl.sum(lower + upper, axis=1), mask=inside, sem="relaxed")


def copy(source: Rows, target: Rows, count: int, place: Place) -> Tensor:
    """As :func:`twinpool.kernels.reference.copy`, on the current device and without waiting for it."""
    return _launch(source, target, count, place, stores=True)


def sums(source: Rows, count: int, place: Place) -> Tensor:
    """As :func:`twinpool.kernels.reference.sums`, on the current device and without waiting for it."""
    return _launch(source, source, count, place, stores=False)


def _launch(source: Rows, target: Rows, count: int, place: Place, stores: bool) -> Tensor:
    device = target.memory.device
    sums = torch.zeros(count, dtype=torch.int64, device=device)
    parts, _, length = source.cut
    rows = count * parts
    if not rows:
        return sums
    sizes = [length, *_run(source), *_run(target), place.stride, place.first]
    unit = 1 if any(size % 16 for size in sizes) else 2
    columns = min(triton.next_power_of_2(length // 8), _TILE_WORDS)
    tile_rows = _TILE_WORDS // columns
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(length // 8, columns),)
    numbers = [sums if end.blocks is None else end.blocks for end in (source, target)]
    _move[grid](
        source.memory.view(torch.int64), target.memory.view(torch.int64), *numbers, sums, rows, parts,
        *(size // (8 * unit) for size in sizes),
        UNIT=unit, FROM_PAGES=source.blocks is not None, TO_PAGES=target.blocks is not None, STORE=stores,
        ROWS=tile_rows, COLS=columns, num_warps=_WARPS,
    )  # fmt: skip
    return sums


def _run(rows: Rows) -> tuple[int, int]:
    """Bytes from part to part, and before the run of one."""
    return rows.memory.shape[1] // rows.cut.parts, rows.cut.first
