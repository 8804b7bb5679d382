"""What defines a model of the Llama family, read from a Hugging Face ``config.json`` or from GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import msgspec

from twinpool.errors import ConfigError

DTypeName = Literal["float32", "bfloat16"]

# Hugging Face ``model_type`` -> (biases on q, k and v by default, norms on the heads of q and k)
FAMILIES: dict[str, tuple[bool, bool]] = {
    "llama": (False, False),
    "mistral": (False, False),
    "qwen2": (True, False),
    "qwen3": (False, True),
}


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How rotary frequencies are stretched: ``linear``, ``llama3`` (by wavelength) or ``factors`` (one a frequency)."""

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    factors: tuple[float, ...] = ()

    def apply(self, frequencies: list[float]) -> list[float]:
        """Scaled rotary frequencies (radians per position). ``llama3``: the blend of Llama 3.1's reference code."""
        if self.kind == "factors":
            return [f / by for f, by in zip(frequencies, self.factors, strict=True)]
        if self.kind == "linear":
            return [f / self.factor for f in frequencies]
        return [self._llama3(f) for f in frequencies]

    def _llama3(self, frequency: float) -> float:
        turns = self.original_context * frequency / (2.0 * math.pi)
        keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        keep = min(1.0, max(0.0, keep))
        return frequency * (keep + (1.0 - keep) / self.factor)


class LlamaConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shape of one model; sizes in elements, contexts in tokens."""

    family: str
    vocab_size: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    rope_theta: float
    max_context: int
    tied_head: bool
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None

    def rope_frequencies(self) -> list[float]:
        """``head_dim / 2`` rotary frequencies in radians per position: theta^(-2i / head_dim), scaled."""
        plain = [self.rope_theta ** (-2.0 * i / self.head_dim) for i in range(self.head_dim // 2)]
        return self.rope_scaling.apply(plain) if self.rope_scaling else plain


def check(config: LlamaConfig, source: str) -> LlamaConfig:
    """``config`` itself if its sizes make sense; raises ConfigError naming ``source`` and the size that does not."""
    for name in ("vocab_size", "hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "max_context"):
        value = getattr(config, name)
        if not 1 <= value < 1 << 28:
            raise ConfigError(f"{source}: {name} = {value} cannot be; the file is damaged or not a Llama-family model")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise ConfigError(
            f"{source}: {config.heads} heads over {config.kv_heads} KV heads of {config.head_dim} dimensions "
            "cannot be; take a model whose heads divide by its KV heads"
        )
    if config.rope_theta <= 0.0 or config.eps < 0.0:
        raise ConfigError(f"{source}: rope theta {config.rope_theta} or norm epsilon {config.eps} cannot be")
    _check_scaling(config, source)
    return config


def _check_scaling(config: LlamaConfig, source: str) -> None:
    scaling = config.rope_scaling
    if scaling is None:
        return
    divisors = scaling.factors if scaling.kind == "factors" else (scaling.factor,)
    bad_count = scaling.kind == "factors" and len(divisors) != config.head_dim // 2
    bad_band = scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor
    if bad_count or bad_band or min(divisors, default=1.0) <= 0.0:
        raise ConfigError(f"{source}: the {scaling.kind} rope scaling has impossible values; the file is damaged")


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name (as in Hugging Face checkpoints) and shape of every weight a model of this shape has."""
    hidden, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (config.ffn, hidden),
        "mlp.up_proj.weight": (config.ffn, hidden),
        "mlp.down_proj.weight": (hidden, config.ffn),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))}
    if config.output_bias:
        layer["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    for index in range(config.layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


class _Hf(msgspec.Struct):
    """The keys of ``config.json`` that matter; unknown ones are allowed, theirs is a large and growing format."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: dict[str, object] | None = None
    rope_parameters: dict[str, object] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    mlp_bias: bool = False
    hidden_act: str = "silu"
    sliding_window: int | None = None
    use_sliding_window: bool = True
    quantization_config: object = None
    eos_token_id: int | list[int] | None = None
    bos_token_id: int | None = None


def from_hf(data: bytes, source: str, eos_ids: tuple[int, ...] = (), max_context: int | None = None) -> LlamaConfig:
    """Config from the bytes of a ``config.json``; ``eos_ids`` (of generation_config.json) go before its own.

    ``max_context`` lowers the model's own. Raises ConfigError for another architecture or impossible values.
    """
    try:
        hf = msgspec.json.decode(data, type=_Hf)
    except msgspec.DecodeError as error:  # covers ValidationError
        raise ConfigError(f"{source} is not the config.json of a Llama-family model: {error}") from error
    if hf.model_type not in FAMILIES:
        raise ConfigError(f"{source}: model_type {hf.model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    _refuse_unsupported(hf, source)
    theta, scaling = _rope(hf, source)
    bias_default, qk_norm = FAMILIES[hf.model_type]
    qkv_bias = bias_default if hf.attention_bias is None or hf.model_type == "qwen2" else hf.attention_bias
    config = LlamaConfig(
        family=hf.model_type,
        vocab_size=hf.vocab_size,
        hidden=hf.hidden_size,
        ffn=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads or hf.num_attention_heads,
        head_dim=hf.head_dim or hf.hidden_size // max(1, hf.num_attention_heads),
        eps=hf.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_context=min(hf.max_position_embeddings, max_context or hf.max_position_embeddings),
        tied_head=hf.tie_word_embeddings,
        qkv_bias=qkv_bias,
        output_bias=qkv_bias and hf.model_type in ("llama", "qwen3"),
        qk_norm=qk_norm,
        eos_ids=eos_ids or _ids(hf.eos_token_id),
        bos_id=hf.bos_token_id,
    )
    refuse_window(hf.sliding_window if hf.use_sliding_window else None, config.max_context, source)
    return check(config, source)


def refuse_window(window: int | None, max_context: int, source: str) -> None:
    """Raise ConfigError where full attention would differ from the model's sliding window (tokens)."""
    if window is not None and max_context > window:
        raise ConfigError(
            f"{source}: the model attends to a sliding window of {window} tokens, which is not supported beyond the "
            f"window; set the worker's max_context to {window} or less (results are then exact)"
        )


def _refuse_unsupported(hf: _Hf, source: str) -> None:
    if hf.quantization_config is not None:
        raise ConfigError(f"{source}: quantised checkpoints are not supported; take the bfloat16 or float32 weights")
    if hf.hidden_act not in ("silu", "swish") or hf.mlp_bias:
        raise ConfigError(f"{source}: only the SiLU MLP without biases is supported, not {hf.hidden_act!r}")


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rope(hf: _Hf, source: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before)."""
    values: Mapping[str, object] = hf.rope_parameters or hf.rope_scaling or {}
    theta = _number(values, "rope_theta", hf.rope_theta if hf.rope_theta is not None else 10000.0, source)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(values, "factor", None, source))
    if kind != "llama3":
        raise ConfigError(f"{source}: rope scaling {kind!r} is not supported; known: default, linear, llama3")
    return theta, RopeScaling(
        "llama3",
        _number(values, "factor", None, source),
        _number(values, "low_freq_factor", None, source),
        _number(values, "high_freq_factor", None, source),
        int(_number(values, "original_max_position_embeddings", None, source)),
    )


def _number(values: Mapping[str, object], key: str, default: float | None, source: str) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{source}: rope setting {key} is {value!r}, not a number")
    return float(value)
