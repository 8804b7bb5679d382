"""Traffic as columns: one entry a request, sorted by arrival; and the cheap changes one makes to a whole trace.

Columns are never changed once a trace is made, so traces share them freely. Hash ids are chained: an id stands for its
block and everything before it in the prompt, so equal ids mean equal prefixes, and an id follows one other id only.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from operator import eq, le

from twinpool.errors import ConfigError

NO_REQUEST = -1  # in ``after``: this request waits for no other
NO_TAIL = -1
HASH_LIMIT = 1 << 62

CHECKED_IDS = 1 << 16  # ids looked at to tell whether they are chained: a file that is not shows it soon
MIN_QUANTUM_S = 0.01  # a finer grid of stamps makes no bursts worth telling
MIN_SHARED = 0.05  # share of requests that must have their stamp in common with another for a grid to matter
GRID_TOLERANCE = 0.01  # of a quantum, that a gap may be away from a whole number of them
GRID_SHARE = 0.9  # of the gaps, that must lie on the grid


@dataclass(frozen=True, slots=True)
class Trace:
    """What arrived when. All columns have ``len(self)`` entries, but for ``hashes`` (all ids) and ``offsets`` (+ 1)."""

    name: str
    block_tokens: int  # prompt tokens that one hash id stands for; 0: no hashes
    arrival: array[float]  # seconds, the first at least 0
    prompt: array[int]  # tokens, at least 1
    output: array[int]  # tokens, at least 1
    hashes: array[int]  # ids of all requests, one after the other, 0 to 2**62 - 1; of full blocks only
    offsets: array[int]  # request i has hashes[offsets[i]:offsets[i + 1]]: prompt // block_tokens of them, or fewer
    after: array[int] | None = None  # the request that this one follows; its arrival is then a lower bound only
    think: array[float] | None = None  # seconds from the end of that request to this one's arrival
    tenant: list[str] | None = None
    klass: list[str] | None = None
    session: list[str] | None = None
    tail: array[int] | None = None  # id of the partly filled last block, NO_TAIL where there is none
    returns: list[bool] | None = None  # the request says that its conversation will come back (returns.py)

    def __len__(self) -> int:
        return len(self.arrival)

    def block_hashes(self, i: int) -> list[int]:
        """Ids of the full blocks of request ``i``, as a new list."""
        return self.hashes[self.offsets[i] : self.offsets[i + 1]].tolist()

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.arrival[-1] - self.arrival[0] if len(self) else 0.0

    def check_integrity(self) -> None:
        """Raises ValueError where the columns contradict what their comments say."""
        n = len(self)
        columns = (self.prompt, self.output, self.after, self.think, self.tenant, self.klass, self.session, self.tail,
                   self.returns)  # fmt: skip
        if len(self.offsets) != n + 1 or any(column is not None and len(column) != n for column in columns):
            raise ValueError("columns differ in length")
        if n and (self.arrival[0] < 0 or not all(map(le, self.arrival, self.arrival[1:]))):
            raise ValueError("arrivals are negative or not sorted")
        if n and (min(self.prompt) < 1 or min(self.output) < 1):
            raise ValueError("a request has no prompt or no output")
        if self.hashes and not (self.block_tokens > 0 and min(self.hashes) >= 0 and max(self.hashes) < HASH_LIMIT):
            raise ValueError("hash ids without a block size, or out of range")
        counts = [high - low for low, high in pairwise(self.offsets)]
        full = [tokens // self.block_tokens if self.block_tokens else 0 for tokens in self.prompt]
        if not all(0 <= count <= most for count, most in zip(counts, full, strict=True)):
            raise ValueError("a request has more hash ids than full blocks")
        if (self.after is None) != (self.think is None):
            raise ValueError("after and think come together")
        if any(not NO_REQUEST <= follows < i for i, follows in enumerate(self.after or ())):
            raise ValueError("a request follows one that does not come before it")


def no_hashes(n: int) -> array[int]:
    """The ``offsets`` of ``n`` requests without hashes."""
    return array("q", bytes(8 * (n + 1)))


def by_arrival(trace: Trace) -> Trace:
    """The same requests, sorted by arrival; equal ones keep their order. The same object where they are sorted.

    A follower that claims to arrive before the request it follows gets that one's arrival.
    """
    trace = replace(trace, arrival=_after_arrivals(trace)) if trace.after is not None else trace
    arrival = trace.arrival
    if all(map(le, arrival, arrival[1:])):
        return trace
    return select(trace, sorted(range(len(trace)), key=arrival.__getitem__))


def _after_arrivals(trace: Trace) -> array[float]:
    arrival = trace.arrival[:]
    for i, follows in enumerate(trace.after or ()):
        if follows >= 0 and arrival[follows] > arrival[i]:
            arrival[i] = arrival[follows]
    return arrival


def select(trace: Trace, rows: Sequence[int]) -> Trace:
    """The requests ``rows``, in that order; whom they follow must be among them, and before them."""
    hashes, offsets = array("q"), array("q", [0])
    for i in rows:
        hashes += trace.hashes[trace.offsets[i] : trace.offsets[i + 1]]
        offsets.append(len(hashes))
    places = {i: place for place, i in enumerate(rows)}
    places[NO_REQUEST] = NO_REQUEST
    return replace(
        trace,
        arrival=array("d", [trace.arrival[i] for i in rows]),
        prompt=_picked(trace.prompt, rows),
        output=_picked(trace.output, rows),
        hashes=hashes,
        offsets=offsets,
        after=None if trace.after is None else array("q", [places[trace.after[i]] for i in rows]),
        think=None if trace.think is None else array("d", [trace.think[i] for i in rows]),
        tenant=_words(trace.tenant, rows),
        klass=_words(trace.klass, rows),
        session=_words(trace.session, rows),
        tail=None if trace.tail is None else _picked(trace.tail, rows),
        returns=None if trace.returns is None else [trace.returns[i] for i in rows],
    )


def _picked(column: array[int], rows: Sequence[int]) -> array[int]:
    return array("q", [column[i] for i in rows])


def _words(column: list[str] | None, rows: Sequence[int]) -> list[str] | None:
    return None if column is None else [column[i] for i in rows]


# --- part of a trace ----------------------------------------------------------------------------------------------


def limit(trace: Trace, n: int) -> Trace:
    """The first ``n`` requests. Raises ConfigError where ``n`` is below 1."""
    if n < 1:
        raise ConfigError(f"a limit of {n} requests leaves none: give at least 1")
    return trace if n >= len(trace) else _cut(trace, 0, n, 0.0)


def slice_time(trace: Trace, start: float, end: float) -> Trace:
    """Requests that arrive from ``start`` to before ``end`` (seconds); ``start`` becomes 0.

    A follower whose predecessor is cut off arrives by its own arrival column. Raises ConfigError where none is left.
    """
    low, high = bisect_left(trace.arrival, start), bisect_left(trace.arrival, end)
    if start < 0 or high <= low:
        last = trace.arrival[-1] if len(trace) else 0.0
        raise ConfigError(f"no request arrives from {start:g} to {end:g} s: the trace ends at {last:.3f} s")
    return _cut(trace, low, high, start)


def _cut(trace: Trace, low: int, high: int, start: float) -> Trace:
    rows = slice(low, high)
    first, last = trace.offsets[low], trace.offsets[high]
    offsets = trace.offsets[low : high + 1]
    after = None
    if trace.after is not None:
        after = array("q", [i - low if i >= low else NO_REQUEST for i in trace.after[rows]])
    return replace(
        trace,
        arrival=array("d", [when - start for when in trace.arrival[rows]]) if start else trace.arrival[rows],
        prompt=trace.prompt[rows],
        output=trace.output[rows],
        hashes=trace.hashes[first:last],
        offsets=array("q", [offset - first for offset in offsets]) if first else offsets,
        after=after,
        think=None if trace.think is None else trace.think[rows],
        tenant=None if trace.tenant is None else trace.tenant[rows],
        klass=None if trace.klass is None else trace.klass[rows],
        session=None if trace.session is None else trace.session[rows],
        tail=None if trace.tail is None else trace.tail[rows],
        returns=None if trace.returns is None else trace.returns[rows],
    )


# --- other times --------------------------------------------------------------------------------------------------


def speed(trace: Trace, factor: float) -> Trace:
    """``factor`` times the load: arrivals and think times divided by it. Raises ConfigError where it is not above 0."""
    if not 0 < factor < float("inf"):
        raise ConfigError(f"a speed of {factor:g} is no traffic: give a factor above 0")
    if factor == 1:
        return trace
    think = None if trace.think is None else array("d", [seconds / factor for seconds in trace.think])
    return replace(trace, arrival=array("d", [when / factor for when in trace.arrival]), think=think)


def quantum(trace: Trace) -> float:
    """Seconds between the stamps of a trace whose arrivals were rounded to a grid; 0.0 where they were not.

    A grid: requests share stamps, and the gaps between stamps are whole multiples (within GRID_TOLERANCE) of one gap.
    That gap is the 5th percentile of all: stamps of an hour in steps of 3 s are jittered by a millisecond.
    """
    arrival = trace.arrival
    stamps = sorted(set(arrival))
    if len(arrival) - len(stamps) < MIN_SHARED * len(arrival) or len(stamps) < 2:
        return 0.0
    gaps = sorted(late - early for early, late in pairwise(stamps))
    step = gaps[len(gaps) // 20]
    if step < MIN_QUANTUM_S:
        return 0.0
    steps = [(gap, round(gap / step)) for gap in gaps]
    on_grid = [(gap, count) for gap, count in steps if abs(gap / step - count) <= GRID_TOLERANCE * count]
    if len(on_grid) < GRID_SHARE * len(gaps):
        return 0.0
    return sum(gap for gap, _ in on_grid) / sum(count for _, count in on_grid)


def spread(trace: Trace, seed: int) -> Trace:
    """Quantised arrivals, each drawn evenly from its stamp to a quantum later; the order of requests stays as it is.

    A trace that is not quantised comes back as it is. Rounded to the nanosecond, the precision of our files.
    """
    step = quantum(trace)
    if not step:
        return trace
    rng = random.Random(seed)
    old = trace.arrival
    new = array("d")
    while len(new) < len(old):
        stamp = old[len(new)]
        high = bisect_right(old, stamp, len(new))
        room = min(step, old[high] - stamp) if high < len(old) else step
        new.extend(sorted(round(stamp + room * rng.random(), 9) for _ in range(high - len(new))))
    return by_arrival(replace(trace, arrival=new))


# --- hash ids -----------------------------------------------------------------------------------------------------


def is_chained(trace: Trace) -> bool:
    """Whether each id always follows the same one, looking at the first CHECKED_IDS ids."""
    ids = trace.hashes[:CHECKED_IDS]
    before = array("q", [NO_TAIL])
    before += ids[:-1]
    for start in trace.offsets:
        if start >= len(ids):
            break
        before[start] = NO_TAIL
    parents = dict(zip(ids, before, strict=False))  # the last wins: any other differs from it below
    return all(map(eq, map(parents.__getitem__, ids), before))


def rechain(trace: Trace) -> Trace:
    """New ids, numbered from 0, that stand for their block and all before it: for ids that name contents only."""
    names: dict[tuple[int, int], int] = {}
    hashes, tail = array("q"), array("q")
    tails: Iterable[int] = repeat(NO_TAIL) if trace.tail is None else trace.tail
    for (low, high), last in zip(pairwise(trace.offsets), tails, strict=False):
        parent = NO_TAIL
        for block in trace.hashes[low:high]:
            parent = names.setdefault((parent, block), len(names))
            hashes.append(parent)
        tail.append(NO_TAIL if last == NO_TAIL else names.setdefault((parent, last), len(names)))
    return replace(trace, hashes=hashes, tail=None if trace.tail is None else tail)
