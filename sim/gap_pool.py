"""All gaps of all requests together: their mean and any quantile of them, exact, without writing them out.

Runs are counted in bins under 1 % wide by their shortest and by their longest gap. A gap is not below the first and not
above the second, so the two bins where the counts pass the rank bracket the quantile. Only the runs that reach into the
bracket are looked at, halved by bisection where they still hold many gaps, and what is left is written out and sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twinpool.sim.gaps import Floats, GapLog, Ints, Runs, RunTable, Units, rank

BIN_BITS = 45  # of the 52 bits of a mantissa that a bin does not see: bins are 0.4 to 0.8 % wide
SPREAD = 1 << 16  # gaps that a quantile may write out


def _key(values: Floats) -> Ints:
    """Integers in the order of the values: the bits of a float are, but for negative ones, whose order is turned."""
    bits = (values + 0.0).view(np.int64)
    return np.asarray(bits ^ ((bits >> 63) & np.int64(0x7FFFFFFFFFFFFFFF)))


def _value(key: int) -> float:
    """The value that has this key."""
    bits = np.int64(key)
    return float((bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))).view(np.float64))


class GapPool:
    """All gaps of all requests: each gap of a run ``batch`` times, each single gap once."""

    __slots__ = ("_count", "_first", "_high_bin", "_high_weight", "_increment", "_low_bin", "_low_weight", "_offset",
                 "_weight", "count", "mean")  # fmt: skip

    def __init__(self, workers: Sequence[Runs], log: GapLog) -> None:
        table = RunTable(workers)
        gap = np.array(log.gap, dtype=np.float64)
        ones, zeros = np.ones(len(gap), np.int64), np.zeros(len(gap))
        self._first = np.concatenate([table.first, gap])
        self._increment = np.concatenate([table.increment, zeros])
        self._count = np.concatenate([table.count, ones])
        self._weight = np.concatenate([table.batch, ones])
        weight = self._count * self._weight
        self.count = int(weight.sum())
        units = Units.of(np.concatenate([table.sums() * table.batch, gap]))
        self.mean = float(units.total()) / max(self.count, 1)
        self._low_bin = _key(np.concatenate([table.low, gap])) >> BIN_BITS
        self._high_bin = _key(np.concatenate([table.high, gap])) >> BIN_BITS
        self._offset = int(self._low_bin.min()) if len(weight) else 0
        self._low_bin -= self._offset
        self._high_bin -= self._offset
        self._low_weight = np.cumsum(np.bincount(self._low_bin, weight)) if len(weight) else np.zeros(0)
        self._high_weight = np.cumsum(np.bincount(self._high_bin, weight)) if len(weight) else np.zeros(0)

    def binned(self, width_s: float) -> Floats:
        """How many gaps are in each bin of that width, from 0 to the longest; those below 0 are in the first."""
        found: Floats = np.zeros(1)
        ends = np.cumsum(self._count)
        begin = 0
        while begin < len(ends):
            before = int(ends[begin - 1]) if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, before + SPREAD, side="right")))
            count = self._count[begin:end]
            run = np.repeat(np.arange(begin, end), count)
            index = np.arange(len(run)) - np.repeat(ends[begin:end] - count - before, count)
            gap = self._first[run] + index * self._increment[run]
            place = (np.maximum(gap, 0.0) / width_s).astype(np.int64)
            part = np.asarray(np.bincount(place, self._weight[run]), np.float64)
            short, long = sorted((found, part), key=len)
            long[: len(short)] += short
            found = long
            begin = end
        return found

    def quantile(self, q: float) -> float:
        """Quantile ``q``, as the module defines it, in seconds. Raises ValueError where there are no gaps."""
        place = rank(q, self.count)
        lower = int(np.searchsorted(self._low_weight, place))  # not place gaps can be in bins below
        upper = int(np.searchsorted(self._high_weight, place))  # place gaps are in bins up to here
        here = np.flatnonzero((self._high_bin >= lower) & (self._low_bin <= upper))
        place -= int(self._high_weight[lower - 1]) if lower else 0
        search = _Search(self._first[here], self._increment[here], self._count[here], self._weight[here])
        return search.find(place, (lower + self._offset) << BIN_BITS, (upper + 1 + self._offset) << BIN_BITS)


class _Search:
    """The n-th smallest gap of few runs; a run keeps the range ``begin`` to ``end`` of its gaps, in rising order."""

    __slots__ = ("begin", "count", "end", "first", "increment", "weight")

    def __init__(self, first: Floats, increment: Floats, count: Ints, weight: Ints) -> None:
        self.first, self.increment, self.count, self.weight = first, increment, count, weight
        self.begin, self.end = np.zeros(len(count), np.int64), count.copy()

    def find(self, place: int, lower: int, upper: int) -> float:
        """The ``place``-th gap, counted from 1; its key is at least ``lower`` and below ``upper``."""
        place = self._keep_from(self._below(_value(lower)), place)
        self.end = self._below(_value(upper))
        while upper - lower > 1 and int((self.end - self.begin).sum()) > SPREAD:
            middle = (lower + upper) // 2
            cut = self._below(_value(middle))
            if self._weight(cut) >= place:
                self.end, upper = cut, middle
            else:
                place, lower = self._keep_from(cut, place), middle
        return _value(lower) if upper - lower <= 1 else self._sorted_gap(place)

    def _weight(self, cut: Ints) -> int:
        """How often the gaps below ``cut`` that are still kept were felt."""
        return int((self.weight * (cut - self.begin)).sum())

    def _keep_from(self, cut: Ints, place: int) -> int:
        """Forgets the gaps below ``cut``; returns the place among those that stay."""
        place -= self._weight(cut)
        self.begin = cut
        return place

    def _sorted_gap(self, place: int) -> float:
        length = self.end - self.begin
        index = np.arange(length.sum()) + np.repeat(self.begin - (np.cumsum(length) - length), length)
        values = self._gaps(np.repeat(np.arange(len(length)), length), index)
        order = np.argsort(values)
        held = np.cumsum(np.repeat(self.weight, length)[order])
        return float(values[order[np.searchsorted(held, place)]])

    def _below(self, value: float) -> Ints:
        """For each run the end of its gaps that are below ``value``: binary search, because rounding makes ties."""
        begin, end = self.begin.copy(), self.end.copy()
        at = np.flatnonzero(begin < end)
        while len(at):
            middle = (begin[at] + end[at]) // 2
            less = self._gaps(at, middle) < value
            begin[at[less]] = middle[less] + 1
            end[at[~less]] = middle[~less]
            at = at[begin[at] < end[at]]
        return begin

    def _gaps(self, run: Ints, index: Ints) -> Floats:
        """Gap ``index`` of each run, in rising order."""
        increment = self.increment[run]
        index = np.where(increment < 0.0, self.count[run] - 1 - index, index)
        return np.asarray(self.first[run] + index * increment)
