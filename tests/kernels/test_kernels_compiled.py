"""Kernels compiled for Hopper without a device: how wide their accesses to memory are, what tensor cores they use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from tests.kernels.conftest import Run

STRIDES = ("q_stride", "q_head_stride", "block_stride", "value_stride", "head_stride", "token_stride")
ALIGNED = ("source", "target", "q", "kv", "partial", "out", *STRIDES)
MOVE = dict.fromkeys(("source", "target", "source_blocks", "target_blocks", "sums"), "*i64")
ATTEND = {"q": "*bf16", "kv": "*bf16", "scales": "*bf16", "tables": "*i32", "contexts": "*i32", "scale": "fp32"}
DECODE = ATTEND | {"partial": "*fp32", "sums": "*fp32"}
PREFILL = ATTEND | {"starts": "*i32", "out": "*bf16"}
pytestmark = pytest.mark.timeout(300)  # ends what hangs; a busy machine may take its time to compile

SIZES = {"BLOCK_SIZE": 16, "DIM": 128, "PAD": 128, "TILE": 64, "GROUP": 4}


def compiled(module: str, name: str, types: Mapping[str, str], sizes: Mapping[str, object], warps: int) -> str:
    """PTX of a kernel for compute capability 9.0; ptxas has taken it too. Integers not in ``types`` are int32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from twinpool.kernels import attention, blocks

    kernel: Any = getattr({"attention": attention, "blocks": blocks}[module], name)
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={arg: "constexpr" if arg in sizes else types.get(arg, "i32") for arg in names},
        constexprs={(names.index(arg),): value for arg, value in sizes.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index, arg in enumerate(names) if arg in ALIGNED},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert kernel.asm["cubin"]
    ptx: str = kernel.asm["ptx"]
    return ptx


PAGES = [(True, False), pytest.param(False, True, marks=pytest.mark.full), (True, True)]


@pytest.mark.parametrize(("from_pages", "to_pages"), PAGES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 2048), (64, 32)])
def test_copies_move_16_bytes_at_a_time(
    from_pages: bool, to_pages: bool, rows: int, columns: int, compiling: Run
) -> None:
    pages = {"FROM_PAGES": from_pages, "TO_PAGES": to_pages}
    sizes = {"UNIT": 2, "STORE": True, "ROWS": rows, "COLS": columns} | pages
    ptx = str(compiling(compiled, "blocks", "_move", MOVE, sizes, 8))
    assert set(re.findall(r"st\.global[\w.]*", ptx)) == {"st.global.v2.b64"}
    assert len(re.findall(r"ld\.global\.v2\.b64", ptx)) == 2048 // (2 * 8 * 32)


@pytest.mark.full
def test_decode_fetches_keys_asynchronously(compiling: Run) -> None:
    ptx = str(compiling(compiled, "attention", "_decode_splits", DECODE, SIZES | {"M": 16}, 4))
    assert "cp.async.cg.shared.global" in ptx  # there is no other width of it than 16 bytes
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx


@pytest.mark.full
def test_prefill_uses_the_tensor_cores_of_hopper(compiling: Run) -> None:
    ptx = str(compiling(compiled, "attention", "_prefill", PREFILL, SIZES | {"M": 128}, 8))
    assert "wgmma.mma_async" in ptx
    assert "cp.async.cg.shared.global" in ptx


@pytest.mark.full
def test_float8_is_widened_for_the_tensor_cores(compiling: Run) -> None:
    types = DECODE | {"kv": "*fp8e4nv", "scales": "*fp32"}
    ptx = str(compiling(compiled, "attention", "_decode_splits", types, SIZES | {"M": 16}, 4))
    assert "e4m3x2" in ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
