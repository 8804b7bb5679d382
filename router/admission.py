"""The central queue: bounded, feasible first, in order of first-token deadline, with removal from anywhere. Pure.

Order by deadline never starves: a waiting request's deadline stays where it is while those of newcomers move on. It
collapses, though, where work is more than workers: all that is left is just late. So those that cannot make their
deadline any more stand behind all that can, shortest work first.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator

from twinpool.router.request import Request


class Queue:
    """Waiting requests by (deadline, rid), then late ones by (work, rid); entries of those that left are skipped."""

    __slots__ = ("_late", "_order", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._order: list[tuple[float, int]] = []
        self._late: list[tuple[float, int]] = []  # heap
        self.waiting: dict[int, Request] = {}  # by rid; borrowed

    @property
    def full(self) -> bool:
        """Whether a new request must be shed (lost attempts always come back in)."""
        return len(self.waiting) >= self.limit

    def push(self, request: Request) -> None:
        """Add a request that does not wait already."""
        assert request.rid not in self.waiting, f"request {request.rid} waits already"
        request.late = False
        self.waiting[request.rid] = request
        insort(self._order, (request.deadline, request.rid))

    def head(self) -> Request | None:
        """The first that is not late; stays in."""
        order = self.order()
        return self.valid(order[0]) if order else None

    def order(self) -> list[tuple[float, int]]:
        """Entries for ``valid``, by deadline, the first one valid. Borrowed: nothing may be pushed meanwhile."""
        order = self._order
        stale = 0
        while stale < len(order) and self.valid(order[stale]) is None:
            stale += 1
        if stale:
            del order[:stale]
        return order

    def valid(self, entry: tuple[float, int]) -> Request | None:
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
        return self.waiting.pop(request.rid, None) is not None

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self.waiting.values()))
