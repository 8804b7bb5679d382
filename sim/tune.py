"""The best split of so many GPUs into prefill and decode workers, and the best chunk size, for a trace.

1. The analytic ratio (ratio.py) names a split to begin with and about what it carries.
2. Its capacity is bracketed to a step of the grid (search.py, 0.5 %).
3. *Every* other split is run once at ``EDGE`` steps above that. Those that still meet the target climb together, until
   one is left standing: the new lead. A split far from the best fails early in its one run, so that is cheap.
4. Every other chunk size is tried against the lead in the same way, with the lead's split. Where one wins, the splits
   are tried again, with that chunk size.
5. Neighbours (a prefill worker more or fewer, half and twice the chunk size) are bracketed, more coarsely: the margin.

What is assumed: that more load never makes more requests meet their SLO, and that the best chunk size of the best split
is the best of all (splits and chunk sizes are not tried in all pairs). Nothing is assumed of how capacity depends on the
split: that there are not two peaks is seen, not taken for granted. A tie goes to the split that was there first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.ratio import Ratio, ratio_of
from twinpool.sim.result import Summary
from twinpool.sim.search import Job, Runner, Search, allowed_misses, narrow, nearest, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

CHUNKS = (512, 1024, 2048, 4096, 8192)  # tokens
EDGE = 2  # steps by which another must be better to be preferred: 1 %
MARGIN_STEPS = 6  # of a neighbour's bracket: 3 %
MARGIN_JUMP = 4  # steps of the first look below the best
BURSTS = 0.75  # a trace's capacity over what its means allow; public conversation traces have 0.6 to 0.9
ROUNDS = 4  # of splits and chunk sizes in turn, at most

Tell = Callable[[float], None]  # the share that is done


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
    at_most: float

    def figures(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**self.tried.figures(), "margin_at_least": self.at_least, "margin_at_most": self.at_most}


@dataclass(frozen=True, slots=True)
class Tuned:
    """What ``tune`` found. ``summary``: of a run of the best at its capacity."""

    best: Tried
    capacity: float  # speed-up of the trace
    ratio: Ratio
    analytic: tuple[int, int]
    neighbours: Sequence[Neighbour]
    tried: Sequence[Tried]
    summary: Summary
    facts: dict[str, Any] = field(default_factory=dict)  # about trace, GPUs, policy, for the report

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
                "prefill_worker_rps": self.ratio.prefill,
                "decode_worker_rps": self.ratio.decode,
                "link_rps": self.ratio.link,
            },
            "tried": [each.figures() for each in self.tried],
            "runs": sum(each.runs for each in self.tried),
        }


class Board:
    """The searches of all that was tried, by (prefill workers, chunk tokens)."""

    def __init__(self, made: Runner, base: Settings, workers: int, target: float, start: int) -> None:
        self.made = made
        self.base = base
        self.workers = workers
        self.target = target
        self.start = start
        self.allowed = allowed_misses(made.requests, target)
        self.searches: dict[tuple[int, int], Search] = {}

    def at(self, prefill: int, chunk: int) -> Search:
        """The search of one combination; the same object each time."""
        search = self.searches.get((prefill, chunk))
        if search is None:
            decode = self.workers - prefill
            settings = replace(self.base, prefill=prefill, decode=decode, both=0, chunk_tokens=chunk)
            search = self.searches[prefill, chunk] = Search(settings, self.allowed, self.start)
        return search

    def meeting(self, searches: Sequence[Search], k: int) -> list[Search]:
        """Those that meet the target at ``k``, run where that is not known."""
        unknown = [search for search in searches if search.meets(k) is None]
        trials = self.made.trials([Job(search.settings, speed_of(k), self.target) for search in unknown])
        for search, found in zip(unknown, trials, strict=True):
            search.take({k: found})
        return [search for search in searches if search.meets(k)]

    def first(self, order: Sequence[int], chunk: int) -> Search:
        """The first split of the order that has a capacity, bracketed to one step. Raises ConfigError without any."""
        problem = None
        for prefill in order:
            search = self.at(prefill, chunk)
            narrow(self.made, [search], self.target)
            if (found := search.problem(self.target)) is None:
                return search
            problem = problem or found
        raise ConfigError(problem or "there is no split to try")

    def race(self, lead: Search, others: Sequence[Search]) -> Search:
        """The lead, unless others are better by ``EDGE`` steps or more: then the best of them, bracketed to one step."""
        level, stride = _low(lead) + EDGE, 2 * EDGE
        alive = self.meeting(others, level)
        if not alive:
            return lead
        rising = True
        while stride:
            higher = self.meeting(alive, level + stride)
            if higher:
                alive, level = higher, level + stride
            rising = rising and bool(higher)
            stride = 2 * stride if rising else stride // 2
        return min(alive, key=lambda search: search.trials[level].misses)


def _low(search: Search) -> int:
    assert search.low is not None, "only what has a capacity leads"
    return search.low


def tune(made: Runner, trace: Trace, settings: Settings, gpus: int, target: float, tell: Tell | None = None) -> Tuned:
    """The best split and chunk size of ``gpus`` GPUs; see the module's docstring. ``settings``: everything else.

    ``trace`` is the one of the runner. Raises ConfigError where the GPUs make fewer than two workers, or where no split
    meets the target at any speed.
    """
    tell = tell or (lambda share: None)
    size = load_profile(settings.profile).gpus
    workers = gpus // size
    if workers < 2:
        raise ConfigError(
            f"{gpus} GPUs make {workers} workers of {settings.profile}, which has {size} GPUs each, and a split needs "
            f"two: give --gpus {2 * size} or more, or another --profile"
        )
    ratio = ratio_of(trace, settings)
    order = ratio.order(workers)
    board = Board(made, settings, workers, target, _start(trace, ratio.rate(order[0], workers - order[0])))
    lead = board.first(order, settings.chunk_tokens)
    tell(0.3)
    lead = _climb(board, lead, order, tell)
    facts = {
        "trace": trace.name, "requests": len(trace), "target": target, "policy": settings.policy,
        "profile": settings.profile, "gpus": gpus, "gpus_used": workers * size, "workers": workers,
    }  # fmt: skip
    running = made.summary(Job(lead.settings, speed_of(_low(lead))))
    neighbours = _neighbours(board, lead)
    tell(1.0)
    tried = [_tried(board.searches[key]) for key in sorted(board.searches)]
    analytic = (order[0], workers - order[0])
    return Tuned(_tried(lead), speed_of(_low(lead)), ratio, analytic, neighbours, tried, running.result(), facts)


def _start(trace: Trace, rate: float) -> int:
    """The place on the grid at which a trace offers about what a cluster carries that its means say carries ``rate``."""
    return nearest(BURSTS * rate * trace.duration_s / len(trace)) if trace.duration_s and rate < float("inf") else 0


def _climb(board: Board, lead: Search, order: Sequence[int], tell: Tell) -> Search:
    """All splits with the lead's chunk size, then all chunk sizes with the lead's split, until neither changes."""
    for turn in range(ROUNDS):
        chunk = lead.settings.chunk_tokens
        lead = board.race(lead, [board.at(prefill, chunk) for prefill in order if prefill != lead.settings.prefill])
        tell(0.6 + 0.05 * turn)
        others = [c for c in _chunks(board.base) if c != chunk]
        lead = board.race(lead, [board.at(lead.settings.prefill, c) for c in others])
        tell(0.8)
        if lead.settings.chunk_tokens == chunk:
            break
    return lead


def _chunks(base: Settings) -> list[int]:
    return sorted({*CHUNKS, base.chunk_tokens})


def _neighbours(board: Board, lead: Search) -> list[Neighbour]:
    """One worker to either side, and the next smaller and larger chunk size, each with its margin."""
    prefill, chunk = lead.settings.prefill, lead.settings.chunk_tokens
    chunks = _chunks(board.base)
    place = chunks.index(chunk)
    keys = [(p, chunk) for p in (prefill - 1, prefill + 1) if 1 <= p < board.workers]
    keys += [(prefill, chunks[i]) for i in (place - 1, place + 1) if 0 <= i < len(chunks)]
    searches = [board.at(*key) for key in keys]
    best = _low(lead)
    board.meeting(searches, best + EDGE)
    for search in searches:
        search.jump = MARGIN_JUMP
    narrow(board.made, searches, board.target, MARGIN_STEPS)
    return [_neighbour(search, speed_of(best)) for search in searches]


def _neighbour(search: Search, best: float) -> Neighbour:
    tried = _tried(search)
    missed = best if tried.missed is None else tried.missed
    return Neighbour(tried, at_least=1.0 - missed / best, at_most=1.0 - (tried.met or 0.0) / best)


def _tried(search: Search) -> Tried:
    settings = search.settings
    met = None if search.low is None else speed_of(search.low)
    missed = None if search.high is None else speed_of(search.high)
    return Tried(settings.prefill, settings.decode, settings.chunk_tokens, met, missed, len(search.trials))
