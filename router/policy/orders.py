"""The workers of a large cell in the orders in which ``least_seconds`` asks for them, so that it asks a few. Pure.

Every order is of bounds that do not change while time passes: the end of what a worker has to compute as it was
committed, its booked share of memory, the seconds of a prompt token beside what it decodes. A search goes along one
until nothing behind can be better, and takes exact figures of those it meets. Workers note that they changed
(``Worker.note``); ``refresh`` puts those in order again.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from typing import Final, NamedTuple

from twinpool.router.kv_index import KvIndex, Stair
from twinpool.router.pool import Pool
from twinpool.router.request import Request
from twinpool.router.worker import Worker

MOST_SLOS: Final = 8  # ITL SLOs that have an order of their own
MOST_KNOWN: Final = 4096  # requests

Place = tuple[float, int]


class Kind:
    """Workers that predict alike: one pace, one chunk size, one unit of hashes."""

    __slots__ = ("like", "mask")

    def __init__(self, like: Worker) -> None:
        self.like = like  # any of them
        self.mask = 0

    def takes(self, worker: Worker) -> bool:
        """Whether the worker is one of them."""
        like = self.like
        same = worker.pace is like.pace and worker.cost is like.cost
        return same and worker.chunk_tokens == like.chunk_tokens and worker.index_tokens == like.index_tokens


class Depth(NamedTuple):
    """Workers of one kind that have equally much of a prompt cached."""

    mask: int
    cached: int  # tokens
    seconds: float  # that the rest takes where nothing decodes
    like: Worker  # any of them


class Known:
    """What was found out about a waiting request, which is asked about again and again."""

    __slots__ = ("depths", "length", "paces", "stairs", "version")

    def __init__(self, stairs: list[Stair], length: int) -> None:
        self.stairs = stairs
        self.length = length
        self.depths: list[Depth] = []
        self.paces: list[float] = []  # that ``depths`` were predicted with
        self.version = -1  # of the pool


class Order:
    """Workers by a number, ties by id."""

    __slots__ = ("_of", "places")

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._of: dict[int, float] = {}

    def put(self, worker: int, value: float) -> None:
        """Where it is from now on."""
        before = self._of.get(worker)
        if before is not None:
            if before == value:
                return
            del self.places[bisect_left(self.places, (before, worker))]
        self._of[worker] = value
        insort(self.places, (value, worker))

    def drop(self, worker: int) -> None:
        """It is in no place any more. Idempotent."""
        before = self._of.pop(worker, None)
        if before is not None:
            del self.places[bisect_left(self.places, (before, worker))]


class Rates:
    """How prompts fare beside the decodes of workers: see ``pool.Beside``."""

    __slots__ = ("loads", "rises", "tokens")

    def __init__(self) -> None:
        self.tokens = Order()  # workers by seconds of a token at position 0
        self.loads = Order()  # ... by those of a step of decodes alone
        self.rises = Order()  # ... by how much more a token takes for each one before it

    def put(self, worker: Worker, itl_s: float) -> None:
        """Where it is from now on; nowhere while nothing decodes there."""
        number = worker.id
        if not worker.decodes:
            self.tokens.drop(number)
            self.loads.drop(number)
            self.rises.drop(number)
            return
        beside = worker.beside(itl_s)
        self.tokens.put(number, beside.token_s)
        self.loads.put(number, beside.load_s)
        self.rises.put(number, beside.token_rise)

    def least(self, uncached: int, cached: int) -> float:
        """No worker has the first token of such a prompt sooner than this and ``uncached`` times its ``token_s``."""
        if not self.loads.places:
            return math.inf
        rise = self.rises.places[0][0]
        return 1.5 * self.loads.places[0][0] + uncached * rise * (cached + uncached / 2)


class Orders:
    """Of one pool. Masks are of worker ids; all are as of the last ``refresh``."""

    __slots__ = (
        "_pool", "_rates", "_rises", "_version", "begins", "booked", "busy", "decode", "decoding", "first_begin",
        "free", "idle", "kinds", "known", "largest", "prefill",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._version = -1
        self.known: dict[int, Known] = {}  # rid ->
        self._clear()

    def _clear(self) -> None:
        self.busy = Order()  # workers with prompts, by when these would end if they took as long as predicted
        self.begins = Order()  # ... by when one more could begin at the earliest
        self.booked = Order()  # decode workers, by booked share of memory
        self._rates: dict[float, Rates] = {}  # ITL SLO -> of the decode workers
        self.kinds: list[Kind] = []
        self.prefill = self.decode = 0  # those of the pools
        self.idle = 0  # without prompts in line
        self.free = 0  # ... and without those of the batch class
        self.decoding = 0
        self.first_begin = -math.inf  # no prompt begins at a prefill worker before
        self.largest = 1.0  # KV tokens that a decode worker may book at most
        self._rises: list[float] = []  # of each kind: what a token of context adds to a step at least, without its pace

    def refresh(self) -> None:
        """Up to date with the pool."""
        pool = self._pool
        if pool.version != self._version:
            self._rebuild()
        elif not pool.changes:
            return
        for worker in pool.changes:
            self._take(worker)
            worker.noted = False
        pool.changes.clear()
        self.first_begin = -math.inf if self.idle & self.prefill else self._first_begin()

    def _first_begin(self) -> float:
        for begin, number in self.begins.places:
            if self.prefill >> number & 1:
                return begin
        return math.inf

    def _rebuild(self) -> None:
        self._clear()
        pool = self._pool
        self._version = pool.version
        self.kinds = kinds(list(pool.workers.values()))
        self._rises = [_least_rise(kind.like) for kind in self.kinds]
        self.prefill = sum([1 << worker.id for worker in pool.prefill])
        self.decode = sum([1 << worker.id for worker in pool.decode])
        self.largest = max([worker.limit for worker in pool.decode], default=1.0)
        for worker in pool.workers.values():
            self._take(worker)

    def _take(self, worker: Worker) -> None:
        number, bit = worker.id, 1 << worker.id
        if self._pool.workers.get(number) is not worker:
            return  # it is gone
        if worker.prefills:
            self.busy.put(number, worker.line.since + worker.line.seconds)
            self.begins.put(number, worker.begins())
            self.idle &= ~bit
        else:
            self.busy.drop(number)
            self.begins.drop(number)
            self.idle |= bit
        self.free = self.free & ~bit if worker.prefills or worker.fills else self.free | bit
        self.decoding = self.decoding | bit if worker.decodes else self.decoding & ~bit
        if "decode" in worker.roles and not worker.draining:
            self.booked.put(number, worker.booked / worker.limit)
            for itl_s, rates in self._rates.items():
                rates.put(worker, itl_s)

    def rates(self, itl_s: float) -> Rates:
        """Of the decode workers that decode, for a prompt with this ITL SLO. Borrowed."""
        rates = self._rates.get(itl_s)
        if rates is None:
            if len(self._rates) >= MOST_SLOS:
                self._rates.clear()
            self._rates[itl_s] = rates = Rates()
            for worker in self._pool.decode:
                rates.put(worker, itl_s)
        return rates

    def context_s(self) -> float:
        """Seconds that a token more of context adds to the step of any decode worker, at least."""
        least = math.inf
        for kind, rise in zip(self.kinds, self._rises, strict=True):
            if kind.mask & self.decode:
                least = min(least, kind.like.pace.decode * rise)
        return least if least < math.inf else 0.0

    def about(self, request: Request, hashes: list[int], index: KvIndex) -> Known:
        """Stairs of a request's hashes and, for its length, ``depths``; kept while they hold."""
        known = self.known.get(request.rid)
        length = request.length
        if known is None or known.length != length or not index.still(known.stairs, hashes):
            if len(self.known) >= MOST_KNOWN:
                self.known.clear()
            known = self.known[request.rid] = Known(index.stairs(hashes), length)
        paces = [kind.like.pace.prefill for kind in self.kinds]
        if known.version != self._version or known.paces != paces:
            known.version, known.paces = self._version, paces
            known.depths = depths(length, known.stairs, self.kinds)
        return known

    def prefill_share(self) -> float:
        """``Pool.prefill_share``."""
        self.refresh()
        mask = self.prefill or self.decode
        return (mask & ~self.free).bit_count() / mask.bit_count() if mask else 1.0

    def check_integrity(self) -> None:
        """As if made anew, or AssertionError."""
        self.refresh()
        fresh = Orders(self._pool)
        fresh.refresh()
        assert self.busy.places == fresh.busy.places, "workers with prompts are out of order"
        assert self.begins.places == fresh.begins.places, "workers are out of the order in which prompts may begin"
        assert self.booked.places == fresh.booked.places, "decode workers are out of order"
        assert (self.idle, self.free, self.decoding) == (fresh.idle, fresh.free, fresh.decoding), "masks differ"


def depths(length: int, stairs: list[Stair], kinds: list[Kind]) -> list[Depth]:
    """All workers, each in one of them, by what they have cached of a prompt of so many tokens."""
    found: list[Depth] = []
    for kind in kinds:
        like, left, size = kind.like, kind.mask, kind.like.index_tokens
        for stair in stairs:
            mask = stair.mask & left
            if mask:
                left ^= mask
                cached = min(stair.depth * size, (length - 1) // size * size)  # base.cached_tokens
                found.append(Depth(mask, cached, like.prefill_s(length - cached, cached), like))
        if left:
            found.append(Depth(left, 0, like.prefill_s(length, 0), like))
    return found


def _least_rise(worker: Worker) -> float:
    return min([min(worker.cost.row(batch).beta) for batch in range(1, worker.max_batch + 2)])


def kinds(workers: list[Worker]) -> list[Kind]:
    """The workers by kind."""
    found: list[Kind] = []
    for worker in workers:
        for kind in found:
            if kind.takes(worker):
                break
        else:
            kind = Kind(worker)
            found.append(kind)
        kind.mask |= 1 << worker.id
    return found
