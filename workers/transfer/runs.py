"""Runs: neighbouring blocks that are moved as one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """``length`` blocks, consecutive at both ends."""

    offset: int  # index of the first of them in the lists they came from
    source: int
    target: int
    length: int

    @property
    def targets(self) -> range:
        """The blocks it fills."""
        return range(self.target, self.target + self.length)


def coalesce(source: Sequence[int], target: Sequence[int], longest: int) -> list[Run]:
    """Runs that cover ``zip(source, target)`` in order, none of more than ``longest`` blocks (at least 1)."""
    runs: list[Run] = []
    start = 0
    for i in range(1, len(source) + 1):
        if i < len(source) and i - start < longest and _follows(source, i) and _follows(target, i):
            continue
        runs.append(Run(start, source[start], target[start], i - start))
        start = i
    return runs


def _follows(blocks: Sequence[int], i: int) -> bool:
    return blocks[i] == blocks[i - 1] + 1
