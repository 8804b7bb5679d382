"""What an emulated worker may ask of the virtual clock, its links and its router. ``loop.py`` is all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from twinpool.router import events as ev
from twinpool.router.request import Request


class Net(Protocol):
    """Times are seconds of the virtual clock."""

    @property
    def outputs(self) -> Sequence[int]:
        """Output tokens that request ``rid`` really has, by rid."""
        ...

    @property
    def work(self) -> Sequence[float]:
        """By rid, how many times as long as predicted a request's prompt work takes; empty: all exactly as long."""
        ...

    def tell(self, event: ev.Event, now: float) -> None:
        """The router hears of it, in the order of telling."""
        ...

    def wake_at(self, worker: int, when: float) -> None:
        """Call ``wake(when)`` then. Replaces what this worker wished before; infinity: no call."""
        ...

    def link(self, sender: int, receiver: int, nbytes: int, now: float) -> float:
        """Books both ends; returns when the last byte is there."""
        ...

    def transferred(
        self, worker: int, attempt: int, first: int, count: int, nbytes: int, started: float, when: float
    ) -> None:
        """Call ``pulled(attempt, first, count, nbytes, when - started, when)`` then."""
        ...

    def span(self, request: Request, worker: int, lo: int, hi: int) -> None:
        """The request felt the gaps of runs ``lo`` to ``hi - 1`` of this worker."""
        ...

    def kv(self, worker: int, stored: list[int], removed: list[int], due: float) -> None:
        """Changes of the prefix cache that are sent at ``due``; the lists may grow until then (``memory.py``)."""
        ...
