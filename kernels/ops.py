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
from twinpool.kernels.reference import HeadRange, Packed, head_range, layer_kv, layer_scales, write_kv

__all__ = ["HeadRange", "Packed", "gather_blocks", "head_range", "layer_kv", "layer_scales", "paged_decode",
           "paged_prefill", "scatter_blocks", "write_kv"]  # fmt: skip

_INDEX = (torch.int32, torch.int64)


def gather_blocks(pool: Tensor, blocks: Tensor, cut: HeadRange | None = None, out: Tensor | None = None) -> Packed:
    """Pack rows ``blocks`` (int32 or int64 [n]) of ``pool`` uint8 [*, block_bytes], and sum each, in one pass.

    ``cut`` limits it to a range of heads (:func:`head_range`); ``out`` uint8 [n, packed bytes] is filled where given.
    Raises ValueError where shapes do not fit or sizes are no multiples of 8 bytes.
    """
    cut = cut or HeadRange(1, 0, pool.shape[1])
    if out is None:
        out = pool.new_empty(blocks.shape[0], cut.packed_bytes)
    _check_copy(pool, blocks, cut, out)
    if not pool.is_cuda:
        return Packed(out, reference.gather(pool, blocks, cut, out))
    from twinpool.kernels import blocks as kernels

    with torch.cuda.device(pool.device):  # triton launches on the current one, whatever its arguments are on
        return Packed(out, kernels.gather(pool, blocks, cut, out))


def scatter_blocks(packed: Packed, pool: Tensor, blocks: Tensor, cut: HeadRange | None = None) -> Tensor:
    """Write packed blocks to rows ``blocks`` (no row twice) of the pool; bool [n]: does what came match its sum?

    A block that does not match is written all the same: it must not be used. ``packed.sums`` are those that
    :func:`gather_blocks` gave where the blocks come from, for the same ``cut``. Raises as it does.
    """
    cut = cut or HeadRange(1, 0, pool.shape[1])
    _check_copy(pool, blocks, cut, packed.data)
    if not pool.is_cuda:
        return reference.scatter(packed.data, pool, blocks, cut) == packed.sums
    from twinpool.kernels import blocks as kernels

    with torch.cuda.device(pool.device):
        return kernels.scatter(packed.data, pool, blocks, cut) == packed.sums


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


def _check_copy(pool: Tensor, blocks: Tensor, cut: HeadRange, data: Tensor) -> None:
    if any(tensor.dtype != torch.uint8 or not tensor.is_contiguous() for tensor in (pool, data)):
        raise ValueError("the pool and the packed blocks must be contiguous bytes")
    _check_numbers("blocks", blocks, blocks.numel())
    if pool.dim() != 2 or data.shape != (blocks.shape[0], cut.packed_bytes):
        raise ValueError(f"{list(data.shape)} packed bytes for {list(blocks.shape)} blocks of {cut}")
    part, rest = divmod(pool.shape[1], cut.parts)
    if rest or part % 8 or cut.first % 8 or cut.length % 8 or cut.first + cut.length > part:
        raise ValueError(f"a block of {pool.shape[1]} bytes cannot be cut by {cut} into 64-bit words")


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
