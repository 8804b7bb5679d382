"""Gaps between tokens, kept as runs, and exact statistics of them.

While the same sequences decode, step after step, a gap is the one before plus a constant (every sequence has one more
token to read). So a worker's gaps are *runs*: ``first, first + increment, ...``, ``count`` of them, each felt by
``batch`` sequences; some 25,000 runs hold 4 million gaps. Gap j of a run is ``first + j * increment`` in float64: that
value, not one summed up, is what everything here is exact for: quantiles and longest gaps to the last bit, means to
1e-15 of their value or 1e-20 s.

**Worst tenth of a request** (``request_gaps``): the mean of its k = ceil(0.1 * n) longest gaps. Runs are put into 64
levels by their shortest gap; the highest levels that hold k gaps give a value that at least k gaps reach. Only gaps
from there up are written out (little more than k), sorted and summed.

All gaps of all requests together: ``gap_pool.py``.

A quantile q of n values is, here and wherever this package prints one, the inverted distribution function: the smallest
value v such that at least q * n of the values are <= v. It is always one of the values.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Number = TypeVar("Number", np.int64, np.float64)

UNIT = 2.0**-30  # seconds; sums are taken in whole units, which is exact, and in rests, which are tiny
LEVELS = 64
BLOCK_RUNS = 1 << 14  # requests are worked through in blocks of about so many runs: their columns stay in the cache
BLOCK_ROWS = 256
BLOCK_GAPS = 1 << 20
SAMPLE = 1 << 14  # runs from which the levels are taken


class Runs:
    """The runs of one worker: append-only columns, in the order of time. A sequence joins and leaves between runs."""

    __slots__ = ("batch", "count", "first", "increment")

    def __init__(self) -> None:
        self.first = array("d")  # seconds
        self.increment = array("d")  # seconds; rounding may make it slightly negative
        self.count = array("q")  # gaps, at least 1
        self.batch = array("q")  # sequences that feel each of them

    def __len__(self) -> int:
        return len(self.count)

    def add(self, first: float, increment: float, count: int, batch: int) -> None:
        """Appends the gaps ``first + j * increment`` for j below ``count``, each felt by ``batch`` sequences."""
        self.first.append(first)
        self.increment.append(increment)
        self.count.append(count)
        self.batch.append(batch)

    def expand(self, lo: int, hi: int) -> list[float]:
        """Every gap of runs ``lo`` to ``hi - 1``, in seconds and in order of time. For looking at few requests."""
        return [self.first[r] + j * self.increment[r] for r in range(lo, hi) for j in range(self.count[r])]


class GapLog:
    """Whose gaps are whose: spans of runs, and single gaps that are in no run. Any order; requests are 0, 1, 2, ..."""

    __slots__ = ("gap", "hi", "lo", "request", "single", "worker")

    def __init__(self) -> None:
        self.request = array("q")  # one entry a span
        self.worker = array("q")
        self.lo = array("q")
        self.hi = array("q")
        self.single = array("q")  # request of a single gap
        self.gap = array("d")  # seconds

    def add_span(self, request: int, worker: int, lo: int, hi: int) -> None:
        """The request felt the gaps of runs ``lo`` to ``hi - 1`` of this worker; none where ``lo == hi``."""
        self.request.append(request)
        self.worker.append(worker)
        self.lo.append(lo)
        self.hi.append(hi)

    def add_single(self, request: int, gap: float) -> None:
        """The request felt one gap of ``gap`` seconds outside of all runs: a hand-over, a pause after a loss."""
        self.single.append(request)
        self.gap.append(gap)


class RequestGaps(NamedTuple):
    """Columns with one entry a request; seconds. All 0 where a request has no gap."""

    gaps: Ints  # how many
    worst: Floats  # mean of the ceil(0.1 * gaps) longest
    longest: Floats
    mean: Floats


def rank(q: float, count: int) -> int:
    """Which of ``count`` sorted values, from 1, is their quantile ``q``: ceil(q * count), q read as a decimal.

    So 0.07 of 100 is the 7th, though the float 0.07 * 100 is above 7. Raises ValueError unless 0 <= q <= 1, count > 0.
    """
    if count < 1 or not 0.0 <= q <= 1.0:
        raise ValueError(f"no quantile {q} of {count} values")
    return max(1, math.ceil(Fraction(repr(float(q))) * count))


def quantile(values: Floats, q: float) -> float:
    """Quantile ``q`` of plain values in any order, as the module defines it. Raises ValueError without values."""
    at = rank(q, len(values)) - 1
    return float(np.partition(values, at)[at])


class RunTable:
    """Runs of all workers in one set of columns; those of worker w begin at ``base[w]``."""

    __slots__ = ("base", "batch", "count", "first", "high", "increment", "low")

    def __init__(self, workers: Sequence[Runs]) -> None:
        self.base = np.cumsum([0, *(len(runs) for runs in workers)], dtype=np.int64)
        self.first = _floats([runs.first for runs in workers])
        self.increment = _floats([runs.increment for runs in workers])
        self.count = _ints([runs.count for runs in workers])
        self.batch = _ints([runs.batch for runs in workers])
        if len(self.count) and self.count.min() < 1:
            raise ValueError("a run without a gap")
        last = self.first + (self.count - 1) * self.increment
        self.low = np.minimum(self.first, last)
        self.high = np.maximum(self.first, last)

    def sums(self) -> Floats:
        """Seconds of each run: all its gaps once."""
        return self.count * (self.first + self.increment * (0.5 * (self.count - 1)))


def _floats(columns: Sequence[array[float]]) -> Floats:
    return np.concatenate([np.zeros(0), *(np.array(column, dtype=np.float64) for column in columns)])


def _ints(columns: Sequence[array[int]]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *(np.array(column, dtype=np.int64) for column in columns)])


class Units(NamedTuple):
    """Values as whole units and rests: sums of the first are exact, sums of the second are too small to matter."""

    whole: Floats
    rest: Floats

    @classmethod
    def of(cls, values: Floats) -> Units:
        whole = np.rint(values * (1.0 / UNIT))
        return cls(whole, values - whole * UNIT)

    def total(self, axis: int | None = None) -> Floats:
        """Their sum, right to the last bit or two, whatever their number."""
        return np.asarray(self.whole.sum(axis=axis) * UNIT + self.rest.sum(axis=axis))


def _by_request(request: Ints, values: Units, requests: int) -> Floats:
    """Sum of the values of each request."""
    whole = np.bincount(request, values.whole, requests)
    return np.asarray(whole * UNIT + np.bincount(request, values.rest, requests))


def _before(column: npt.NDArray[Number]) -> npt.NDArray[Number]:
    """Prefix sums: entry i is the sum of the first i."""
    sums = np.zeros(len(column) + 1, column.dtype)
    np.cumsum(column, out=sums[1:])
    return sums


class _Levels:
    """Runs put into levels by their shortest gap, level 0 the highest: gaps of level i are ``floor[i]`` or longer."""

    __slots__ = ("floor", "of")

    def __init__(self, low: Floats) -> None:
        sample = np.sort(low[:: 1 + len(low) // SAMPLE])
        edges = np.unique(sample[np.arange(LEVELS - 1) * len(sample) // (LEVELS - 1)])
        self.floor = np.concatenate([edges[::-1], low.min(keepdims=True)])
        self.of: Ints = len(edges) - np.searchsorted(edges, low, side="right")


class _Spans:
    """Spans as ranges of rows of the table, and single gaps; each sorted by the place of its request in ``order``."""

    __slots__ = ("gap", "hi", "lo", "place", "single")

    def __init__(self, table: RunTable, log: GapLog, requests: int) -> None:
        worker, lo, hi = (np.array(column, dtype=np.int64) for column in (log.worker, log.lo, log.hi))
        if np.any((worker < 0) | (worker >= len(table.base) - 1)) or np.any((lo < 0) | (lo > hi)):
            raise ValueError("a span of a worker or of runs that are not there")
        base = table.base[worker]
        self.lo: Ints = base + lo
        self.hi: Ints = base + hi
        if np.any(self.hi > table.base[worker + 1]):
            raise ValueError("a span of runs that are not there")
        self.place: Ints = np.array(log.request, dtype=np.int64)
        self.single: Ints = np.array(log.single, dtype=np.int64)
        self.gap: Floats = np.array(log.gap, dtype=np.float64)
        for column in (self.place, self.single):
            if len(column) and (column.min() < 0 or column.max() >= requests):
                raise ValueError(f"a gap of a request that is not one of {requests}")

    def sort(self, place: Ints) -> None:
        """Request i is at ``place[i]`` from now on."""
        self.place, self.single = place[self.place], place[self.single]
        by_place = np.argsort(self.place, kind="stable")
        self.lo, self.hi, self.place = self.lo[by_place], self.hi[by_place], self.place[by_place]
        by_place = np.argsort(self.single, kind="stable")
        self.gap, self.single = self.gap[by_place], self.single[by_place]


def request_gaps(workers: Sequence[Runs], log: GapLog, requests: int) -> RequestGaps:
    """Statistics of the gaps of each request. Raises ValueError on spans of runs or of requests that are not there.

    Linear in requests and in the runs they span.
    """
    table = RunTable(workers)
    spans = _Spans(table, log, requests)
    before = _before(table.count)
    count = np.bincount(spans.single, minlength=requests).astype(np.int64)
    count += np.bincount(spans.place, before[spans.hi] - before[spans.lo], requests).astype(np.int64)
    mean = _means(table, spans, count)
    order = np.argsort(count, kind="stable")  # requests with like numbers of gaps share a block
    place = np.empty(requests, np.int64)
    place[order] = np.arange(requests)
    spans.sort(place)
    worst, longest = _worst(table, spans, count[order])
    return RequestGaps(count, worst[place], longest[place], mean)


def _means(table: RunTable, spans: _Spans, count: Ints) -> Floats:
    units = Units.of(table.sums())
    whole, rest = _before(units.whole.astype(np.int64)), _before(units.rest)
    felt = Units((whole[spans.hi] - whole[spans.lo]).astype(np.float64), rest[spans.hi] - rest[spans.lo])
    total = _by_request(spans.place, felt, len(count))
    total += _by_request(spans.single, Units.of(spans.gap), len(count))
    return np.asarray(total / np.maximum(count, 1))


def _worst(table: RunTable, spans: _Spans, count: Ints) -> tuple[Floats, Floats]:
    """Mean of the worst tenth, and the longest gap, by place; ``count`` ascending."""
    worst, longest = np.zeros(len(count)), np.zeros(len(count))
    levels = _Levels(table.low) if len(table.low) else None
    for begin, end in _blocks(spans, count):
        block = _Block(spans, begin, end, (count[begin:end] + 9) // 10)
        rows = block.rows(table, levels)
        rows.sort(axis=1)
        most = int(block.wanted[-1])
        units = Units.of(np.where(np.arange(most) >= most - block.wanted[:, None], rows[:, -most:], 0.0))
        worst[begin:end] = units.total(axis=1) / block.wanted
        longest[begin:end] = rows[:, -1]
    return worst, longest


def _blocks(spans: _Spans, count: Ints) -> Iterator[tuple[int, int]]:
    """Ranges of places to work through at once: all that have gaps."""
    runs = _before(np.bincount(spans.place, spans.hi - spans.lo, len(count)))
    gaps = _before(count)
    begin = int(np.searchsorted(count, 1))
    while begin < len(count):
        end = int(np.searchsorted(runs, runs[begin] + BLOCK_RUNS, side="right")) - 1
        end = min(end, int(np.searchsorted(gaps, gaps[begin] + BLOCK_GAPS, side="right")) - 1, begin + BLOCK_ROWS)
        end = max(end, begin + 1)
        yield begin, end
        begin = end


class _Block:
    """Some requests, one row each: which of them spans which runs, and how many gaps of each are wanted."""

    __slots__ = ("gap", "row", "run", "single", "wanted")

    def __init__(self, spans: _Spans, begin: int, end: int, wanted: Ints) -> None:
        self.wanted = wanted
        here = slice(*np.searchsorted(spans.place, [begin, end]))
        lo, length = spans.lo[here], spans.hi[here] - spans.lo[here]
        self.row: Ints = np.repeat(spans.place[here] - begin, length)
        self.run: Ints = np.arange(len(self.row)) + np.repeat(lo - (np.cumsum(length) - length), length)
        here = slice(*np.searchsorted(spans.single, [begin, end]))
        self.gap, self.single = spans.gap[here], spans.single[here] - begin

    def rows(self, table: RunTable, levels: _Levels | None) -> Floats:
        """A matrix with the longest gaps of each request, at least as many as are wanted, filled up with -inf."""
        if levels is None:
            values, lengths = np.zeros(0), np.zeros(len(self.wanted), np.int64)
        else:
            values, lengths = self._long_gaps(table, self._reached(table, levels))
        ends = lengths + np.bincount(self.single, minlength=len(lengths))
        column = np.arange(ends.max())
        matrix = np.full((len(ends), len(column)), -np.inf)
        inside = column < lengths[:, None]
        matrix[inside] = values
        matrix[(column < ends[:, None]) & ~inside] = self.gap
        return matrix

    def _reached(self, table: RunTable, levels: _Levels) -> Floats:
        """For each row a value that as many gaps of its runs reach as are wanted; -inf where they have not so many."""
        width, height = len(levels.floor), len(self.wanted)
        key = levels.of[self.run] * height + self.row
        held = np.bincount(key, table.count[self.run], width * height).reshape(width, height).cumsum(axis=0)
        at = (held < self.wanted).sum(axis=0)
        return np.asarray(np.append(levels.floor, -np.inf)[at])

    def _long_gaps(self, table: RunTable, reached: Floats) -> tuple[Floats, Ints]:
        """All gaps of runs that are not below ``reached`` of their row, some below it, row by row; how many a row."""
        at = np.flatnonzero(table.high[self.run] >= reached[self.row])
        row, run = self.row[at], self.run[at]
        first, increment, count, high = table.first[run], table.increment[run], table.count[run], table.high[run]
        slack = 2.0**-50 * np.maximum(np.abs(first), high) + 1e-270  # far more than the gaps are rounded by
        slope = np.maximum(np.abs(increment), 1e-290)
        taken = np.minimum(count, (high - reached[row] + slack) / slope + 2.0).astype(np.int64)
        begin = np.where(increment < 0.0, 0, count - taken)
        index = np.arange(taken.sum()) + np.repeat(begin - (np.cumsum(taken) - taken), taken)
        values = np.repeat(first, taken) + index * np.repeat(increment, taken)
        return values, np.bincount(row, taken, len(reached)).astype(np.int64)
