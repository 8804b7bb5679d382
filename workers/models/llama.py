"""The Llama family (Llama, SmolLM, Mistral, Qwen2, Qwen3) as one forward pass over a step's tokens.

All tokens of a step, of whichever sequence, are rows of one matrix; only attention knows sequences (attention.py).
Rotary embedding: the rows of the q and k weights are reordered once so that the two halves of a rotary pair are
adjacent; rotating is then one complex product in place, and attention, a sum over pairs, does not change.
On CPUs everything between the matrix products is float32, whatever the dtype of weights and KV.
With tensor parallelism ``config`` and ``weights`` are one rank's share (tensor_parallel.py), and the products that end
attention and MLP are summed over the ranks; hidden states are then equal everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from twinpool.workers.models.attention import StepAttention
from twinpool.workers.models.config import LlamaConfig
from twinpool.workers.models.linear import Linear, make_linear


class RmsNorm:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype, copy=True)  # a view would keep the whole weights file mapped
        self._eps = eps
        self._eps_tensor = torch.tensor(eps, dtype=torch.float32, device=weight.device)
        self._share = 1.0 / weight.shape[0]
        self._fused = weight.device.type != "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        if self._fused:
            return functional.rms_norm(x, self._weight.shape, self._weight, self._eps)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps_tensor, norm, norm, value=self._share).rsqrt_()
        return torch.mul(x, scale).mul_(self._weight)


class RankGroup(Protocol):
    """The ranks that compute a model together, as one of them sees them (workers/ranks/group.py)."""

    rank: int

    def all_reduce(self, part: Tensor) -> None:
        """Replace ``part`` by its sum over all ranks, equal at all of them. Raises RuntimeError when one is gone."""
        ...


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: RmsNorm
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    output: Linear
    mlp_norm: RmsNorm
    gate: Linear
    up: Linear
    down: Linear


class Llama:
    """Weights arranged for one device. Immutable after construction; does not keep the ``weights`` it was made from."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], group: RankGroup | None = None) -> None:
        """``weights`` by their Hugging Face names, complete (loader.py checks), all on one device.

        Of the ranks of a ``group`` only the first has a head: the others compute no logits.
        """
        self.config = config
        self._group = group
        self._embedding = weights["model.embed_tokens.weight"].clone()  # not to keep the whole weights file mapped
        self._device = self._embedding.device
        self._act = torch.float32 if self._device.type == "cpu" else self._embedding.dtype
        self._layers = [self._layer(weights, f"model.layers.{index}.") for index in range(config.layers)]
        self._norm = RmsNorm(weights["model.norm.weight"], config.eps, self._act)
        has_head = group is None or group.rank == 0
        head = self._embedding if config.tied_head else weights["lm_head.weight"]
        self._head = make_linear(head) if has_head else None
        self._frequencies = torch.tensor(config.rope_frequencies(), dtype=torch.float32, device=self._device)

    def _layer(self, weights: dict[str, Tensor], prefix: str) -> _Layer:
        config = self.config

        def linear(name: str) -> Linear:
            return make_linear(weights[f"{prefix}{name}.weight"], weights.get(f"{prefix}{name}.bias"))

        def norm(name: str) -> RmsNorm:
            return RmsNorm(weights[f"{prefix}{name}.weight"], config.eps, self._act)

        def head_norm(name: str) -> RmsNorm | None:
            weight = weights.get(f"{prefix}{name}.weight")
            return None if weight is None else RmsNorm(_pair_rows(weight, config.head_dim), config.eps, self._act)

        return _Layer(
            attention_norm=norm("input_layernorm"),
            qkv=make_linear(self._fused_qkv(weights, prefix, "weight"), self._fused_bias(weights, prefix)),
            q_norm=head_norm("self_attn.q_norm"),
            k_norm=head_norm("self_attn.k_norm"),
            output=linear("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate=linear("mlp.gate_proj"),
            up=linear("mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )

    def _fused_qkv(self, weights: dict[str, Tensor], prefix: str, kind: str) -> Tensor:
        q, k, v = (weights[f"{prefix}self_attn.{name}_proj.{kind}"] for name in "qkv")
        return torch.cat((_pair_rows(q, self.config.head_dim), _pair_rows(k, self.config.head_dim), v))

    def _fused_bias(self, weights: dict[str, Tensor], prefix: str) -> Tensor | None:
        return self._fused_qkv(weights, prefix, "bias") if self.config.qkv_bias else None

    def forward(self, tokens: Tensor, step: StepAttention) -> Tensor:
        """Hidden states ``[tokens, hidden]`` before the last norm; the KV of all tokens is in the pool afterwards.

        ``tokens`` int64 in the order of ``step``. Raises IndexError for ids outside the vocabulary.
        """
        x = functional.embedding(tokens, self._embedding).to(self._act)
        turns = torch.outer(step.positions.float(), self._frequencies)
        rotation = torch.polar(torch.ones_like(turns), turns).unsqueeze(1)
        for index, layer in enumerate(self._layers):
            q, new_kv = self._qkv(layer, layer.attention_norm(x), rotation)
            x = self._plus(layer.output, step.attend(index, q, new_kv), x)
            hidden = layer.mlp_norm(x)
            x = self._plus(layer.down, layer.up.times(hidden, layer.gate.silu(hidden)), x)
        return x

    def _plus(self, linear: Linear, part: Tensor, x: Tensor) -> Tensor:
        """``x`` plus the product of ``part``; of several ranks, the sum of their products, and the first adds x."""
        group = self._group
        if group is None:
            return linear.plus(part, x)
        total = linear.plus(part, x) if group.rank == 0 else linear(part)
        group.all_reduce(total)
        return total

    def _qkv(self, layer: _Layer, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """q ``[tokens, heads, dim]`` and kv ``[tokens, 2, kv_heads, dim]``, normed if need be, and rotated."""
        config = self.config
        qkv = layer.qkv(x).view(x.shape[0], -1, config.head_dim)
        rotated = config.heads + config.kv_heads
        if layer.q_norm is not None and layer.k_norm is not None:
            qkv[:, : config.heads] = layer.q_norm(qkv[:, : config.heads])
            qkv[:, config.heads : rotated] = layer.k_norm(qkv[:, config.heads : rotated])
        _rotate(qkv[:, :rotated], rotation)
        return qkv[:, : config.heads], qkv[:, config.heads :].view(x.shape[0], 2, config.kv_heads, config.head_dim)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[rows, vocabulary]`` of hidden states ``[rows, hidden]``; only where there is a head."""
        assert self._head is not None, "only the first rank is asked for logits"
        return self._head(self._norm(hidden)).float()


def _pair_rows(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from [first halves, second halves] of the rotary pairs to pair after pair."""
    halves = weight.reshape(-1, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _rotate(x: Tensor, rotation: Tensor) -> None:
    """Turn the pairs of ``x [tokens, heads, dim]`` in place by ``rotation [tokens, 1, dim / 2]`` (complex)."""
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation)
    else:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        x.copy_(torch.view_as_real(pairs * rotation).flatten(-2))
