"""What the kernels compute, in plain torch on any device: the reference they are tested against, and the CPU path."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MASK_64 = (1 << 64) - 1
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


class Packed(NamedTuple):
    """Blocks one after another, and their checksums (as :func:`block_sums`, but signed: torch has no wider type)."""

    data: Tensor  # uint8 [blocks, packed bytes]
    sums: Tensor  # int64 [blocks]


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
    """Odd weights ``2 i + 1`` of the block checksum: int64 [words]."""
    return torch.arange(words, device=device).mul_(2).add_(1)


def block_sums(words: Tensor, weights: Tensor) -> list[int]:
    """Checksums of blocks given as int64 [blocks, words]: ``sum of w[i] * (2 i + 1) mod 2**64``, as unsigned ints.

    The odd weights are invertible, so any one changed word changes the sum, and so do most words that change places.
    One parallel reduction, and one wait for the device.
    """
    sums: list[int] = (words * weights).sum(dim=1).tolist()
    return [value & MASK_64 for value in sums]


def packed_sums(data: Tensor) -> Tensor:
    """Checksums of packed blocks, uint8 [blocks, bytes] -> int64 [blocks]: :func:`block_sums` without the wait."""
    words = data.view(torch.int64)
    return (words * sum_weights(words.shape[1], words.device)).sum(dim=1)


def gather(pool: Tensor, blocks: Tensor, cut: HeadRange, out: Tensor) -> Tensor:
    """Pack ``cut`` of ``pool`` uint8 [*, block_bytes] rows ``blocks`` [n] into ``out`` uint8 [n, packed bytes].

    Returns the checksums of what was packed, int64 [n].
    """
    parts = out.view(out.shape[0], cut.parts, cut.length)
    torch.index_select(_parts(pool, cut), 0, blocks, out=parts)
    return packed_sums(out)


def scatter(data: Tensor, pool: Tensor, blocks: Tensor, cut: HeadRange) -> Tensor:
    """The reverse of :func:`gather`: ``data`` uint8 [n, packed bytes] into the pool. Returns the sums of ``data``."""
    _parts(pool, cut).index_copy_(0, blocks.long(), data.view(data.shape[0], cut.parts, cut.length))
    return packed_sums(data)


def _parts(pool: Tensor, cut: HeadRange) -> Tensor:
    return pool.view(pool.shape[0], cut.parts, -1)[:, :, cut.first : cut.first + cut.length]


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
