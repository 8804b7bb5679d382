"""Measuring the step cost of an engine: a handful of real steps, fitted to the formula of cost.py.

``T = max(c0 + a*w, d0 + d1*w) + d2*K + b*A`` with w the tokens of the step, K the context of decoding rows and A the
attention of chunks. Steps of decodes, few and many, short and long, give ``d0``, ``d1`` and ``d2``; steps of chunks
give ``c0``, ``a`` and ``b``. Where the second branch then is not the higher one for small steps and the lower one for
large ones (CPUs: a row more costs most in small batches), both are one line, fitted to all steps. Each fit is by
non-negative least squares, every equation weighted by one over its measured time (relative error).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from twinpool.cost import StepCost
from twinpool.errors import EngineError
from twinpool.workers.engine.base import Row

_DECODES = ((1, 64), (8, 64), (1, 768), (8, 768))  # (rows, tokens of context each)
_CHUNKS = ((32, 0), (96, 0), (224, 0), (64, 832))  # (tokens, cached tokens before)
_MOST_TOKENS = 896  # of context in any of them
_REPEATS_UNDER_S = 0.15  # steps that are shorter run again, and the best time counts


class Measured(NamedTuple):
    """One timed step."""

    chunk: int  # prompt tokens, 0 for a step of decodes
    cached: int  # tokens before the chunk
    batch: int  # decoding rows
    context: int  # sum of their context tokens
    seconds: float

    @property
    def attention(self) -> float:
        """Attention work of the chunk: tokens times the tokens each attends to, on average."""
        return self.chunk * (self.cached + self.chunk / 2)


Step = Callable[[Sequence[Row]], object]


Clock = Callable[[], float]


def calibrate(step: Step, clock: Clock, blocks: int, block_size: int, max_context: int, vocabulary: int) -> StepCost:
    """Run steps on the first of ``blocks`` pool blocks and fit their times by ``clock`` (seconds).

    Raises EngineError where the pool cannot hold even one short sequence.
    """
    bench = _Bench(step, clock, min(max_context, blocks * block_size), block_size, vocabulary)
    bench.decode(2, 1)  # the first step also pays for lazy initialisation
    chunks = [bench.prefill(*shape) for shape in _shrunk(_CHUNKS, bench.capacity)]
    decodes = [bench.decode(batch, min(context, bench.capacity)) for batch, context in _DECODES]
    return fit(chunks, decodes)


def _shrunk(shapes: Sequence[tuple[int, int]], capacity: int) -> list[tuple[int, int]]:
    """``shapes`` scaled down to a pool of ``capacity`` tokens."""
    scale = min(1.0, capacity / _MOST_TOKENS)
    return [(max(1, int(tokens * scale)), int(cached * scale)) for tokens, cached in shapes]


class _Bench:
    """Timed steps on a table that starts at block 0. Decoding rows share their blocks: results are not used."""

    def __init__(self, step: Step, clock: Clock, capacity: int, block_size: int, vocabulary: int) -> None:
        if capacity < 2:
            raise EngineError("the KV pool is too small to measure the engine: it must hold more than one token")
        self._step = step
        self._clock = clock
        self.capacity = min(capacity, _MOST_TOKENS)
        self._table = range(-(-self.capacity // block_size))
        self._vocabulary = vocabulary

    def prefill(self, tokens: int, cached: int) -> Measured:
        row = Row([position % self._vocabulary for position in range(tokens)], cached, self._table, None)
        return Measured(tokens, cached, 0, 0, self._seconds([row]))

    def decode(self, batch: int, context: int) -> Measured:
        rows = [Row([row % self._vocabulary], context - 1, self._table, None) for row in range(batch)]
        return Measured(0, 0, batch, batch * context, self._seconds(rows))

    def _seconds(self, rows: Sequence[Row]) -> float:
        best = self._once(rows)
        return min(best, self._once(rows)) if best < _REPEATS_UNDER_S else best

    def _once(self, rows: Sequence[Row]) -> float:
        started = self._clock()
        self._step(rows)
        return self._clock() - started


def fit(chunks: Sequence[Measured], decodes: Sequence[Measured]) -> StepCost:
    """Coefficients from timed chunk steps and timed decode steps; all are finite and not negative."""
    d0, d1, d2 = _least_squares([(1.0, m.batch, m.context) for m in decodes], [m.seconds for m in decodes])
    c0, a, b = _least_squares([(1.0, m.chunk, m.attention) for m in chunks], [m.seconds for m in chunks])
    if c0 > d0 or d1 > a:
        steps = [*chunks, *decodes]
        rows = [(1.0, m.chunk + m.batch, m.attention, m.context) for m in steps]
        c0, a, b, d2 = _least_squares(rows, [m.seconds for m in steps])
        d0, d1 = c0, a
    return StepCost(c0=c0, a=a, b=b, d0=d0, d1=d1, d2=d2)


def _least_squares(rows: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
    """Non-negative ``x`` of least relative squared error, by trying every set of columns that may be positive."""
    weights = torch.tensor([1.0 / max(value, 1e-9) for value in seconds], dtype=torch.float64).unsqueeze(1)
    matrix = torch.tensor(rows, dtype=torch.float64) * weights
    scale = matrix.norm(dim=0).clamp_min(1e-30)
    matrix /= scale
    target = torch.tensor(seconds, dtype=torch.float64).unsqueeze(1) * weights
    count = matrix.shape[1]
    best = torch.zeros(count, dtype=torch.float64)
    error = float(target.norm())
    for columns in (chosen for size in range(1, count + 1) for chosen in combinations(range(count), size)):
        part = torch.linalg.pinv(matrix[:, columns]) @ target
        left = float((matrix[:, columns] @ part - target).norm())
        if bool((part >= 0.0).all()) and left < error:
            error = left
            best = torch.zeros(count, dtype=torch.float64)
            best[list(columns)] = part.squeeze(1)
    values: list[float] = (best / scale).tolist()
    return values
