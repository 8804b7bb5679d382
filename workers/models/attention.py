"""Attention over a paged KV pool, for steps that mix decoding sequences with chunks of prompts: the way of CPUs.

What the model needs of it is a :class:`StepAttention`; kernel_kv.py makes the same by kernels.

The pool is block-major and head-major: ``[block][layer][k or v][kv head][token][dim]``. Seen as *lines* of one (block,
layer, k or v, head), each ``block_size * head_dim`` elements in a run, the KV of a sequence is gathered straight into
``[k or v][kv head][position][dim]`` by one ``index_select``; seen as *slots* of ``head_dim`` elements, new KV is
written by one ``index_copy_``. A layer's indices are those of layer 0 plus a constant.

Grouped-query attention: the ``group`` query heads that share a KV head are folded into the query positions, so KV is
never repeated. Decoding rows of similar context are attended together, as many as keep their gathered KV in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from twinpool.workers.models.config import DTypeName, LlamaConfig
from twinpool.workers.models.kv_layout import DTYPES, KvLayout, kv_layout

_MOST_PADDING = 1.25  # longest to shortest context within a group of decoding rows
_GROUP_BYTES = 3 << 20  # gathered KV of a group, measured: more does not stay in a core's caches
_QUERY_BLOCK = 64  # queries of a chunk that share one bound on their keys: skips most of what the mask hides
_CAUSAL_FROM = 768  # tokens of a prompt from which torch's own causal kernel is the faster one (larger tiles)


class Span(NamedTuple):
    """One row of a step: new ``tokens`` after ``start`` computed ones, and the block table that covers them."""

    tokens: int
    start: int
    table: Sequence[int]


class StepAttention(NamedTuple):
    """The attention of one step, for all its layers."""

    positions: Tensor  # int64 [tokens], of the step's tokens in order
    # (layer, q [tokens, heads, dim], kv [tokens, 2, kv_heads, dim]), both rotated: writes the layer's kv into the pool
    # and attends to it and what was there. [tokens, heads * dim] in the dtype of q.
    attend: Callable[[int, Tensor, Tensor], Tensor]


class KvCache(Protocol):
    """The KV pool as the engine uses it; not for use by two threads at once."""

    layout: KvLayout
    blocks: int
    block_size: int

    def step(self, spans: Sequence[Span]) -> StepAttention:
        """Plan a step. Decoding rows (one token) come first, longest context first: see :func:`attention_order`."""
        ...


def check_pool(pool: Tensor, layout: KvLayout) -> None:
    """Raises ValueError where ``pool`` is not contiguous uint8 [blocks, block_bytes] of the layout."""
    if pool.dtype != torch.uint8 or pool.dim() != 2 or pool.shape[1] != layout.block_bytes:
        raise ValueError(f"the pool is {list(pool.shape)} of {pool.dtype}, not uint8 [blocks, {layout.block_bytes}]")
    if not pool.is_contiguous():
        raise ValueError("the pool is not contiguous")


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Decoding rows that are attended together: tokens ``first`` to ``last`` of the step."""

    first: int
    last: int
    lines: Tensor  # [rows * 2 * kv_heads * blocks], of layer 0
    context: int  # of the longest row, tokens
    mask: Tensor | None  # [rows, 1, 1, context], 0 or -inf; None where all contexts are equal


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A chunk of a prompt: tokens ``first`` to ``last`` of the step, after ``past`` computed ones."""

    first: int
    last: int
    past: int
    lines: Tensor | None  # [2 * kv_heads * blocks] of the past, of layer 0; None without a past
    mask: Tensor | None  # [group * query block, keys], 0 or -inf, for any query block by its last columns; None: causal


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Where the tokens of a step lie and what each attends to. Made once a step, used by all layers."""

    positions: Tensor  # [tokens]
    slots: Tensor  # [tokens * 2 * kv_heads], of layer 0
    decodes: tuple[_Decodes, ...]
    chunks: tuple[_Chunk, ...]


class PagedKv:
    """The KV pool as tensors, in the dtypes that torch computes attention in. Borrows ``pool``; is a ``KvCache``."""

    def __init__(self, pool: Tensor, config: LlamaConfig, dtype: DTypeName, block_size: int) -> None:
        """``pool`` uint8 [blocks, block_bytes], contiguous. Raises ValueError where it does not fit the layout."""
        layout = kv_layout(config, dtype, block_size)
        check_pool(pool, layout)
        self.layout = layout
        self.blocks = pool.shape[0]
        self.block_size = block_size
        self._device = pool.device
        self._heads = config.kv_heads
        self._group = config.heads // config.kv_heads
        self._dim = config.head_dim
        self._dtype = DTYPES[dtype]
        elements = pool.view(-1).view(self._dtype)
        self._slots = elements.view(-1, config.head_dim)
        self._lines = elements.view(-1, block_size * config.head_dim)
        self._scratch = self._lines.new_empty(0, self._lines.shape[1])
        self._block_lines = config.layers * 2 * config.kv_heads
        self._causal_from = _CAUSAL_FROM
        self._part_lines = torch.arange(2 * config.kv_heads, device=pool.device)

    # ---- planning ----------------------------------------------------------------------------------------------

    def step(self, spans: Sequence[Span]) -> StepAttention:
        """See ``KvCache``."""
        plan = self.plan(spans)
        return StepAttention(plan.positions, partial(self.attend, plan))

    def plan(self, spans: Sequence[Span]) -> StepPlan:
        """Plan a step of rows in the order of :func:`attention_order`."""
        decodes = sum(1 for span in spans if span.tokens == 1)
        flat = torch.tensor([block for span in spans for block in span.table], dtype=torch.int64)
        tables = flat.to(self._device).split([len(span.table) for span in spans])
        positions = [torch.arange(s.start, s.start + s.tokens, device=self._device) for s in spans]
        slots = [self._slots_of(table, at) for table, at in zip(tables, positions, strict=True)]
        return StepPlan(
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            decodes=tuple(self._plan_decodes(spans[:decodes], tables[:decodes])),
            chunks=tuple(self._plan_chunks(spans[decodes:], tables[decodes:], decodes)),
        )

    def _slots_of(self, table: Tensor, positions: Tensor) -> Tensor:
        lines = table[positions // self.block_size].mul_(self._block_lines).unsqueeze(1) + self._part_lines
        return lines.mul_(self.block_size).add_((positions % self.block_size).unsqueeze(1)).view(-1)

    def _lines_of(self, table: Tensor) -> Tensor:
        """``table [..., blocks]`` -> line indices of layer 0, flat, in the order [...][k or v][kv head][block]."""
        return ((table * self._block_lines).unsqueeze(-2) + self._part_lines.unsqueeze(-1)).view(-1)

    def _plan_decodes(self, spans: Sequence[Span], tables: Sequence[Tensor]) -> list[_Decodes]:
        token_bytes = 2 * self._heads * self._dim * self._dtype.itemsize
        groups: list[_Decodes] = []
        first = 0
        while first < len(spans):
            longest = spans[first].start + 1
            most = max(1, _GROUP_BYTES // (longest * token_bytes))
            last = first + 1
            while last < len(spans) and last - first < most and longest <= _MOST_PADDING * (spans[last].start + 1):
                last += 1
            groups.append(self._plan_group(spans, tables, first, last))
            first = last
        return groups

    def _plan_group(self, spans: Sequence[Span], tables: Sequence[Tensor], first: int, last: int) -> _Decodes:
        contexts = [span.start + 1 for span in spans[first:last]]
        longest = contexts[0]
        blocks = -(-longest // self.block_size)
        # Rows that are shorter repeat their first block: the mask hides it, and it holds no NaN.
        table = torch.stack([self._padded(tables[row], contexts[row - first], blocks) for row in range(first, last)])
        mask = None
        if contexts[-1] != longest:
            keys = torch.arange(longest, device=self._device)
            hidden = keys >= torch.tensor(contexts, device=self._device).unsqueeze(1)
            mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None, None, :]
        return _Decodes(first, last, self._lines_of(table), longest, mask)

    def _padded(self, table: Tensor, context: int, blocks: int) -> Tensor:
        own = -(-context // self.block_size)
        return table[:blocks] if own == blocks else torch.cat((table[:own], table[:1].expand(blocks - own)))

    def _plan_chunks(self, spans: Sequence[Span], tables: Sequence[Tensor], first: int) -> list[_Chunk]:
        chunks: list[_Chunk] = []
        for span, table in zip(spans, tables, strict=True):
            past_blocks = -(-span.start // self.block_size)
            lines = self._lines_of(table[:past_blocks]) if span.start else None
            causal = span.start == 0 and span.tokens >= self._causal_from
            mask = None if causal else self._chunk_mask(span.start + span.tokens, min(_QUERY_BLOCK, span.tokens))
            chunks.append(_Chunk(first, first + span.tokens, span.start, lines, mask))
            first += span.tokens
        return chunks

    def _chunk_mask(self, keys: int, queries: int) -> Tensor:
        """[queries * group, keys]: query t of the last ``queries`` sees the keys up to its own."""
        mask = torch.zeros(queries, keys, dtype=self._dtype, device=self._device)
        mask[:, keys - queries :].fill_(-torch.inf).triu_(1)
        return mask.repeat_interleave(self._group, 0)

    # ---- a layer -----------------------------------------------------------------------------------------------

    def attend(self, plan: StepPlan, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """See ``StepAttention``."""
        offset = layer * 2 * self._heads
        kv = kv.to(self._dtype)
        self._slots.index_copy_(0, plan.slots + offset * self.block_size, kv.reshape(-1, self._dim))
        folded = q.to(self._dtype).view(q.shape[0], self._heads, self._group, self._dim)
        out = torch.empty_like(folded, memory_format=torch.contiguous_format)
        for group in plan.decodes:
            self._attend_decodes(group, offset, folded, out[group.first : group.last])
        for chunk in plan.chunks:
            own = slice(chunk.first, chunk.last)
            keys, values = self._keys_values(chunk, offset, kv[own])
            attend = self._attend_causal if chunk.mask is None else self._attend_masked
            attend(chunk, folded[own], keys, values, out[own])
        return out.view(q.shape[0], -1).to(q.dtype)

    def _attend_decodes(self, group: _Decodes, offset: int, q: Tensor, out: Tensor) -> None:
        rows = group.last - group.first
        past = self._gather(group.lines + offset).view(rows, 2, self._heads, -1, self._dim)[:, :, :, : group.context]
        queries = q[group.first : group.last]
        out.copy_(functional.scaled_dot_product_attention(queries, past[:, 0], past[:, 1], group.mask))

    def _attend_causal(self, chunk: _Chunk, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """A whole prompt at once: query heads of a group as a batch over the same KV."""
        queries = q.permute(2, 1, 0, 3)
        keys, values = keys.expand(self._group, -1, -1, -1), values.expand(self._group, -1, -1, -1)
        attended = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        out.copy_(attended.permute(2, 1, 0, 3))

    def _attend_masked(self, chunk: _Chunk, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        """Query blocks one after another, each over the keys up to its last query."""
        assert chunk.mask is not None
        count = q.shape[0]
        width = chunk.mask.shape[0] // self._group
        queries = q.transpose(0, 1).reshape(1, self._heads, count * self._group, self._dim)
        for start in range(0, count, width):
            stop = min(start + width, count)
            seen = chunk.past + stop
            mask = chunk.mask[-(stop - start) * self._group :, chunk.mask.shape[1] - seen :]
            rows = queries[:, :, start * self._group : stop * self._group]
            attended = functional.scaled_dot_product_attention(rows, keys[:, :, :seen], values[:, :, :seen], mask)
            folded = attended.view(self._heads, stop - start, self._group, self._dim)
            out[start:stop] = folded.transpose(0, 1)

    def _keys_values(self, chunk: _Chunk, offset: int, kv: Tensor) -> Tensor:
        """[2, 1, kv_heads, past + tokens, dim]: the past from the pool, the chunk's own as just computed."""
        own = kv.permute(1, 2, 0, 3)
        if chunk.lines is None:
            return own.contiguous().unsqueeze(1)
        past = self._gather(chunk.lines + offset).view(2, self._heads, -1, self._dim)[:, :, : chunk.past]
        return torch.cat((past, own), 2).unsqueeze(1)

    def _gather(self, lines: Tensor) -> Tensor:
        """The lines one after another, in a buffer that the next gather overwrites: fresh memory costs page faults."""
        if self._scratch.shape[0] < lines.shape[0]:
            self._scratch = self._lines.new_empty(lines.shape[0], self._lines.shape[1])
        return torch.index_select(self._lines, 0, lines, out=self._scratch[: lines.shape[0]])


def attention_order(counts: Sequence[int], starts: Sequence[int]) -> list[int]:
    """Indices of rows in the order :meth:`KvCache.step` takes them: decodes by falling context, then chunks."""
    return sorted(range(len(counts)), key=lambda row: (counts[row] != 1, -starts[row] if counts[row] == 1 else 0))
