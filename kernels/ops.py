"""The kernels behind one door: Triton for tensors on a CUDA device, the torch reference for all others.

Nothing here waits for the device, or looks at what a tensor on it holds: block numbers, contexts and tables are the
caller's responsibility. Triton is imported when the first CUDA tensor comes (extra ``gpu``).

KV lies as the engine of this project keeps it (workers/models/attention.py): a block is
``[layer][k or v][kv head][token][dim]``. Attention takes one layer of it, ``[blocks, 2, kv_heads, block_size, dim]``
(:func:`layer_kv`), by its strides, so other orders of blocks, heads and tokens will do where dim is contiguous. A line
(one head of one k or v) of a float8 cache ends in its scales, float32, one a token (:func:`layer_scales`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from twinpool.kernels import reference
from twinpool.kernels.reference import (
    HeadRange,
    Packed,
    Place,
    Rows,
    head_range,
    layer_kv,
    layer_scales,
    write_kv,
)

__all__ = ["HeadRange", "Packed", "Place", "Rows", "copy_blocks", "gather_blocks", "head_range", "layer_kv",
           "layer_scales", "paged_decode", "paged_prefill", "scatter_blocks", "sum_blocks", "write_kv"]  # fmt: skip

_INDEX = (torch.int32, torch.int64)


def copy_blocks(source: Rows, target: Rows, count: int, place: Place) -> Tensor:
    """Copy ``count`` blocks in one pass; the sum of each as it was written, int64 [count], every byte by its ``place``.

    Both ends have as many parts, equally long; no row of the target comes twice. They may be on different GPUs, or in
    another process's memory mapped here: the target's GPU copies. Raises ValueError where shapes do not fit or sizes
    are no multiples of 8 bytes.
    """
    _check_rows(source, count, place)
    _check_rows(target, count, place)
    if source.cut[::2] != target.cut[::2]:
        raise ValueError(f"{source.cut} cannot be copied to {target.cut}")
    if not target.memory.is_cuda:
        return reference.copy(source, target, count, place)
    from twinpool.kernels import blocks as kernels

    with torch.cuda.device(target.memory.device):  # triton launches on the current one, whatever its arguments are on
        return kernels.copy(source, target, count, place)


def sum_blocks(source: Rows, count: int, place: Place) -> Tensor:
    """The sums of :func:`copy_blocks`, without copying. Raises as it does."""
    _check_rows(source, count, place)
    if not source.memory.is_cuda:
        return reference.sums(source, count, place)
    from twinpool.kernels import blocks as kernels

    with torch.cuda.device(source.memory.device):
        return kernels.sums(source, count, place)


def gather_blocks(pool: Tensor, blocks: Tensor, cut: HeadRange | None = None, out: Tensor | None = None) -> Packed:
    """Pack rows ``blocks`` (int32 or int64 [n]) of ``pool`` uint8 [*, block_bytes], and sum each, in one pass.

    ``cut`` limits it to a range of heads (:func:`head_range`); ``out`` uint8 [n, packed bytes] is filled where given.
    The places of the sums are those in ``out``. Raises as :func:`copy_blocks` does.
    """
    cut = cut or HeadRange(1, 0, pool.shape[1])
    if out is None:
        out = pool.new_empty(blocks.shape[0], cut.packed_bytes)
    packed, place = _packed(out, blocks, cut)
    return Packed(out, copy_blocks(Rows(pool, blocks, cut), packed, blocks.shape[0], place))


def scatter_blocks(packed: Packed, pool: Tensor, blocks: Tensor, cut: HeadRange | None = None) -> Tensor:
    """Write packed blocks to rows ``blocks`` (no row twice) of the pool; bool [n]: does what came match its sum?

    A block that does not match is written all the same: it must not be used. ``packed.sums`` are those that
    :func:`gather_blocks` gave where the blocks come from, for the same ``cut``. Raises as it does.
    """
    cut = cut or HeadRange(1, 0, pool.shape[1])
    source, place = _packed(packed.data, blocks, cut)
    return copy_blocks(source, Rows(pool, blocks, cut), blocks.shape[0], place) == packed.sums


def paged_decode(q: Tensor, kv: Tensor, tables: Tensor, contexts: Tensor, scales: Tensor | None = None) -> Tensor:
    """Attention of one new token a row: ``q [rows, heads, dim]`` -> the same shape and dtype.

    ``tables [rows, width]`` and ``contexts [rows]`` are int32 or int64; a context counts the new token, whose KV is in
    ``kv`` already. The rest is as in :func:`twinpool.kernels.reference.paged_attention`. Raises ValueError where
    shapes do not fit.
    """
    _check_attention(q, kv, tables, contexts, scales)
    if not q.is_cuda:
        return reference.paged_attention(q, kv, tables, contexts, torch.arange(q.shape[0] + 1), scales)
    from twinpool.kernels import attention as kernels

    with torch.cuda.device(q.device):
        return kernels.paged_decode(q, kv, tables, contexts, scales)


def paged_prefill(
    q: Tensor,
    kv: Tensor,
    tables: Tensor,
    contexts: Tensor,
    starts: Tensor,
    longest: int,
    scales: Tensor | None = None,
) -> Tensor:
    """Attention of a chunk of new tokens a row: ``q [tokens, heads, dim]`` -> the same shape and dtype.

    ``starts [rows + 1]`` says where in ``q`` each row's chunk begins; ``longest`` is the most tokens that one has. The
    rest is as in :func:`paged_decode`.
    """
    _check_attention(q, kv, tables, contexts, scales)
    _check_numbers("starts", starts, tables.shape[0] + 1)
    if not q.is_cuda:
        return reference.paged_attention(q, kv, tables, contexts, starts, scales)
    from twinpool.kernels import attention as kernels

    with torch.cuda.device(q.device):
        return kernels.paged_prefill(q, kv, tables, contexts, starts, longest, scales)


def _packed(data: Tensor, blocks: Tensor, cut: HeadRange) -> tuple[Rows, Place]:
    """Packed blocks as one end of a copy."""
    _check_numbers("blocks", blocks, blocks.numel())
    if data.shape != (blocks.shape[0], cut.packed_bytes):
        raise ValueError(f"{list(data.shape)} packed bytes for {list(blocks.shape)} blocks of {cut}")
    return Rows(data, None, HeadRange(cut.parts, 0, cut.length)), Place(cut.length, 0)


def _check_rows(rows: Rows, count: int, place: Place) -> None:
    memory, blocks, cut = rows
    if memory.dtype != torch.uint8 or memory.dim() != 2 or not memory.is_contiguous():
        raise ValueError("the pool and the packed blocks must be contiguous bytes")
    if blocks is None and memory.shape[0] < count:
        raise ValueError(f"{count} packed blocks cannot be among {memory.shape[0]}")
    if blocks is not None:
        _check_numbers("blocks", blocks, count)
    part, rest = divmod(memory.shape[1], cut.parts)
    sizes = (part, cut.first, cut.length, *place)
    if rest or cut.length < 1 or cut.first + cut.length > part or any(size % 8 for size in sizes):
        raise ValueError(f"a block of {memory.shape[1]} bytes cannot be cut by {cut} into 64-bit words at {place}")


def _check_attention(q: Tensor, kv: Tensor, tables: Tensor, contexts: Tensor, scales: Tensor | None) -> None:
    if q.dim() != 3 or kv.dim() != 5 or kv.shape[1] != 2 or q.shape[2] != kv.shape[4] or q.shape[1] % kv.shape[2]:
        raise ValueError(f"queries {list(q.shape)} do not fit KV {list(kv.shape)}")
    if q.stride(2) != 1 or kv.stride(4) != 1 or tables.stride(1) != 1:
        raise ValueError("queries, KV and block tables must be contiguous in their last dimension")
    if (scales is None) == (kv.dtype == reference.FLOAT8):
        raise ValueError(f"KV of {kv.dtype} comes {'without' if scales is None else 'with'} scales")
    if scales is not None:
        _check_scales(scales, kv)
    if tables.dtype not in _INDEX:
        raise ValueError(f"block tables must be int32 or int64, not {tables.dtype}")
    _check_numbers("contexts", contexts, tables.shape[0])


def _check_scales(scales: Tensor, kv: Tensor) -> None:
    """Kernels step through scales as through the lines that these lie in: see ``layer_scales``."""
    fits = scales.shape == kv.shape[:4] and scales.dtype == torch.float32
    wanted = (*(stride // 4 for stride in kv.stride()[:3]), 1)
    if not fits or any(size > 1 and scales.stride(at) != wanted[at] for at, size in enumerate(scales.shape)):
        said = f"{list(scales.shape)} of {scales.dtype} with strides {list(scales.stride())}"
        raise ValueError(f"scales {said} do not fit KV {list(kv.shape)} with strides {list(kv.stride())}")


def _check_numbers(name: str, numbers: Tensor, count: int) -> None:
    """Kernels read such a column by its address alone."""
    if numbers.dtype not in _INDEX or numbers.shape != (count,) or not numbers.is_contiguous():
        said = f"{list(numbers.shape)} of {numbers.dtype} with strides {list(numbers.stride())}"
        raise ValueError(f"{name} must be {count} contiguous numbers, int32 or int64, not {said}")
