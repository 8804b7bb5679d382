"""How many requests are placed a second of late, and how many wait. Pure."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Final

FADE_S: Final = 10.0  # after so long an event counts 1/e


class Rate:
    """Events a second, running mean over the last seconds."""

    __slots__ = ("_at", "_per_s")

    def __init__(self) -> None:
        self._at = 0.0
        self._per_s = 0.0

    def add(self, weight: float, now: float) -> None:
        """An event, or a part of one."""
        self._per_s = self.per_s(now) + weight / FADE_S
        self._at = now

    def per_s(self, now: float) -> float:
        """As of ``now``, which is no earlier than the last event."""
        return self._per_s * math.exp((self._at - now) / FADE_S)


class Demand:
    """What a cell is asked for."""

    __slots__ = ("_waiting", "placed", "prefilled")

    def __init__(self, waiting: Sized = ()) -> None:
        """``waiting``: who is in the queue, borrowed."""
        self._waiting = waiting
        self.placed = Rate()
        self.prefilled = Rate()  # ... on a worker that may prefill

    def wait_s(self, now: float) -> float:
        """Seconds that those beside the request in hand will have waited, by Little's law; 0 if nobody was placed."""
        others = len(self._waiting) - 1
        per_s = self.placed.per_s(now)
        return others / per_s if others > 0 and per_s > 0.0 else 0.0
