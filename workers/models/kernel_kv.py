"""Attention over the paged KV pool by the project's kernels (kernels/ops.py): the way of CUDA, and of float8 anywhere.

What a step needs of its tokens (positions, where their KV goes, block tables, contexts) are a few columns of numbers.
They are made in host memory and brought over without a wait; or they stand in buffers that a CUDA graph was captured
with (engine/decode.py), which is why all that a layer does here depends on shapes alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from twinpool.kernels import ops
from twinpool.workers.models.attention import Span, StepAttention, check_pool
from twinpool.workers.models.config import LlamaConfig
from twinpool.workers.models.kv_layout import KV_DTYPES, KvDTypeName, kv_layout
from twinpool.workers.staging import upload, upload_list

_WIDTH_STEP = 16  # blocks: widths of tables vary, and so would the sizes of what attention allocates


class PagedRows(NamedTuple):
    """Rows of a kind: their block tables and contexts, in memory of their own (kernels like it aligned)."""

    tables: Tensor  # int32 [rows, width]
    contexts: Tensor  # int32 [rows], with the new tokens


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """The tokens of a step on the device: those of decoding rows, then those of chunks."""

    positions: Tensor  # int64 [tokens]
    blocks: Tensor  # int64 [tokens]: where the KV of each goes,
    offsets: Tensor  # int64 [tokens]: and where in that block
    decodes: PagedRows | None
    chunks: PagedRows | None = None
    starts: Tensor | None = None  # int32 [chunks + 1], in the tokens of chunks
    longest: int = 0  # tokens of a chunk


class KernelKv:
    """The KV pool as kernels see it, on any device. Borrows ``pool``; implements ``KvCache``."""

    def __init__(self, pool: Tensor, config: LlamaConfig, dtype: KvDTypeName, block_size: int) -> None:
        """``pool`` uint8 [blocks, block_bytes], contiguous. Raises ValueError where it does not fit the layout."""
        self.layout = layout = kv_layout(config, dtype, block_size)
        check_pool(pool, layout)
        self.blocks = pool.shape[0]
        self.block_size = block_size
        self.device = pool.device
        layers, shape = range(config.layers), layout.shape
        self._layers = [ops.layer_kv(pool, KV_DTYPES[dtype], shape, layer) for layer in layers]
        scaled = dtype == "float8_e4m3"
        self._scales = [ops.layer_scales(pool, shape, layer) if scaled else None for layer in layers]

    def step(self, spans: Sequence[Span]) -> StepAttention:
        """See ``KvCache``."""
        plan = self.plan(spans)
        return StepAttention(plan.positions, partial(self.attend, plan))

    def plan(self, spans: Sequence[Span]) -> KernelPlan:
        """Plan a step of rows in the order of ``attention_order``; waits for no device."""
        at = [torch.arange(span.start, span.start + span.tokens) for span in spans]
        blocks = [_used(span, self.block_size)[own // self.block_size] for span, own in zip(spans, at, strict=True)]
        positions = torch.cat(at)
        decodes = [span for span in spans if span.tokens == 1]
        chunks = spans[len(decodes) :]
        starts = list(accumulate((span.tokens for span in chunks), initial=0))
        return KernelPlan(
            positions=upload(positions, self.device),
            blocks=upload(torch.cat(blocks).long(), self.device),
            offsets=upload(positions % self.block_size, self.device),
            decodes=self._rows(decodes),
            chunks=self._rows(chunks),
            starts=upload_list(starts, torch.int32, self.device),
            longest=max((span.tokens for span in chunks), default=0),
        )

    def _rows(self, spans: Sequence[Span]) -> PagedRows | None:
        if not spans:
            return None
        contexts = [span.start + span.tokens for span in spans]
        width = -(-max(contexts) // (self.block_size * _WIDTH_STEP)) * _WIDTH_STEP
        tables = torch.zeros(len(spans), width, dtype=torch.int32)
        fill_tables(tables, spans, self.block_size)
        return PagedRows(upload(tables, self.device), upload_list(contexts, torch.int32, self.device))

    def attend(self, plan: KernelPlan, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """See ``StepAttention``. One write of all new KV, then a kernel for decoding rows and one for chunks."""
        cache, scales = self._layers[layer], self._scales[layer]
        ops.write_kv(kv, cache, scales, plan.blocks, plan.offsets)
        parts = []
        edge = 0
        if plan.decodes is not None:
            edge = plan.decodes.contexts.shape[0]
            parts.append(ops.paged_decode(q[:edge], cache, *plan.decodes, scales))
        if plan.chunks is not None and plan.starts is not None:
            parts.append(ops.paged_prefill(q[edge:], cache, *plan.chunks, plan.starts, plan.longest, scales))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)


def fill_tables(tables: Tensor, spans: Sequence[Span], block_size: int) -> None:
    """Write the blocks that each span needs to its row of ``tables``, int32 [spans, at least as many], on the host."""
    for row, span in zip(tables, spans, strict=True):
        used = _used(span, block_size)
        row[: len(used)] = used


def _used(span: Span, block_size: int) -> Tensor:
    """The blocks of a span that its tokens reach into, int32."""
    count = -(-(span.start + span.tokens) // block_size)
    return torch.frombuffer(array("i", span.table[:count]), dtype=torch.int32)
