"""The kernels on a device, compiled: the comparisons of tests/kernels, the dispatch, pools beyond 32-bit offsets."""

from __future__ import annotations

import pytest
import torch
from tests.kernels import cases

from twinpool.kernels import ops, reference

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # ends what hangs; the first of a shape compiles

SEEDS = [seed if seed < 40 else pytest.param(seed, marks=pytest.mark.full) for seed in range(200)]
GIB = 1 << 30
QUIET = pytest.mark.filterwarnings("ignore:Synchronization debug mode")


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed (Linux only; extra: gpu)")


@pytest.mark.parametrize("seed", SEEDS)
def test_gather(seed: int) -> None:
    cases.compare_gather(seed, "cuda")


@pytest.mark.parametrize("seed", SEEDS)
def test_scatter(seed: int) -> None:
    cases.compare_scatter(seed, "cuda")


@pytest.mark.parametrize("seed", SEEDS)
def test_copy(seed: int) -> None:
    cases.compare_copy(seed, "cuda")


@pytest.mark.parametrize("seed", SEEDS)
def test_paged_decode(seed: int) -> None:
    cases.compare_decode(seed, "cuda")


@pytest.mark.parametrize("seed", SEEDS)
def test_paged_prefill(seed: int) -> None:
    cases.compare_prefill(seed, "cuda")


def test_blocks_of_a_megabyte_go_there_and_back() -> None:
    pool = torch.randint(0, 256, (64, 1 << 20), dtype=torch.uint8, device="cuda")
    source, target = torch.randperm(64, device="cuda").view(2, 32)
    packed = ops.gather_blocks(pool, source)
    assert torch.equal(packed.sums, reference.packed_sums(packed.data))
    assert ops.scatter_blocks(packed, pool, target).all()
    assert torch.equal(pool[source], pool[target])
    packed.data[7, 12345] ^= 1
    assert ops.scatter_blocks(packed, pool, target).tolist() == [index != 7 for index in range(32)]


@QUIET
def test_copies_wait_for_nobody() -> None:
    pool = torch.zeros(8, 1 << 16, dtype=torch.uint8, device="cuda")
    blocks = torch.tensor([3, 1], device="cuda")
    ops.gather_blocks(pool, blocks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.scatter_blocks(ops.gather_blocks(pool, blocks), pool, blocks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@QUIET
def test_attention_waits_for_nobody() -> None:
    case = cases.attention_case(5, "cuda", decode=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.paged_decode(case.q, case.kv, case.tables, case.contexts)
        ops.paged_prefill(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 words in a pool of 17 GiB; the same memory has four times as many elements of bfloat16."""
    if torch.cuda.mem_get_info()[0] < 24 * GIB:
        pytest.skip("needs 24 GiB of free device memory")
    pool = torch.zeros(17 * 1024, 1 << 20, dtype=torch.uint8, device="cuda")
    blocks = torch.arange(pool.shape[0] - 4, pool.shape[0], device="cuda")
    data = torch.randn(4, 1 << 19, device="cuda").bfloat16().view(torch.uint8)
    sums = reference.packed_sums(data)
    assert ops.scatter_blocks(reference.Packed(data, sums), pool, blocks).all()
    assert torch.equal(pool[-4:], data)
    assert torch.equal(ops.gather_blocks(pool, blocks).data, data)
    kv = ops.layer_kv(pool, torch.bfloat16, (16, 2, 8, 16, 128), 15)
    q = torch.randn(1, 32, 128, device="cuda").bfloat16()
    contexts = torch.tensor([60], device="cuda")
    starts = torch.tensor([0, 1], device="cuda")
    expected = reference.paged_attention(q, kv, blocks[None], contexts, starts).float()
    for out in (
        ops.paged_decode(q, kv, blocks[None], contexts),
        ops.paged_prefill(q, kv, blocks[None], contexts, starts, 1),
    ):
        torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_llama_batch_equals_its_reference() -> None:
    """Llama 3 8B shapes: 32 query heads over 8 KV heads of 128, ragged contexts up to 2,048."""
    torch.manual_seed(1)
    kv = torch.randn(1024, 2, 8, 16, 128, device="cuda").bfloat16()
    contexts = torch.tensor([2048, 1, 777, 1300], device="cuda")
    tables = torch.randperm(1024, device="cuda")[:512].view(4, 128).int()
    starts = torch.tensor([0, 512, 513, 600, 1000], device="cuda")
    q = torch.randn(1000, 32, 128, device="cuda").bfloat16()
    expected = reference.paged_attention(q.float(), kv.float(), tables, contexts, starts)
    out = ops.paged_prefill(q, kv, tables, contexts, starts, 512)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    rows = torch.arange(5, device="cuda")
    expected = reference.paged_attention(q[:4].float(), kv.float(), tables, contexts, rows)
    torch.testing.assert_close(ops.paged_decode(q[:4], kv, tables, contexts).float(), expected, rtol=2e-2, atol=2e-2)
