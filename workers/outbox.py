"""Tokens on their way to the router: one frame a step, at most a few unacknowledged, later ones merged.

Socket buffers do not bound latency when the router is saturated; credit does.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from twinpool.blockhash import token_bytes
from twinpool.proto import frames
from twinpool.sampling import TokenLogprob

CREDIT = 4  # Tokens frames under way
MAX_TOKENS = 4096  # of several sequences in one frame: with 20 logprobs each they stay far below the frame limit


class _Row:
    """Tokens of one sequence, nearly always one."""

    __slots__ = ("ids", "logprobs", "position", "text")

    def __init__(self, position: int, token: int, text: str, logprob: TokenLogprob | None) -> None:
        self.position = position
        self.ids = [token]
        self.text = text
        self.logprobs = [] if logprob is None else [logprob]

    def add(self, token: int, text: str, logprob: TokenLogprob | None) -> None:
        self.ids.append(token)
        self.text += text
        if logprob is not None:
            self.logprobs.append(logprob)


class TokenOutbox:
    """Collects the tokens of steps and sends them while there is credit."""

    def __init__(self, send: Callable[[frames.Frame], None]) -> None:
        self._send = send
        self._rows: dict[int, _Row] = {}
        self._ends: list[frames.End] = []
        self._step = 0
        self._acked = 0

    def add(self, attempt: int, position: int, token: int, text: str, logprob: TokenLogprob | None) -> None:
        """One token of one sequence; ``position`` counts its output tokens from 0."""
        row = self._rows.get(attempt)
        if row is None:
            self._rows[attempt] = _Row(position, token, text, logprob)
        else:
            row.add(token, text, logprob)

    def end(self, end: frames.End) -> None:
        """The sequence ends with the tokens added so far."""
        self._ends.append(end)

    def drop(self, attempt: int) -> None:
        """Nobody wants the attempt's tokens any more."""
        self._rows.pop(attempt, None)
        self._ends = [end for end in self._ends if end.attempt != attempt]

    def acked(self, step: int, step_s: float) -> None:
        """The router took all frames up to ``step``."""
        self._acked = max(self._acked, min(step, self._step))
        self.flush(step_s)

    def reset(self) -> None:
        """A new link: nothing is under way."""
        self._rows, self._ends = {}, []
        self._step = self._acked = 0

    @property
    def waiting(self) -> bool:
        """Whether tokens wait for credit."""
        return bool(self._rows)

    def flush(self, step_s: float) -> None:
        """Send what waits, as far as credit allows."""
        while self._rows and self._step - self._acked < CREDIT:
            self._send_rows(self._take(), step_s)

    def _take(self) -> dict[int, _Row]:
        """Takes out the oldest rows, of ``MAX_TOKENS`` together or one that is longer."""
        if sum([len(row.ids) for row in self._rows.values()]) <= MAX_TOKENS:
            every, self._rows = self._rows, {}
            return every
        taken: dict[int, _Row] = {}
        tokens = 0
        for attempt, row in self._rows.items():
            tokens += len(row.ids)
            if taken and tokens > MAX_TOKENS:
                break
            taken[attempt] = row
        for attempt in taken:
            del self._rows[attempt]
        return taken

    def _send_rows(self, taken: dict[int, _Row], step_s: float) -> None:
        self._step += 1
        rows = taken.values()
        ends: tuple[frames.End, ...] = ()
        if self._ends:
            ends = tuple(end for end in self._ends if end.attempt in taken)
            self._ends = [end for end in self._ends if end.attempt not in taken]
        any_logprobs = any(row.logprobs for row in rows)
        self._send(
            frames.Tokens(
                attempts=token_bytes(array("I", taken)),
                positions=token_bytes(array("I", [row.position for row in rows])),
                counts=token_bytes(array("I", [len(row.ids) for row in rows])),
                ids=token_bytes(array("I", [token for row in rows for token in row.ids])),
                texts=tuple([row.text for row in rows]),
                logprobs=tuple(tuple(row.logprobs) for row in rows) if any_logprobs else (),
                ends=ends,
                step=self._step,
                step_s=step_s,
            )
        )
