"""What single gaps take more or less than the simulated ones: steps are not all alike, and a router's edge queues.

Of a token's gap g on the virtual clock a client sees about ``g + s + d - d'``: s is what the step took beyond its
prediction and the mean lateness, d what lies outside of the router's core for this token, d' for the one before. All
three are known as distributions only (``twinpool sim calibrate``), taken as independent; so quantiles of all gaps
together can be told, and not which gap is which. What requests are judged by stays that of the virtual clock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gaps import Floats, rank

QUANTILES = 256  # of the sum
PARTS = 64  # of each of the three that are summed
BIN_S = 20e-6
TURNS = 60  # halvings: to the last bit of a double


def quantiles(values: Floats, count: int) -> Floats:
    """Evenly spaced ones, none at the ends: each stands for an equal share."""
    return np.asarray(np.quantile(values, (np.arange(count) + 0.5) / count))


def gap_spread(steps_s: Floats, outside_s: Floats) -> tuple[float, ...]:
    """Quantiles of ``s + d - d'``; either may be empty: then nothing is known of it."""
    step = quantiles(steps_s - steps_s.mean(), PARTS) if len(steps_s) else np.zeros(1)
    outside = quantiles(outside_s, PARTS) if len(outside_s) else np.zeros(1)
    total = step[:, None, None] + outside[None, :, None] - outside[None, None, :]
    return tuple(float(f"{value:.6g}") for value in quantiles(total.ravel(), QUANTILES))


class SpreadGaps:
    """Quantiles of all gaps when each takes more or less by one of ``spread_s``, all of which come as often."""

    __slots__ = ("_pool", "_spread", "_total", "_upto")

    def __init__(self, pool: GapPool, spread_s: Sequence[float]) -> None:
        self._pool = pool
        self._spread = np.array(spread_s)
        self._upto = np.cumsum(pool.binned(BIN_S)) if spread_s and pool.count else np.zeros(1)
        self._total = float(self._upto[-1])

    def quantile(self, q: float) -> float:
        """Quantile ``q`` in seconds, exact without a spread, else to a bin; none is below 0: tokens come in order.

        Raises ValueError where there are no gaps.
        """
        if not len(self._spread) or not self._total:
            return self._pool.quantile(q)
        wanted = rank(q, self._pool.count) / self._pool.count
        low = float(self._spread.min())
        high = len(self._upto) * BIN_S + float(self._spread.max())
        for _ in range(TURNS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._share(middle) < wanted else (low, middle)
        return max(0.0, high)

    def _share(self, value: float) -> float:
        """Of the gaps that are not above the value."""
        place = np.floor((value - self._spread) / BIN_S).astype(np.int64)
        inside = np.minimum(place, len(self._upto) - 1)
        return float(np.where(place < 0, 0.0, self._upto[np.maximum(inside, 0)]).mean() / self._total)
