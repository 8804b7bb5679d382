"""Random shapes for the kernels, and the comparison of each kernel with its reference, on any device.

Triton is imported by the comparisons themselves: where it is imported first, it decides to compile or to interpret.
"""

from __future__ import annotations

import itertools
import random
from typing import NamedTuple

import torch
from torch import Tensor

from twinpool.kernels import reference
from twinpool.kernels.reference import HeadRange, Place, Rows, head_range

_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
_NOT_A_BLOCK = 1 << 30  # stands in block tables where nothing may read it


class CopyCase(NamedTuple):
    """Blocks of a pool, in runs and singly, and what of each moves."""

    pool: Tensor
    blocks: Tensor
    cut: HeadRange


class AttentionCase(NamedTuple):
    """Rows of a batch; each has its last ``starts[r + 1] - starts[r]`` tokens in ``q``."""

    q: Tensor
    kv: Tensor
    tables: Tensor
    contexts: Tensor
    starts: Tensor
    longest: int
    scales: Tensor | None = None


def copy_case(seed: int, device: str) -> CopyCase:
    """Lines of any dtype, some with the scales of a quantised cache behind them, some not of 16 bytes."""
    rng = random.Random(seed)
    layers, heads, tokens = rng.randint(1, 3), rng.randint(1, 6), rng.choice((1, 4, 8, 16))
    itemsize, scales = rng.choice(((1, 0), (1, 4), (2, 0), (4, 0)))
    line = tokens * (8 * rng.choice((1, 2, 3, 8, 16)) * itemsize + 2 * scales)
    pool = torch.randint(0, 256, (rng.randint(1, 24), layers * 2 * heads * line), dtype=torch.uint8)
    last = rng.randint(1, heads)
    cut = head_range(pool.shape[1], layers, heads, rng.choice((0, rng.randrange(last))), last)
    return CopyCase(pool.to(device), torch.tensor(_some_blocks(rng, len(pool)), dtype=torch.int64, device=device), cut)


def _some_blocks(rng: random.Random, count: int) -> list[int]:
    """Different blocks, at most 8: neighbours in runs, the runs in any order."""
    edges = sorted(rng.sample(range(count), min(count, rng.randint(0, 3))))
    runs = [list(range(first, last)) for first, last in itertools.pairwise([0, *edges, count])]
    rng.shuffle(runs)
    return [block for run in runs for block in run][: rng.randint(0, 8)]


def attention_case(seed: int, device: str, decode: bool, float8: bool = False) -> AttentionCase:
    """One layer of a pool in which all that must not be read is NaN, or no block at all."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(tuple(_TOLERANCE))
    rows, kv_heads = rng.randint(1, 3), rng.randint(1, 2)
    dim, size = rng.choice((16, 32, 64, 80)), rng.choice((4, 16, 24))
    heads = kv_heads * rng.choice((1, 2, 3, 4, 8))
    chunks = [1 if decode else rng.randint(0, 24) for _ in range(rows)]
    contexts = [rng.choice((chunk, rng.randint(chunk, 160))) for chunk in chunks]
    if decode and rng.random() < 0.2:
        contexts[-1] = 0  # a row that only fills the batch
    tables = _tables(rng, contexts, size)
    layers, layer = 2, rng.randint(0, 1)
    used = sum(table < _NOT_A_BLOCK for table in itertools.chain(*tables))
    pool = torch.full((used + 2, layers, 2, kv_heads, size, dim), torch.nan, dtype=dtype)
    for table, context in zip(tables, contexts, strict=True):
        for position in range(context):
            pool[table[position // size], layer, :, :, position % size] = torch.randn(2, kv_heads, dim)
    projected = torch.randn(sum(chunks), heads + 2 * kv_heads, dim).to(dtype)
    index = rng.choice((torch.int32, torch.int64))
    starts = list(itertools.accumulate(chunks, initial=0))
    kv, scales = pool.to(device)[:, layer], None
    if float8:
        kv, scales = _float8(kv)
    return AttentionCase(
        q=projected.to(device)[:, :heads],
        kv=kv,
        tables=torch.tensor(tables, dtype=index, device=device),
        contexts=torch.tensor(contexts, dtype=index, device=device),
        starts=torch.tensor(starts, dtype=index, device=device),
        longest=max(chunks),
        scales=scales,
    )


def _float8(kv: Tensor) -> tuple[Tensor, Tensor]:
    """``kv`` in lines of float8 with their scales behind them, as they lie in a pool; NaN stays NaN."""
    blocks, _, heads, tokens, dim = kv.shape
    pool = torch.zeros(blocks, 2 * heads * tokens * (dim + 4), dtype=torch.uint8, device=kv.device)
    shape = (1, 2, heads, tokens, dim)
    place, scales = reference.layer_kv(pool, reference.FLOAT8, shape, 0), reference.layer_scales(pool, shape, 0)
    values, found = reference.quantise(kv)
    place.copy_(values)
    scales.copy_(found)
    return place, scales


def _tables(rng: random.Random, contexts: list[int], size: int) -> list[list[int]]:
    counts = [-(-context // size) for context in contexts]
    blocks = rng.sample(range(sum(counts) + 2), sum(counts))
    width = max(1, *counts) + rng.randint(0, 2)
    taken = iter(blocks)
    return [[*itertools.islice(taken, count), *[_NOT_A_BLOCK] * (width - count)] for count in counts]


def compare_gather(seed: int, device: str = "cpu") -> None:
    pool, blocks, cut = copy_case(seed, device)
    out = torch.zeros(len(blocks), cut.packed_bytes, dtype=torch.uint8, device=device)
    packed = Rows(out, None, HeadRange(cut.parts, 0, cut.length))
    _compare_copy(Rows(pool, blocks, cut), packed, Place(cut.length, 0))


def compare_scatter(seed: int, device: str = "cpu") -> None:
    pool, blocks, cut = copy_case(seed, device)
    data = torch.randint(0, 256, (len(blocks), cut.packed_bytes), dtype=torch.uint8).to(device)
    _compare_copy(Rows(data, None, HeadRange(cut.parts, 0, cut.length)), Rows(pool, blocks, cut), Place(cut.length, 0))


def compare_copy(seed: int, device: str = "cpu") -> None:
    """From pool to pool, each holding other heads beside those that move, summed as heads of a wider block."""
    rng = random.Random(seed)
    pool, blocks, cut = copy_case(seed, device)
    before, behind = (8 * rng.randint(0, 3) for _ in range(2))
    line = before + cut.length + behind
    target = torch.randint(0, 256, (len(pool) + 2, cut.parts * line), dtype=torch.uint8).to(device)
    order = torch.tensor(rng.sample(range(len(target)), len(blocks)), dtype=torch.int32, device=device)
    place = Place(cut.length + 8 * rng.randint(0, 4), 8 * rng.randint(0, 4))
    _compare_copy(Rows(pool, blocks, cut), Rows(target, order, HeadRange(cut.parts, before, cut.length)), place)


def _compare_copy(source: Rows, target: Rows, place: Place) -> None:
    from twinpool.kernels import blocks as kernels

    paged = source.blocks if source.blocks is not None else target.blocks
    assert paged is not None
    expected = target._replace(memory=target.memory.clone())
    sums = reference.copy(source, expected, len(paged), place)
    assert torch.equal(kernels.sums(source, len(paged), place), sums)
    assert torch.equal(kernels.copy(source, target, len(paged), place), sums)
    assert torch.equal(target.memory, expected.memory)


def compare_decode(seed: int, device: str = "cpu") -> None:
    from twinpool.kernels import attention as kernels

    case = attention_case(seed, device, decode=True, float8=seed % 3 == 2)
    split_tokens = random.Random(seed).choice((0, 16, 64))
    out = kernels.paged_decode(case.q, case.kv, case.tables, case.contexts, case.scales, split_tokens)
    assert_close(out, case)


def compare_prefill(seed: int, device: str = "cpu") -> None:
    from twinpool.kernels import attention as kernels

    case = attention_case(seed, device, decode=False, float8=seed % 3 == 2)
    assert_close(kernels.paged_prefill(*case), case)


def assert_close(out: Tensor, case: AttentionCase) -> None:
    """``out`` against the reference in float32, as near as the dtype of queries and KV can come."""
    kv = case.kv.float() if case.scales is None else case.kv.float() * case.scales.unsqueeze(-1)
    expected = reference.paged_attention(case.q.float(), kv, case.tables, case.contexts, case.starts)
    assert out.dtype == case.q.dtype
    tolerance = _TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
