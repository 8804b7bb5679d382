"""Scales of charts: where a value lies, which round values are written beside it, and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twinpool.sim.gaps import Floats

Formatter = Callable[[float], str]
NONE = "-"


@dataclass(frozen=True, slots=True)
class Axis:
    """A scale from ``low`` to ``high``; ``form`` writes its ticks."""

    title: str
    low: float
    high: float
    form: Formatter
    log: bool = False
    step: float = 0.0  # between ticks; 0: a round one is chosen

    def place(self, value: float) -> float:
        """0 at ``low``, 1 at ``high``, and no more than that on either side."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, part))

    def ticks(self) -> list[float]:
        """About six round values, or on a logarithmic scale 1, 2, 5 of each decade, or 1 only."""
        return _decades(self.low, self.high) if self.log else _round_steps(self.low, self.high, self.step)


def linear(title: str, values: Sequence[Floats], form: Formatter, *, low: float | None = 0.0) -> Axis:
    """An axis over all finite values, from ``low`` or (None) from the least of them."""
    known = _finite(values)
    least = low if low is not None else float(known.min(initial=math.inf))
    least = 0.0 if least == math.inf else least
    most = float(known.max(initial=-math.inf))
    if most <= least:
        most = least + 1.0
    steps = _round_steps(least, most)
    most = max(most, steps[-1] if most - steps[-1] < 1e-9 * most else 2 * steps[-1] - steps[-2])
    return Axis(title, least, most, form)


def logarithmic(title: str, values: Sequence[Floats], form: Formatter, floor: float) -> Axis:
    """A logarithmic axis over all values from ``floor`` up, half a decade wide or more; smaller ones go to its edge."""
    known = _finite(values)
    known = known[known > 0.0]
    if not len(known):
        return Axis(title, floor, 10.0 * floor, form, True)
    low, high = max(floor, float(known.min())), max(floor, float(known.max()))
    middle = math.sqrt(low * high)
    return Axis(title, min(low, middle / 1.8), max(high, middle * 1.8), form, True)


def _finite(values: Sequence[Floats]) -> Floats:
    every = np.concatenate([np.zeros(0), *values])
    return np.asarray(every[np.isfinite(every)])


def _round_steps(low: float, high: float, step: float = 0.0) -> list[float]:
    rough = (high - low) / 5.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = step or next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    factors = (1, 2, 5) if high / low < 2000.0 else (1,)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    return [value for value in every if low * 0.999 <= value <= high * 1.001]


# --- how figures are written -------------------------------------------------------------------------------------


def plain(value: float | None, digits: int = 3) -> str:
    """Some significant digits, without an exponent; thousands with commas; ``NONE`` where there is no value."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0.0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    written = f"{value:,.{min(places, 9)}f}"
    return written.rstrip("0").rstrip(".") if "." in written else written


def percent(share: float | None, places: int = 1) -> str:
    """A share as so many of a hundred."""
    return NONE if share is None or not math.isfinite(share) else f"{100.0 * share:.{places}f} %"


def whole_percent(share: float) -> str:
    """A share on an axis."""
    return f"{100.0 * share:.0f} %"


def milliseconds(ms: float | None) -> str:
    """Milliseconds, to a tenth where there are few."""
    if ms is None or not math.isfinite(ms):
        return NONE
    return f"{ms:,.1f}" if ms < 100.0 else f"{ms:,.0f}"


def seconds(value: float) -> str:
    """Seconds on a logarithmic axis, in the unit that reads best."""
    if value >= 0.9995:
        return f"{plain(value)} s"
    return f"{plain(1000.0 * value)} ms" if value >= 0.9995e-3 else f"{plain(1e6 * value)} µs"
