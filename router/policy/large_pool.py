"""The searches of ``least_seconds`` in a large cell: the same answers as asking every worker, from a few of them. Pure.

Workers that have equally much of a prompt cached take equally long for it, so among them the one that is free first is
the earliest. Hence for each depth of the staircase (``kv_index.py``) a search goes along ``Orders``, past those that
have another depth, until a bound says that nobody behind is earlier.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Final, NamedTuple

from twinpool.cost import ITL_SHARE
from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import View
from twinpool.router.policy.candidates import Candidate, Outlook, with_fetch
from twinpool.router.policy.fetch import MIN_GAIN_S, best_offer, held_tokens
from twinpool.router.policy.orders import Depth, Orders
from twinpool.router.policy.price import prefill_price_s
from twinpool.router.pool import Pool
from twinpool.router.request import NOBODY, Request
from twinpool.router.worker import Worker

ROUNDING: Final = 1e-9  # seconds: more than sums of clock readings round off


def numbers(mask: int) -> list[int]:
    """Ids in a mask, ascending."""
    found: list[int] = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


class PrefillSearch:
    """Gathers an ``Outlook``."""

    __slots__ = (
        "_best", "_itl_s", "_length", "_limit", "_now", "_orders", "_workers", "least", "least_s", "somebody",
        "soonest", "surest",
    )  # fmt: skip

    def __init__(self, pool: Pool, orders: Orders, request: Request, limit: float, now: float) -> None:
        self._workers = pool.workers
        self._orders = orders
        self._length = request.length
        self._itl_s = request.itl_s
        self._limit = limit
        self._now = now
        self._best: Candidate | None = None
        self.soonest = self.least = self.surest = math.inf
        self.least_s = 0.0
        self.somebody = False

    def ask(self, worker: Worker, seconds: float, cached: int) -> bool:
        """Count one worker in; whether it could take the prompt at once."""
        if self._length > worker.limit:
            return False
        free_at = worker.free_at(self._now)
        finish = free_at + seconds
        error_s = worker.pace.spread * seconds
        if finish < self.least or (finish == self.least and seconds < self.least_s):
            self.least, self.least_s = finish, seconds
        if finish + error_s < self.surest:
            self.surest = finish + error_s
        limit, now, itl_s = self._limit, self._now, self._itl_s
        begins = free_at <= limit or worker.begins_by(limit, now, self._length - cached, itl_s)
        if not begins and finish < self.soonest:
            self.soonest = finish
        if worker.full or not (begins or worker.begins_by(limit, now, 1, itl_s)):
            return False
        self.somebody = True
        if not begins or worker.booked + self._length > worker.limit:
            return False
        best = self._best
        if best is None or finish < best.finish or (finish == best.finish and worker.id < best.worker):
            self._best = Candidate(finish, worker.id, cached, seconds, error_s=error_s)
        return True

    def ask_all(self, mask: int, seconds: float, cached: int, spread: float) -> None:
        """Count in those of a mask for whom the prompt takes equally long: as few as will do. ``spread``: ``Pace``."""
        idle = mask & self._orders.idle
        while idle:
            low = idle & -idle
            if self.ask(self._workers[low.bit_length() - 1], seconds, cached):
                break  # the others are no earlier, and come later
            idle ^= low
        mask &= ~self._orders.idle
        if not mask:
            return
        for until, number in self._orders.busy.places:
            finish = until + seconds - ROUNDING
            if until > self._limit and finish >= self.soonest and finish + spread * seconds >= self.surest:
                best = self._best
                if self._orders.first_begin > self._limit or (best is not None and finish >= best.finish):
                    return
            if mask >> number & 1:
                self.ask(self._workers[number], seconds, cached)

    def outlook(self) -> Outlook:
        """What was found."""
        return Outlook(self._best, self.soonest, self.least, self.surest, self.least_s, self.somebody)


class Earliest(NamedTuple):
    """As in ``Outlook``."""

    least: float
    least_s: float
    surest: float


def least_finish(length: int, found: list[Depth], pool: Pool, orders: Orders, now: float) -> Earliest:
    """The earliest first token of prefill workers that all compute prompts; the same with the usual error in hand."""
    least = surest = math.inf
    least_s = 0.0
    for depth in found:
        mask = depth.mask & orders.prefill
        if not mask:
            continue
        seconds = depth.seconds
        more = seconds + depth.like.pace.spread * seconds
        for end, number in orders.busy.places:
            if end + seconds - ROUNDING >= least and end + more - ROUNDING >= surest:
                break
            if mask >> number & 1:
                worker = pool.workers[number]
                if length <= worker.limit:
                    free_at = worker.free_at(now)
                    finish = free_at + seconds
                    if finish < least or (finish == least and seconds < least_s):
                        least, least_s = finish, seconds
                    surest = min(surest, finish + depth.like.pace.spread * seconds)
    return Earliest(least, least_s, surest)


def outlook(request: Request, found: list[Depth], pool: Pool, orders: Orders, limit: float, now: float) -> Outlook:
    """What the prefill workers promise; those that are free until ``limit`` have room."""
    if orders.first_begin > limit and not orders.prefill & orders.decoding:
        least, least_s, surest = least_finish(request.length, found, pool, orders, now)
        return Outlook(None, least, least, surest, least_s, False)
    length = request.length
    search = PrefillSearch(pool, orders, request, limit, now)
    for depth in found:
        mask = depth.mask & orders.prefill
        beside = mask & orders.decoding
        if beside:  # each takes its own time
            mask ^= beside
            for number in numbers(beside):
                worker = pool.workers[number]
                seconds = worker.prompt_s(length - depth.cached, depth.cached, request.itl_s)
                search.ask(worker, seconds, depth.cached)
        if mask:
            search.ask_all(mask, depth.seconds, depth.cached, depth.like.pace.spread)
    return search.outlook()


def fetching(outlook: Outlook, request: Request, stairs: list[Stair], view: View, now: float) -> Outlook:
    """With the longest cached prefix fetched where that is earlier. Only who would be chosen without is looked at."""
    split = outlook.split
    if split is None:
        return outlook
    worker = view.pool.workers[split.worker]
    if split.cached >= held_tokens(stairs[0].depth, request, worker):
        return outlook
    offer = best_offer(request, stairs, view, now)
    if offer is None:
        return outlook
    free_at = worker.free_at(now)
    finish = offer.finish(worker, request, split.cached, free_at)
    if finish + MIN_GAIN_S >= split.finish:
        return outlook
    split = with_fetch(split._replace(finish=finish), worker, offer, free_at, now)
    least, surest = min(outlook.least, finish), min(outlook.surest, finish + split.error_s)
    least_s = finish - free_at if finish < outlook.least else outlook.least_s
    return Outlook(split, outlook.soonest, least, surest, least_s, outlook.somebody)


Local = Callable[[Worker, Request, int, float, float], "Candidate | None"]


class LocalSearch:
    """The earliest decode worker for a prompt, if it is earlier than ``bound``.

    ``make``: the candidate of one worker, of which (worker, request, cached tokens, seconds alone, now) are told.
    """

    __slots__ = ("_bound", "_make", "_need", "_orders", "_request", "_workers", "best", "now")

    def __init__(
        self, request: Request, pool: Pool, orders: Orders, need: int, bound: float, now: float,
        make: Local,
    ) -> None:  # fmt: skip
        self._request = request
        self._workers = pool.workers
        self._orders = orders
        self._need = need
        self._bound = bound
        self.now = now
        self._make = make
        self.best: Candidate | None = None

    def latest(self) -> float:
        """A first token after this would not be chosen."""
        return self._bound if self.best is None else min(self._bound, self.best.finish)

    def ask_busy(self, number: int, cached: int, alone_s: float, limit: float, bound: float) -> None:
        """Count one worker in that may have prompts, if one more begins until ``limit``, in time for ``bound``."""
        worker, request = self._workers[number], self._request
        if worker.fills or worker.free_at(self.now) + alone_s >= bound:
            return
        if worker.begins_by(limit, self.now, request.length - cached, request.itl_s):
            self.ask(number, cached, alone_s)

    def ask(self, number: int, cached: int, alone_s: float) -> bool:
        """Count one worker in; whether it could take the prompt."""
        worker = self._workers[number]
        if not worker.fits(self._need) or worker.batch >= worker.max_batch:
            return False
        found = self._make(worker, self._request, cached, alone_s, self.now)
        if found is None:
            return False
        best = self.best
        if best is None or found.finish < best.finish or (found.finish == best.finish and number < best.worker):
            self.best = found
        return True

    def ask_all(self, mask: int, cached: int, alone_s: float) -> None:
        """Count in those of a mask that have equally much cached: as few as will do."""
        idle = mask & ~self._orders.decoding
        while idle:
            low = idle & -idle
            if self.ask(low.bit_length() - 1, cached, alone_s):
                break
            idle ^= low
        mask &= self._orders.decoding
        if not mask:
            return
        tokens = self._request.length - cached
        rates = self._orders.rates(self._request.itl_s)
        least = self.now + rates.least(tokens, cached) - ROUNDING
        for token_s, number in rates.tokens.places:
            if least + tokens * token_s > self.latest():
                return
            if mask >> number & 1:
                self.ask(number, cached, alone_s)


def may_take_prompts(pool: Pool, orders: Orders, itl_s: float, limit: float, now: float) -> bool:
    """Whether a prompt may begin at a decode worker until ``limit`` that has memory which is not booked."""
    for _, number in orders.booked.places:
        if orders.free >> number & 1:
            worker = pool.workers[number]
            if worker.booked <= worker.limit:
                return True
            break
    for begin, number in orders.begins.places:
        if begin > limit:
            break
        worker = pool.workers[number]
        takes = orders.decode >> number & 1 and not worker.fills and worker.booked <= worker.limit
        if takes and worker.begins_by(limit, now, 1, itl_s):
            return True
    return False


def may_be_earlier(
    request: Request, found: list[Depth], orders: Orders, bound: float, limit: float, now: float
) -> bool:
    """Whether a decode worker where it may begin until ``limit`` might give the first token before ``bound``."""
    shortest = min([depth.seconds for depth in found], default=math.inf)
    for begin, number in orders.begins.places:
        if begin > limit or begin + shortest - ROUNDING >= bound:
            break
        if orders.decode >> number & 1:
            return True
    free = orders.decode & orders.free
    idle = free & ~orders.decoding
    rates = orders.rates(request.itl_s)
    token_s = rates.tokens.places[0][0] if rates.tokens.places else math.inf
    for depth in found:
        if depth.mask & free and now + depth.seconds < bound:
            tokens = request.length - depth.cached
            if depth.mask & idle or now + rates.least(tokens, depth.cached) + tokens * token_s - ROUNDING <= bound:
                return True
    return False


def passed_by(request: Request, found: list[Depth], view: View, price: bool, limit: float, now: float) -> float:
    """Short for what is asked most often: the earliest finish at a prefill worker (with the usual error in hand), where
    none of these has room until ``limit`` and no decode worker that may take prompts would be earlier, or (``price``)
    enough for the others; -1: somebody might take this one.
    """
    pool, orders = view.pool, view.orders
    assert orders is not None
    if orders.first_begin <= limit or orders.prefill & orders.decoding or not orders.decode:
        return -1.0
    if not may_take_prompts(pool, orders, request.itl_s, limit, now):
        return -1.0
    least, least_s, surest = least_finish(request.length, found, pool, orders, now)
    bound = least + prefill_price_s(least_s, view, now) if price else least
    return -1.0 if may_be_earlier(request, found, orders, bound, limit, now) else surest


def best_local(
    search: LocalSearch, found: list[Depth], orders: Orders, bound: float, limit: float, also: int
) -> Candidate | None:
    """The earliest; worker ``also`` is counted in even where it cannot be earlier than ``bound``."""
    free = orders.decode & orders.free
    for depth in found:
        mask = depth.mask & free
        if also != NOBODY and depth.mask & orders.decode & 1 << also:
            search.ask_busy(also, depth.cached, depth.seconds, limit, math.inf)
        if mask and search.now + depth.seconds < bound:
            search.ask_all(mask, depth.cached, depth.seconds)
    shortest = min([depth.seconds for depth in found], default=math.inf)
    for begin, number in orders.begins.places:
        if begin > limit or begin + shortest - ROUNDING > search.latest():
            break
        if orders.decode >> number & 1:
            for depth in found:
                if depth.mask >> number & 1:
                    search.ask_busy(number, depth.cached, depth.seconds, limit, bound)
    return search.best


Score = Callable[[Worker, Request, int], float]


class DecodeSearch:
    """The decode worker of the least score, ties to the lower id."""

    __slots__ = ("_need", "_request", "_score", "best", "least")

    def __init__(self, request: Request, need: int, score: Score) -> None:
        self._request = request
        self._need = need
        self._score = score
        self.best = NOBODY
        self.least = math.inf

    def ask(self, worker: Worker) -> None:
        """Count one in."""
        score = self._score(worker, self._request, self._need)
        if score < self.least or (score == self.least and score < math.inf and worker.id < self.best):
            self.best, self.least = worker.id, score


def least_loaded(request: Request, pool: Pool, orders: Orders, need: int, score: Score) -> int:
    """The decode worker of the least score, which is the larger of the shares of memory and of the ITL that are booked.

    Who has no room is asked, too, as far as a bound says that it might be least.
    """
    search = DecodeSearch(request, need, score)
    holder = pool.workers.get(request.prefill)  # books less for what it has already
    if holder is not None and request.attempt in holder.held and "decode" in holder.roles and not holder.draining:
        search.ask(holder)
    for number in numbers(orders.decode & ~orders.decoding):
        search.ask(pool.workers[number])
    loads, booked = orders.rates(request.itl_s).loads.places, orders.booked.places
    step_s = ITL_SHARE * request.itl_s  # of the request alone: among others it may be less
    for places in (loads, booked):
        if places:
            search.ask(pool.workers[places[0][1]])
    # Whoever is chosen has a longer step and more memory booked than it has now, by so much at least.
    longest = search.least * step_s * (1.0 + ROUNDING) - orders.context_s() * request.length
    by_load = bisect_left(loads, (longest, -1)) if search.least < math.inf else len(loads)
    by_memory = bisect_left(booked, (search.least + ROUNDING - need / orders.largest, -1))
    for _, number in loads[:by_load] if by_load < by_memory else booked[:by_memory]:
        search.ask(pool.workers[number])
    return search.best


def next_free(pool: Pool, orders: Orders, horizon: float, now: float) -> float:
    """The first moment after ``now`` at which, without news, a worker comes within the horizon."""
    places = orders.begins.places
    for i in range(bisect_left(places, (now + horizon - ROUNDING, -1)), len(places)):
        moment = pool.workers[places[i][1]].free_within(horizon)
        if now < moment < math.inf:
            return moment
    return math.inf
