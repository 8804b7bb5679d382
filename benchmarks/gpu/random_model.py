"""A Llama with seeded random weights as a Hugging Face folder, for benchmarks: speed is not in the words.

Weights are normal with a deviation of one over the square root of their inputs, so that attention and MLP matter as
much as in a trained model and tokens depend on the whole prompt. The tokenizer is that of the embedded model: prompts
are token ids, and ids beyond its vocabulary have no text.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twinpool.tokenizer import load_tokenizer
from twinpool.workers.models.config import LlamaConfig, from_hf, tensor_shapes

SEED = 7
_LLAMA_31 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1 8B
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131_072,
        "rope_scaling": _LLAMA_31,
    },
    "small": {  # Llama 3.2 1B, but with a head of its own
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072,
        "rope_scaling": _LLAMA_31,
    },
    "tiny": {
        "vocab_size": 49_152, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    },
}  # fmt: skip


def prepare(folder: Path, shape: str, layers: int | None, dtype: torch.dtype, device: str) -> LlamaConfig:
    """Write a model into ``folder``, unless one is there already; what it is.

    ``shape`` is one of ``SHAPES``, ``layers`` replaces its number. Random numbers come from ``device``, which is part
    of the seed.
    """
    place = folder / "config.json"
    if not place.is_file():
        _write(folder, _hf_config(shape, layers), dtype, device)
    return from_hf(place.read_bytes(), str(place))


def _hf_config(shape: str, layers: int | None) -> bytes:
    fixed = {"model_type": "llama", "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    sizes = {**SHAPES[shape], **({"num_hidden_layers": layers} if layers else {})}
    return json.dumps({**fixed, **sizes}, indent=1).encode()


def _write(folder: Path, config: bytes, dtype: torch.dtype, device: str) -> None:
    """One file a layer, and config.json last: a folder with it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in load_tokenizer(None).files().items():
        (folder / name).write_bytes(data)
    generator = torch.Generator(device).manual_seed(SEED)
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in tensor_shapes(from_hf(config, "config.json")).items():
        parts = name.split(".")
        files.setdefault(f"layer-{int(parts[2]):03}" if parts[1] == "layers" else "rest", {})[name] = shape
    size = sum(math.prod(shape) for shapes in files.values() for shape in shapes.values()) * dtype.itemsize
    print(f"writing {size / 1e9:.1f} GB of random weights", file=sys.stderr)
    for file, shapes in files.items():
        weights = {name: _random(shape, dtype, generator).cpu() for name, shape in shapes.items()}
        save_file(weights, folder / f"{file}.safetensors")
    (folder / "config.json").write_bytes(config)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms
        return torch.ones(shape, dtype=dtype)
    weight = torch.empty(shape, dtype=dtype, device=generator.device)
    return weight.normal_(0.0, 1.0 / math.sqrt(shape[1]), generator=generator)
