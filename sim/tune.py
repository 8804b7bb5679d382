"""The best split of so many GPUs into prefill and decode workers, and the best chunk size, for a trace.

1. The analytic ratio (ratio.py) names a split to begin with, and about what it carries.
2. On the busiest part of a long trace its capacity is bracketed (search.py). *Every* other split is run once a little
   above that; those that still meet the target climb together until one is left: the new lead. Every chunk size is
   tried against the lead in the same way; where one wins, the splits are tried again with it. Last, neighbours of the
   winner (a prefill worker more or fewer, the next chunk sizes) are looked at a few steps below: the margin.
3. On the whole trace the winner's capacity is bracketed to a step of the grid, 0.5 %; then every split and chunk size
   whose capacity on the part was at most ``REACH`` steps lower is run at ``EDGE`` steps above it. Any that meets the
   target there climbs and takes its place.

What is assumed: that more load never makes more requests meet their SLO; that what carries 11 % less than the winner on
the busiest part is not better on the whole; and that the best chunk size of the best split is the best of all (splits
and chunk sizes are not tried in all pairs). Nothing is assumed of how capacity depends on the split: each one is run. A
tie goes to what led before. A part is an eighth to a quarter of the requests, and so long that batches settle: several
times what an answer takes, at the speed-up that is looked for. Traces that have no such part are not cut, and closed
loops never: step 2 then runs on the whole, and is all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add
from typing import Any

from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.ratio import Ratio, ratio_of
from twinpool.sim.result import Summary
from twinpool.sim.search import JUMP, Job, Runner, Search, allowed_misses, narrow, nearest, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, slice_time

CHUNKS = (512, 1024, 2048, 4096, 8192)  # tokens
EDGE = 2  # steps by which another must be better to be preferred: 1 %
REACH = 24  # steps
PARTS = (8, 6, 4)  # an eighth to a quarter of a trace
PART_REQUESTS = 2000  # at least
PART_ANSWERS = 6.0  # at least: seconds of a part, sped up, over those of a mean answer at the ITL SLO
PART_MISSES = 3.0  # share of its requests that may miss there, over that on the whole: peaks have more of them
PART_STEPS = 4  # of a bracket on the part: 2 %
MARGINS = (4, 12, 32)  # steps below the best at which neighbours are looked at: 2, 6 and 15 %
BURSTS = 0.75  # a trace's capacity over what its means allow; public conversation traces have 0.6 to 0.9
ROUNDS = 4  # of splits and chunk sizes in turn, at most

TICK_S = 1e-6  # closer arrivals count as so far apart

Tell = Callable[[float], None]  # the share that is done
Window = tuple[float, float]  # from, to before: seconds at the trace's own speed


@dataclass(frozen=True, slots=True)
class Tried:
    """One split and chunk size. Speed-ups of the trace: ``met`` met the target, ``missed`` did not; None: not tried."""

    prefill: int
    decode: int
    chunk_tokens: int
    met: float | None
    missed: float | None
    runs: int

    def figures(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "prefill": self.prefill, "decode": self.decode, "chunk_tokens": self.chunk_tokens, "met": self.met,
            "missed": self.missed, "runs": self.runs,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour of the best, and by which share of the best's capacity it is worse: between the two bounds."""

    tried: Tried
    at_least: float  # negative: it may be better by so much
    at_most: float | None  # None: nobody looked so far below

    def figures(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**self.tried.figures(), "margin_at_least": self.at_least, "margin_at_most": self.at_most}


@dataclass(frozen=True, slots=True)
class Tuned:
    """What ``tune`` found."""

    best: Tried
    capacity: float  # speed-up of the trace
    ratio: Ratio
    analytic: tuple[int, int]
    neighbours: Sequence[Neighbour]  # on the part, where there is one
    tried: Sequence[dict[str, Any]]  # on the whole trace
    tried_on_part: Sequence[dict[str, Any]]
    window: Window | None  # of the part
    summary: Summary  # of the best at its capacity
    facts: dict[str, Any]  # trace, GPUs, policy, profile

    def figures(self) -> dict[str, Any]:
        """As plain values for JSON."""
        wanted = ("goodput_rps", "goodput_rps_per_gpu", "attainment", "cost_per_million_tokens", "tokens_per_joule")
        return {
            **self.facts,
            "prefill": self.best.prefill,
            "decode": self.best.decode,
            "chunk_tokens": self.best.chunk_tokens,
            "capacity": self.capacity,
            **{name: self.summary[name] for name in wanted},
            "neighbours": [each.figures() for each in self.neighbours],
            "analytic": {
                "prefill": self.analytic[0],
                "decode": self.analytic[1],
                "prefill_worker_rps": _finite(self.ratio.prefill),
                "decode_worker_rps": _finite(self.ratio.decode),
                "link_rps": _finite(self.ratio.link),
            },
            "tried": list(self.tried),
            "tried_on_part": list(self.tried_on_part),
            "part_s": self.window,
            "runs": sum(each["runs"] for each in (*self.tried, *self.tried_on_part)),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Board:
    """The searches of all that was tried, by (prefill workers, chunk tokens), on a trace or a window of it."""

    def __init__(self, made: Runner, trace: Trace, base: Settings, workers: int, target: float) -> None:
        self.made = made
        self.trace = trace
        self.base = base
        self.workers = workers
        self.target = target
        self.window: Window | None = None
        self.stride = 1  # of a bracket of what leads
        self.start, self.jump = 0, JUMP
        self.allowed = allowed_misses(len(trace), target)
        self.searches: dict[tuple[int, int], Search] = {}

    def part(self, window: Window) -> Board:
        """The same on a part of the trace."""
        board = Board(self.made, self.trace, self.base, self.workers, self.target)
        board.window, board.stride, board.start = window, PART_STEPS, self.start
        board.target = max(0.5, 1.0 - PART_MISSES * (1.0 - self.target))
        board.allowed = allowed_misses(len(slice_time(self.trace, *window)), board.target)
        return board

    def at(self, prefill: int, chunk: int) -> Search:
        """The search of one combination; the same object each time."""
        search = self.searches.get((prefill, chunk))
        if search is None:
            decode = self.workers - prefill
            settings = replace(self.base, prefill=prefill, decode=decode, both=0, chunk_tokens=chunk)
            search = self.searches[prefill, chunk] = Search(settings, self.allowed, self.start, self.jump)
        return search

    def narrow(self, searches: Sequence[Search], stride: int) -> None:
        """Bracket each to so many steps."""
        narrow(self.made, searches, self.target, stride, window=self.window)

    def meeting(self, searches: Sequence[Search], k: int) -> list[Search]:
        """Those that meet the target at ``k``, run where that is not known."""
        unknown = [search for search in searches if search.meets(k) is None]
        jobs = [Job(search.settings, speed_of(k), self.target, self.window) for search in unknown]
        for search, found in zip(unknown, self.made.trials(jobs), strict=True):
            search.take({k: found})
        return [search for search in searches if search.meets(k)]

    def first(self, order: Sequence[tuple[int, int]]) -> Search:
        """The first of the order that has a capacity, bracketed. Raises ConfigError where none has."""
        problem = None
        for key in order:
            search = self.at(*key)
            self.narrow([search], self.stride)
            if (found := search.problem(self.target)) is None:
                return search
            problem = problem or found
        raise ConfigError(problem or "there is no split to try")

    def race(self, lead: Search, others: Sequence[Search]) -> Search:
        """The lead, unless others are better by ``EDGE`` steps or more: then the best of them, bracketed."""
        level, stride = _low(lead) + EDGE, JUMP // 2
        alive = self.meeting(others, level)
        if not alive:
            return lead
        while len(alive) > 1 and stride >= self.stride:
            higher = self.meeting(alive, level + stride)
            if higher:
                alive, level = higher, level + stride
            else:
                stride //= 2
        best = min(alive, key=lambda search: (-_low(search), search.trials[_low(search)].misses))
        self.narrow([best], self.stride)
        return best

    def climb(self, lead: Search, splits: Sequence[int]) -> Search:
        """Splits with the lead's chunk size, then chunk sizes with the lead's split, until neither changes."""
        for _ in range(ROUNDS):
            split, chunk = _key(lead)
            lead = self.race(lead, [self.at(prefill, chunk) for prefill in splits if prefill != split])
            split, _ = _key(lead)
            lead = self.race(lead, [self.at(split, c) for c in _chunks(self.base) if c != chunk])
            if _key(lead)[1] == chunk:
                break
        return lead

    def neighbours(self, lead: Search) -> list[Neighbour]:
        """One worker to either side, and the next smaller and larger chunk size, each with its margin."""
        prefill, chunk = _key(lead)
        chunks = _chunks(self.base)
        place = chunks.index(chunk)
        keys = [(p, chunk) for p in (prefill - 1, prefill + 1) if 1 <= p < self.workers]
        keys += [(prefill, chunks[i]) for i in (place - 1, place + 1) if 0 <= i < len(chunks)]
        searches = [self.at(*key) for key in keys]
        self.narrow([lead], self.stride)
        best = _low(lead)
        left = searches
        for steps in (-EDGE, *MARGINS):
            met = self.meeting(left, best - steps)
            left = [search for search in left if search not in met]
        return [_neighbour(search, speed_of(best)) for search in searches]

    def figures(self) -> list[dict[str, Any]]:
        """All that was tried."""
        return [_tried(self.searches[key]).figures() for key in sorted(self.searches)]


def _low(search: Search) -> int:
    assert search.low is not None, "only what has a capacity leads"
    return search.low


def _key(search: Search) -> tuple[int, int]:
    return search.settings.prefill, search.settings.chunk_tokens


def _chunks(base: Settings) -> list[int]:
    return sorted({*CHUNKS, base.chunk_tokens})


def _tried(search: Search) -> Tried:
    settings = search.settings
    met = None if search.low is None else speed_of(search.low)
    missed = None if search.high is None else speed_of(search.high)
    return Tried(settings.prefill, settings.decode, settings.chunk_tokens, met, missed, len(search.trials))


def _neighbour(search: Search, best: float) -> Neighbour:
    tried = _tried(search)
    missed = best if tried.missed is None else tried.missed
    return Neighbour(tried, at_least=1.0 - missed / best, at_most=None if tried.met is None else 1.0 - tried.met / best)


def tune(made: Runner, trace: Trace, settings: Settings, gpus: int, target: float, tell: Tell | None = None) -> Tuned:
    """The best split and chunk size of ``gpus`` GPUs; see the module's docstring. ``settings``: everything else.

    ``trace`` is the one of the runner. Raises ConfigError where the GPUs make fewer than two workers, or where no split
    meets the target at any speed.
    """
    tell = tell or (lambda share: None)
    size = load_profile(settings.profile).gpus
    workers = _workers(settings.profile, size, gpus)
    ratio = ratio_of(trace, settings)
    order = ratio.order(workers)
    whole = Board(made, trace, settings, workers, target)
    whole.start = _start(trace, ratio.rate(order[0], workers - order[0]))
    window = busiest(trace, _settle_s(trace, settings.itl_s, speed_of(whole.start)))
    part = whole if window is None else whole.part(window)
    lead = part.climb(part.first([(prefill, settings.chunk_tokens) for prefill in order]), order)
    tell(0.4)
    if part is not whole:
        lead = _verified(whole, part, lead, order)
        tell(0.8)
    capacity = speed_of(_low(lead))
    neighbours = part.neighbours(part.at(*_key(lead)))
    tell(1.0)
    return Tuned(
        _tried(lead), capacity, ratio, (order[0], workers - order[0]), neighbours, whole.figures(),
        [] if part is whole else part.figures(), window, lead.trials[_low(lead)].figures or {},
        {"trace": trace.name, "requests": len(trace), "target": target, "policy": settings.policy,
         "profile": settings.profile, "gpus": gpus, "workers": workers, "gpus_per_worker": size},
    )  # fmt: skip


def _workers(profile: str, size: int, gpus: int) -> int:
    """Workers that so many GPUs make; at least the two that a split needs. Raises ConfigError."""
    workers = gpus // size
    if workers < 2:
        raise ConfigError(
            f"--gpus {gpus}: a worker of {profile} has {size} GPUs, and a split needs two workers: give --gpus "
            f"{2 * size} or more, or another --profile"
        )
    return workers


def _start(trace: Trace, rate: float) -> int:
    """Where on the grid to look for the capacity of a cluster that by the trace's means carries ``rate``."""
    return nearest(BURSTS * rate * trace.duration_s / len(trace)) if trace.duration_s and rate < math.inf else 0


def busiest(trace: Trace, settle_s: float) -> Window | None:
    """Seconds between which the most tokens a second come, of the smallest part of a trace that is ``settle_s`` long.

    None where no part is long enough, and for closed loops, whose sessions a cut would break.
    """
    if trace.after is not None:
        return None
    tokens = list(accumulate(map(add, trace.prompt, trace.output), initial=0))
    arrival = trace.arrival
    for share in PARTS:
        count = len(trace) // share
        if count < PART_REQUESTS:
            continue

        def density(i: int, count: int = count) -> float:
            return float(tokens[i + count] - tokens[i]) / max(TICK_S, arrival[i + count] - arrival[i])

        first = max(range(len(trace) - count), key=density)
        start, end = arrival[first], arrival[first + count]
        if end - start >= max(settle_s, TICK_S):
            return start, end
    return None


def _settle_s(trace: Trace, itl_s: float, speed: float) -> float:
    """Seconds of the trace in which batches settle when it is so much faster."""
    return PART_ANSWERS * speed * itl_s * sum(trace.output) / len(trace)


def _verified(whole: Board, part: Board, lead: Search, splits: Sequence[int]) -> Search:
    """What is best on the whole trace, of all that came near the lead on a part of it."""
    whole.start, whole.jump = _low(lead), JUMP // 2
    best = whole.first([_key(lead)])
    for _ in range(ROUNDS):
        split, chunk = key = _key(best)
        keys = [(prefill, chunk) for prefill in splits] + [(split, c) for c in _chunks(whole.base)]
        others = [part.at(*other) for other in keys if other != key]
        near = part.meeting(others, _low(lead) - REACH)
        best = whole.race(best, [whole.at(*_key(search)) for search in near])
        if _key(best) == key:
            break
    return best
