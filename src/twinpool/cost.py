"""The cost of a step, in seconds: one formula for policy, admission, chunk budget, emulated engine and simulator.

Symbols: x_i prompt tokens of chunk i, c_i tokens already in KV before it, x their sum; B decoding sequences, K the sum
of their context tokens::

    T_step = max(c0 + a*(x + B), d0 + d1*(x + B)) + d2*K + sum_i b*x_i*(c_i + x_i/2)

The first branch is arithmetic (weights times tokens), the second reading the weights, ``d2*K`` reading the KV of the
decoding sequences, the sum attention of the chunks. Adding a prefill and a decode part instead overstates a mixed step
by 10-30 % (fitted to aiconfigurator 0.12 tables, vLLM on H100: mean error 2-3 %, worst 10 %).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, Protocol

import msgspec

ITL_SHARE: Final = 0.9  # of the tightest ITL SLO that a step with chunks may take
UNBOUNDED_CHUNK: Final = 1 << 30


class DecodeRow:
    """Seconds of a step without chunks at one batch size, by the sum K of its context tokens: straight pieces.

    ``alpha[i] + beta[i] * K`` for ``breaks[i] <= K < breaks[i + 1]``; ``breaks[0]`` is 0, the last piece is open,
    no ``beta`` is negative. Shared by whoever asks for it: not to be changed.
    """

    __slots__ = ("alpha", "beta", "breaks")

    def __init__(self, breaks: tuple[int, ...], alpha: tuple[float, ...], beta: tuple[float, ...]) -> None:
        self.breaks = breaks
        self.alpha = alpha
        self.beta = beta

    def seconds(self, context: int) -> float:
        """Seconds at ``context`` tokens in all."""
        piece = bisect_right(self.breaks, context) - 1
        return self.alpha[piece] + self.beta[piece] * context


class Cost(Protocol):
    """Seconds of a step. ``StepCost`` is the closed form, ``GridCost`` (cost_grid.py) a measured table.

    A step never gets cheaper by more tokens in a chunk or more context; by more sequences or cached tokens only as
    measured kernels do.
    """

    def step(self, chunks: Iterable[tuple[int, int]], batch: int, context: int) -> float:
        """Seconds of a step with ``chunks`` of (tokens, cached tokens before) and ``batch`` sequences decoding."""
        ...

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a step without chunks; ``context`` is the sum over the batch. Exactly ``row(batch)``."""
        ...

    def row(self, batch: int) -> DecodeRow:
        """``decode`` of this batch size by context."""
        ...

    def prefill(self, uncached: int, cached: int, chunk: int) -> float:
        """Seconds to compute ``uncached`` tokens after ``cached`` ones, alone, ``chunk`` tokens a step."""
        ...

    def attention(self, tokens: int, cached: int) -> float:
        """Seconds of attention that a chunk of ``tokens`` after ``cached`` ones adds to its step."""
        ...

    def largest_chunk(self, seconds: float, cached: int, batch: int, context: int, tokens: int = 0) -> int:
        """The most tokens of one more chunk, after ``cached`` ones, that keep the step within ``seconds``; or 0.

        ``tokens`` is what earlier chunks of the step hold; their attention is to be taken off ``seconds`` before.
        """
        ...


class StepCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Coefficients of the step formula for one (model, device, TP); seconds, seconds per token, per token squared."""

    c0: float
    a: float
    b: float
    d0: float
    d1: float
    d2: float

    def step(self, chunks: Iterable[tuple[int, int]], batch: int, context: int) -> float:
        """Seconds of a step with ``chunks`` of (tokens, cached tokens before) and ``batch`` sequences decoding."""
        x = 0
        attention = 0.0
        for tokens, cached in chunks:
            x += tokens
            attention += self.b * tokens * (cached + tokens / 2)
        work = x + batch
        return max(self.c0 + self.a * work, self.d0 + self.d1 * work) + self.d2 * context + attention

    def decode(self, batch: int, context: int) -> float:
        """T_d(B, K): seconds of a step without chunks."""
        return max(self.c0 + self.a * batch, self.d0 + self.d1 * batch) + self.d2 * context

    def row(self, batch: int) -> DecodeRow:
        """T_d(B, K) as one straight piece in K."""
        return DecodeRow((0,), (max(self.c0 + self.a * batch, self.d0 + self.d1 * batch),), (self.d2,))

    def attention(self, tokens: int, cached: int) -> float:
        """Seconds of attention that a chunk of ``tokens`` after ``cached`` ones adds to its step."""
        return self.b * tokens * (cached + tokens / 2)

    def prefill(self, uncached: int, cached: int, chunk: int) -> float:
        """T_p(u, c): seconds to compute ``uncached`` tokens after ``cached`` ones, alone, ``chunk`` tokens a step."""
        if uncached <= 0:
            return 0.0
        full, rest = divmod(uncached, chunk)
        seconds = full * max(self.c0 + self.a * chunk, self.d0 + self.d1 * chunk)
        if rest:
            seconds += max(self.c0 + self.a * rest, self.d0 + self.d1 * rest)
        return seconds + self.b * uncached * (cached + uncached / 2)

    def largest_chunk(self, seconds: float, cached: int, batch: int, context: int, tokens: int = 0) -> int:
        """The most prompt tokens, after ``cached`` ones, that keep a step with this decode load within ``seconds``.

        Solves ``b/2*x^2 + (slope + b*c)*x = R`` for both branches of the max; 0 where no token fits. ``tokens`` of
        earlier chunks count like decoding sequences.
        """
        batch += tokens
        room = seconds - self.d2 * context
        return min(
            self._chunk_root(room - self.c0 - self.a * batch, self.a, cached),
            self._chunk_root(room - self.d0 - self.d1 * batch, self.d1, cached),
        )

    def _chunk_root(self, rest: float, slope: float, cached: int) -> int:
        if rest <= 0.0:
            return 0
        g = slope + self.b * cached
        if self.b > 0.0:
            return min(UNBOUNDED_CHUNK, int((math.sqrt(g * g + 2.0 * self.b * rest) - g) / self.b))
        return min(UNBOUNDED_CHUNK, int(rest / g)) if g > 0.0 else UNBOUNDED_CHUNK


# aiconfigurator 0.12, vLLM on H100 (worst error of the fit 10 %).
LLAMA_70B_H100_TP4 = StepCost(c0=6.865e-3, a=6.0524e-5, b=9.948e-10, d0=15.013e-3, d1=3.5445e-5, d2=2.8855e-8)
LLAMA_8B_H100_TP1 = StepCost(c0=2.846e-3, a=1.9334e-5, b=8.017e-10, d0=6.380e-3, d1=1.034e-5, d2=4.429e-8)
