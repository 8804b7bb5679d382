"""How many process groups one process may have: each NCCL communicator takes tens of MiB of its GPU's memory.

The least recently used idle one is closed for a new one. Its channel is cut with it, so both ends know at once and meet
anew when they need each other again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

from twinpool.errors import TransferError

LIMIT = 32  # of one process, both roles together


class Groups:
    """The seats that are taken, the least recently used first. Safe from any thread."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._taken: dict[Seat, bool] = {}  # whether it is in use just now

    def seat(self, evict: Callable[[], None]) -> Seat:
        """A seat, in use until :meth:`Seat.__exit__`; ``evict`` is called from another thread once it is lost.

        Raises ``TransferError`` when all others are in use.
        """
        with self._lock:
            loser = None
            if len(self._taken) >= self._limit:
                loser = next((seat for seat, busy in self._taken.items() if not busy), None)
                if loser is None:
                    raise TransferError(f"all {self._limit} process groups of KV are in use", reason="NO_CHANNEL")
                del self._taken[loser]
            seat = Seat(self, evict)
            self._taken[seat] = True
        if loser is not None:
            loser.evict()
        return seat

    def use(self, seat: Seat) -> None:
        """Mark it as in use. Raises ``TransferError`` when it has been lost."""
        with self._lock:
            if self._taken.pop(seat, None) is None:
                raise TransferError("the process group was closed in favour of others", reason="PEER_GONE")
            self._taken[seat] = True

    def idle(self, seat: Seat) -> None:
        """Mark it as idle."""
        with self._lock:
            if seat in self._taken:
                self._taken[seat] = False

    def leave(self, seat: Seat) -> None:
        """Give it back. Idempotent."""
        with self._lock:
            self._taken.pop(seat, None)

    def __len__(self) -> int:
        return len(self._taken)


class Seat:
    """The place of one group; entered while the group is in use."""

    def __init__(self, groups: Groups, evict: Callable[[], None]) -> None:
        self._groups = groups
        self.evict = evict

    def __enter__(self) -> None:
        self._groups.use(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._groups.idle(self)

    def leave(self) -> None:
        """Give it back. Idempotent."""
        self._groups.leave(self)
        self.evict = _nothing  # it leads to the group, whose descriptors would wait for the garbage collector


def _nothing() -> None:
    pass


GROUPS = Groups()
