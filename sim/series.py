"""What a report draws of one run: distributions at fixed quantiles, and courses over time in bins of equal width.

Everything is worked out from the columns of a ``Result``, but for how busy a worker was when: that is noted while the
run goes on (``ObservedWorker``), from the totals that a worker keeps anyway. A queue's course is the exact mean of its
length over a bin: the time that requests spent in it there, divided by the width. A course holds nan where there is
nothing to show, such as the attainment of a bin in which nobody arrived.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from twinpool.sim.gaps import Floats, Ints, quantile
from twinpool.sim.loop import Loop
from twinpool.sim.replay import Cluster, Watch, build, result_of, run
from twinpool.sim.result import Columns, Mask, Result, Summary, WorkerTotals
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace
from twinpool.sim.worker import SimWorker

BINS = 96
SHARES: tuple[float, ...] = (*(i / 200 for i in range(200)), 0.997, 0.999, 1.0)  # the quantiles of a distribution
KINDS = ("prefill", "decode", "mixed")


class BusyLog:
    """When workers computed: stretches of seconds, each of one of ``KINDS``."""

    __slots__ = ("_ends", "_kinds", "_starts", "_workers")

    def __init__(self) -> None:
        self._workers = array("q")
        self._starts = array("d")
        self._ends = array("d")
        self._kinds = array("q")

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, worker: int, start: float, end: float, kind: str) -> None:
        """A worker computed from ``start`` to ``end``. Raises ValueError for a kind that there is not."""
        if kind not in KINDS:
            raise ValueError(f"a step is one of {', '.join(KINDS)}, not {kind}")
        self._workers.append(worker)
        self._starts.append(start)
        self._ends.append(end)
        self._kinds.append(KINDS.index(kind))

    def shares(self, worker: int, edges: Floats, kind: str | None = None) -> Floats:
        """Share of each bin in which the worker computed, of one kind or of any."""
        wanted = np.array(self._workers, np.int64) == worker
        if kind is not None:
            wanted &= np.array(self._kinds, np.int64) == KINDS.index(kind)
        starts, ends = np.array(self._starts, np.float64)[wanted], np.array(self._ends, np.float64)[wanted]
        return lengths(starts, ends, edges)


class ObservedWorker(SimWorker):
    """An emulated worker that notes when it computed; otherwise the same, to the last decision.

    A worker's steps are over at a wake or at its death, and then they are in its totals: what these grew by is one
    stretch that ends there. Only the last one of a worker that dies is placed late, by less than a step, and that of a
    worker that stalls, whose totals leave the stall out, by as much as it stalled.
    """

    __slots__ = ("_log", "_told")

    def observed_by(self, log: BusyLog) -> ObservedWorker:
        """Itself, with the log that it writes to."""
        self._log = log
        self._told = (0.0, 0.0, 0.0)
        return self

    def wake(self, now: float) -> None:
        super().wake(now)
        self._note(now)

    def stop(self, now: float) -> None:
        super().stop(now)
        self._note(now)

    def _note(self, now: float) -> None:
        totals = WorkerTotals("")
        self.total(totals)
        seen = (totals.busy_prefill_s, totals.busy_decode_s, totals.busy_mixed_s)
        if seen != self._told:
            for kind, before, after in zip(KINDS, self._told, seen, strict=True):
                if after > before:
                    self._log.add(self.id, now - (after - before), now, kind)
            self._told = seen


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One run as a report draws it; seconds, shares from 0 to 1. Arrays over time have ``BINS`` columns."""

    label: str
    summary: Summary  # without what depends on the machine
    edges: Floats  # of the bins: BINS + 1, seconds since the first arrival
    ttft: Floats  # at SHARES, of completed requests; empty where there are none
    itl: Floats  # of all gaps
    transfer: Floats  # of requests that moved blocks
    attained: Floats  # by time of arrival, of those offered
    cached: Floats  # by time of arrival, of the prompt tokens of completed requests
    waiting: Floats  # requests that have arrived and were not shown a token
    decoding: Floats  # requests that were shown a token and are not over
    waiting_at: Floats  # a row a worker: of the waiting requests, those whose prompt it computed in the end
    decoding_at: Floats  # a row a worker: of the decoding requests, those that decoded on it in the end
    busy: Floats | None  # a row a worker: share of time in steps; None: not known

    @property
    def workers(self) -> list[str]:
        """Names, by row."""
        return [worker["name"] for worker in self.summary["workers"]]


def observe(trace: Trace, settings: Settings, watch: Watch | None = None) -> tuple[Result, BusyLog]:
    """``replay``, and when each worker was busy. Raises what ``replay`` raises."""
    log = BusyLog()

    def worker(cluster: Cluster, number: int, loop: Loop) -> SimWorker:
        return ObservedWorker(
            number, loop, cluster.cost, blocks=cluster.blocks, block_size=cluster.block_size,
            unit_tokens=cluster.unit_tokens, block_bytes=cluster.block_bytes, chunk_tokens=settings.chunk_tokens,
            max_batch=settings.max_batch,
        ).observed_by(log)  # fmt: skip

    loop = build(trace, settings, None, watch, worker)
    run(loop)
    return result_of(loop, trace, settings), log


def series_of(label: str, result: Result, log: BusyLog | None = None) -> Series:
    """Everything a report draws of a run."""
    columns = result.columns
    start, end = span(columns)
    edges = np.linspace(start, end, BINS + 1)
    completed = columns.completed()
    moved = completed & (columns.kv_bytes > 0) & (columns.transfer_s >= 0.0)
    waiting, decoding = _stays(columns, end)
    workers = range(len(result.workers))
    busy = None
    if log is not None and len(log):
        busy = np.array([log.shares(worker, edges) for worker in workers])
    itl = [result.gaps.quantile(share) for share in SHARES] if result.gaps.count else []
    return Series(
        label, result.figures(), edges - start, distribution(columns.ttft()[completed]), np.array(itl, np.float64),
        distribution(columns.transfer_s[moved]), _attained(columns, edges), _cached(columns, edges),
        lengths(*waiting.all(), edges), lengths(*decoding.all(), edges),
        np.array([waiting.of(worker, edges) for worker in workers]),
        np.array([decoding.of(worker, edges) for worker in workers]), busy,
    )  # fmt: skip


def span(columns: Columns) -> tuple[float, float]:
    """From the first arrival to the last end, or a second where that is nothing."""
    arrived = columns.arrival[columns.arrival >= 0.0]
    start = float(arrived.min()) if len(arrived) else 0.0
    duration_s = columns.duration_s() if len(arrived) else 0.0
    return start, start + (duration_s or 1.0)


def distribution(values: Floats) -> Floats:
    """The quantiles ``SHARES`` of plain values; empty where there are none."""
    if not len(values):
        return np.zeros(0)
    ordered = np.sort(values)
    return np.array([quantile(ordered, share) for share in SHARES])


def lengths(starts: Floats, ends: Floats, edges: Floats) -> Floats:
    """Mean number of the stretches from ``starts`` to ``ends`` that cover a moment, over each bin."""
    covered = _seconds_since(starts, edges) - _seconds_since(ends, edges)
    return np.maximum(np.diff(covered) / np.diff(edges), 0.0)  # a difference may be off by a rounding


def _seconds_since(moments: Floats, edges: Floats) -> Floats:
    """At each edge: the sum over all moments before it of the seconds since then."""
    ordered = np.sort(moments)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    passed = np.searchsorted(ordered, edges)
    return np.asarray(passed * edges - sums[passed])


@dataclass(frozen=True, slots=True)
class _Stays:
    """Stretches of requests, and the worker that each belongs to (-1: none)."""

    starts: Floats
    ends: Floats
    worker: Ints

    def all(self) -> tuple[Floats, Floats]:
        return self.starts, self.ends

    def of(self, worker: int, edges: Floats) -> Floats:
        here = self.worker == worker
        return lengths(self.starts[here], self.ends[here], edges)


def _stays(columns: Columns, end: float) -> tuple[_Stays, _Stays]:
    """Requests before their first token, by prefill worker; and from there to their end, by decode worker."""
    over = np.where(columns.ended >= 0.0, columns.ended, end)
    shown = columns.shown >= 0.0
    came = columns.arrival >= 0.0
    first = np.where(shown, np.minimum(columns.shown, over), over)
    waiting = _Stays(columns.arrival[came], first[came], columns.prefill[came])
    where = np.where(columns.decode >= 0, columns.decode, columns.prefill)
    return waiting, _Stays(first[shown], over[shown], where[shown])


def _attained(columns: Columns, edges: Floats) -> Floats:
    came = columns.arrival >= 0.0
    return _binned(columns.arrival[came], columns.attained()[came].astype(np.float64), np.ones(came.sum()), edges)


def _cached(columns: Columns, edges: Floats) -> Floats:
    done: Mask = columns.completed()
    cached, prompt = columns.cached[done].astype(np.float64), columns.prompt[done].astype(np.float64)
    return _binned(columns.arrival[done], cached, prompt, edges)


def _binned(when: Floats, part: Floats, whole: Floats, edges: Floats) -> Floats:
    """Sum of ``part`` over sum of ``whole`` in each bin; nan where nothing is."""
    parts, _ = np.histogram(when, edges, weights=part)
    wholes, _ = np.histogram(when, edges, weights=whole)
    return np.asarray(np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0.0))
