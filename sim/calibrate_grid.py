"""Tables in place of the formula, where steps of a worker do not follow it.

The formula (cost.py) has one price for a token, be it of a prompt or of a decoding sequence, and only bends upward. A
CPU decodes one sequence with other kernels than two, and several at another price than a prompt. The tables
(cost_grid.py) take what was measured as it is::

    W(B)    of batches that were often seen alone: the median of their steps, less reading the context
    W(n)    beyond: the formula fitted to steps with prompts only
    R(B, K) the slope of decodes over context, among steps of one batch size
    A(x, c) b x (c + x / 2), of that fit, at knots

Times of W never fall: what was measured less for more tokens is noise, and becomes the most of those before it. All of
them have on top what steps take beyond the usual in the mean, as the formula has (calibrate.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np

from twinpool.cost import StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.sim.calibrate_logs import Steps
from twinpool.sim.fit import Floats, StepSample, fit_step_cost

ENOUGH = 20  # steps of a batch size without prompts that make a knot, and steps with prompts that make a fit
NEAR = 4.0  # median deviations from the middle: what is further away does not count for slopes and fits
BETTER = 0.9  # the tables' mean error is so small a share of the formula's, or they are not used
GOOD = 0.02  # mean error with which the formula is good enough
MOST_TOKENS = 16_384  # last knot; what is beyond goes on straight
MOST_CONTEXT = 131_072
KNOT_RATIO = 2.0**0.5  # of neighbouring knots: the square in A is 2 % off at most between them


def measured_grids(steps: Steps, formula: StepCost, formula_error: float) -> tuple[Grids, float] | None:
    """Tables of these steps and their mean error, as a share; None where they say too little or no more than the
    formula does, whose own mean error is ``formula_error``.
    """
    table = steps.matrix()
    tokens, batch = table[:, 0], table[:, 2]
    alone = table[(tokens == 0) & (batch > 0)]
    sizes = [int(size) for size, count in zip(*np.unique(alone[:, 2], return_counts=True), strict=True)
             if count >= ENOUGH]  # fmt: skip
    mixed = table[tokens > 0]
    if formula_error <= GOOD or not sizes or len(mixed) < ENOUGH:
        return None
    slope = _slope(alone, sizes)
    prompts = _prompt_cost(mixed, slope)
    grids = _grids(sizes, [_middle(alone, size, slope) for size in sizes], slope, prompts, float(tokens.max()))
    error = mean_error(GridCost(grids), table)
    return (_in_all(grids, table), error) if error < BETTER * mean_error(formula, table) else None


def _in_all(grids: Grids, table: Floats) -> Grids:
    """The tables with what steps take beyond them in the mean, a stall counted as one step more."""
    cost = GridCost(grids)
    predicted = np.array([predicted_s(cost, row) for row in table])
    late_s = max(0.0, float(np.minimum(table[:, 4] - predicted, predicted).mean()))
    return replace(grids, work_ms=[value + 1e3 * late_s for value in grids.work_ms])


def mean_error(cost: GridCost | StepCost, table: Floats) -> float:
    """Mean of the absolute error of all steps ([step, field of StepSample]) but the worst twentieth, as a share."""
    off = sorted(abs(predicted_s(cost, row) / float(row[4]) - 1.0) for row in table)
    kept = off[: max(1, len(off) * 19 // 20)]
    return sum(kept) / len(kept)


def predicted_s(cost: GridCost | StepCost, row: Floats) -> float:
    """Seconds of one step, [field of StepSample]."""
    tokens, attention, batch, context = int(row[0]), float(row[1]), int(row[2]), int(row[3])
    if not tokens:
        return cost.decode(batch, context)
    cached = max(0, round(attention / tokens - tokens / 2))  # of one chunk in place of several
    return cost.step([(tokens, cached)], batch, context)


def _slope(alone: Floats, sizes: Sequence[int]) -> float:
    """Seconds of a context token, by how steps of one batch size differ."""
    runs, rises = [], []
    for size in sizes:
        group = alone[alone[:, 2] == size]
        run, rise = (group[:, column] - np.median(group[:, column]) for column in (3, 4))
        near = np.abs(rise) <= NEAR * float(np.median(np.abs(rise)))
        runs.append(run[near])
        rises.append(rise[near])
    run, rise = np.concatenate(runs), np.concatenate(rises)
    square = float(run @ run)
    return max(0.0, float(run @ rise) / square) if square > 0.0 else 0.0


def _middle(alone: Floats, size: int, slope: float) -> float:
    group = alone[alone[:, 2] == size]
    return max(0.0, float(np.median(group[:, 4] - slope * group[:, 3])))


def _prompt_cost(mixed: Floats, slope: float) -> StepCost:
    """The formula of steps with prompts; twice, the second time of what is near the first."""
    rest = np.maximum(mixed[:, 4] - slope * mixed[:, 3], 1e-9)
    near = np.ones(len(mixed), dtype=np.bool_)
    for _ in range(2):
        samples = [
            StepSample(int(row[0]), float(row[1]), int(row[2]), 0, float(seconds))
            for row, seconds in zip(mixed[near], rest[near], strict=True)
        ]
        cost = fit_step_cost(samples).cost
        work = mixed[:, 0] + mixed[:, 2]
        off = np.log(rest / (np.maximum(cost.c0 + cost.a * work, cost.d0 + cost.d1 * work) + cost.b * mixed[:, 1]))
        near = np.abs(off - np.median(off)) <= NEAR * max(float(np.median(np.abs(off - np.median(off)))), 1e-3)
    return cost


def _grids(sizes: list[int], middles: list[float], slope: float, prompts: StepCost, most: float) -> Grids:
    beyond = _knots(2 * sizes[-1], max(MOST_TOKENS, int(most)))
    work_tokens = [0, *sizes, *beyond]
    work = [middles[0], *middles, *(prompts.decode(n, 0) for n in beyond)]
    work = list(accumulate(work, max))
    if work[-1] <= work[-2]:
        work[-1] = work[-2] * (1.0 + 1e-9) + 1e-12
    xs = [0, *_knots(16, MOST_TOKENS)]
    cs = [0, MOST_CONTEXT]
    return Grids(
        work_tokens, [1e3 * value for value in work], xs, cs,
        [[1e3 * prompts.attention(x, c) for c in cs] for x in xs],
        [0, 1], [0, MOST_CONTEXT], [[0.0, 0.0], [0.0, 1e3 * slope * MOST_CONTEXT]],
    )  # fmt: skip


def _knots(first: int, last: int) -> list[int]:
    knots = [first]
    while knots[-1] < last:
        knots.append(min(last, max(knots[-1] + 1, round(knots[-1] * KNOT_RATIO))))
    return knots if len(knots) > 1 else [first, first + 1]
