"""The door to the kernels on CPU tensors: layout, head ranges, checksums; and that nobody pays for triton there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.kernels.cases import assert_close, attention_case

from twinpool.kernels import ops
from twinpool.kernels.reference import MASK_64, block_sums, sum_weights
from twinpool.workers.models.attention import PagedKv, Span
from twinpool.workers.models.config import LlamaConfig

LAYERS, KV_HEADS, TOKENS, DIM = 2, 4, 16, 32
CONFIG = LlamaConfig(
    family="llama",
    vocab_size=16,
    hidden=256,
    ffn=16,
    layers=LAYERS,
    heads=8,
    kv_heads=KV_HEADS,
    head_dim=DIM,
    eps=1e-5,
    rope_theta=1e4,
    max_context=256,
    tied_head=False,
    eos_ids=(),
)


def random_pool(blocks: int, block_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (blocks, block_bytes), dtype=torch.uint8)


def test_importing_the_door_does_not_import_triton() -> None:
    code = "import sys, twinpool.kernels.ops; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sums_are_those_of_the_block_checksum() -> None:
    pool, blocks = random_pool(6, 256), torch.tensor([4, 5, 1])
    packed = ops.gather_blocks(pool, blocks)
    expected = block_sums(pool.view(torch.int64)[blocks], sum_weights(32, "cpu"))
    assert torch.equal(packed.data, pool[blocks])
    assert [value & MASK_64 for value in packed.sums.tolist()] == expected


def test_a_changed_byte_does_not_verify() -> None:
    pool, blocks = random_pool(6, 256), torch.tensor([4, 5, 1])
    packed = ops.gather_blocks(pool, blocks)
    packed.data[1, 77] ^= 1
    assert ops.scatter_blocks(packed, pool, blocks).tolist() == [True, False, True]


def test_head_ranges_move_between_pools_of_unequal_tensor_parallelism() -> None:
    """Heads 1 to 2 of four, in float8 with a scale of 4 bytes a token behind each line, to a worker that has two."""
    line = TOKENS * (DIM + 4)
    blocks = LAYERS * 2 * KV_HEADS * line
    source, target = random_pool(5, blocks), random_pool(7, blocks // 2)
    before = target.clone()
    packed = ops.gather_blocks(source, torch.tensor([2, 3, 0]), ops.head_range(blocks, LAYERS, KV_HEADS, 1, 3))
    assert ops.scatter_blocks(packed, target, torch.tensor([6, 1, 2])).all()
    lines = source.view(5, LAYERS, 2, KV_HEADS, line)[[2, 3, 0], :, :, 1:3]
    arrived = target.view(7, LAYERS, 2, 2, line)[[6, 1, 2]]
    assert torch.equal(arrived, lines)
    assert torch.equal(target[[0, 3, 4, 5]], before[[0, 3, 4, 5]])
    halves = [tensor[..., : TOKENS * DIM].contiguous().view(torch.float8_e4m3fn) for tensor in (arrived, lines)]
    torch.testing.assert_close(*[half.float() for half in halves], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (2, 2), (0, 5)])
def test_a_head_range_must_be_in_the_block(first: int, last: int) -> None:
    with pytest.raises(ValueError, match="heads"):
        ops.head_range(LAYERS * 2 * KV_HEADS * 64, LAYERS, KV_HEADS, first, last)


def test_copies_that_do_not_fit_are_refused() -> None:
    pool, blocks = random_pool(4, 64), torch.tensor([1])
    with pytest.raises(ValueError, match="64-bit words"):
        ops.gather_blocks(random_pool(4, 60), blocks)
    with pytest.raises(ValueError, match="64-bit words"):
        ops.gather_blocks(pool, blocks, ops.HeadRange(2, 16, 24))
    with pytest.raises(ValueError, match="packed bytes"):
        ops.gather_blocks(pool, blocks, out=torch.empty(2, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="contiguous bytes"):
        ops.gather_blocks(pool[:, :32], blocks)


def test_queries_that_do_not_fit_are_refused() -> None:
    case = attention_case(1, "cpu", decode=True)
    with pytest.raises(ValueError, match="do not fit"):
        ops.paged_decode(case.q[:, :, 1:], case.kv, case.tables, case.contexts)
    with pytest.raises(ValueError, match="last dimension"):
        ops.paged_decode(case.q, case.kv, case.tables.repeat(1, 2)[:, ::2], case.contexts)


BAD_NUMBERS = [
    lambda column: column.repeat_interleave(2)[::2],
    lambda column: column.float(),
    lambda column: column[None],
]


@pytest.mark.parametrize("spoil", BAD_NUMBERS)
def test_columns_of_numbers_that_kernels_would_misread_are_refused(
    spoil: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    pool, blocks = random_pool(4, 64), torch.tensor([1, 3])
    packed = ops.gather_blocks(pool, blocks)
    with pytest.raises(ValueError, match="blocks must be"):
        ops.gather_blocks(pool, spoil(blocks))
    with pytest.raises(ValueError, match="blocks must be"):
        ops.scatter_blocks(packed, pool, spoil(blocks))
    case = attention_case(3, "cpu", decode=False)
    with pytest.raises(ValueError, match="contexts must be"):
        ops.paged_prefill(case.q, case.kv, case.tables, spoil(case.contexts), case.starts, case.longest)
    with pytest.raises(ValueError, match="starts must be"):
        ops.paged_prefill(case.q, case.kv, case.tables, case.contexts, spoil(case.starts), case.longest)
    with pytest.raises(ValueError, match="tables must be"):
        ops.paged_prefill(case.q, case.kv, case.tables.float(), case.contexts, case.starts, case.longest)


def test_columns_of_numbers_may_be_of_32_bits() -> None:
    pool, blocks = random_pool(6, 256), torch.tensor([4, 5, 1])
    packed = ops.gather_blocks(pool, blocks.int())
    assert torch.equal(packed.data, pool[blocks])
    assert ops.scatter_blocks(packed, pool, blocks.int()).all()


@pytest.mark.parametrize("seed", range(6))
def test_cpu_tensors_take_the_reference(seed: int) -> None:
    case = attention_case(seed, "cpu", decode=True, float8=seed % 2 == 1)
    assert_close(ops.paged_decode(case.q, case.kv, case.tables, case.contexts, case.scales), case)
    case = attention_case(seed, "cpu", decode=False, float8=seed % 2 == 1)
    assert_close(ops.paged_prefill(*case), case)


def test_float8_and_scales_come_together() -> None:
    case = attention_case(1, "cpu", decode=True, float8=True)
    with pytest.raises(ValueError, match="without scales"):
        ops.paged_decode(case.q, case.kv, case.tables, case.contexts)
    with pytest.raises(ValueError, match="with scales"):
        ops.paged_decode(case.q, case.kv.float(), case.tables, case.contexts, case.scales)
    assert case.scales is not None
    for scales in (case.scales[:, :, :, 1:], case.scales.double(), case.scales.clone()):
        with pytest.raises(ValueError, match="do not fit KV"):
            ops.paged_decode(case.q, case.kv, case.tables, case.contexts, scales)


def test_layout_is_that_of_the_engine() -> None:
    """What the engine writes and attends to is what the kernels' reference reads."""
    torch.manual_seed(3)
    layer, spans = 1, [Span(1, 40, [5, 2, 7]), Span(1, 20, [1, 4]), Span(9, 30, [6, 0, 3])]
    pool = torch.zeros(8, LAYERS * 2 * KV_HEADS * TOKENS * DIM * 4, dtype=torch.uint8)
    engine = PagedKv(pool, CONFIG, "float32", TOKENS)
    kv = ops.layer_kv(pool, torch.float32, engine.layout.shape, layer)
    kv.copy_(torch.randn(kv.shape))
    q = torch.randn(11, CONFIG.heads, DIM)
    attended = engine.attend(engine.plan(spans), layer, q, torch.randn(11, 2, KV_HEADS, DIM)).view_as(q)
    tables = torch.tensor([[5, 2, 7], [1, 4, 0], [6, 0, 3]])
    contexts = torch.tensor([41, 21, 39])
    decoded = ops.paged_decode(q[:2], kv, tables[:2], contexts[:2])
    chunk = ops.paged_prefill(q[2:], kv, tables[2:], contexts[2:], torch.tensor([0, 9]), 9)
    torch.testing.assert_close(torch.cat((decoded, chunk)), attended, rtol=1e-5, atol=1e-5)
