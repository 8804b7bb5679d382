"""Ids to text while they are being made: what may be shown after each token, and where a stop string ends the output.

Two stages, both functions of the ids alone, so that a resumed stream which replays its ids goes on exactly:

    id -> text     bytes of the id through an incremental UTF-8 decoder (byte-level vocabularies), or a sliding window
                   of recent ids decoded together (all others): constant work a token
    text -> text   a Knuth-Morris-Pratt automaton for each stop string; what is the beginning of one waits

A stop string counts at the first *character* where one is complete, of several there the longest; how the text was
cut into tokens does not matter.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from twinpool.errors import InvalidRequest
from twinpool.tokenizer import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # UTF-8 bytes, hence tokens at most


class _TextStream(Protocol):
    def feed(self, token_id: int) -> str:
        """Text that this id completes."""
        ...

    def flush(self) -> str:
        """Text of what never became complete."""
        ...


class _ByteStream:
    """For vocabularies where every id is a fixed run of bytes."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._partial = False  # the decoder holds the beginning of a character

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._bytes_of(token_id)
        if not self._partial:
            try:
                return piece.decode()  # whole characters, as nearly always: no need of the decoder
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(piece)
        self._partial = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        self._partial = False
        return self._decoder.decode(b"", True)


class _Window(NamedTuple):
    before: str  # text of the shown ids
    text: str  # what the held ids add to it


class _WindowStream:
    """For vocabularies whose decoder looks at neighbours (word starts, byte fallback).

    New text is what the window (shown ids, then held ids) reads beyond what its shown part reads alone. Ids are held
    while the text ends in an unfinished character, but never longer than a character can be. Ids without a text of
    their own stay in the window at the start of the output, where decoders drop a leading space.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._shown: list[int] = []
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.has_id(token_id):
            return ""
        self._held.append(token_id)
        before, text = self._read()
        if text.endswith(_UNFINISHED) and len(self._held) < _LONGEST_CHARACTER:
            return ""
        if text:
            self._shown = self._held
        elif not before:
            self._shown += self._held
        self._held = []
        return text

    def flush(self) -> str:
        text = self._read().text if self._held else ""
        self._held = []
        return text

    def _read(self) -> _Window:
        before = self._tokenizer.decode(self._shown, False)
        after = self._tokenizer.decode([*self._shown, *self._held], False)
        if after.startswith(before):
            return _Window(before, after[len(before) :])
        return _Window(before, self._tokenizer.decode(self._held, False))


class _Stop:
    """Knuth-Morris-Pratt automaton of one stop string; ``matched`` characters of it end the text read so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._border = [0] * len(text)  # longest proper prefix of text[:i + 1] that is also its suffix
        for index in range(1, len(text)):
            size = self._border[index - 1]
            while size and text[size] != text[index]:
                size = self._border[size - 1]
            self._border[index] = size + (text[size] == text[index])

    def advance(self, char: str) -> bool:
        """Read one character; True when it completes the stop string."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._border[self.matched - 1]
        self.matched += self.text[self.matched] == char
        if self.matched < len(self.text):
            return False
        self.matched = self._border[-1]
        return True


class Detokenizer:
    """Text of one output, token by token.

    The deltas of ``feed`` and ``flush`` joined are ``decode(ids)``, cut at the first stop string (after it with
    ``include_stop``). Stop strings do not count before ``min_tokens`` ids have been fed. An id that ends the output
    (eos, ``stop_token_ids``) is fed only if its text is wanted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """Raises ``InvalidRequest`` for an empty stop string."""
        if "" in stops:
            raise InvalidRequest("a stop string is empty")
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._stream: _TextStream = (_ByteStream if tokenizer.byte_level else _WindowStream)(tokenizer, skipped)
        self._stops = [_Stop(text) for text in sorted(stops, key=len, reverse=True)]
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._fed = 0
        self._waiting = ""
        self.stopped: str | None = None  # the stop string that ended the text

    def feed(self, token_id: int) -> str:
        """Take the next id; returns the text that may be shown now, "" once ``stopped``."""
        if self.stopped is not None:
            return ""
        self._fed += 1
        text = self._stream.feed(token_id)
        return self._release(text) if self._stops else text

    def flush(self) -> str:
        """The output has ended: returns what was still waiting, "" if ``stopped``."""
        if self.stopped is not None:
            return ""
        text = self._release(self._stream.flush())
        if self.stopped is None:
            text, self._waiting = text + self._waiting, ""
        return text

    def _release(self, text: str) -> str:
        """Show all but what may be the beginning of a stop string; ends the output where one is complete."""
        known, text = len(self._waiting), self._waiting + text
        for index in range(known, len(text)):
            found = [stop for stop in self._stops if stop.advance(text[index])]
            if found and self._fed > self._min_tokens:
                self.stopped, self._waiting = found[0].text, ""
                return text[: index + 1 if self._include_stop else index + 1 - len(self.stopped)]
        shown = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._waiting = text[shown:]
        return text[:shown]
