"""What the router must know of a worker's prefix cache: changes, batched into numbered KvEvents frames.

Changes of one batch are *netted*: a hash that was stored and removed again is not mentioned, neither is one that was
removed and stored again. So a hash is at most once in a batch, and the order inside a frame means nothing.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

from twinpool.proto.frames import KvEvents

MAX_HASHES = 1 << 16  # a frame; 512 KiB of hashes, far below the frame limit


class KvEventLog:
    """Collects changes and cuts them into frames whose ``sequence`` numbers have no gaps."""

    __slots__ = ("_limit", "_next", "_pending")

    def __init__(self, limit: int = MAX_HASHES) -> None:
        self._limit = limit
        self._next = 0
        self._pending: dict[int, int] = {}  # hash -> times stored minus times removed, never 0

    def __len__(self) -> int:
        """Hashes waiting for a frame."""
        return len(self._pending)

    def record(self, stored: Iterable[int], removed: Iterable[int]) -> None:
        """Adds what happened to the cache since the last call (``BlockPool.drain_events``)."""
        for value in stored:
            self._change(value, 1)
        for value in removed:
            self._change(value, -1)

    def _change(self, value: int, by: int) -> None:
        net = self._pending.pop(value, 0) + by
        if net:
            self._pending[value] = net

    def frames(self) -> list[KvEvents]:
        """Takes out everything pending, as frames of at most the limit's hashes; empty where nothing changed."""
        stored = [value for value, net in self._pending.items() if net > 0]
        removed = [value for value, net in self._pending.items() if net < 0]
        self._pending = {}
        return self._cut(stored, removed)

    def snapshot(self, cached: Sequence[int]) -> list[KvEvents]:
        """Frames that start from nothing and store ``cached``, all that is in the cache; pending changes are dropped.

        The first has ``reset`` set, and there is always one. Drain the pool's events before and drop them too.
        """
        self._pending = {}
        first = self._frame(cached[: self._limit], (), reset=True)
        return [first, *self._cut(cached[self._limit :], ())]

    def _cut(self, stored: Sequence[int], removed: Sequence[int]) -> list[KvEvents]:
        parts: list[KvEvents] = []
        for start in range(0, len(stored) + len(removed), self._limit):
            end = start + self._limit
            skip = len(stored)
            parts.append(self._frame(stored[start:end], removed[max(0, start - skip) : max(0, end - skip)]))
        return parts

    def _frame(self, stored: Sequence[int], removed: Sequence[int], *, reset: bool = False) -> KvEvents:
        frame = KvEvents(sequence=self._next, stored=_column(stored), removed=_column(removed), reset=reset)
        self._next += 1
        return frame


def _column(values: Sequence[int]) -> bytes:
    column = array("Q", values)
    if sys.byteorder == "big":
        column.byteswap()
    return column.tobytes()
