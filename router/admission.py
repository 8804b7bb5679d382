"""The central queue: bounded, fair, feasible first, in order of first-token deadline, removal from anywhere. Pure.

Order by deadline never starves: a waiting request's deadline stays where it is while those of newcomers move on. It
collapses, though, where work is more than workers: all that is left is just late. So those that cannot make their
deadline any more stand behind all that can, shortest work first.

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

Entry = tuple[float, int]


class Queue:
    """Waiting requests by (deadline, rid), then late ones by (work, rid); entries of those that left are skipped."""

    __slots__ = ("_classes", "_late", "_lines", "_tenants", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lines: dict[tuple[int, str], list[Entry]] = {}  # of each (rank, tenant), sorted
        self._late: list[Entry] = []  # heap
        self._classes = Shares()  # by rank, in predicted prefill seconds by weight
        self._tenants: dict[int, Shares] = {}  # rank -> by tenant, in tokens
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
        insort(self._lines.setdefault((rank, tenant), []), (request.deadline, request.rid))
        self._classes.came(rank)
        self._tenants.setdefault(rank, Shares()).came(tenant)

    def head(self) -> Request | None:
        """The first that is not late; stays in."""
        for entry in self.order():
            request = self.valid(entry)
            if request is not None:
                return request
        return None

    def order(self, below: int = NO_RANK) -> Iterable[Entry]:
        """Entries for ``valid``, of ranks ``below``, in order. Borrowed: nothing may be pushed or charged meanwhile."""
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

    def charge(self, request: Request, seconds: float, cached: int, output: int) -> None:
        """It is served: predicted seconds of its prompt, of which so many tokens are cached, and output to come."""
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
        """The request of an entry; None where it left, came back with another deadline, or is late."""
        request = self.waiting.get(entry[1])
        if request is None or request.late or request.deadline != entry[0]:
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
