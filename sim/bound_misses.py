"""How many requests must miss when there is more work than time: bounds on one preemptive server, and the exact number.

Given are pieces of work, each of one request, with release, due time and seconds. A set of requests can be served if
one server that may be interrupted at any time does all their pieces between release and due time. Wanted: the least
number of requests that cannot be. The known exact algorithms take O(n^4) and more (Lawler 1990, Baptiste 1999); these
bounds take a second for tens of thousands, and the exact search serves up to ``EXACT`` requests.

``by_size``. Let ``p_1 <= ... <= p_n`` be the requests by work, and ``R_k`` the most work of the ``k`` smallest that can
be done in time, parts of requests counting. A served set ``S`` has, for every ``k``, work ``w_k`` of its members among
the ``k`` smallest within ``R_k``. Taking the smallest first while ``w_k <= R_k`` holds serves the most of all sets that
obey this (an exchange: a smaller request in place of a larger one keeps every ``w_k`` as small), so no ``S`` is larger.
``R_k`` is what the server does that always works on what is due first and drops what is overdue: it idles only where
nothing is left, and any work it loses at a time was all due by then, so every interval before was full. ``R_k`` is run
for some ``k`` only; between two of them it is at most that of the next and at most that of the last plus the work
between. This weighs all intervals at once and is what decides on long traces.

Work may also belong to a *pair* of requests and be needed if both are served, but for ``credit`` seconds of all pairs
together. Then the same is said of what is dropped: with ``v`` the work of a request and of all its pairs, and ``L_k``
the least of the work of the ``k`` smallest by ``v``, pairs among them too, that cannot be done in time, dropped
requests among these have ``v`` of ``L_k - credit`` at least, since dropping one saves no more. Without pairs ``R_k`` is
the sum of their work less ``L_k``.

With ``caps`` no more than so many may miss of each of some groups. The most ``v`` that any number of the ``k`` smallest
have together, within the caps, have those that are taken from the largest down, each whose group has room left (sets
within the caps are a matroid, where greed is best). So as many as make up for ``L_k - credit`` in this way miss at
least, and where all together do not, no served set is within the caps.

``by_interval``. Requests whose pieces all lie in ``[s, e]`` concern nobody else in that time, so misses forced in
disjoint intervals add up. Pretend that all with a release after ``s`` were released at ``s``: Moore and Hodgson's rule
(1968; in order of due times, drop the largest whenever work exceeds time) then finds the fewest misses by every ``e``,
never fewer than the largest-first count of any interval from ``s``. A dynamic programme over ``s`` takes the best
disjoint intervals. Few starts are tried: any subset is a bound. It is the sharper one where short bursts lie apart.

``exact``. Breadth first over dropped sets: where some interval has more work than time, one of its requests must go.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXACT = 12  # requests up to which the exact number is found
SHARE, SLACK = 1e-9, 1e-7  # of the time, and seconds: what exceeds it by less is rounding
COARSE, FINE = 5, 12  # values of k for which R_k is run
NEAR = 1.25  # a coarse count this near to what would be enough is worth a fine one
LARGEST_SHARE = 0.25  # of the requests, from the largest, that k is chosen from
EVEN_STARTS = 24  # starts with all that comes after
BUSY_STARTS = 256  # starts of busy periods
BUSY_JOBS = 1500  # requests looked at from each of these


class Jobs(NamedTuple):
    """Pieces of work, as columns; a request may have several. Times and work in seconds."""

    owner: Ints
    release: Floats
    due: Floats
    seconds: Floats


class Pairs(NamedTuple):
    """Work that is needed where both of two requests are served, as columns; ``credit`` seconds of it all are not."""

    first: Ints
    second: Ints
    release: Floats
    due: Floats
    seconds: Floats
    credit: float


class Caps(NamedTuple):
    """The most that may miss of the requests of each group."""

    group: Ints  # of each request
    most: Ints  # of each group


def least_misses(jobs: Jobs, enough: int | None = None, pairs: Pairs | None = None, caps: Caps | None = None) -> int:
    """Requests that miss, at least; more than there are where ``caps`` cannot be kept.

    ``enough``: a count above it is as good as any, and one far below may be rough.
    """
    if enough is None:
        with_pairs = by_size(jobs, FINE, pairs, caps) if pairs else 0
        return max(by_size(jobs, FINE, None, caps), with_pairs, by_interval(jobs))
    misses = by_size(jobs, COARSE, None, caps)
    if pairs and misses <= enough:
        misses = max(misses, by_size(jobs, COARSE, pairs, caps))
    if misses <= enough:
        misses = max(misses, by_interval(jobs))
    if misses <= enough < NEAR * misses:
        misses = max(misses, by_size(jobs, FINE, pairs, caps), by_size(jobs, FINE, None, caps) if pairs else 0)
    return misses


# --- by size ------------------------------------------------------------------------------------------------------


class _Pieces(NamedTuple):
    """Pieces of work, of requests and of pairs, by release; ``rank``: from which on by size they count."""

    rank: Ints
    release: Floats
    due: Floats
    seconds: Floats

    def take(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> _Pieces:
        """Some of them."""
        return _Pieces(self.rank[which], self.release[which], self.due[which], self.seconds[which])


def _together(some: _Pieces, more: _Pieces) -> _Pieces:
    return _Pieces(
        np.concatenate((some.rank, more.rank)),
        np.concatenate((some.release, more.release)),
        np.concatenate((some.due, more.due)),
        np.concatenate((some.seconds, more.seconds)),
    )


def _dense(pairs: Pairs, known: Ints) -> Pairs:
    """Those of two known requests, as places in ``known``."""
    some = np.isin(pairs.first, known) & np.isin(pairs.second, known)
    first, second = np.searchsorted(known, pairs.first[some]), np.searchsorted(known, pairs.second[some])
    return Pairs(first, second, pairs.release[some], pairs.due[some], pairs.seconds[some], pairs.credit)


def by_size(jobs: Jobs, runs: int = FINE, pairs: Pairs | None = None, caps: Caps | None = None) -> int:
    """Misses that the sizes of the requests force, all intervals at once; ``R_k`` run for so many ``k``."""
    owner, size = _requests(jobs)
    known = np.unique(jobs.owner)
    between = _dense(pairs, known) if pairs else None
    if between is not None:
        size = size + np.bincount(between.first, between.seconds, len(size))
        size = size + np.bincount(between.second, between.seconds, len(size))
    order = np.argsort(size, kind="stable")
    sizes = size[order]
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    pieces = _Pieces(rank[owner], jobs.release, jobs.due, jobs.seconds)
    if between is not None:
        later = np.maximum(rank[between.first], rank[between.second])
        pieces = _together(pieces, _Pieces(later, between.release, between.due, between.seconds))
    by_release = np.argsort(pieces.release, kind="stable")
    losses = _losses(pieces.take(by_release), len(sizes), runs, between.credit if between else 0.0)
    done, served = 0.0, 0
    for size, limit in zip(sizes.tolist(), _most_work(losses, sizes).tolist(), strict=True):
        if done + size <= limit * (1.0 + SHARE) + SLACK:
            done += size
            served += 1
    misses = len(sizes) - served
    return misses if caps is None else max(misses, _within(caps.group[known[order]], caps.most, sizes, losses))


def _within(group: Ints, most: Ints, sizes: Floats, losses: list[tuple[int, float]]) -> int:
    """The fewest of each ``k`` smallest that make up for what they lose, with no more than ``most`` of each group; more
    than there are where these do not."""
    total, fewest = np.cumsum(sizes), 0
    members = [np.flatnonzero(group == which) for which in range(len(most))]
    for k, lost in losses:
        first = [np.searchsorted(some, k) for some in members]
        largest = [
            some[max(0, end - room) : end] for some, end, room in zip(members, first, most.tolist(), strict=True)
        ]
        saved = np.cumsum(np.sort(sizes[np.concatenate(largest)])[::-1])
        wanted = lost - SHARE * (float(total[k - 1]) - lost) - SLACK
        needed = int(np.searchsorted(saved, wanted)) + 1 if wanted > 0.0 else 0
        if needed > len(saved):
            return len(sizes) + 1
        fewest = max(fewest, needed)
    return fewest


def _requests(jobs: Jobs) -> tuple[Ints, Floats]:
    """Dense numbers of the owners, and the work of each."""
    owner = np.asarray(np.unique(jobs.owner, return_inverse=True)[1], dtype=np.int64)
    return owner, np.bincount(owner, jobs.seconds).astype(np.float64)


def _losses(pieces: _Pieces, n: int, runs: int, credit: float) -> list[tuple[int, float]]:
    """(k, ``L_k - credit``) for some ``k``, falling from ``n``. All of the smallest are done in time if more are."""
    found: list[tuple[int, float]] = []
    for k in _counts(n, runs):
        some = pieces.take(pieces.rank < k)
        lost = unfinished(some.release.tolist(), some.due.tolist(), some.seconds.tolist()) - credit
        if lost <= SLACK:
            break
        found.append((k, lost))
    return found


def _most_work(losses: list[tuple[int, float]], sizes: Floats) -> Floats:
    """An upper bound on ``R_k`` for every ``k`` from 1."""
    total = np.cumsum(sizes)
    bound = total.copy()
    above, ceiling = len(sizes) + 1, np.inf
    for k, lost in losses:
        between = slice(k - 1, above - 1)
        bound[between] = np.minimum(total[between] - lost, ceiling)
        above, ceiling = k, float(bound[k - 1])
    np.minimum(bound[: above - 1], ceiling, out=bound[: above - 1])
    return bound


def _counts(n: int, runs: int) -> list[int]:
    """Numbers ``k`` to run, falling from ``n``, ever further apart."""
    dropped = np.geomspace(1.0, max(1.0, LARGEST_SHARE * n), runs).round().astype(np.int64)
    return [n, *[n - int(x) for x in np.unique(dropped) if x < n]]


def unfinished(release: Sequence[float], due: Sequence[float], seconds: Sequence[float]) -> float:
    """Seconds of work, sorted by release, that are overdue when what is due first is always done first: the least."""
    waiting: list[tuple[float, float]] = []
    push, pop = heapq.heappush, heapq.heappop
    now = lost = 0.0
    for comes, end, work in zip(release, due, seconds, strict=True):
        while waiting:
            first, left = waiting[0]
            until = now + left
            if until <= first and until <= comes:
                now = until
                pop(waiting)
            elif first <= comes:
                lost += until - max(now, first)
                now = max(now, first)
                pop(waiting)
            else:
                heapq.heapreplace(waiting, (first, until - comes))
                break
        now = max(now, comes)
        push(waiting, (end, work))
    while waiting:
        first, left = pop(waiting)
        until = now + left
        lost += max(0.0, until - max(now, first))
        now = max(now, min(until, first))
    return lost


# --- by interval --------------------------------------------------------------------------------------------------


def by_interval(jobs: Jobs) -> int:
    """Misses forced in the best disjoint intervals, of those that start at some releases."""
    owner, work = _requests(jobs)
    release = np.full(len(work), np.inf)
    due = np.full(len(work), -np.inf)
    np.minimum.at(release, owner, jobs.release)
    np.maximum.at(due, owner, jobs.due)
    order = np.argsort(due, kind="stable")
    release, due, work = release[order], due[order], work[order]
    starts: list[float] = []  # negated, so that they rise
    best: list[int] = []
    for start, most in _starts(release, work):
        low = int(np.searchsorted(due, start))
        some = low + np.flatnonzero(release[low:] >= start)[:most]
        value = best[-1] if best else 0
        for end, misses in _misses_from(start, due[some], work[some]):
            later = bisect_right(starts, -end)  # starts at or after this end
            value = max(value, misses + (best[later - 1] if later else 0))
        starts.append(-start)
        best.append(value)
    return best[-1] if best else 0


def _starts(release: Floats, work: Floats) -> list[tuple[float, int]]:
    """Where intervals start, last first, and how many requests to look at from there."""
    order = np.argsort(release, kind="stable")
    when, before = release[order], np.cumsum(work[order]) - work[order]
    begun = np.maximum.accumulate(when - before)
    busy = when[np.flatnonzero(np.append(True, begun[1:] > begun[:-1]))] if len(when) else when
    found = dict.fromkeys(_some(busy, BUSY_STARTS), BUSY_JOBS) | dict.fromkeys(_some(when, EVEN_STARTS), len(when))
    return sorted(found.items(), reverse=True)


def _some(values: Floats, count: int) -> list[float]:
    if not len(values):
        return []
    places = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(np.int64))
    picked: list[float] = values[places].tolist()
    return picked


def _misses_from(start: float, due: Floats, work: Floats) -> list[tuple[float, int]]:
    """(end, misses by then) where these increase, of requests sorted by due time and all released at ``start``."""
    time = (due - start) * (1.0 + SHARE) + SLACK
    if not len(due) or float((np.cumsum(work) - time).max()) <= 0.0:
        return []
    found: list[tuple[float, int]] = []
    kept: list[float] = []
    total, misses = 0.0, 0
    for end, limit, seconds in zip(due.tolist(), time.tolist(), work.tolist(), strict=True):
        heapq.heappush(kept, -seconds)
        total += seconds
        if total > limit:
            total += heapq.heappop(kept)
            misses += 1
            found.append((end, misses))
    return found


# --- exact --------------------------------------------------------------------------------------------------------


def exact(kinds: Sequence[Jobs], caps: Caps | None = None) -> int:
    """The fewest requests that must be dropped so that every kind of workers can do the rest in time; one more than
    there are where ``caps`` cannot be kept."""
    requests = frozenset(owner for jobs in kinds for owner in jobs.owner.tolist())
    level = {requests}
    for misses in range(len(requests) + 1):
        following: set[frozenset[int]] = set()
        for served in level:
            conflict = _conflict(kinds, served)
            if not conflict:
                return misses
            following.update(served - {request} for request in conflict)
        level = following if caps is None else {served for served in following if _kept(caps, requests - served)}
    return len(requests) + 1


def _kept(caps: Caps, dropped: frozenset[int]) -> bool:
    count = np.bincount(caps.group[list(dropped)], minlength=len(caps.most))
    return not bool((count > caps.most).any())


def _conflict(kinds: Sequence[Jobs], served: frozenset[int]) -> frozenset[int]:
    """Those with work in an interval that is too short for it, the fewest found; empty where there is none."""
    found: frozenset[int] = frozenset()
    for jobs in kinds:
        some = np.isin(jobs.owner, list(served))
        owner, release, due, seconds = (column[some] for column in jobs)
        starts, ends = np.unique(release), np.unique(due)
        inside = (release >= starts[:, None])[:, None, :] & (due <= ends[:, None])[None, :, :]
        time = np.maximum(0.0, ends - starts[:, None]) * (1.0 + SHARE) + SLACK
        for s, e in np.argwhere(inside @ seconds > time):
            members = frozenset(owner[inside[s, e]].tolist())
            if not found or len(members) < len(found):
                found = members
    return found
