"""What the kernels compute, in plain torch on any device: the reference they are tested against, and the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MASK_64 = (1 << 64) - 1
MASK_32 = (1 << 32) - 1
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the golden ratio times 2**64, odd, as torch and Triton write it: signed
FLOAT8 = torch.float8_e4m3fn
FLOAT8_MOST = 448.0


class HeadRange(NamedTuple):
    """The bytes of a block that move: of each of its ``parts`` equal parts, ``length`` bytes from ``first`` on."""

    parts: int
    first: int
    length: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of a block once packed."""
        return self.parts * self.length


class Place(NamedTuple):
    """Where the bytes that move lie in what is summed: part p of them begins at byte ``p * stride + first``."""

    stride: int
    first: int


class Packed(NamedTuple):
    """Blocks one after another, and their checksums (as :func:`block_sums`, but signed: torch has no wider type)."""

    data: Tensor  # uint8 [blocks, packed bytes]
    sums: Tensor  # int64 [blocks]


class Rows(NamedTuple):
    """One end of a copy: ``cut`` of the rows ``blocks`` [n] of ``memory`` uint8 [*, bytes]; None: the first n rows."""

    memory: Tensor
    blocks: Tensor | None
    cut: HeadRange


def head_range(block_bytes: int, layers: int, heads: int, first: int, last: int) -> HeadRange:
    """KV heads ``first`` to ``last - 1`` of blocks laid out ``[layer][k or v][kv head][line]``.

    A line is all that a block holds for one head: tokens x dim, and whatever scales of a quantised cache lie behind
    them. All heads together are one run of bytes. Raises ValueError where the block or the range cannot be cut so.
    """
    if not 0 <= first < last <= heads or block_bytes % (2 * layers * heads):
        raise ValueError(f"heads {first} to {last} of {heads} in {layers} layers of a block of {block_bytes} bytes")
    if last - first == heads:
        return HeadRange(1, 0, block_bytes)
    line = block_bytes // (2 * layers * heads)
    return HeadRange(2 * layers, first * line, (last - first) * line)


def sum_weights(words: int, device: torch.device | str) -> Tensor:
    """Odd weights of the halves of so many words, int64 [2 * words]: ``(x ^ x >> 32) | 1`` of ``x = (k + 1) * GOLDEN``.

    The product alone is linear in the place k; folding its upper half into the lower one ends that.
    """
    x = torch.arange(1, 2 * words + 1, device=device).mul_(GOLDEN)
    return ((x >> 32) & MASK_32).bitwise_xor_(x).bitwise_or_(1)


def block_sums(words: Tensor, weights: Tensor) -> Tensor:
    """Checksums ``sum-64`` of blocks given as int64 [blocks, words]: int64 [blocks], the unsigned ones' bits.

    A block is seen as 32-bit halves v[k], lower half of each word first, signed; its sum is that of ``v[k] * a[k]``
    modulo 2**64 with the odd weights a[k] of :func:`sum_weights` (multilinear hashing; Carter and Wegman, 1979). Sums
    of disjoint places add up to that of all.

    Whatever changes within one half is always seen: it moves the sum by less than 2**32 times something odd. All else,
    such as words or halves that change places, or one bit, the highest too, that flips in many words, goes unseen for
    about one of 2**33 patterns: a change of v[k] that 2**31 divides still weighs with 33 bits of a[k].
    """
    return (words.contiguous().view(torch.int32).long() * weights).sum(dim=1)


def unsigned(sums: Tensor) -> list[int]:
    """Checksums as the frames have them; waits for the device."""
    values: list[int] = sums.tolist()
    return [value & MASK_64 for value in values]


def packed_sums(data: Tensor) -> Tensor:
    """Checksums of packed blocks, uint8 [blocks, bytes] -> int64 [blocks]."""
    words = data.view(torch.int64)
    return block_sums(words, sum_weights(words.shape[1], words.device))


def copy(source: Rows, target: Rows, count: int, place: Place) -> Tensor:
    """Copy ``count`` blocks; the sums of what moved, int64 [count]: each byte weighs by its ``place``."""
    moved = _taken(source, count)
    parts = _parts(target)
    if target.blocks is None:
        parts[:count] = moved
    else:
        parts.index_copy_(0, target.blocks.long(), moved)
    return _placed_sums(moved, place)


def sums(source: Rows, count: int, place: Place) -> Tensor:
    """The sums of :func:`copy`, without copying."""
    return _placed_sums(_taken(source, count), place)


def _taken(rows: Rows, count: int) -> Tensor:
    parts = _parts(rows)
    return parts[:count] if rows.blocks is None else parts.index_select(0, rows.blocks)


def _placed_sums(moved: Tensor, place: Place) -> Tensor:
    """``moved`` uint8 [blocks, parts, bytes]."""
    parts, length = moved.shape[1:]
    weights = sum_weights(((parts - 1) * place.stride + place.first + length) // 8, moved.device)
    each = weights.as_strided((parts, length // 4), (place.stride // 4, 1), place.first // 4)
    return block_sums(moved.reshape(len(moved), parts * length).view(torch.int64), each.reshape(-1))


def _parts(rows: Rows) -> Tensor:
    cut = rows.cut
    part = rows.memory.shape[1] // cut.parts
    return rows.memory.view(len(rows.memory), cut.parts, part)[:, :, cut.first : cut.first + cut.length]


def layer_kv(pool: Tensor, dtype: torch.dtype, shape: tuple[int, int, int, int, int], layer: int) -> Tensor:
    """One layer of ``pool`` uint8 [blocks, block_bytes], as attention takes it: [blocks, 2, kv_heads, tokens, dim].

    ``shape`` is that of a block: layers, k and v, kv heads, tokens, dim. The view shares the pool's memory.
    """
    tokens, dim = shape[3:]
    values = _lines(pool, shape, layer)[..., : tokens * dim * dtype.itemsize].view(dtype)
    return values.view(*values.shape[:-1], tokens, dim)


def layer_scales(pool: Tensor, shape: tuple[int, int, int, int, int], layer: int) -> Tensor:
    """Scales of one layer of a float8 cache: float32 [blocks, 2, kv_heads, tokens], behind the tokens of each line."""
    tokens, dim = shape[3:]
    return _lines(pool, shape, layer)[..., tokens * dim :].view(torch.float32)


def _lines(pool: Tensor, shape: tuple[int, int, int, int, int], layer: int) -> Tensor:
    return pool.view(pool.shape[0], *shape[:3], -1)[:, layer]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x [..., dim]`` in float8 (e4m3) and its scales, float32 [...]: x is about values times scale.

    The largest of each run of ``dim`` becomes 448, so that a token's KV depends on that token alone and not on what was
    written with it. The error is at most a sixteenth of a value, or 1/1024 of its scale where that is more.
    """
    largest = x.abs().amax(-1).float()
    scales = torch.where(largest > 0, largest / FLOAT8_MOST, 1.0)
    return (x.float() / scales.unsqueeze(-1)).to(FLOAT8), scales


def write_kv(new: Tensor, kv: Tensor, scales: Tensor | None, blocks: Tensor, offsets: Tensor) -> None:
    """Put ``new [tokens, 2, kv_heads, dim]`` at the given blocks and offsets in them (int64 [tokens], no place twice).

    ``kv`` is a layer of the cache (:func:`layer_kv`), ``scales`` those of a float8 one. Waits for no device.
    """
    if scales is None:
        kv[blocks, :, :, offsets] = new.to(kv.dtype)
        return
    values, found = quantise(new)
    kv.view(torch.uint8)[blocks, :, :, offsets] = values.view(torch.uint8)
    scales[blocks, :, :, offsets] = found


def paged_attention(
    q: Tensor, kv: Tensor, tables: Tensor, contexts: Tensor, starts: Tensor, scales: Tensor | None = None
) -> Tensor:
    """Causal grouped-query attention of ragged rows over paged KV: softmax(q k^T / sqrt(dim)) v, row by row.

    ``q [tokens, heads, dim]``: row r has tokens ``starts[r]`` to ``starts[r + 1] - 1``, the last of its ``contexts[r]``
    positions, whose KV is in ``kv [blocks, 2, kv_heads, block_size, dim]`` at the blocks ``tables[r]``. Query head h
    reads KV head ``h // (heads / kv_heads)``. Returns the shape and dtype of ``q``; a row without context is zero.
    A float8 cache comes with its ``scales`` (:func:`layer_scales`) and is attended to in float32.
    """
    dtype = kv.dtype if scales is None else torch.float32
    out = torch.zeros_like(q)
    edges, lengths = starts.tolist(), contexts.tolist()
    for first, last, context, table in zip(edges, edges[1:], lengths, tables.long(), strict=False):
        if last > first and context:
            used = table[: -(-context // kv.shape[3])]
            blocks = kv[used] if scales is None else _widened(kv, scales, used)
            out[first:last] = _attend_row(q[first:last].to(dtype), blocks, context)
    return out


def _widened(kv: Tensor, scales: Tensor, blocks: Tensor) -> Tensor:
    return kv.view(torch.uint8)[blocks].view(kv.dtype).float() * scales[blocks].unsqueeze(-1)


def _attend_row(q: Tensor, blocks: Tensor, context: int) -> Tensor:
    keys, values = blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :context]
    positions = torch.arange(context, device=q.device)
    seen = positions <= positions[context - q.shape[0] :, None]
    queries = q.transpose(0, 1).unsqueeze(0)
    attended = functional.scaled_dot_product_attention(queries, keys, values, seen, enable_gqa=True)
    return attended[0].transpose(0, 1)
