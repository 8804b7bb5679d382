"""Which worker holds which prefix: hash -> bitmask of workers, fed by worker events.

A worker's set is prefix-closed (a block is cached only after all before it, and evicted leaf first), so along one
prompt masks only shrink: every worker's match, the best match and its holders come from a staircase of a few lookups.
"""

from __future__ import annotations

from typing import NamedTuple


class Stair(NamedTuple):
    """Workers of ``mask`` hold at least ``depth`` leading blocks."""

    depth: int
    mask: int


class KvIndex:
    """Prefix index of a cell; pure, one owner."""

    __slots__ = ("_held", "_masks")

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._held: dict[int, set[int]] = {}  # worker -> its hashes, to forget it in one go

    def change(self, worker: int, stored: list[int], removed: list[int], reset: bool) -> None:
        """Apply one worker's cache events."""
        if reset:
            self.forget(worker)
        held = self._held.setdefault(worker, set())
        bit = 1 << worker
        masks = self._masks
        for key in removed:
            self._clear(key, bit)
        held.difference_update(removed)
        for key in stored:
            masks[key] = masks.get(key, 0) | bit
        held.update(stored)

    def forget(self, worker: int) -> None:
        """The worker is gone."""
        bit = 1 << worker
        for key in self._held.pop(worker, ()):
            self._clear(key, bit)

    def _clear(self, key: int, bit: int) -> None:
        mask = self._masks.get(key, 0) & ~bit
        if mask:
            self._masks[key] = mask
        else:
            self._masks.pop(key, None)

    def stairs(self, hashes: list[int]) -> list[Stair]:
        """Staircase of a prompt, deepest first: disjointly growing masks, at most one stair a distinct depth.

        Gallops from the shallow end: O(steps * log n) lookups.
        """
        stairs: list[Stair] = []
        masks = self._masks
        n = len(hashes)
        low = 0
        while low < n:
            mask = masks.get(hashes[low], 0)
            if not mask:
                break
            low = self._last_equal(hashes, low, mask) + 1
            stairs.append(Stair(low, mask))
        stairs.reverse()
        return stairs

    def still(self, stairs: list[Stair], hashes: list[int]) -> bool:
        """Whether ``stairs(hashes)`` would be these: a few lookups, since masks only shrink along a prompt."""
        masks, low = self._masks, 0
        for i in range(len(stairs) - 1, -1, -1):
            depth, mask = stairs[i]
            if masks.get(hashes[low]) != mask or masks.get(hashes[depth - 1]) != mask:
                return False
            low = depth
        return low == len(hashes) or hashes[low] not in masks

    def _last_equal(self, hashes: list[int], low: int, mask: int) -> int:
        """Largest i >= low with masks[hashes[i]] == mask (masks only shrink along a prompt)."""
        masks = self._masks
        step = 1
        n = len(hashes)
        while low + step < n and masks.get(hashes[low + step], 0) == mask:
            low += step
            step *= 2
        while step > 1:
            step //= 2
            if low + step < n and masks.get(hashes[low + step], 0) == mask:
                low += step
        return low

    def depth(self, worker: int, hashes: list[int]) -> int:
        """Leading blocks that one worker holds."""
        bit = 1 << worker
        for stair in self.stairs(hashes):
            if stair.mask & bit:
                return stair.depth
        return 0

    def __len__(self) -> int:
        return len(self._masks)

    def check_integrity(self) -> None:
        """Both directions agree, or AssertionError."""
        masks: dict[int, int] = {}
        for worker, keys in self._held.items():
            for key in keys:
                masks[key] = masks.get(key, 0) | 1 << worker
        assert masks == self._masks, "KV index and per-worker sets disagree"
