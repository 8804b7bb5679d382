"""Triton: paged KV blocks to and from one packed buffer, with the checksum of every block in the same pass.

Everything is moved as 64-bit words, so any dtype will do, quantised caches and their scales included. The words that
move are seen as *rows*: one row is the run of bytes that a (block, part) contributes, as :class:`HeadRange` cuts it. A
program moves ``ROWS`` rows by ``COLS`` columns of them, so that short runs of many blocks share a program and long ones
are spread over several, each thread with 16 bytes at a time. What lies side by side in the pool (all heads of a block,
neighbouring blocks) is read side by side.

The checksum is that of reference.py, ``sum of w[i] * (2 i + 1) mod 2**64`` over the packed words of a block: each
program adds its share with an atomic, and as addition modulo 2**64 does not care about order, the sum is exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twinpool.kernels.reference import HeadRange

_TILE_WORDS = 2048  # 16 KiB a program: 256 threads with four 16-byte accesses each in flight
_WARPS = 8


@triton.jit(do_not_specialize=["rows"])
def _move(
    pool: tl.tensor,  # int64 words
    packed: tl.tensor,  # int64 words, [rows, length]
    blocks: tl.tensor,  # [rows / parts]
    sums: tl.tensor,  # int64 [rows / parts], zeroed
    rows: int,
    parts: int,
    stride: int,  # the rest in units of UNIT words: from part to part of a block,
    first: int,  # before a part's run,
    length: int,  # in the run
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
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
    block = tl.load(blocks + index, mask=inside, other=0).to(tl.int64)
    paged = ((block * parts + part) * stride + first) * UNIT
    paged_words = pool + paged[:, None] + column[None, :]
    packed_words = packed + (row * length * UNIT)[:, None] + column[None, :]
    if GATHER:
        words = tl.load(paged_words, mask=mask, other=0)
        tl.store(packed_words, words, mask=mask)
    else:
        words = tl.load(packed_words, mask=mask, other=0)
        tl.store(paged_words, words, mask=mask)
    weights = (part * width)[:, None] * 2 + (column.to(tl.int64) * 2 + 1)[None, :]
    tl.atomic_add(sums + index, tl.sum(words * weights, axis=1), mask=inside, sem="relaxed")


def gather(pool: Tensor, blocks: Tensor, cut: HeadRange, out: Tensor) -> Tensor:
    """As :func:`twinpool.kernels.reference.gather`, on the device and without waiting for it."""
    return _launch(pool, out, blocks, cut, gathers=True)


def scatter(data: Tensor, pool: Tensor, blocks: Tensor, cut: HeadRange) -> Tensor:
    """As :func:`twinpool.kernels.reference.scatter`, on the device and without waiting for it."""
    return _launch(pool, data, blocks, cut, gathers=False)


def _launch(pool: Tensor, packed: Tensor, blocks: Tensor, cut: HeadRange, gathers: bool) -> Tensor:
    sums = torch.zeros(blocks.shape[0], dtype=torch.int64, device=pool.device)
    rows = blocks.shape[0] * cut.parts
    if not rows:
        return sums
    part_bytes = pool.shape[1] // cut.parts
    unit = 1 if any(size % 16 for size in (part_bytes, cut.first, cut.length)) else 2
    words = cut.length // 8
    columns = min(triton.next_power_of_2(words), _TILE_WORDS)
    tile_rows = _TILE_WORDS // columns
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(words, columns),)
    sizes = [size // (8 * unit) for size in (part_bytes, cut.first, cut.length)]
    _move[grid](
        pool.view(torch.int64), packed.view(torch.int64), blocks, sums, rows, cut.parts, *sizes,
        UNIT=unit, GATHER=gathers, ROWS=tile_rows, COLS=columns, num_warps=_WARPS,
    )  # fmt: skip
    return sums
