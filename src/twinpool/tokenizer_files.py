"""Where a tokenizer comes from: a GGUF header, or a Hugging Face folder; both become one ``TokenizerFiles``.

GGUF stores vocabulary, merges and the *name* of the splitting rule (``tokenizer.ggml.pre``); the rule itself is looked
up here. An unknown name is refused: a wrong split gives plausible but wrong ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from twinpool.errors import ConfigError
from twinpool.gguf_meta import read_metadata

_MAX_FILE_BYTES = 256 << 20
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type
_NO_CONTEXT_LIMIT = 10**9  # tokenizer_config.json writes 1e30 for "unknown"
_SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class TokenizerFiles:
    """All that is known of a model's text side. ``config`` is its tokenizer_config.json, chat template included."""

    name: str
    backend: Tokenizer
    config: dict[str, Any]
    eos_ids: tuple[int, ...]
    max_context: int | None  # tokens

    def special(self, role: str) -> str | None:
        """Text of the special token of that role, e.g. ``bos_token``; None if the model has none."""
        value = self.config.get(role)
        return value.get("content") if isinstance(value, dict) else value

    def specials(self) -> dict[str, str]:
        """Special tokens by role, those the model has."""
        return {role: text for role in _SPECIALS if (text := self.special(role)) is not None}


def _byte_level() -> PreTokenizer:
    return cast(PreTokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def _single_digits() -> PreTokenizer:
    digits = cast(PreTokenizer, pre_tokenizers.Digits(individual_digits=True))
    return cast(PreTokenizer, pre_tokenizers.Sequence([digits, _byte_level()]))


def _words(digits: str) -> PreTokenizer:
    """The splitting rule of Llama 3 and Qwen 2, which differ only in how many digits stay together."""
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = cast(PreTokenizer, pre_tokenizers.Split(Regex(rule), behavior="isolated"))
    level = cast(PreTokenizer, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return cast(PreTokenizer, pre_tokenizers.Sequence([split, level]))


_LLAMA_3 = "llama-bpe"
_PRE_TOKENIZERS: dict[str, Callable[[], PreTokenizer]] = {
    "default": _byte_level,
    "gpt-2": _byte_level,
    "smollm": _single_digits,
    _LLAMA_3: lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
}


def from_gguf(path: Path) -> TokenizerFiles:
    """Build the tokenizer of a GGUF model. Raises ``ConfigError`` for kinds that GGUF does not describe fully."""
    meta = read_metadata(path)
    tokens = _tokens(path, meta)
    backend = _build(path, meta, tokens)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, key in zip(_SPECIALS, ("bos", "eos", "unknown", "padding"), strict=True):
        if (token := _token_id(meta, key, len(tokens))) is not None:
            config[role] = tokens[token]
    if isinstance(template := meta.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    context = meta.get(f"{meta.get('general.architecture')}.context_length")
    max_context = context if isinstance(context, int) else None
    if max_context is not None:
        config["model_max_length"] = max_context
    ends = (_token_id(meta, key, len(tokens)) for key in ("eos", "eot", "eom"))
    eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
    return TokenizerFiles(str(meta.get("general.name", path.stem)), backend, config, eos_ids, max_context)


def _tokens(path: Path, meta: dict[str, object]) -> list[str]:
    kind, tokens = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.tokens")
    if kind != "gpt2" or not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
        raise ConfigError(
            f"{path}: no byte-level BPE vocabulary (tokenizer.ggml.model is {kind!r}); use the model's folder"
        )
    return tokens


def _token_id(meta: dict[str, object], key: str, count: int) -> int | None:
    value = meta.get(f"tokenizer.ggml.{key}_token_id")
    return value if isinstance(value, int) and value < count else None


def _build(path: Path, meta: dict[str, object], tokens: list[str]) -> Tokenizer:
    pre = str(meta.get("tokenizer.ggml.pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise ConfigError(f"{path}: unknown splitting rule {pre!r} (known: {known}); use the model's folder instead")
    merges = [(left, right) for left, _, right in (m.partition(" ") for m in _strings(meta, "tokenizer.ggml.merges"))]
    try:
        model = models.BPE({text: i for i, text in enumerate(tokens)}, merges, ignore_merges=pre == _LLAMA_3)
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(f"{path}: vocabulary and merges do not fit: {error}") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    _add_special_tokens(backend, meta, tokens)
    bos = _token_id(meta, "bos", len(tokens))
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", pre == _LLAMA_3):
        backend.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=None, special_tokens=[(tokens[bos], bos)]
        )
    return backend


def _strings(meta: dict[str, object], key: str) -> list[str]:
    value = meta.get(key)
    return value if isinstance(value, list) else []


def _add_special_tokens(backend: Tokenizer, meta: dict[str, object], tokens: list[str]) -> None:
    kinds = meta.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, tuple):
        return
    for special, kind in ((True, _CONTROL), (False, _USER_DEFINED)):
        chosen = [text for text, its_kind in zip(tokens, kinds, strict=False) if its_kind == kind]
        added = [AddedToken(text, special=special, normalized=False) for text in chosen]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def from_folder(folder: Path) -> TokenizerFiles:
    """Read ``tokenizer.json`` and its companions; only the first is required. Raises ``ConfigError``."""
    try:
        backend = Tokenizer.from_buffer(_read(folder / "tokenizer.json"))
    except ConfigError:
        raise
    except Exception as error:  # the library raises no narrower class
        raise ConfigError(f"{folder / 'tokenizer.json'} is not a tokenizer: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "chat_template.jinja").is_file():
        config["chat_template"] = _read(folder / "chat_template.jinja").decode("utf-8", "replace")
    model, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
    files = TokenizerFiles(folder.name, backend, config, (), _folder_context(config, model))
    eos_ids = _folder_eos(files, generation, model)
    return TokenizerFiles(files.name, backend, config, eos_ids, files.max_context)


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in an optional file, empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return value


def _folder_context(config: dict[str, Any], model: dict[str, Any]) -> int | None:
    nested = model.get("text_config")
    text = nested if isinstance(nested, dict) else model
    for value in (text.get("max_position_embeddings"), config.get("model_max_length")):
        if isinstance(value, int) and 0 < value < _NO_CONTEXT_LIMIT:
            return value
    return None


def _folder_eos(files: TokenizerFiles, generation: dict[str, Any], model: dict[str, Any]) -> tuple[int, ...]:
    """Every id that ends an output: those of generation_config.json (else config.json), and the tokenizer's own."""
    listed = generation.get("eos_token_id", model.get("eos_token_id"))
    ids = listed if isinstance(listed, list) else [listed]
    text = files.special("eos_token")
    ids = [*ids, files.backend.token_to_id(text) if text is not None else None]
    return tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))
