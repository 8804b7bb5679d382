"""Straight lines under measured costs, through points that stand for all values between them.

The parts of a step are those of cost_grid.py; the closed form is a case of them, without a start of kernels::

    T_step = W(x + B) + R(B, K) + max_i h_i + sum_i (A(x_i, c_i) - h_i)        attention(x, c) = A(x, c) - h

``W`` and ``A`` never fall with tokens, nor ``R`` with ``K``; ``A`` may with ``c``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from twinpool.cost import Cost
from twinpool.cost_grid import GridCost

Floats = NDArray[np.float64]

EXACT_TOKENS = 256  # every chunk size up to here is looked at
FINE_TOKENS = 16  # between chunk sizes from there
FINE_CACHED = 64  # tokens between the first samples of what a chunk follows
RATIO = 1.02  # between later samples
SEARCH_STEPS = 40  # each leaves two thirds of the slopes


@dataclass(frozen=True, slots=True)
class Line:
    """``const + slope * x``, neither negative unless said."""

    const: float
    slope: float


def line_below(x: Floats, y: Floats, at: float, least: float = 0.0) -> Line:
    """The straight line under all points (x, y), both >= 0, that is highest at ``at``, with ``slope >= 0`` and
    ``const >= -least``. Any slope gives a valid line; the best is searched for, the height being concave in it."""
    some = x > 0.0
    low, high = 0.0, float(((y[some] + least) / x[some]).min())
    for _ in range(SEARCH_STEPS):
        third = (high - low) / 3.0
        heights = [float((y - slope * x).min()) + slope * at for slope in (low + third, high - third)]
        low, high = (low + third, high) if heights[0] < heights[1] else (low, high - third)
    lines = [Line(float((y - slope * x).min()), slope) for slope in (low, high)]
    return max(lines, key=lambda line: line.const + line.slope * at)


class Attention:
    """Attention of all chunks of up to ``chunk_tokens`` in prompts of up to ``longest`` tokens, held from below."""

    __slots__ = ("_above", "_places", "_sizes", "_starts", "_tokens", "_whole")

    def __init__(self, cost: Cost, chunk_tokens: int, longest: int) -> None:
        most = min(chunk_tokens, longest)
        sizes, cached = _corners(cost, most, longest)
        self._whole = np.array([_whole(cost, x, c) for x in sizes for c in cached])
        self._tokens = np.repeat(np.array(sizes, dtype=np.float64), len(cached))
        self._places = np.tile(np.array(cached, dtype=np.float64), len(sizes)) + self._tokens / 2.0
        if isinstance(cost, GridCost):
            sizes = _ladder(list(range(1, min(EXACT_TOKENS, most) + 1)), most, FINE_TOKENS)
            cached = sorted({*cached, *_ladder([0], longest, FINE_CACHED)})
        else:
            sizes.append(most + 1)
        self._starts = np.array(cached, dtype=np.float64)
        self._sizes = np.array(sizes[1:], dtype=np.float64)[:, None] - 1.0  # the most that a sample stands for
        self._above = np.array([[cost.attention(x, c) for c in cached] for x in sizes[:-1]])

    def line(self, at: float, const: float) -> Line:
        """Under ``(A + const) / x`` of every chunk, by the place of its middle."""
        return line_below(self._places, (self._whole + const) / self._tokens, at)

    def lost(self, line: Line, length: Floats) -> Floats:
        """How far ``line`` can be above ``attention``, in seconds of a whole chunk that starts before ``length``.

        Between two starts ``attention`` is straight, or straight until 0 and then 0.
        """
        height = (line.const + line.slope * (self._starts + self._sizes / 2.0)) * self._sizes
        over, some = height - self._above, self._above > 0.0
        most = np.where(some[:, :-1] == some[:, 1:], np.maximum(over[:, :-1], over[:, 1:]), height[:, 1:]).max(axis=0)
        most = np.maximum.accumulate(np.maximum(0.0, most))
        place = np.searchsorted(self._starts, length, side="right") - 1
        return np.asarray(most[np.minimum(place, len(most) - 1)])


def work(cost: Cost, largest: int) -> Floats:
    """W(1) to W(largest)."""
    one = cost._work if isinstance(cost, GridCost) else lambda tokens: cost.decode(tokens, 0)
    return np.array([one(tokens) for tokens in range(1, largest + 1)])


def _whole(cost: Cost, tokens: int, cached: int) -> float:
    if isinstance(cost, GridCost):
        return cost._whole_attention(tokens, cached)
    return cost.attention(tokens, cached)


def _corners(cost: Cost, most: int, longest: int) -> tuple[list[int], list[int]]:
    """Sizes and starts of chunks between which A is bilinear; of the closed form, that bends by x, every size."""
    if not isinstance(cost, GridCost):
        return list(range(1, most + 1)), [0, longest]
    sizes = sorted({1, most, *[x for x in cost._tokens if 1 < x < most]})
    return sizes, sorted({0, longest, *[c for c in cost._cached if c < longest]})


def _ladder(first: list[int], top: int, step: int) -> list[int]:
    """Samples after ``first``, ``step`` apart and then ever further; the last one is ``top + 1``."""
    found = list(first)
    while found[-1] <= top:
        found.append(max(found[-1] + step, int(found[-1] * RATIO)))
    return [*found[:-1], top + 1]


def reading(cost: Cost, work_s: Floats, max_batch: int, longest: int) -> tuple[Floats, Floats]:
    """Points (context tokens a sequence, seconds of R a sequence): the corners of its straight pieces."""
    contexts: list[float] = []
    seconds: list[float] = []
    for batch in range(1, max_batch + 1):
        most = batch * longest
        corners = [*[k for k in cost.row(batch).breaks if k < most], most]
        contexts += [k / batch for k in corners]
        seconds += [max(0.0, cost.decode(batch, k) - work_s[batch - 1]) / batch for k in corners]
    return np.array(contexts), np.array(seconds)
