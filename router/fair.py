"""Virtual counters: who has had how much, so that who waits gets its share and who was away saves nothing up. Pure.

Virtual token counters of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): who gets something is
charged; who begins to wait is lifted to the least of those that wait already, or to who waited last.
"""

from __future__ import annotations

from typing import Final

Name = int | str
MIN_KEPT: Final = 1024


class Shares:
    """Counters of those that ever waited, in whatever unit they are charged."""

    __slots__ = ("_had", "_level", "_limit", "_waiting")

    def __init__(self) -> None:
        self._had: dict[Name, float] = {}
        self._waiting: dict[Name, int] = {}  # those with somebody in the queue, and how many
        self._level = 0.0  # of who left an empty queue behind
        self._limit = MIN_KEPT  # above that counters are forgotten that mean nothing any more

    def __len__(self) -> int:
        """Counters kept."""
        return len(self._had)

    def came(self, name: Name) -> None:
        """One more of this name waits."""
        count = self._waiting.get(name, 0)
        if not count:
            level = self.least() if self._waiting else self._level
            self._had[name] = max(self._had.get(name, 0.0), level)
        self._waiting[name] = count + 1

    def left(self, name: Name) -> None:
        """One less waits."""
        count = self._waiting[name] - 1
        if count:
            self._waiting[name] = count
            return
        del self._waiting[name]
        if not self._waiting:
            self._level = self._had[name]
        if len(self._had) > self._limit:
            self._forget()

    def _forget(self) -> None:
        """Who does not wait and had no more than the least would be lifted to that anyway."""
        level = self.least() if self._waiting else self._level
        self._had = {name: had for name, had in self._had.items() if name in self._waiting or had > level}
        self._limit = max(MIN_KEPT, 2 * len(self._had))

    def charge(self, name: Name, amount: float) -> None:
        """It got something, or (negative) less than it was charged for."""
        self._had[name] = self._had.get(name, 0.0) + amount

    def least(self) -> float:
        """The lowest counter of those that wait; there must be one."""
        return min([self._had[name] for name in self._waiting])

    def had(self, name: Name) -> float:
        """What it was charged, or was lifted to."""
        return self._had.get(name, 0.0)
