"""The door to the kernels on CPU tensors: layout, head ranges, checksums; and that nobody pays for triton there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from tests.kernels.cases import assert_close, attention_case

from twinpool.kernels import ops
from twinpool.kernels.reference import GOLDEN, MASK_64, HeadRange, Place, Rows, block_sums, sum_weights, unsigned
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
    assert torch.equal(packed.sums, expected)
    assert unsigned(packed.sums) == [slow_sum(bytes(pool[block].tolist())) for block in (4, 5, 1)]


def slow_sum(block: bytes) -> int:
    """``sum-64`` by its definition."""
    total = 0
    for k in range(len(block) // 4):
        x = (k + 1) * GOLDEN & MASK_64
        total += int.from_bytes(block[4 * k : 4 * k + 4], "little", signed=True) * ((x ^ x >> 32) | 1)
    return total & MASK_64


CONTENTS = {
    "zeros": torch.zeros(4096, dtype=torch.int64),
    "equal": torch.full((4096,), 0x3F803F803F803F80),
    "random": torch.randint(-(1 << 62), 1 << 62, (4096,), generator=torch.Generator().manual_seed(5)),
}
TOP, MIDDLE = -(1 << 63), 1 << 31
FLIPS = [(start, stop, step) for start in (0, 1, 2048) for stop, step in ((start + 2, 1), (start + 4, 1), (4096, 2))]


@pytest.mark.parametrize("contents", CONTENTS)
@pytest.mark.parametrize("mask", [TOP, MIDDLE, TOP | MIDDLE, 1, -1])
def test_flips_of_a_bit_in_many_words_are_seen(mask: int, contents: str) -> None:
    words = CONTENTS[contents]
    damaged = words.repeat(len(FLIPS), 1)
    for row, flip in zip(damaged, FLIPS, strict=True):
        row[slice(*flip)] ^= mask
    sums = block_sums(torch.cat((words[None], damaged)), sum_weights(4096, "cpu"))
    assert len(set(sums.tolist())) == 1 + len(FLIPS)


def test_words_and_halves_that_change_places_are_seen() -> None:
    words = CONTENTS["random"]
    halves = words.view(torch.int32)
    swapped = [halves.clone() for _ in range(5)]
    swapped[0][[0, 1]] = halves[[1, 0]]
    swapped[1][[0, 1, 2, 3]] = halves[[2, 3, 0, 1]]
    swapped[2][[100, 8000]] = halves[[8000, 100]]
    swapped[3] = halves.roll(1)
    swapped[4] = halves.flip(0)
    sums = block_sums(torch.stack((halves, *swapped)).view(torch.int64), sum_weights(4096, "cpu"))
    assert len(set(sums.tolist())) == 6


def test_any_change_within_a_half_is_seen() -> None:
    """The worst that can be: by a multiple of 2**31."""
    words = torch.zeros(257, 256, dtype=torch.int64)
    words[torch.arange(1, 257), torch.arange(256)] = MIDDLE
    assert (block_sums(words, sum_weights(256, "cpu"))[1:] != 0).all()


def test_sums_of_heads_add_up_to_those_of_the_block() -> None:
    pool, blocks = random_pool(6, 512), torch.tensor([4, 5, 1])
    whole = ops.sum_blocks(Rows(pool, blocks, HeadRange(1, 0, 512)), 3, Place(512, 0))
    cuts = [HeadRange(4, 0, 40), HeadRange(4, 40, 8), HeadRange(4, 48, 80)]
    parts = [ops.sum_blocks(Rows(pool, blocks, cut), 3, Place(128, cut.first)) for cut in cuts]
    assert torch.equal(torch.stack(parts).sum(dim=0), whole)


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
    whole, half = (Rows(pool, blocks, HeadRange(1, 0, length)) for length in (64, 32))
    with pytest.raises(ValueError, match="cannot be copied"):
        ops.copy_blocks(whole, half, 1, Place(64, 0))
    with pytest.raises(ValueError, match="5 packed blocks"):
        ops.copy_blocks(whole._replace(blocks=None), whole, 5, Place(64, 0))
    with pytest.raises(ValueError, match="64-bit words at"):
        ops.sum_blocks(whole, 1, Place(64, 4))


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
