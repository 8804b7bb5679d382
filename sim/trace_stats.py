"""What a trace looks like in a few figures: load, lengths, what a prefix cache could save, bursts, sessions."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, repeat

from twinpool.sim.trace import NO_TAIL, Trace, quantum

WINDOW_S = 10.0  # about, of the busiest window and of the dispersion
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens: mean, percentiles (nearest rank), largest, sum."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    total: int


@dataclass(frozen=True, slots=True)
class IdealHits:
    """What an infinite cache of one worker would have found, in the order of arrival; shares from 0 to 1."""

    block_tokens: int
    distinct_blocks: int  # full ones: what the cache would hold in the end
    blocks: float  # share of full blocks
    tokens: float  # share of prompt tokens that lie in full blocks found
    blocks_with_tails: float  # share of all blocks, partly filled last ones with ids included
    tokens_with_tails: float  # the figure that is published for Mooncake's traces


@dataclass(frozen=True, slots=True)
class Bursts:
    """How uneven arrivals are; those of a closed loop count as early as they may come."""

    gap_cv: float  # standard deviation of the gaps over their mean; 1: Poisson
    dispersion: float  # variance of the arrivals in WINDOW_S over their mean; 1: Poisson
    peak_to_mean: float  # arrivals in the busiest WINDOW_S over the mean
    quantum_s: float  # of quantised stamps, which make bursts that were not there; 0: not quantised


@dataclass(frozen=True, slots=True)
class Sessions:
    """Requests of one conversation."""

    count: int
    mean_turns: float
    max_turns: int
    followers: int  # requests that come only after another has ended (closed loop)


@dataclass(frozen=True, slots=True)
class TraceStats:
    """All figures; ``hits`` and ``sessions`` are None where the trace says nothing about them."""

    name: str
    requests: int
    duration_s: float
    rate: float  # requests a second
    input: Lengths
    output: Lengths
    bursts: Bursts
    hits: IdealHits | None
    sessions: Sessions | None


def stats(trace: Trace) -> TraceStats:
    """The figures of a trace that has requests; linear in its requests and hash ids."""
    duration = trace.duration_s
    return TraceStats(
        name=trace.name,
        requests=len(trace),
        duration_s=round(duration, 9),
        rate=len(trace) / duration if duration else 0.0,
        input=_lengths(trace.prompt),
        output=_lengths(trace.output),
        bursts=bursts(trace.arrival, quantum(trace)),
        hits=ideal_hits(trace) if trace.block_tokens else None,
        sessions=_sessions(trace),
    )


def percentile(ordered: Sequence[int], percent: float) -> int:
    """The nearest rank: the smallest value that ``percent`` of all are not above."""
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def _lengths(column: array[int]) -> Lengths:
    ordered, total = sorted(column), sum(column)
    p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Lengths(total / len(column), p50, p90, p99, ordered[-1], total)


def ideal_hits(trace: Trace) -> IdealHits:
    """Prefix hits of an infinite cache that holds every block from the arrival of its first request on."""
    size = trace.block_tokens
    seen: set[int] = set()
    seen_tails: set[int] = set()
    found = full = found_tails = tails = tail_tokens = 0
    last = repeat(NO_TAIL) if trace.tail is None else trace.tail
    for (low, high), tail, tokens in zip(pairwise(trace.offsets), last, trace.prompt, strict=False):
        ids = trace.hashes[low:high]
        hit = next((depth for depth, block in enumerate(ids) if block not in seen), len(ids))
        seen.update(islice(ids, hit, None))
        found += hit
        full += tokens // size
        if tail != NO_TAIL:
            tails += 1
            if hit == len(ids) and (tail in seen_tails or tail in seen):
                found_tails += 1
                tail_tokens += tokens % size
            seen_tails.add(tail)
    total = sum(trace.prompt)
    return IdealHits(
        block_tokens=size,
        distinct_blocks=len(seen),
        blocks=found / full if full else 0.0,
        tokens=found * size / total,
        blocks_with_tails=(found + found_tails) / (full + tails) if full + tails else 0.0,
        tokens_with_tails=(found * size + tail_tokens) / total,
    )


def bursts(arrival: Sequence[float], quantum_s: float = 0.0) -> Bursts:
    """How uneven sorted arrivals (seconds) are; ``quantum_s`` is passed on."""
    start, end = arrival[0], arrival[-1]
    windows = max(1, round((end - start) / WINDOW_S))  # equal ones: a last one cut short would look like a lull
    width = (end - start) / windows or WINDOW_S
    counts = Counter(min(windows - 1, int((when - start) / width)) for when in arrival)
    return Bursts(
        gap_cv=_spread_over_mean([late - early for early, late in pairwise(arrival)], squared=False),
        dispersion=_spread_over_mean([counts[window] for window in range(windows)], squared=True),
        peak_to_mean=max(counts.values()) * windows / len(arrival),
        quantum_s=round(quantum_s, 9),
    )


def _spread_over_mean(values: Sequence[float], squared: bool) -> float:
    """Variance, or standard deviation, over the mean; 0.0 where there is nothing to tell."""
    mean = math.fsum(values) / len(values) if values else 0.0
    if not mean:
        return 0.0
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    return (variance if squared else math.sqrt(variance)) / mean


def _sessions(trace: Trace) -> Sessions | None:
    if trace.session is None and trace.after is None:
        return None
    turns = Counter(_roots(trace) if trace.session is None else (name or i for i, name in enumerate(trace.session)))
    return Sessions(
        count=len(turns),
        mean_turns=len(trace) / len(turns),
        max_turns=max(turns.values()),
        followers=sum(1 for i in trace.after or () if i >= 0),
    )


def _roots(trace: Trace) -> list[int]:
    """First request of the chain that each request is in."""
    roots: list[int] = []
    for i, follows in enumerate(trace.after or ()):
        roots.append(i if follows < 0 else roots[follows])
    return roots
