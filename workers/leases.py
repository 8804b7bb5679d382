"""Leases: who holds something for somebody else, and until when.

A heap of (expiry, key) with lazy deletion: renewing or releasing leaves the old entry in the heap, where it is known as
stale because it differs from the table; the heap is rebuilt when most of it is stale.
"""

from __future__ import annotations

import heapq

from twinpool.workers.blocks import IntegrityError

_SLACK = 64


class LeaseTable:
    """Leases by integer key (an attempt); all times are seconds on the caller's clock."""

    __slots__ = ("_expiry", "_heap")

    def __init__(self) -> None:
        self._expiry: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._expiry)

    def __contains__(self, key: int) -> bool:
        return key in self._expiry

    def grant(self, key: int, now: float, lease_s: float) -> None:
        """The lease of ``key`` runs for ``lease_s`` from now, whatever it was before."""
        self._expiry[key] = now + lease_s
        heapq.heappush(self._heap, (now + lease_s, key))
        if len(self._heap) > 2 * len(self._expiry) + _SLACK:
            self._heap = [(expiry, key) for key, expiry in self._expiry.items()]
            heapq.heapify(self._heap)

    def renew(self, key: int, now: float, lease_s: float) -> bool:
        """Like ``grant``, but only where there is a lease; says whether there was."""
        if key not in self._expiry:
            return False
        self.grant(key, now, lease_s)
        return True

    def release(self, key: int) -> bool:
        """Ends the lease; says whether there was one."""
        return self._expiry.pop(key, None) is not None

    def expired(self, now: float) -> list[int]:
        """Takes out all leases that ran out at or before ``now``; returns their keys, earliest first, ties by key."""
        keys: list[int] = []
        while self._heap and self._heap[0][0] <= now:
            expiry, key = heapq.heappop(self._heap)
            if self._expiry.get(key) == expiry:
                del self._expiry[key]
                keys.append(key)
        return keys

    def next_expiry(self) -> float | None:
        """When the next lease runs out; None where there is none."""
        heap = self._heap
        while heap and self._expiry.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def check_integrity(self) -> None:
        """Raises IntegrityError where a lease could never expire."""
        entries = set(self._heap)
        faults = [
            f"lease {key} has no heap entry for its expiry {expiry}"
            for key, expiry in self._expiry.items()
            if (expiry, key) not in entries
        ]
        if faults:
            raise IntegrityError(faults)
