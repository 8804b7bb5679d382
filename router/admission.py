"""The central queue: bounded, fair, feasible first, in order of slack and deadline, removal from anywhere. Pure.

    turn = deadline - work_s + pressure * work_s        who has the least is next

``deadline - work_s`` is when a request has to begin. In that order nobody is preferred and, where work is more than
workers, all miss together. In the order of deadlines (pressure 1) whoever has little work goes first and the longest
miss, a few for many, but they do so as well where all could have been in time. So the weight of the work is the
*pressure*: what share of its slack a request has used up by the time it is placed, a running mean. Nobody starves:
whatever the pressure, a waiting request's turn is no later than its deadline, while those of newcomers move on. Those
that cannot make their deadline any more stand behind all that can, shortest work first.

Before deadlines come shares. Where several classes wait, the one that had the least predicted prefill seconds for its
weight goes first; within a class those tenants that had at most a quantum of tokens more than the one that had least.
The others come after these: what no request before them can use is theirs.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Final

from twinpool.classes import weight_of
from twinpool.router.fair import Shares
from twinpool.router.request import Request

QUANTUM: Final = 4096.0  # tokens that a tenant may be ahead of the one that had least
CACHED_WEIGHT: Final = 0.1  # of a token whose KV was there, beside one computed
OUTPUT_WEIGHT: Final = 2.0  # of one drawn

NO_RANK: Final = 1 << 30
PRESSURE_WEIGHT: Final = 0.05  # of a request just placed, in the running mean
LEAST_PRESSURE: Final = 0.05
PRESSURE_STEP: Final = 1.3  # times more or less than what the order goes by: the queue is put in order again

Entry = tuple[float, int]


class Pressure:
    """How much of their slack the requests of one class wait; see the module's docstring."""

    __slots__ = ("_mean", "level")

    def __init__(self) -> None:
        self._mean = 0.0
        self.level = LEAST_PRESSURE  # what the order goes by

    def placed(self, request: Request, now: float) -> bool:
        """A request was placed for the first time; whether ``level`` changed for that."""
        slack_s = request.deadline - request.work_s - request.arrival
        waited_s = now - request.arrival
        self._mean += PRESSURE_WEIGHT * ((waited_s / slack_s if waited_s < slack_s else 1.0) - self._mean)
        wanted = max(LEAST_PRESSURE, self._mean)
        if self.level <= PRESSURE_STEP * wanted and wanted <= PRESSURE_STEP * self.level:
            return False
        self.level = wanted
        return True


class Queue:
    """Waiting requests by (turn, rid), then late ones by (work, rid); entries of those that left are skipped.

    ``by_deadline``: as if under full pressure, always.
    """

    __slots__ = (
        "_by_deadline", "_classes", "_late", "_lines", "_pressures", "_tenants", "_unsorted",
        "limit", "waiting",
    )  # fmt: skip

    def __init__(self, limit: int, by_deadline: bool = False) -> None:
        self.limit = limit
        self._by_deadline = by_deadline
        self._lines: dict[tuple[int, str], list[Entry]] = {}  # of each (rank, tenant), sorted
        self._late: list[Entry] = []  # heap
        self._classes = Shares()  # by rank, in predicted prefill seconds by weight
        self._tenants: dict[int, Shares] = {}  # rank -> by tenant, in tokens
        self._pressures: dict[int, Pressure] = {}  # by rank
        self._unsorted: set[int] = set()  # ranks whose pressure changed
        self.waiting: dict[int, Request] = {}  # by rid; borrowed

    @property
    def full(self) -> bool:
        """Whether a new request must be shed (lost attempts always come back in)."""
        return len(self.waiting) >= self.limit

    @property
    def mixed(self) -> bool:
        """Whether shares matter: requests of several tenants or classes wait."""
        return len(self._lines) > 1

    def push(self, request: Request) -> None:
        """Add a request that does not wait already."""
        assert request.rid not in self.waiting, f"request {request.rid} waits already"
        request.late = False
        self.waiting[request.rid] = request
        rank, tenant = request.rank, request.tenant
        request.turn = self._turn(request)
        insort(self._lines.setdefault((rank, tenant), []), (request.turn, request.rid))
        self._classes.came(rank)
        self._tenants.setdefault(rank, Shares()).came(tenant)

    def _turn(self, request: Request) -> float:
        level = 1.0 if self._by_deadline else self._pressure(request.rank).level
        return request.deadline - (1.0 - level) * request.work_s

    def _pressure(self, rank: int) -> Pressure:
        pressure = self._pressures.get(rank)
        if pressure is None:
            pressure = self._pressures[rank] = Pressure()
        return pressure

    def _sort(self) -> None:
        """Lines whose pressure changed, by what it is now."""
        for (rank, _), line in self._lines.items():
            if rank in self._unsorted:
                waiting = [other for other in map(self.valid, line) if other is not None]
                for other in waiting:
                    other.turn = self._turn(other)
                line[:] = sorted([(other.turn, other.rid) for other in waiting])
        self._unsorted.clear()

    def head(self) -> Request | None:
        """The first that is not late; stays in."""
        for entry in self.order():
            request = self.valid(entry)
            if request is not None:
                return request
        return None

    def order(self, below: int = NO_RANK) -> Iterable[Entry]:
        """Entries for ``valid``, of ranks ``below``, in order. Borrowed: nothing may be pushed or charged meanwhile."""
        if self._unsorted:
            self._sort()
        lines = self._lines
        for key, line in lines.items() if len(lines) == 1 else list(lines.items()):
            stale = 0
            while stale < len(line) and self.valid(line[stale]) is None:
                stale += 1
            if stale:
                del line[:stale]
            if len(lines) == 1:
                return line if key[0] < below else []
            if not line:
                del lines[key]
        return self._fair_order(below)

    def _fair_order(self, below: int) -> Iterable[Entry]:
        parts: list[Iterable[Entry]] = []
        ranks = {rank for rank, _ in self._lines if rank < below}
        for rank in sorted(ranks, key=lambda rank: (self._classes.had(rank), rank)):
            shares = self._tenants[rank]
            lines = {tenant: line for (other, tenant), line in self._lines.items() if other == rank}
            limit = min([shares.had(tenant) for tenant in lines]) + QUANTUM
            parts.append(heapq.merge(*[line for tenant, line in lines.items() if shares.had(tenant) <= limit]))
            parts.append(heapq.merge(*[line for tenant, line in lines.items() if shares.had(tenant) > limit]))
        return chain.from_iterable(parts)

    def charge(self, request: Request, seconds: float, cached: int, output: int, now: float) -> None:
        """It is served: predicted seconds of its prompt, of which so many tokens are cached, and output to come."""
        if not request.late and self._pressure(request.rank).placed(request, now):
            self._unsorted.add(request.rank)
        self._classes.charge(request.rank, seconds / weight_of(request.rank))
        tokens = request.length - cached + CACHED_WEIGHT * cached + OUTPUT_WEIGHT * output
        self._tenants[request.rank].charge(request.tenant, tokens)
        request.charged_output = output

    def settle(self, request: Request) -> None:
        """It is over: charge the output it had in place of what was predicted."""
        if request.charged_output >= 0:
            more = request.emitted - request.charged_output
            self._tenants[request.rank].charge(request.tenant, OUTPUT_WEIGHT * more)

    def valid(self, entry: Entry) -> Request | None:
        """The request of an entry; None where it left, came back at another turn, or is late."""
        request = self.waiting.get(entry[1])
        if request is None or request.late or request.turn != entry[0]:
            return None
        return request

    def late(self) -> Request | None:
        """The shortest of those that are late; stays in."""
        late = self._late
        while late:
            request = self.waiting.get(late[0][1])
            if request is not None and request.late:
                return request
            heapq.heappop(late)
        return None

    def postpone(self, request: Request, work_s: float) -> None:
        """Behind all that are not late, in order of work. It waits, and was not postponed before."""
        request.late = True
        heapq.heappush(self._late, (work_s, request.rid))

    def remove(self, request: Request) -> bool:
        """Take a request out; False if it does not wait."""
        if self.waiting.pop(request.rid, None) is None:
            return False
        self._classes.left(request.rank)
        self._tenants[request.rank].left(request.tenant)
        return True

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self.waiting.values()))
