"""Many runs on all cores: side by side, and the largest speed-up of a trace that still meets its SLO.

Speeds are tried on a grid of steps of 0.5 %, ``speed_of(k) = 1.005**k``, so that a capacity is a property of trace and
settings and not of the order in which speeds were tried: the largest ``k`` that meets the target below the smallest one
that was seen to miss it. Assumed is that what meets the target at one speed does so at lower ones; where that does not
hold there are several such ``k``, and which is found may depend on the number of processes.

A run that cannot meet the target any more is cut short: first tokens are counted as they are late, gaps are looked at
now and then. How far it came says about how many misses it would have had,
and the logarithm of misses is nearly straight in that of the speed around a capacity: so the next speed is where the
line through both ends of the bracket crosses the target (false position), or the middle where that did not help.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

from twinpool.errors import ConfigError, TwinpoolError
from twinpool.sim.bound import bound_capacity
from twinpool.sim.loop import Loop
from twinpool.sim.replay import build, replay, result_of, run
from twinpool.sim.result import Result
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, slice_time, speed

TOLERANCE = 0.005  # a step of the grid
FARTHEST = 1668  # steps: 4,096 times as fast or as slow
LOOKS = 3  # at gaps, in a run that may be cut short
JUMP = 16  # steps, of the first move towards a bracket: 8 %
SOME = 8  # misses, before their number says where more would be
UNSERVABLE = "KV_TOO_SMALL"  # the core's reason for refusing what no worker can hold

T = TypeVar("T")
_shared: list[Trace] = []  # of a process of the pool


def speed_of(k: int) -> float:
    """The speed-up of a place on the grid, to six digits."""
    return float(f"{(1.0 + TOLERANCE) ** k:.6g}")


def nearest(wanted: float) -> int:
    """The place on the grid that is nearest to a speed-up, within its ends. Raises ConfigError if it is not above 0."""
    if not 0.0 < wanted < math.inf:
        raise ConfigError(f"a speed of {wanted:g} is no traffic: give a factor above 0")
    return max(-FARTHEST, min(FARTHEST, round(math.log(wanted) / math.log1p(TOLERANCE))))


def allowed_misses(requests: int, target: float) -> int:
    """The most of so many requests that may miss their SLO while ``target`` of them meet it.

    Raises ConfigError on a target outside 0 to 1.
    """
    if not 0.0 < target <= 1.0:
        raise ConfigError(f"a target of {target:g} is not a share: give one above 0 and up to 1")
    misses = min(requests, int(requests * (1.0 - target)) + 1)
    while misses and (requests - misses) / requests < target:
        misses -= 1
    return misses


# --- runs in other processes ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Job:
    """One run in another process: settings, speed-up, and the attainment below which it may be cut short; 0: never.

    ``window``: only what arrives from its first to before its second (seconds at the trace's own speed); None: all.
    """

    settings: Settings
    speed: float = 1.0
    target: float = 0.0
    window: tuple[float, float] | None = None


class Trial(NamedTuple):
    """What a run showed: misses of the SLO up to where it was cut short, the share of requests over by then."""

    requests: int
    misses: int
    progress: float = 1.0
    unservable: int = 0  # of the misses, requests that no worker can hold
    figures: dict[str, Any] | None = None  # of a whole run that was cut short nowhere: ``Result.figures``

    @property
    def attained(self) -> float:
        """Share of offered requests that met their SLO; no less than the true one where the run was cut short."""
        return (self.requests - self.misses) / self.requests

    def depth(self) -> float:
        """Logarithm of all misses that the run would have had, if they go on as they began."""
        return math.log(self.misses / max(self.progress, 1.0 / self.requests) + 0.5)


def _init(trace: Trace) -> None:
    _shared[:] = [trace]


def trial(trace: Trace, settings: Settings, target: float = 0.0) -> Trial:
    """One run in this process, cut short as soon as ``target`` cannot be met any more."""
    n = len(trace)
    loop = build(trace, settings)
    if target > 0.0:
        loop.spare_misses = allowed_misses(n, target)
        loop.watch = _look_at_gaps(loop, trace, settings)
    run(loop)
    result, unservable = result_of(loop, trace, settings), loop.record.reasons.get(UNSERVABLE, 0)
    if loop.done == n:
        return Trial(n, _missed(loop, result), 1.0, unservable, result.figures())
    misses = max(_missed(loop, result), loop.missed)  # this counts late first tokens of requests that are not over, too
    return Trial(n, misses, loop.done / n, unservable)


def _missed(loop: Loop, result: Result) -> int:
    """Requests that are over and missed their SLO."""
    return loop.done - int(result.columns.attained().sum())


def _look_at_gaps(loop: Loop, trace: Trace, settings: Settings) -> Callable[[int, float], None]:
    """Stops the loop, at one of a few looks, where more have missed either SLO than may."""
    looks = [len(trace) * (i + 1) // (LOOKS + 1) for i in range(LOOKS)]

    def look(done: int, now: float) -> None:
        if looks and done >= looks[0]:
            del looks[0]
            if _missed(loop, result_of(loop, trace, settings)) > loop.spare_misses:
                loop.spare_misses = -1

    return look


def _taken(job: Job) -> Trace:
    trace = _shared[0] if job.window is None else slice_time(_shared[0], *job.window)
    return speed(trace, job.speed)


def _trial(job: Job) -> Trial:
    return trial(_taken(job), job.settings, job.target)


def _summary(job: Job) -> dict[str, Any]:
    return replay(_taken(job), job.settings).summary()


def _bound(job: Job) -> float:
    if not job.settings.foreseen:
        return math.inf  # it is proved of the work that trace and profile say
    return bound_capacity(_shared[0], job.settings, job.target)


class Runner:
    """Runs jobs over one trace in processes of their own; a job's result does not depend on how many there are."""

    def __init__(self, trace: Trace, processes: int) -> None:
        self.processes = processes
        self.requests = len(trace)
        self._pool = ProcessPoolExecutor(processes, get_context("spawn"), _init, (trace,))

    def trials(self, jobs: Sequence[Job], done: Callable[[], None] | None = None) -> list[Trial]:
        """What each job showed, in their order; ``done`` is called after each. Raises what a job raised."""
        return _gathered([self._pool.submit(_trial, job) for job in jobs], done)

    def summaries(self, jobs: Sequence[Job], done: Callable[[], None] | None = None) -> list[dict[str, Any]]:
        """Summaries of runs, in the order of the jobs; ``done`` is called after each. Raises what a job raised."""
        return _gathered([self._pool.submit(_summary, job) for job in jobs], done)

    def bound(self, settings: Settings, target: float) -> Future[float]:
        """``bound_capacity``, beside whatever else is run."""
        return self._pool.submit(_bound, Job(settings, target=target))

    def close(self) -> None:
        """End the processes, as soon as what they run is over."""
        self._pool.shutdown(cancel_futures=True)


def _gathered(futures: list[Future[T]], done: Callable[[], None] | None) -> list[T]:
    for future in as_completed(futures):
        future.result()
        if done is not None:
            done()
    return [future.result() for future in futures]


@contextmanager
def runner(trace: Trace, processes: int = 0) -> Iterator[Runner]:
    """A ``Runner`` for a while; 0 processes: one a core. Raises TwinpoolError where one of them is killed."""
    if not len(trace):
        raise ConfigError("the trace is empty: give one with at least one request")
    made = Runner(trace, processes or len(os.sched_getaffinity(0)))
    try:
        yield made
    except BrokenProcessPool:
        raise TwinpoolError(
            f"one of {made.processes} simulating processes ended unexpectedly, most likely for want of memory: give "
            "fewer --processes or a smaller --limit"
        ) from None
    finally:
        made.close()


# --- capacity -------------------------------------------------------------------------------------------------------


class Search:
    """One settings' capacity on the grid: between ``low``, which meets the target, and ``high``, which misses it."""

    __slots__ = ("allowed", "high", "jump", "low", "settings", "slow", "start", "trials")

    def __init__(self, settings: Settings, allowed: int, start: int, jump: int = JUMP) -> None:
        self.settings = settings
        self.allowed = allowed  # misses
        self.start = start
        self.jump = jump
        self.trials: dict[int, Trial] = {}
        self.low: int | None = None
        self.high: int | None = None
        self.slow = 0  # rounds in a row that did not halve the bracket

    def meets(self, k: int) -> bool | None:
        """Whether the target is met at ``k``; None: not known."""
        if self.high is not None and k >= self.high:
            return False
        return True if self.low is not None and k <= self.low else None

    def done(self, stride: int = 1) -> bool:
        """Whether the bracket is at most ``stride`` steps wide, or there is none on the grid."""
        if self.low is None:
            return self.high is not None and self.high <= -FARTHEST
        return self.low >= FARTHEST or (self.high is not None and self.high - self.low <= stride)

    def take(self, found: dict[int, Trial]) -> None:
        """What one round of runs showed."""
        before = self.width
        self.trials |= found
        failed = [k for k, each in self.trials.items() if each.misses > self.allowed]
        self.high = min(failed, default=None)
        met = [k for k in self.trials if self.high is None or k < self.high]
        self.low = max(met, default=None)
        self.slow = self.slow + 1 if 2 * self.width > before else 0

    @property
    def width(self) -> float:
        """Steps of the bracket."""
        return math.inf if self.low is None or self.high is None else self.high - self.low

    def next_places(self, count: int) -> list[int]:
        """Up to ``count`` places on the grid to try next, side by side; rising, new, at least one."""
        if self.low is not None and self.high is not None:
            return self._inside(self.low, self.high, count)
        if self.low is None and self.high is None:
            return _on_grid(self.start + self.jump * i for i in range(count))
        stride = max(self.jump, max(self.trials) - min(self.trials))  # so far: it doubles
        if self.high is None and self.low is not None:
            ahead = self._ahead(self.low, 3 * stride)
            if ahead:
                return _on_grid(self.low + ahead + (stride * i) // 2 for i in range(count))
            return _on_grid(self.low + stride * ((1 << i + 1) - 1) for i in range(count))
        return _on_grid((self.high or 0) - stride * ((1 << i + 1) - 1) for i in range(count))

    def _ahead(self, low: int, most: int) -> int:
        """Steps to the capacity by the line through the two highest places that meet the target; 0: no telling."""
        before = max((k for k in self.trials if k < low), default=low)
        rise = self.trials[low].depth() - self.trials[before].depth()
        if rise <= 0.0 or self.trials[low].misses < SOME:
            return 0
        return min(most, 1 + int((low - before) * (math.log(self.allowed + 0.75) - self.trials[low].depth()) / rise))

    def _inside(self, low: int, high: int, count: int) -> list[int]:
        width = high - low
        if width - 1 <= count:
            return list(range(low + 1, high))
        if self.slow:
            return [low + width * (i + 1) // (count + 1) for i in range(count)]
        above, below = self.trials[high].depth(), self.trials[low].depth()
        share = (math.log(self.allowed + 0.75) - below) / (above - below)
        gap = max(1.0, width / (3 * count))
        middle = low + width * min(0.875, max(0.125, share)) - gap * (count - 1) / 2
        first = max(low + 1, min(high - count, round(middle)))
        return sorted({min(high - 1, first + round(gap * i)) for i in range(count)})

    def problem(self, target: float) -> str | None:
        """Why there is no capacity, and what to do; None: there is one."""
        if self.low is None:
            each = self.trials[min(self.trials)]
            if each.unservable > self.allowed:
                return (
                    f"{each.unservable} of {each.requests} requests are larger than any worker's KV memory, so "
                    f"{target:.4g} of them can never meet the SLO: leave them out, or give workers more memory"
                )
            return (
                f"even {speed_of(-FARTHEST):.2g} times the trace's own speed misses the SLO for more than "
                f"{1 - target:.4g} of the requests: these workers cannot; `twinpool sim replay` shows by how much"
            )
        if self.high is None:
            return (
                f"more than {speed_of(FARTHEST):.0f} times the trace's own speed meets the SLO: the trace is too small "
                "to load these workers; give a longer one"
            )
        return None


def _on_grid(places: Iterator[int]) -> list[int]:
    return sorted({max(-FARTHEST, min(FARTHEST, k)) for k in places})


def narrow(
    made: Runner, searches: Sequence[Search], target: float, stride: int = 1,
    step: Callable[[Search], None] | None = None, window: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """Run until each bracket is at most ``stride`` steps wide. Rounds: what is tried never depends on timing."""
    while waiting := [search for search in searches if not search.done(stride)]:
        width = max(1, made.processes // len(waiting))
        tries = [(search, k) for search in waiting for k in search.next_places(width)]
        trials = made.trials([Job(search.settings, speed_of(k), target, window) for search, k in tries])
        for search in waiting:
            search.take({k: found for (other, k), found in zip(tries, trials, strict=True) if other is search})
            if step is not None:
                step(search)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The largest speed-up found that meets the target, and how many runs it took."""

    speed: float
    runs: int


def capacity(
    made: Runner, settings: Settings, target: float, *, start: float = 1.0, tolerance: float = TOLERANCE,
    step: Callable[[float, float], None] | None = None,
) -> Capacity:  # fmt: skip
    """The largest speed-up of the trace with attainment >= target, to ``tolerance``; ``step(low, high)`` as it goes."""
    return capacities(made, [settings], target, start=start, tolerance=tolerance, step=step)[0]


def capacities(
    made: Runner, settings: Sequence[Settings], target: float, *, start: float = 1.0, tolerance: float = TOLERANCE,
    step: Callable[[float, float], None] | None = None,
) -> list[Capacity]:  # fmt: skip
    """Capacities of several settings, side by side. The step is told the speeds of a bracket: 0 and inf are no ends.

    Raises ConfigError where one meets the target at no speed of the grid, or at all.
    """
    allowed, first = allowed_misses(made.requests, target), nearest(start)
    searches = [Search(each, allowed, first) for each in settings]

    def tell(search: Search) -> None:
        if step is not None:
            low, high = search.low, search.high
            step(0.0 if low is None else speed_of(low), math.inf if high is None else speed_of(high))

    narrow(made, searches, target, max(1, int(math.log1p(tolerance) / math.log1p(TOLERANCE) + 1e-9)), tell)
    for search in searches:
        if (problem := search.problem(target)) is not None:
            raise ConfigError(problem)
    return [Capacity(speed_of(search.low or 0), len(search.trials)) for search in searches]


def splits(settings: Settings, workers: int) -> list[Settings]:
    """The same with every number of prefill workers from 1 to all but one."""
    return [replace(settings, prefill=p, decode=workers - p, both=0) for p in range(1, workers)]
