"""Matrix products with fixed weights, arranged for the machine they run on.

On CPUs a step multiplies either one row (a lone sequence decoding: bound by reading the weights) or many (bound by
arithmetic), and no single arrangement of the weights is good at both:

- one row: weights in their own dtype, mostly by columns;
- many rows: packed by oneDNN once, with SiLU, product and sum done while the output tile is in cache.

So a CPU worker holds float32 weights twice. bfloat16 is chosen to save memory: CPUs with bfloat16 instructions use the
packed form alone; on others oneDNN emulates them at a fifth of the speed of float32, so there each matrix is widened to
float32 in a small buffer just before it is used, which changes no value. Other devices use a plain ``linear``.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

_BUFFER_ELEMENTS = 1 << 21  # 8 MiB of float32: most of it stays in cache between widening and use
_buffers = threading.local()
_PACK_ROWS = 16  # a hint for oneDNN's choice of layout; measured good from 2 to 2,048 rows


class Linear(Protocol):
    """``x [rows, in] -> [rows, out]``; the last three spare a pass over the output."""

    def __call__(self, x: Tensor) -> Tensor:
        """``x W^T + b``"""
        ...

    def silu(self, x: Tensor) -> Tensor:
        """``silu(x W^T + b)``"""
        ...

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """``(x W^T + b) * other``"""
        ...

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """``x W^T + b + other``"""
        ...


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest arrangement of ``weight [out, in]`` for its device and dtype: a copy on CPUs (rows are float32)."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return PlainLinear(weight, bias)
    if weight.dtype == torch.float32:
        return TwoWayLinear(PlainLinear(for_one_row(weight), bias), PackedLinear(weight, bias))
    if has_bfloat16_instructions():
        return PackedLinear(weight, bias)
    rows = PlainLinear(for_one_row(weight), bias)
    return TwoWayLinear(rows, WideningLinear(rows.weight, None if bias is None else bias.float()))


def for_one_row(weight: Tensor) -> Tensor:
    """A copy of ``weight [out, in]`` laid out so that one row is multiplied at the speed of memory.

    That is by columns, except where the input is wider than the output (measured).
    """
    wide_input = weight.shape[1] > weight.shape[0]
    return weight.clone() if wide_input else weight.t().contiguous().t()


def has_bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 by itself (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class PlainLinear:
    """Weights as they are, on any device; results have the dtype of ``x``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x.to(self.weight.dtype), self.weight, self._bias).to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        return functional.silu(self(x), inplace=True)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).mul_(other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self(x).add_(other)


class WideningLinear(PlainLinear):
    """bfloat16 weights, widened to float32 as they are used; rows are float32."""

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(x.shape[0], self.weight.shape[0])
        start = 0
        for part in self.weight.split(max(1, _BUFFER_ELEMENTS // self.weight.shape[1])):
            end = start + part.shape[0]
            torch.mm(x, _widened(part).t(), out=y[:, start:end])
            start = end
        return y if self._bias is None else y.add_(self._bias)


def _widened(weight: Tensor) -> Tensor:
    """float32 form of ``weight [out, in]``, valid until the next call in this thread."""
    buffer = getattr(_buffers, "tensor", None)
    if buffer is None or buffer.numel() < weight.numel():
        buffer = _buffers.tensor = torch.empty(max(_BUFFER_ELEMENTS, weight.numel()))
    by_columns = weight.stride(0) == 1
    flat = buffer[: weight.numel()]
    wide: Tensor = flat.view(weight.shape[1], weight.shape[0]).t() if by_columns else flat.view(weight.shape)
    return wide.copy_(weight)


class PackedLinear:
    """Weights in oneDNN's own layout; rows are float32, cast where the weights are bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACK_ROWS)
        self._bias = bias
        self._dtype = weight.dtype

    def _unary(self, x: Tensor, then: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(self._dtype), self._packed, self._bias, then, [], "")
        return y.to(x.dtype)

    def _binary(self, x: Tensor, other: Tensor, then: str) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
            x.to(self._dtype), other.to(self._dtype), self._packed, self._bias, then
        )
        return y.to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._unary(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        return self._unary(x, "swish")

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self._binary(x, other, "mul")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        if self._dtype != x.dtype:  # the sum is the residual: it stays float32
            return self._unary(x, "none").add_(other)
        return self._binary(x, other, "add")


class TwoWayLinear:
    """One arrangement for a single row, another for more."""

    def __init__(self, one: Linear, many: Linear) -> None:
        self._one = one
        self._many = many

    def _for(self, x: Tensor) -> Linear:
        return self._one if x.shape[0] == 1 else self._many

    def __call__(self, x: Tensor) -> Tensor:
        return self._for(x)(x)

    def silu(self, x: Tensor) -> Tensor:
        return self._for(x).silu(x)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        return self._for(x).times(x, other)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return self._for(x).plus(x, other)
