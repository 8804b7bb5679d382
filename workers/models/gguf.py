"""Reading GGUF files: metadata to :class:`LlamaConfig`, tensors dequantised to float32 under Hugging Face names.

llama.cpp stores the q and k rows of the ``llama`` architecture with the two halves of each rotary pair interleaved;
they are put back in the order of Hugging Face checkpoints here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import torch

from twinpool.errors import ConfigError
from twinpool.workers.models.config import FAMILIES, LlamaConfig, RopeScaling, check, refuse_window, tensor_shapes

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufModel(NamedTuple):
    """Config, the model's own name, and float32 weights."""

    config: LlamaConfig
    name: str
    weights: dict[str, torch.Tensor]


def read(path: Path, max_context: int | None = None) -> GgufModel:
    """Read a whole GGUF file (5-11 s for 90 MB: its reader is plain Python).

    Raises ConfigError where the file is damaged, cut short, of another architecture, or lacks a tensor.
    """
    try:
        reader = gguf.GGUFReader(path)
        config = _config(_Fields(reader, str(path)), reader, max_context)
        return GgufModel(config, _name(reader, path), dict(_weights(reader, config, str(path))))
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise ConfigError(
            f"{path} is not a whole GGUF file ({type(error).__name__}: {error}); download it again"
        ) from error


class _Fields:
    """Metadata of a GGUF file by name, typed."""

    def __init__(self, reader: gguf.GGUFReader, source: str) -> None:
        self._reader = reader
        self.source = source
        self.family = str(self._value("general.architecture"))

    def _value(self, key: str) -> object:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def number(self, key: str, default: float | None = None) -> float:
        """A number under the architecture's prefix; raises ConfigError where it is absent and has no default."""
        value = self._value(f"{self.family}.{key}")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if value is None and default is not None:
            return default
        raise ConfigError(f"{self.source}: metadata {self.family}.{key} is {value!r}, not a number")

    def token_ids(self, *names: str) -> tuple[int, ...]:
        """The distinct special token ids among ``names`` that the file has."""
        values = (self._value(f"tokenizer.ggml.{name}_token_id") for name in names)
        return tuple(dict.fromkeys(value for value in values if isinstance(value, int)))

    def scaling(self, reader: gguf.GGUFReader) -> RopeScaling | None:
        """Rope scaling from the metadata or from a tensor of factors."""
        for tensor in reader.tensors:
            if tensor.name == "rope_freqs.weight":
                return RopeScaling("factors", factors=tuple(float(v) for v in tensor.data))
        kind = self._value(f"{self.family}.rope.scaling.type")
        if kind in (None, "none"):
            return None
        if kind == "linear":
            return RopeScaling("linear", self.number("rope.scaling.factor"))
        raise ConfigError(f"{self.source}: rope scaling {kind!r} is not supported; known: none, linear")


def _config(fields: _Fields, reader: gguf.GGUFReader, max_context: int | None) -> LlamaConfig:
    if fields.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"{fields.source}: architecture {fields.family!r} is not supported; known: {known}")
    names = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in names:
        raise ConfigError(f"{fields.source} has no tensor token_embd.weight; download it again")
    heads = int(fields.number("attention.head_count"))
    hidden = int(fields.number("embedding_length"))
    own_context = int(fields.number("context_length"))
    config = LlamaConfig(
        family=fields.family,
        vocab_size=int(names["token_embd.weight"].shape[1]),
        hidden=hidden,
        ffn=int(fields.number("feed_forward_length")),
        layers=int(fields.number("block_count")),
        heads=heads,
        kv_heads=int(fields.number("attention.head_count_kv", heads)),
        head_dim=int(fields.number("attention.key_length", hidden // max(1, heads))),
        eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_scaling=fields.scaling(reader),
        max_context=min(own_context, max_context or own_context),
        tied_head="output.weight" not in names,
        qkv_bias="blk.0.attn_q.bias" in names,
        output_bias="blk.0.attn_output.bias" in names,
        qk_norm="blk.0.attn_q_norm.weight" in names,
        eos_ids=fields.token_ids("eos", "eot"),
        bos_id=next(iter(fields.token_ids("bos")), None),
    )
    window = int(fields.number("attention.sliding_window", 0.0))
    refuse_window(window or None, config.max_context, fields.source)
    return check(config, fields.source)


def _name(reader: gguf.GGUFReader, path: Path) -> str:
    field = reader.get_field("general.name")
    return path.stem if field is None else str(field.contents())


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face weight: ``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in _TOP:
        return _TOP[name]
    index, part = name.removeprefix("model.layers.").split(".", 1)
    module, kind = part.rsplit(".", 1)
    return f"blk.{index}.{_LAYER[module]}.{kind}"


def _weights(reader: gguf.GGUFReader, config: LlamaConfig, source: str) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, shape in tensor_shapes(config).items():
        tensor = tensors.get(gguf_name(name))
        if tensor is None:
            raise ConfigError(f"{source} has no tensor {gguf_name(name)}; it is cut short or another architecture")
        if tuple(int(n) for n in reversed(tensor.shape)) != shape:
            raise ConfigError(f"{source}: tensor {tensor.name} has shape {list(tensor.shape)[::-1]}, not {list(shape)}")
        data = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        weight = torch.from_numpy(data.copy() if not data.flags.writeable else data)
        yield name, _unpermute(name, weight, config)


def _unpermute(name: str, weight: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None or config.family != "llama":
        return weight
    rows = weight.reshape(heads, config.head_dim // 2, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()
