"""Triton: attention over paged KV, for decoding rows and for chunks of prompts.

Both walk the keys of a row in tiles with the online softmax of Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018, as in FlashAttention-2 (Dao, 2023, section 3.1): for scores s of a tile, in base 2::

    m' = max(m, max s)    w = 2^(s - m')    l' = l 2^(m - m') + sum w    o' = o 2^(m - m') + w v

and out = o / l at the end. The ``GROUP`` query heads of a KV head are rows of one tile, so KV is read once for all.

Decoding is split over the keys as well (flash-decoding, Dao et al., 2023): a program takes ``split_tokens`` of a row's
context, and a second kernel weighs the parts by their log-sum-exp, L = m + log2 l. How many tokens a split has follows
from the widest table, the batch and the device: never from what the tensors hold. Sums are in float32.

A float8 cache has one scale a token and head (reference.py). Those of keys multiply the scores, those of values the
weights, so both products are of numbers as they are stored, widened to the dtype of the queries. As scales lie in the
lines that they belong to, their strides are those of the cache in words of four bytes. Other caches pass themselves as
their scales, whose dtype then tells that there are none.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = math.log2(math.e)
_MOST_SPLIT = 1024  # tokens: a program at the end of a ragged batch must not hold up the step
_WAVES = 8  # programs wanted for each multiprocessor, so that uneven rows level out
_SPLIT_TILE = 16  # partial results that are added up at a time
_PER_BATCH = ["table_stride", "splits", "split_tokens"]  # change with every batch: no kernels of their own


@triton.jit
def _attend(
    q: tl.tensor,  # [M, PAD]
    limits: tl.tensor,  # [M], the last key that each query sees
    first: tl.tensor,  # keys from here,
    last: tl.tensor,  # to here, exclusive
    keys: tl.tensor,  # of the head, block 0
    scales: tl.tensor,  # of these keys
    table: tl.tensor,  # of the row
    block_stride: tl.tensor,
    value_stride: tl.tensor,  # from keys to values
    token_stride: tl.tensor,
    scale: tl.tensor,  # log2(e) / sqrt(dim)
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Output [M, PAD] and log-sum-exp [M]. Every query must see the key ``first``."""
    M: tl.constexpr = q.shape[0]
    PAD: tl.constexpr = q.shape[1]
    SCALED: tl.constexpr = scales.dtype.element_ty != keys.dtype.element_ty
    if not SCALED:
        q = q.to(keys.dtype.element_ty)
    dims = tl.arange(0, PAD)[None, :]
    peak = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    out = tl.zeros([M, PAD], tl.float32)
    for start in range(first, last, TILE):
        position = start + tl.arange(0, TILE)
        inside = position < last
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offset = (block * block_stride + (position % BLOCK_SIZE) * token_stride)[:, None] + dims
        mask = inside[:, None] & (dims < DIM)
        key = tl.load(keys + offset, mask=mask, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        if SCALED:
            place = scales + block * (block_stride // 4) + position % BLOCK_SIZE
            scores *= tl.load(place, mask=inside, other=0.0)[None, :]
        seen = inside[None, :] & (position[None, :] <= limits[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(peak - higher)
        value = tl.load(keys + value_stride + offset, mask=mask, other=0.0).to(q.dtype)
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(place + value_stride // 4, mask=inside, other=0.0)[None, :]
        out = tl.dot(weights.to(q.dtype), value, acc=out * fade[:, None], input_precision="ieee")
        peak = higher
    return out / total[:, None], peak + tl.log2(total)


@triton.jit(do_not_specialize=_PER_BATCH)
def _decode_splits(
    q: tl.tensor,  # [rows, heads, dim]
    kv: tl.tensor,
    scales: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    partial: tl.tensor,  # float32 [rows, heads, splits, DIM]
    sums: tl.tensor,  # float32 [rows, heads, splits]: log-sum-exp
    q_stride: int,
    q_head_stride: int,
    block_stride: int,
    value_stride: int,
    head_stride: int,
    token_stride: int,
    table_stride: int,
    splits: int,
    split_tokens: int,
    scale: float,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One split of a row's context, for the query heads of one KV head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    context = tl.load(contexts + row).to(tl.int32)
    first = split * split_tokens
    if first >= context:
        return
    last = tl.minimum(first + split_tokens, context)
    member = tl.arange(0, M)
    query_head = head * GROUP + member
    dims = tl.arange(0, PAD)[None, :]
    mask = (member < GROUP)[:, None] & (dims < DIM)
    queries = tl.load(q + row * q_stride + query_head[:, None] * q_head_stride + dims, mask=mask, other=0.0)
    line = head.to(tl.int64) * head_stride
    out, sum_ = _attend(
        queries, tl.zeros([M], tl.int32) + context, first, last, kv + line, scales + line // 4,
        tables + row * table_stride, block_stride, value_stride, token_stride, scale, BLOCK_SIZE, DIM, TILE,
    )  # fmt: skip
    place = (row * (tl.num_programs(1) * GROUP) + query_head) * splits + split
    tl.store(partial + place[:, None] * DIM + dims, out, mask=mask)
    tl.store(sums + place, sum_, mask=member < GROUP)


@triton.jit(do_not_specialize=["splits", "split_tokens"])
def _decode_reduce(
    partial: tl.tensor,
    sums: tl.tensor,
    contexts: tl.tensor,
    out: tl.tensor,  # [rows, heads, dim], contiguous
    splits: int,
    split_tokens: int,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """The splits of one query head of one row into its output."""
    row = tl.program_id(0).to(tl.int64)
    place = row * tl.num_programs(1) + tl.program_id(1)
    used = tl.cdiv(tl.load(contexts + row).to(tl.int32), split_tokens)
    dims = tl.arange(0, PAD)
    peak = float("-inf")
    total = 0.0
    result = tl.zeros([PAD], tl.float32)
    for first in range(0, used, TILE):
        split = first + tl.arange(0, TILE)
        inside = split < used
        sum_ = tl.load(sums + place * splits + split, mask=inside, other=float("-inf"))
        mask = inside[:, None] & (dims < DIM)[None, :]
        part = tl.load(partial + (place * splits + split)[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        higher = tl.maximum(peak, tl.max(sum_, 0))
        weights = tl.exp2(sum_ - higher)
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.sum(weights, 0)
        result = result * fade + tl.sum(part * weights[:, None], 0)
        peak = higher
    result = result / tl.where(total > 0, total, 1.0)  # a row without context is zero
    tl.store(out + place * DIM + dims, result.to(out.dtype.element_ty), mask=dims < DIM)


@triton.jit(do_not_specialize=_PER_BATCH)
def _prefill(
    q: tl.tensor,  # [tokens, heads, dim]
    kv: tl.tensor,
    scales: tl.tensor,
    tables: tl.tensor,
    contexts: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,  # [tokens, heads, dim], contiguous
    q_stride: int,
    q_head_stride: int,
    block_stride: int,
    value_stride: int,
    head_stride: int,
    token_stride: int,
    table_stride: int,
    scale: float,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """``M`` queries, a token's ``GROUP`` heads side by side, over all keys that the last of them sees."""
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    top = (tl.num_programs(0) - 1 - tl.program_id(0)) * M  # the tiles with most keys go first
    begin = tl.load(starts + row).to(tl.int64)
    tokens = (tl.load(starts + row + 1) - begin).to(tl.int32)
    context = tl.load(contexts + row).to(tl.int32)
    if top >= tokens * GROUP:
        return
    index = top + tl.arange(0, M)
    token = index // GROUP
    place = begin + token
    query_head = head * GROUP + index % GROUP
    dims = tl.arange(0, PAD)[None, :]
    mask = (token < tokens)[:, None] & (dims < DIM)
    offset = (place * q_stride + query_head * q_head_stride)[:, None] + dims
    queries = tl.load(q + offset, mask=mask, other=0.0)
    limits = context - tokens + token
    last = tl.minimum(context - tokens + (top + M - 1) // GROUP + 1, context)
    line = head.to(tl.int64) * head_stride
    result, _ = _attend(
        queries, limits, 0, last, kv + line, scales + line // 4,
        tables + row * table_stride, block_stride, value_stride, token_stride, scale, BLOCK_SIZE, DIM, TILE,
    )  # fmt: skip
    written = ((place * tl.num_programs(1) * GROUP + query_head) * DIM)[:, None] + dims
    tl.store(out + written, result.to(out.dtype.element_ty), mask=mask)


def paged_decode(
    q: Tensor, kv: Tensor, tables: Tensor, contexts: Tensor, scales: Tensor | None = None, split_tokens: int = 0
) -> Tensor:
    """See :func:`twinpool.kernels.ops.paged_decode`. ``split_tokens`` 0 chooses for the batch and the device."""
    rows, heads, dim = q.shape
    out = torch.empty((rows, heads, dim), dtype=q.dtype, device=q.device)
    if not rows:
        return out
    kv_heads, block_size = kv.shape[2:4]
    longest = tables.shape[1] * block_size
    operands = kv.dtype if scales is None else q.dtype
    shape = _tile(kv, operands)
    split_tokens = split_tokens or _split_tokens(rows * kv_heads * longest, shape["TILE"], _processors(q.device))
    splits = triton.cdiv(longest, split_tokens)
    partial = torch.empty((rows, heads, splits, dim), dtype=torch.float32, device=q.device)
    sums = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    group, scale = heads // kv_heads, _LOG2_E / math.sqrt(dim)
    _decode_splits[(rows, kv_heads, splits)](
        q, kv, kv if scales is None else scales, tables, contexts, partial, sums, *_strides(q, kv, tables),
        splits, split_tokens, scale,
        GROUP=group, M=max(16, triton.next_power_of_2(group)), **shape, num_warps=4, num_stages=3,
    )  # fmt: skip
    _decode_reduce[(rows, heads)](
        partial, sums, contexts, out, splits, split_tokens, DIM=dim, PAD=shape["PAD"], TILE=_SPLIT_TILE, num_warps=4
    )
    return out


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    contexts: Tensor,
    starts: Tensor,
    longest: int,
    scales: Tensor | None = None,
) -> Tensor:
    """See :func:`twinpool.kernels.ops.paged_prefill`."""
    tokens, heads, dim = q.shape
    out = torch.empty((tokens, heads, dim), dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    kv_heads = kv.shape[2]
    group = heads // kv_heads
    operands = kv.dtype if scales is None else q.dtype
    wide = operands == torch.float32  # no tensor cores: smaller tiles, or they do not fit in registers
    queries = 32 if wide else 128
    _prefill[(triton.cdiv(longest * group, queries), kv_heads, tables.shape[0])](
        q, kv, kv if scales is None else scales, tables, contexts, starts, out, *_strides(q, kv, tables),
        _LOG2_E / math.sqrt(dim),
        GROUP=group, M=queries, **_tile(kv, operands), num_warps=4 if wide else 8, num_stages=2,
    )  # fmt: skip
    return out


def _tile(kv: Tensor, operands: torch.dtype) -> dict[str, int]:
    """Sizes that a kernel is compiled for: those of the cache, and the keys of a tile (at most 16 KiB of them)."""
    pad = max(16, triton.next_power_of_2(kv.shape[4]))
    tile = min(64, max(16, (16 << 10) // (pad * operands.itemsize)))
    return {"BLOCK_SIZE": kv.shape[3], "DIM": kv.shape[4], "PAD": pad, "TILE": tile}


def _strides(q: Tensor, kv: Tensor, tables: Tensor) -> tuple[int, ...]:
    return (*q.stride()[:2], *kv.stride()[:4], tables.stride(0))


def _split_tokens(tokens: int, tile: int, processors: int) -> int:
    """Tokens of a split, a multiple of ``tile``, where rows and KV heads have up to ``tokens`` of them together."""
    even = -(-tokens // (_WAVES * processors))
    return -(-min(max(even, 2 * tile), _MOST_SPLIT) // tile) * tile


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
