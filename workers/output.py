"""The output of one sequence on a worker: its tokens, what the sampler needs, its text, and when it ends."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from twinpool import blockhash
from twinpool.detokenizer import Detokenizer
from twinpool.proto import frames
from twinpool.tokenizer import Tokenizer
from twinpool.workers.engine.base import SampleState


class Spoken(NamedTuple):
    """What one token added: the text that may be shown, and the end if this was the last token."""

    text: str
    end: frames.End | None


class Output:
    """Tokens of one attempt, prompt included. The same on every worker: a pure function of the frame and the tokens."""

    __slots__ = ("_detokenizer", "_eos_ids", "_key", "_stop_ids", "attempt", "sample", "sampling", "tokens")

    def __init__(
        self, attempt: int, sequence: frames.Sequence, key: bytes, tokenizer: Tokenizer, eos_ids: tuple[int, ...]
    ) -> None:
        self.attempt = attempt
        self.sampling = sequence.sampling
        self.tokens: array[int] = blockhash.tokens_from_bytes(sequence.tokens)
        ends = () if self.sampling.ignore_eos else eos_ids
        self.sample = SampleState(self.sampling, self.tokens, sequence.prompt_len, ends)
        self._key = key
        self._eos_ids = frozenset(ends)
        self._stop_ids = frozenset(self.sampling.stop_token_ids)
        sampling = self.sampling
        self._detokenizer = Detokenizer(
            tokenizer, sampling.stop, sampling.include_stop, sampling.skip_special_tokens, sampling.min_tokens
        )
        for token in self.tokens[sequence.prompt_len :]:
            self._detokenizer.feed(token)  # what the client has; the text goes on after it

    @property
    def position(self) -> int:
        """Output tokens so far."""
        return self.sample.position

    def hashes(self, block_size: int) -> list[int]:
        """Hashes of all full blocks of the tokens."""
        return blockhash.block_hashes(self._key, self.tokens, block_size)

    def next_hash(self, hashes: list[int], block_size: int) -> int:
        """Hash of the full block after those of ``hashes``."""
        start = len(hashes) * block_size
        data = blockhash.token_bytes(self.tokens[start : start + block_size])
        return blockhash.block_hash(self._key, hashes[-1] if hashes else None, data)

    def append(self, token: int) -> Spoken:
        """Take a drawn token."""
        self.tokens.append(token)
        count = self.position
        ends_it = token in self._eos_ids or token in self._stop_ids
        if ends_it and count > self.sampling.min_tokens:
            return Spoken("", self._end("stop", token))
        text = self._detokenizer.feed(token)
        if self._detokenizer.stopped is not None:
            return Spoken(text, self._end("stop", self._detokenizer.stopped))
        if count >= self.sampling.max_tokens:
            return Spoken(text, self._end("length", None))
        return Spoken(text, None)

    def _end(self, reason: str, stop: str | int | None) -> frames.End:
        return frames.End(attempt=self.attempt, reason=reason, stop=stop, text=self._detokenizer.flush())
