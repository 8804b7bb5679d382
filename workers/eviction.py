"""Which idle block goes next: leaf first, least recently used.

One release of a sequence is one *visit*; its blocks come in tail first, so the tail of the oldest visit is evicted
first. The policy lives here alone: who keeps the books (``blocks.py``, and the simulator's memory, whose keys stand for
several blocks each) says what became idle and what is in use again, and asks for a victim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class EvictionOrder:
    """See the module's docstring. A key is whatever int its owner knows a block by."""

    __slots__ = ("_idle",)

    def __init__(self) -> None:
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._idle)

    def add(self, block: int) -> None:
        """The block became idle."""
        self._idle[block] = None

    def add_all(self, blocks: Iterable[int]) -> None:
        """These became idle, in this order."""
        self._idle.update(dict.fromkeys(blocks))

    def remove(self, block: int) -> None:
        """The block is in use again. Raises KeyError if it was not idle."""
        del self._idle[block]

    def remove_all(self, blocks: Iterable[int]) -> None:
        """These are in use again. Raises KeyError at the first that was not idle."""
        idle = self._idle
        for block in blocks:
            del idle[block]

    def next(self) -> int:
        """The next victim, left in. Raises StopIteration when empty."""
        return next(iter(self._idle))

    def pop(self) -> int:
        """Takes out the next victim. Raises KeyError when empty."""
        return self._idle.popitem(last=False)[0]

    def blocks(self) -> list[int]:
        """All idle blocks, next victim first."""
        return list(self._idle)
