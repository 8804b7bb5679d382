"""The reference of the engine benchmark: a plain torch loop, one batch of equal lengths, as one would write it by hand.

Fused qkv and gate-up weights, a preallocated contiguous cache, torch's attention, logits of the last token only; all in
the dtype of the weights. No paging, no mixed steps.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, rms_norm, scaled_dot_product_attention, silu

from twinpool.workers.models.config import LlamaConfig


class PlainLoop:
    """``weights`` by Hugging Face names; the cache holds ``batch`` sequences of up to ``length`` tokens."""

    def __init__(self, config: LlamaConfig, weights: dict[str, Tensor], batch: int, length: int) -> None:
        self.config = config
        self.weights = weights
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights.get("lm_head.weight", self.embedding)
        self.layers = [self._layer(f"model.layers.{index}.") for index in range(config.layers)]
        shape = (config.layers, 2, batch, config.kv_heads, length, config.head_dim)
        self.cache = torch.zeros(shape, dtype=self.embedding.dtype)
        turns = torch.outer(torch.arange(length).float(), torch.tensor(config.rope_frequencies())).repeat(1, 2)
        self.cos, self.sin = turns.cos().to(self.cache.dtype), turns.sin().to(self.cache.dtype)

    def _layer(self, prefix: str) -> tuple[Tensor, ...]:
        def take(name: str) -> Tensor:
            return self.weights[f"{prefix}{name}.weight"]

        return (
            take("input_layernorm"),
            torch.cat([take(f"self_attn.{name}_proj") for name in "qkv"]),
            take("self_attn.o_proj").clone(),
            take("post_attention_layernorm"),
            torch.cat([take("mlp.gate_proj"), take("mlp.up_proj")]),
            take("mlp.down_proj").clone(),
        )

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        cos, sin = self.cos[start : start + x.shape[2]], self.sin[start : start + x.shape[2]]
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    @torch.inference_mode()
    def step(self, tokens: Tensor, start: int) -> Tensor:
        """Logits ``[batch, vocabulary]`` after ``tokens [batch, new]`` at positions from ``start`` (> 0: one token)."""
        c = self.config
        batch, new = tokens.shape
        x = embedding(tokens, self.embedding)
        for cache, (norm, qkv, output, mlp_norm, gate_up, down) in zip(self.cache, self.layers, strict=True):
            heads = linear(rms_norm(x, (c.hidden,), norm, c.eps), qkv).view(batch, new, -1, c.head_dim).transpose(1, 2)
            q, k, v = heads.split((c.heads, c.kv_heads, c.kv_heads), 1)
            cache[0, :batch, :, start : start + new] = self._rotate(k, start)
            cache[1, :batch, :, start : start + new] = v
            keys, values = cache[:, :batch, :, : start + new]
            attended = scaled_dot_product_attention(
                self._rotate(q, start), keys, values, is_causal=start == 0, enable_gqa=True
            )
            x = x + linear(attended.transpose(1, 2).flatten(2), output)
            gate, up = linear(rms_norm(x, (c.hidden,), mlp_norm, c.eps), gate_up).chunk(2, -1)
            x = x + linear(silu(gate) * up, down)
        last = rms_norm(x[:, -1], (c.hidden,), self.weights["model.norm.weight"], c.eps)
        return linear(last, self.head)
