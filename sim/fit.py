"""Fitting the step formula of cost.py to timed steps, of a live worker's log or of a table.

``T = max(c0 + a*w, d0 + d1*w) + d2*K + b*A`` is linear once it is known which branch of the maximum each step is on.
So: guess the branches, solve non-negative least squares of the relative error, look which branch each step is on now,
and go on until nothing changes; from several guesses, the best of all that is seen counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twinpool.cost import StepCost
from twinpool.errors import ConfigError

ROUNDS = 30
SPLITS = (0.0, 0.2, 0.4, 0.6, 0.8)  # shares of the steps, by tokens, that are first guessed to read the weights
Floats = npt.NDArray[np.float64]


class StepSample(NamedTuple):
    """One timed step."""

    tokens: int  # of its chunks
    attention: float  # sum over its chunks of x * (c + x / 2), in tokens squared
    batch: int  # decoding sequences
    context: int  # sum of their context tokens
    seconds: float


class StepFit(NamedTuple):
    """Coefficients and how far they are from the samples, as shares of the samples' seconds."""

    cost: StepCost
    mean_error: float
    worst_error: float


def sample(chunks: Sequence[tuple[int, int]], batch: int, context: int, seconds: float) -> StepSample:
    """A sample from what ``Cost.step`` takes, and how long it took."""
    attention = sum(tokens * (cached + tokens / 2) for tokens, cached in chunks)
    return StepSample(sum(tokens for tokens, _ in chunks), attention, batch, context, seconds)


def fit_step_cost(samples: Sequence[StepSample]) -> StepFit:
    """Least relative squared error; all coefficients are finite and not negative.

    Raises ConfigError without a sample, or where one took no time.
    """
    if not samples:
        raise ConfigError("there is no step to fit the cost model to: log some steps first")
    seconds = np.array([s.seconds for s in samples])
    if not bool(np.all(np.isfinite(seconds) & (seconds > 0.0))):
        raise ConfigError("every step must have taken some time: check the step log")
    work = np.array([float(s.tokens + s.batch) for s in samples])
    rest = np.array([(float(s.context), s.attention) for s in samples])
    best: StepFit | None = None
    least = np.inf
    for share in SPLITS:
        for cost in _descend(work, rest, seconds, work < np.quantile(work, share)):
            error = np.abs(_predict(cost, work, rest) / seconds - 1.0)
            if (squares := float(np.mean(error**2))) < least:
                least = squares
                best = StepFit(cost, float(np.mean(error)), float(np.max(error)))
    assert best is not None
    return best


def _descend(work: Floats, rest: Floats, seconds: Floats, reads: npt.NDArray[np.bool_]) -> list[StepCost]:
    """Fits from one guess of which steps read the weights, each guess from the fit before."""
    found = []
    for _ in range(ROUNDS):
        arithmetic = (~reads).astype(float)
        reading = reads.astype(float)
        matrix = np.column_stack([arithmetic, arithmetic * work, rest[:, 1], reading, reading * work, rest[:, 0]])
        c0, a, b, d0, d1, d2 = _non_negative(matrix / seconds[:, None])
        if not reads.any():
            d0, d1 = c0, a
        elif reads.all():
            c0, a = d0, d1
        found.append(StepCost(c0=c0, a=a, b=b, d0=d0, d1=d1, d2=d2))
        now = d0 + d1 * work > c0 + a * work
        if bool(np.array_equal(now, reads)):
            break
        reads = now
    return found


def _predict(cost: StepCost, work: Floats, rest: Floats) -> Floats:
    shared = np.maximum(cost.c0 + cost.a * work, cost.d0 + cost.d1 * work)
    predicted: Floats = shared + cost.d2 * rest[:, 0] + cost.b * rest[:, 1]
    return predicted


def _non_negative(matrix: Floats) -> list[float]:
    """``x >= 0`` of least ``|matrix @ x - 1|``, by trying every set of columns that may be positive."""
    scale = np.maximum(np.linalg.norm(matrix, axis=0), 1e-300)
    scaled = matrix / scale
    gram, target = scaled.T @ scaled, scaled.sum(axis=0)
    columns = [index for index in range(matrix.shape[1]) if gram[index, index] > 0.5]  # others are all zero
    best = np.zeros(matrix.shape[1])
    least = 0.0  # of x.G.x - 2 x.t, which is 0 at x = 0
    for chosen in (list(c) for size in range(1, len(columns) + 1) for c in combinations(columns, size)):
        part = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], target[chosen], rcond=1e-12)[0]
        error = float(part @ gram[np.ix_(chosen, chosen)] @ part - 2.0 * part @ target[chosen])
        if bool(np.all(part >= 0.0)) and error < least:
            least = error
            best = np.zeros(matrix.shape[1])
            best[chosen] = part
    return [float(value) for value in best / scale]
