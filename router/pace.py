"""How far predictions are off, by kind of device: learned from what workers report. Pure."""

from __future__ import annotations

import math
from typing import Final

PACE_WEIGHT: Final = 0.1  # of a new observation
SPREAD_WEIGHT: Final = 0.02
OUTLIER: Final = 4.0


class Pace:
    """How much slower than its cost model a kind of device really is: running geometric means of actual/predicted.

    ``spread``: how far single prompts are off by themselves, the running root mean square of ``pace - 1``.
    """

    __slots__ = ("_square", "decode", "prefill", "spread")

    def __init__(self) -> None:
        self.prefill = 1.0
        self.decode = 1.0
        self.spread = 0.0
        self._square = 0.0

    def saw_request(self, pace: float) -> None:
        """A prompt is computed; in its last steps it took so many times as long as predicted."""
        if pace != 1.0 or self._square:
            self._square += SPREAD_WEIGHT * ((pace - 1.0) ** 2 - self._square)
            self.spread = math.sqrt(self._square)

    @staticmethod
    def blend(pace: float, actual: float, predicted: float) -> float:
        """``pace`` with one more step counted in; a single outlier moves it by at most a factor."""
        if actual <= 0.0 or predicted <= 0.0:
            return pace
        ratio = min(OUTLIER, max(1.0 / OUTLIER, actual / predicted))
        return float(min(OUTLIER, max(1.0 / OUTLIER, pace * (ratio / pace) ** PACE_WEIGHT)))
