"""Every arrangement of weights gives the product that the weights define."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from twinpool.workers.models.linear import Linear, PackedLinear, PlainLinear, for_one_row, make_linear

ARRANGEMENTS: dict[str, Callable[[Tensor, Tensor | None], Linear]] = {
    "chosen": make_linear,
    "plain": PlainLinear,
    "one row": lambda weight, bias: PlainLinear(for_one_row(weight), bias),
    "packed": PackedLinear,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_products(name: str, shape: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    if name == "packed" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs bfloat16 only on CPUs with AVX-512; make_linear does not choose it on others")
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = torch.randn(rows, shape[1], generator=generator)
    other = torch.randn(rows, shape[0], generator=generator)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    for bias in (None, torch.randn(shape[0], generator=generator).to(dtype)):
        linear = ARRANGEMENTS[name](weight, bias)
        plain = functional.linear(x, weight.float(), None if bias is None else bias.float())
        wanted = {"call": plain, "silu": functional.silu(plain), "times": plain * other, "plus": plain + other}
        found = {
            "call": linear(x),
            "silu": linear.silu(x),
            "times": linear.times(x, other),
            "plus": linear.plus(x, other),
        }
        for kind, value in wanted.items():
            assert found[kind].dtype == torch.float32
            torch.testing.assert_close(found[kind], value, rtol=tolerance, atol=tolerance, msg=kind)
