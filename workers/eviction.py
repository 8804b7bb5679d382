"""Which idle block goes next: leaf first, and among leaves by a rule.

One release of a sequence is one *visit*; its blocks come in tail first. Blocks wait in queues by *level*, and the next
victim is the oldest of the lowest one. ``age`` is the level of the last victim. A block that becomes idle is put at::

    level = age + min(times it was found by a prompt, most) + (1 if a conversation that will come back left it)

``most`` is the rule. ``lru``: 0, so that all is one queue, the tail of the oldest visit first. ``segmented``: 1, two
segments (Karedla, Love, Wherry, 1994). ``frequency``: no limit, frequency with dynamic aging (LFU-DA: Arlitt et al.,
2000). What is above the others falls back to their level as these are evicted: nothing is kept for ever.

A *promise* is the path of blocks from the first to the last full one of a prompt whose conversation will come back. It
is kept when a prompt finds its last block, and shortened with each of its blocks that is evicted.

Why no block goes before one that is chained to it: a prompt that finds a block finds all before it, a promise covers
all before it, and the age never falls. So along a chain counts and promises never rise, whoever is in use is after all
that it is chained to, and no block is at a lower level, or at the same one earlier, than what is chained to it.

The policy lives here alone: who keeps the books (``blocks.py``, and the simulator's memory, whose keys stand for
several blocks each) says what became idle, what is in use again and what was found, and asks for a victim.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

RULES: Final[dict[str, int]] = {"lru": 0, "segmented": 1, "frequency": 1 << 30}


class EvictionOrder:
    """See the module's docstring. A key is whatever int its owner knows a block by. Raises KeyError for no such rule.

    All is amortised O(1) a block, but for ``promise``, O(length) when it is made and when it ends.
    """

    __slots__ = ("_above", "_age", "_high", "_levels", "_lowest", "_most", "_paths", "_promised", "_uses")

    def __init__(self, rule: str = "lru") -> None:
        self._most = RULES[rule]
        self._age = 0
        self._lowest: OrderedDict[int, None] = OrderedDict()  # idle blocks at level ``age``
        self._levels: dict[int, OrderedDict[int, None]] = {}  # higher level -> idle blocks; none is empty
        self._high = 0  # blocks in these
        self._above: dict[int, int] = {}  # idle block -> level it was put at, where that was above the age
        self._uses: dict[int, int] = {}  # cached block -> times it was found, up to ``most``; where not 0
        self._promised: dict[int, int] = {}  # cached block -> promises that it is part of; where not 0
        self._paths: dict[int, list[int]] = {}  # last block of a promise -> all of it

    def __len__(self) -> int:
        return len(self._lowest) + self._high

    # --- idle or not ----------

    def add(self, block: int) -> None:
        """The block became idle."""
        self.add_all([block])

    def add_all(self, blocks: list[int]) -> None:
        """These of one sequence became idle, last to first."""
        promised, uses = self._promised, self._uses
        if not blocks or not (blocks[-1] in promised or blocks[-1] in uses):
            self._lowest.update(dict.fromkeys(blocks))
            return
        for block in blocks:
            credit = uses.get(block, 0) + (block in promised)
            if credit:
                self._put(block, self._age + credit)
            else:
                self._lowest[block] = None

    def _put(self, block: int, level: int) -> None:
        queue = self._levels.get(level)
        if queue is None:
            self._levels[level] = queue = OrderedDict()
        queue[block] = None
        self._above[block] = level
        self._high += 1

    def remove(self, block: int) -> None:
        """The block is in use again. Raises KeyError if it was not idle."""
        level = self._above.pop(block, -1)
        if level <= self._age:
            del self._lowest[block]
            return
        queue = self._levels[level]
        del queue[block]
        if not queue:
            del self._levels[level]
        self._high -= 1

    def remove_all(self, blocks: list[int]) -> None:
        """These are in use again. Raises KeyError at the first that was not idle."""
        if self._above:
            for block in blocks:
                self.remove(block)
            return
        idle = self._lowest
        for block in blocks:
            del idle[block]

    # --- what is known of them ----------

    def found(self, blocks: list[int], count: int) -> None:
        """A prompt found the first ``count`` of these cached, first to last. None of them is idle any more."""
        most, uses, paths = self._most, self._uses, self._paths
        if most:
            for i in range(count):
                block = blocks[i]
                uses[block] = min(uses.get(block, 0) + 1, most)
        if paths:
            for i in range(count):
                if blocks[i] in paths:
                    self._unpromise(paths.pop(blocks[i]))

    def promise(self, path: list[int]) -> None:
        """A sequence whose conversation will come back gives these back, first to last. Call it before they are idle.

        The list is kept.
        """
        if path and path[-1] not in self._paths:
            self._paths[path[-1]] = path
            promised = self._promised
            for block in path:
                promised[block] = promised.get(block, 0) + 1

    def _unpromise(self, path: list[int]) -> None:
        promised = self._promised
        for block in path:
            if promised[block] > 1:
                promised[block] -= 1
            else:
                del promised[block]

    def reset(self) -> None:
        """Forgets all counts and promises; idle blocks stay in order. For when blocks leave that are no victims."""
        self._lowest = OrderedDict.fromkeys(self.blocks())
        for known in (self._above, self._uses, self._promised):
            known.clear()
        self._levels.clear()
        self._paths.clear()
        self._high = 0

    # --- victims ----------

    def next(self) -> int:
        """The next victim, left in. Raises StopIteration when empty."""
        if self._lowest or not self._levels:
            return next(iter(self._lowest))
        return next(iter(self._levels[min(self._levels)]))

    def pop(self) -> int:
        """Takes out the next victim. Raises KeyError when empty."""
        if self._levels and not self._lowest:
            self._age = min(self._levels)
            self._lowest = self._levels.pop(self._age)
            self._high -= len(self._lowest)
        block = self._lowest.popitem(last=False)[0]
        if self._above:
            self._above.pop(block, None)
        if self._uses:
            self._uses.pop(block, None)
        if block in self._promised:
            self._shorten(block)
        return block

    def _shorten(self, last: int) -> None:
        """The last cached block of a promise goes. What is chained to it went before, so it is in no other."""
        del self._promised[last]
        path = self._paths.pop(last)
        path.pop()
        if not path:
            return
        if path[-1] in self._paths:  # two promises have become the same
            self._unpromise(path)
        else:
            self._paths[path[-1]] = path

    def blocks(self) -> list[int]:
        """All idle blocks, next victim first."""
        idle = list(self._lowest)
        for level in sorted(self._levels):
            idle += self._levels[level]
        return idle
