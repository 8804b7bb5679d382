"""The cost of a step from measured tables, in seconds: three small grids, interpolated linearly.

Symbols as in cost.py::

    T_step = W(x + B) + R(B, K) + max_i h_i + sum_i (A(x_i, c_i) - h_i),   h_i = min(h(c_i), A(x_i, c_i))

``W`` is what all tokens of a step share (weights, activations, all-reduce), by their number. ``R`` is reading the KV
of ``B`` decoding sequences with ``K`` context tokens in all. ``A`` is the attention of a chunk of ``x_i`` tokens after
``c_i`` in KV; ``h``, the start of its kernels, is paid once however many chunks there are: the least ``A(64, c')`` for
``c' <= c`` (of several guesses nearest to aiconfigurator's steps of many prompts). Profilers measure these parts apart;
the maximum of the closed form (arithmetic, or reading the weights) is in the shape of ``W``.

Each part is piecewise linear, ``R`` along ``B`` and ``K / B``, and none falls with ``x`` or ``K``, so neither does a
step. ``R`` may fall with ``B`` and ``A`` with ``c``, as measured kernels do in places. Beyond the last knot the last
piece goes on. For one batch size a step of decodes is a row of straight pieces in ``K``, made when first asked for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from twinpool.cost import UNBOUNDED_CHUNK, DecodeRow
from twinpool.errors import ConfigError

DENSE_TOKENS: Final = 8192  # up to here W is a list by token; steps are rarely larger
MAX_SUMS = 1 << 18  # sums of attention kept
MAX_PREFILLS: Final = 1 << 12  # answers of ``prefill`` kept: a request that waits is looked at again and again
NEWTON_ROUNDS: Final = 8  # at most, in largest_chunk
FLAT: Final = 1e-12  # seconds a token
START_TOKENS: Final = 64  # attention of a chunk so short is all start


@dataclass(frozen=True)
class Grids:
    """Measured tables, in milliseconds. Knots start at 0 and rise; W, A, R never fall along x + B, x and K / B."""

    work_tokens: list[int]  # knots of W; W(0) is what W(1) is
    work_ms: list[float]
    attention_tokens: list[int]  # knots x of A; A(0, c) is 0
    attention_cached: list[int]  # knots c of A
    attention_ms: list[list[float]]  # [x][c]
    decode_batch: list[int]  # knots B of R; R(0, K) is 0
    decode_context: list[int]  # knots K / B of R, context tokens of one sequence
    decode_ms: list[list[float]]  # [B][K / B]


class GridCost:
    """``Cost`` from measured tables. What it caches (rows, sums of attention) changes no result."""

    __slots__ = (
        "_attention", "_batches", "_cached", "_columns", "_contexts", "_decode_s", "_dense", "_kept", "_last_chunk",
        "_prefills", "_rows", "_starts", "_sums", "_tokens", "_work_s", "_work_slope", "_work_tokens",
    )  # fmt: skip

    def __init__(self, grids: Grids) -> None:
        """Raises ConfigError where the tables are not as ``Grids`` says."""
        check(grids)
        self._work_tokens = grids.work_tokens
        self._work_s = [value / 1e3 for value in grids.work_ms]
        self._work_slope = _slopes(self._work_tokens, self._work_s)
        self._dense: list[float] = []
        self._dense = [self._work(tokens) for tokens in range(DENSE_TOKENS)]
        self._tokens = grids.attention_tokens[:-1]  # where cells begin; the last ones have no end
        self._cached = grids.attention_cached[:-1]
        self._columns = len(self._cached)
        self._attention = _cells(grids)
        start = list(accumulate((self._whole_attention(START_TOKENS, c) for c in grids.attention_cached), min))
        slopes = _slopes(grids.attention_cached, start)
        self._starts = [(v - b * c, b) for v, b, c in zip(start, slopes, grids.attention_cached, strict=False)]
        self._batches = grids.decode_batch
        self._contexts = grids.decode_context
        self._decode_s = [[value / 1e3 for value in row] for row in grids.decode_ms]
        self._rows: dict[int, DecodeRow] = {}
        self._sums: dict[int, list[float]] = {}
        self._kept = 0
        self._prefills: dict[tuple[int, int, int], float] = {}
        self._last_chunk = 512

    def step(self, chunks: Iterable[tuple[int, int]], batch: int, context: int) -> float:
        """Seconds of a step with ``chunks`` of (tokens, cached tokens before) and ``batch`` sequences decoding."""
        work = batch
        attention = starts = highest = 0.0
        for tokens, cached in chunks:
            work += tokens
            column = bisect_right(self._cached, cached) - 1
            p, q, r, s = self._attention[(bisect_right(self._tokens, tokens) - 1) * self._columns + column]
            whole = p + q * tokens + (r + s * tokens) * cached
            attention += whole
            alpha, beta = self._starts[column]
            start = alpha + beta * cached
            if start > whole:
                start = whole
            starts += start
            if start > highest:
                highest = start
        if work == batch:
            return self.decode(batch, context)
        shared = self._work(work)
        return shared + self._reading(batch, context) + (attention - (starts - highest))

    def decode(self, batch: int, context: int) -> float:
        """T_d(B, K): seconds of a step without chunks."""
        row = self._rows.get(batch)
        if row is None:
            row = self.row(batch)
        piece = bisect_right(row.breaks, context) - 1
        return row.alpha[piece] + row.beta[piece] * context

    def row(self, batch: int) -> DecodeRow:
        """T_d(B, K) by K; between two measured batch sizes linear at the same mean context."""
        row = self._rows.get(batch)
        if row is None:
            values = self._reading_at(batch)
            breaks = [max(1, batch) * context for context in self._contexts]
            beta = _slopes(breaks, values)
            work = self._work(batch)
            alpha = [work + v - b * k for v, b, k in zip(values, beta, breaks, strict=False)]
            row = self._rows[batch] = DecodeRow(tuple(breaks[:-1]), tuple(alpha), tuple(beta))
        return row

    def attention(self, tokens: int, cached: int) -> float:
        """A(x, c) less its start: seconds of attention that a chunk adds to a step that has others."""
        return max(0.0, self._whole_attention(tokens, cached) - self._start(cached))

    def prefill(self, uncached: int, cached: int, chunk: int) -> float:
        """T_p(u, c): seconds to compute ``uncached`` tokens after ``cached`` ones, alone, ``chunk`` tokens a step."""
        if uncached <= 0:
            return 0.0
        key = (uncached, cached, chunk)
        seconds = self._prefills.get(key, -1.0)
        if seconds < 0.0:
            if len(self._prefills) >= MAX_PREFILLS:
                self._prefills.clear()
            seconds = self._prefills[key] = self._prefill(uncached, cached, chunk)
        return seconds

    def _prefill(self, uncached: int, cached: int, chunk: int) -> float:
        full, rest = divmod(uncached, chunk)
        seconds = self._work(rest) + self._whole_attention(rest, cached + full * chunk) if rest else 0.0
        if full == 1:
            seconds += self._work(chunk) + self._whole_attention(chunk, cached)
        elif full:
            before = cached // chunk
            sums = self._attention_sums(chunk, cached - before * chunk, before + full)
            seconds += full * self._work(chunk) + (sums[before + full] - sums[before])
        return seconds

    def largest_chunk(self, seconds: float, cached: int, batch: int, context: int, tokens: int = 0) -> int:
        """The most tokens of one more chunk, after ``cached`` ones, that keep the step within ``seconds``; or 0.

        Without earlier chunks exactly: ``step`` of the answer is within ``seconds``, of one token more it is not.
        A bracket, entered at the last answer (chunks of one prompt are much alike) and closed by Newton's rule: on one
        straight piece its second point is the answer. Where pieces mislead it, by halving.
        """
        if seconds == math.inf:
            return UNBOUNDED_CHUNK
        others = batch + tokens
        load = self._reading(batch, context)
        start = self._start(cached) if tokens else 0.0
        row = bisect_right(self._cached, cached) - 1
        dense, knots = self._dense, self._tokens
        low, high = 0, UNBOUNDED_CHUNK + 1
        guess = self._last_chunk
        rounds = 0
        while True:
            cell = bisect_right(knots, guess)
            p, q, r, s = self._attention[(cell - 1) * self._columns + row]
            attention = p + q * guess + (r + s * guess) * cached
            at = guess + others
            if at + 1 < DENSE_TOKENS:
                work, next_work = dense[at], dense[at + 1]
            else:
                work, next_work = self._work(at), self._work(at + 1)
            over = work + load + (attention if attention > start else start) - seconds
            if over > 0.0:
                high = guess
            else:
                low = guess
                more = guess + 1
                if cell == len(knots) or more < knots[cell]:
                    attention = p + q * more + (r + s * more) * cached
                    if next_work + load + (attention if attention > start else start) > seconds:
                        break
            if high - low <= 1:
                break
            rounds += 1
            if rounds > NEWTON_ROUNDS:
                guess = (low + high) // 2
                continue
            slope = next_work - work + q + s * cached
            guess = guess - math.ceil(over / slope) if slope > FLAT else (low + high) // 2
            if guess <= low:
                guess = low + 1
            elif guess >= high:
                guess = high - 1
        self._last_chunk = low if low else 1
        return low

    def _reading_at(self, batch: int) -> list[float]:
        """R at the context knots; in proportion to the batch beyond the last knot."""
        last = self._batches[-1]
        if batch >= last:
            return [value * (batch / last) for value in self._decode_s[-1]]
        low = bisect_right(self._batches, batch) - 1
        share = (batch - self._batches[low]) / (self._batches[low + 1] - self._batches[low])
        pairs = zip(self._decode_s[low], self._decode_s[low + 1], strict=True)
        return [first + share * (second - first) for first, second in pairs]

    def _whole_attention(self, tokens: int, cached: int) -> float:
        """A(x, c)."""
        cell = (bisect_right(self._tokens, tokens) - 1) * self._columns + bisect_right(self._cached, cached) - 1
        p, q, r, s = self._attention[cell]
        return p + q * tokens + (r + s * tokens) * cached

    def _start(self, cached: int) -> float:
        """h(c)."""
        alpha, beta = self._starts[bisect_right(self._cached, cached) - 1]
        return alpha + beta * cached

    def _work(self, tokens: int) -> float:
        """W: seconds that all tokens of a step share."""
        if tokens < len(self._dense):
            return self._dense[tokens]
        piece = min(bisect_right(self._work_tokens, tokens), len(self._work_slope)) - 1
        return self._work_s[piece] + self._work_slope[piece] * (tokens - self._work_tokens[piece])

    def _reading(self, batch: int, context: int) -> float:
        """R(B, K): seconds a step spends on the KV of its decoding sequences."""
        if batch == 0:
            return 0.0
        row = self._rows.get(batch)
        if row is None:
            row = self.row(batch)
        piece = bisect_right(row.breaks, context) - 1
        return row.alpha[piece] - self._work(batch) + row.beta[piece] * context

    def _attention_sums(self, chunk: int, first: int, count: int) -> list[float]:
        """``sums[k]``: attention of ``k`` full chunks in a row, the first after ``first`` tokens; ``count`` or more."""
        key = first << 31 | chunk
        sums = self._sums.get(key)
        if sums is None:
            if self._kept > MAX_SUMS:
                self._sums.clear()
                self._kept = 0
            sums = self._sums[key] = [0.0]
        known = len(sums) - 1
        if known < count:
            self._kept += count - known
            for k in range(known, count):
                sums.append(sums[k] + self._whole_attention(chunk, first + k * chunk))
        return sums


def _slopes(knots: Sequence[int], values: Sequence[float]) -> list[float]:
    """Rise of a piecewise linear function over one unit, for each piece."""
    pairs = zip(pairwise(knots), pairwise(values), strict=True)
    return [(v1 - v0) / (k1 - k0) for (k0, k1), (v0, v1) in pairs]


def _cells(grids: Grids) -> list[tuple[float, float, float, float]]:
    """(p, q, r, s) of ``p + q*x + r*c + s*x*c`` seconds for each cell of A, row by row."""
    xs, cs = grids.attention_tokens, grids.attention_cached
    cells = []
    for i, (x0, x1) in enumerate(pairwise(xs)):
        for j, (c0, c1) in enumerate(pairwise(cs)):
            v00, v01 = grids.attention_ms[i][j] / 1e3, grids.attention_ms[i][j + 1] / 1e3
            v10, v11 = grids.attention_ms[i + 1][j] / 1e3, grids.attention_ms[i + 1][j + 1] / 1e3
            s = (v11 - v10 - v01 + v00) / ((x1 - x0) * (c1 - c0))
            q = (v10 - v00) / (x1 - x0) - s * c0
            r = (v01 - v00) / (c1 - c0) - s * x0
            cells.append((v00 - q * x0 - r * c0 - s * x0 * c0, q, r, s))
    return cells


def check(grids: Grids) -> None:
    """Raises ConfigError, naming the table, where ``grids`` are not as their docstring says."""
    columns = [list(column) for column in zip(*grids.attention_ms, strict=False)]
    tables = (
        ("work", [0, 1], grids.work_tokens, [grids.work_ms, grids.work_ms]),
        ("attention", grids.attention_cached, grids.attention_tokens, columns),
        ("decode", grids.decode_batch, grids.decode_context, grids.decode_ms),
    )
    for name, rows, knots, values in tables:
        problem = _shape(rows, knots, values) or _fall(values)
        if problem:
            raise ConfigError(f"the {name} table of the cost grids is not usable: {problem}; make the profile anew")
    if any(grids.attention_ms[0]) or any(grids.decode_ms[0]):
        raise ConfigError("attention and decode of nothing must cost 0 in the cost grids; make the profile anew")
    if grids.work_ms[-1] <= grids.work_ms[-2]:
        raise ConfigError("the work table of the cost grids must rise at its end; make the profile anew")


def _shape(rows: list[int], columns: list[int], values: list[list[float]]) -> str:
    """What is wrong with the axes of a table, or nothing."""
    for axis in (rows, columns):
        if axis[:1] != [0] or any(b <= a for a, b in pairwise(axis)):
            return "knots must start at 0 and rise"
    if min(len(rows), len(columns)) < 2 or len(values) != len(rows) or any(len(row) != len(columns) for row in values):
        return "it does not have one value for each pair of knots"
    return ""


def _fall(values: list[list[float]]) -> str:
    """What is wrong with the values of a table, or nothing."""
    if not all(math.isfinite(value) and value >= 0.0 for row in values for value in row):
        return "values must be numbers not under 0"
    if any(b < a for row in values for a, b in pairwise(row)):
        return "values must not fall with tokens or context"
    return ""
