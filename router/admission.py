"""The central queue: bounded, in order of first-token deadline, with removal from anywhere. Pure.

Order by deadline never starves: a waiting request's deadline stays where it is while those of newcomers move on.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from twinpool.router.request import Request


class Queue:
    """Waiting requests by (deadline, rid); lazy deletion, O(log n)."""

    __slots__ = ("_heap", "limit", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._heap: list[tuple[float, int]] = []
        self.waiting: dict[int, Request] = {}  # by rid; borrowed

    @property
    def full(self) -> bool:
        """Whether a new request must be shed (lost attempts always come back in)."""
        return len(self.waiting) >= self.limit

    def push(self, request: Request) -> None:
        """Add a request that does not wait already."""
        assert request.rid not in self.waiting, f"request {request.rid} waits already"
        self.waiting[request.rid] = request
        heapq.heappush(self._heap, (request.deadline, request.rid))

    def head(self) -> Request | None:
        """The next in order; stays in."""
        while self._heap:
            request = self.waiting.get(self._heap[0][1])
            if request is not None and request.deadline == self._heap[0][0]:
                return request
            heapq.heappop(self._heap)
        return None

    def remove(self, request: Request) -> bool:
        """Take a request out; False if it does not wait."""
        return self.waiting.pop(request.rid, None) is not None

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self.waiting.values()))
