"""How long answers get: output lengths of late, by tenant and class, as histograms that forget. Pure.

A group's mean is drawn to that of the wider one (tenant and class, class, cell) as if it had seen ``PRIOR`` answers
of it: a new tenant is predicted by its class, one with many answers by itself. Of an answer that has so many tokens
already only the longer ones of the histogram tell how many are left.
"""

from __future__ import annotations

import math
from typing import Final

BINS_PER_OCTAVE: Final = 4
WINDOW: Final = 256.0  # answers; one that is so many old weighs 1/e
PRIOR: Final = 16.0  # answers that the wider group counts for
FIRST_GUESS: Final = 128.0  # tokens, before any answer has ended
MOST_GROUPS: Final = 4096  # tenants are named by clients: later ones share what their class knows
LARGEST_UNIT: Final = 1e9


class Lengths:
    """A histogram of output lengths, in bins of a quarter octave; what is older weighs less."""

    __slots__ = ("_counts", "_tokens", "_unit", "count", "tokens")

    def __init__(self) -> None:
        self._unit = 1.0  # weight of the latest: growing, so that no other has to be touched
        self._counts: dict[int, float] = {}
        self._tokens: dict[int, float] = {}
        self.count = 0.0  # sum of weights
        self.tokens = 0.0  # of all, each by its weight

    def add(self, tokens: int) -> None:
        """An answer has ended."""
        self._unit *= math.exp(1.0 / WINDOW)
        if self._unit > LARGEST_UNIT:
            self._scale(1.0 / self._unit)
        place = _place(tokens)
        weight = self._unit
        self._counts[place] = self._counts.get(place, 0.0) + weight
        self._tokens[place] = self._tokens.get(place, 0.0) + weight * tokens
        self.count += weight
        self.tokens += weight * tokens

    def _scale(self, factor: float) -> None:
        for place in self._counts:
            self._counts[place] *= factor
            self._tokens[place] *= factor
        self.count *= factor
        self.tokens *= factor
        self._unit *= factor

    def left(self, emitted: int, wider: float) -> float:
        """Mean of the tokens to come after ``emitted``; ``wider``: what the wider group says of that."""
        count, tokens = self.count, self.tokens
        if emitted > 0:
            place, count, tokens = _place(emitted), 0.0, 0.0
            for other, weight in self._counts.items():
                if other > place:
                    count += weight
                    tokens += self._tokens[other]
        prior = PRIOR * self._unit
        return (tokens - count * emitted + prior * wider) / (count + prior)


def _place(tokens: int) -> int:
    return int(BINS_PER_OCTAVE * math.log2(tokens + 1.0))


class OutputLengths:
    """Of one cell."""

    __slots__ = ("_all", "_classes", "_tenants")

    def __init__(self) -> None:
        self._all = Lengths()
        self._classes: dict[int, Lengths] = {}
        self._tenants: dict[tuple[str, int], Lengths] = {}

    def add(self, tenant: str, rank: int, tokens: int) -> None:
        """An answer of ``tokens`` has ended."""
        self._all.add(tokens)
        if rank not in self._classes:
            self._classes[rank] = Lengths()
        self._classes[rank].add(tokens)
        key = (tenant, rank)
        own = self._tenants.get(key)
        if own is None:
            if len(self._tenants) >= MOST_GROUPS:
                return
            own = self._tenants[key] = Lengths()
        own.add(tokens)

    @property
    def mean(self) -> float:
        """Tokens of an answer, whoever asks."""
        return self._all.left(0, FIRST_GUESS)

    def left(self, tenant: str, rank: int, emitted: int) -> float:
        """Tokens predicted to come for one that has ``emitted``."""
        expected = self._all.left(emitted, FIRST_GUESS)
        group = self._classes.get(rank)
        if group is not None:
            expected = group.left(emitted, expected)
        own = self._tenants.get((tenant, rank))
        return expected if own is None else own.left(emitted, expected)
