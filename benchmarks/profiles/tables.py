"""From aiconfigurator's step times to the grids of cost_grid.py.

aiconfigurator adds up operations, so its steps come apart into the parts of cost_grid.py: ``W`` is a step less its
attention, ``A`` the attention of a prompt after a prefix, ``R`` that of decoding sequences. Its tables fall here and
there by a few per cent when work grows (tile sizes, noise). So ``W`` is made monotone in its tokens, ``A`` in ``x`` and
``R`` in the context: between the highest value at less work and the lowest at more, the middle is taken, which among
all monotone tables has the least worst error. That ``R`` falls at some batch sizes, and attention of a few tokens with
the prefix, is left. ``W`` has steep spots at tile sizes, so its knots are chosen: few (greedily) from which every value
is within 0.2 %.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from twinpool.sim.fit import StepFit, StepSample, fit_step_cost, sample

EVERY_TOKEN = 1200  # W is read at every number of tokens up to here, then 1 % apart
MOST_TOKENS = 1 << 18
MOST_CONTEXT = 1 << 17
WORK_TOLERANCE = 0.002
BATCHES = [1, 2, 3, 4, 6, 8, 12, 15, 16, 24, 31, 32, 48, 63, 64, 96, 127, 128, 160, 192, 224, 255, 256, 384, 512, 1024]
FIT_TOKENS = (64, 256, 512, 1024, 2048, 4096, 8192)
FIT_CACHED = (0, 2048, 8192, 32768, 98304)
FIT_BATCHES = (1, 4, 16, 64, 128, 256)
FIT_CONTEXTS = (128, 512, 2048, 8192, 32768)
Floats = npt.NDArray[np.float64]


class Source:
    """aiconfigurator's engine of one (device, model, TP); milliseconds."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def prefill(self, tokens: int, cached: int) -> float:
        """One prompt alone; aiconfigurator's ``isl`` counts the prefix too."""
        return float(self._engine.predict_prefill_latency(1, tokens + cached, cached))

    def decode(self, batch: int, context: int) -> float:
        """``batch`` sequences of ``context`` tokens each."""
        return float(self._engine.decode_step_latency(batch, context, 2))

    def reading(self, batch: int, context: int) -> float:
        """Attention of a step of ``batch`` decodes of ``context`` tokens each."""
        return float(self._engine.mixed_step_breakdown(0, batch, context, 2, 0)[3])

    def prompt_work(self, tokens: int) -> float:
        """A prompt's step less its attention."""
        return float(self._engine.mixed_step_breakdown(tokens, 0, tokens, 2, 0)[1])

    def work(self, tokens: int) -> float:
        """W: prompts draw one token and decodes one each, so their logits differ a little; the mean of both."""
        if tokens > max(BATCHES):
            return self.prompt_work(tokens)
        return (self.prompt_work(tokens) + self.decode(tokens, 64) - self.reading(tokens, 64)) / 2

    def together(self, prompts: int, tokens: int, cached: int) -> float:
        """So many prompts of ``tokens`` after ``cached`` each in one step."""
        return float(self._engine.predict_prefill_latency(prompts, tokens + cached, cached))

    def mixed(self, tokens: int, batch: int, context: int) -> float:
        """A whole prompt of ``tokens`` and ``batch`` decoding sequences of ``context`` tokens in one step."""
        attention = self.prefill(tokens, 0) - self.prompt_work(tokens)
        return self.prompt_work(tokens + batch) + attention + self.reading(batch, context)


def measure(source: Source) -> dict[str, Any]:
    """The content of ``Grids``."""
    work_tokens, work_ms = _work(source)
    tokens = [*range(16, 64, 16), *range(64, 256, 64), *_powers(256, 1 << 17, 4)]
    tokens = [1, *tokens]
    cached = [0, 16, 64, 128, 256, *_powers(512, 1 << 18, 2)]
    raw = np.array([[source.prefill(x, c) - source.prompt_work(x) for c in cached] for x in tokens])
    attention = np.column_stack([_monotone(column) for column in raw.T])
    contexts = [0, *_powers(16, MOST_CONTEXT, 2)]
    raw = np.array([[source.reading(b, max(1, c)) for c in contexts] for b in BATCHES])
    return {
        "work_tokens": [0, *work_tokens],
        "work_ms": _rounded([work_ms[0], *work_ms]),
        "attention_tokens": [0, *tokens],
        "attention_cached": cached,
        "attention_ms": [[0.0] * len(cached), *(_rounded(row) for row in attention)],
        "decode_batch": [0, *BATCHES],
        "decode_context": contexts,
        "decode_ms": [[0.0] * len(contexts), *(_rounded(_monotone(row)) for row in raw)],
    }


def _powers(first: int, last: int, per_octave: int) -> list[int]:
    """Knots from ``first`` to at least ``last``, so many each time they double."""
    count = int(np.ceil(per_octave * np.log2(last / first)))
    return [round(first * 2 ** (index / per_octave)) for index in range(count + 1)]


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _monotone(values: Floats) -> Floats:
    """The middle between the highest value at less work and the lowest at more; see the module's docstring."""
    middle: Floats = (np.maximum.accumulate(values) + np.minimum.accumulate(values[::-1])[::-1]) / 2
    return middle


def _work(source: Source) -> tuple[list[int], list[float]]:
    """Knots and values of W."""
    tokens = [*range(1, EVERY_TOKEN), *_powers(EVERY_TOKEN, MOST_TOKENS, 70)]
    tokens = sorted({*tokens, *(1 << bits for bits in range(11, 19)), *((1 << bits) + 1 for bits in range(11, 18))})
    values = np.exp(_monotone(np.log(np.array([source.work(count) for count in tokens]))))
    knots = _thinned(np.array(tokens, dtype=float), values)
    return [tokens[index] for index in knots], [float(values[index]) for index in knots]


def _thinned(axis: Floats, values: Floats) -> list[int]:
    """Indices whose straight connection is within the tolerance of all values: split where it is worst."""
    kept = {0, len(axis) - 1}
    todo = [(0, len(axis) - 1)]
    while todo:
        first, last = todo.pop()
        inner = slice(first + 1, last)
        line = np.interp(axis[inner], axis[[first, last]], values[[first, last]])
        error = np.abs(line / values[inner] - 1.0)
        if len(error) and float(error.max()) > WORK_TOLERANCE:
            middle = first + 1 + int(error.argmax())
            kept.add(middle)
            todo += [(first, middle), (middle, last)]
    return sorted(kept)


def fitted(source: Source, kv_tokens: int) -> StepFit:
    """The closed form nearest to prompts, decodes and mixed steps."""
    samples: list[StepSample] = []
    for tokens in FIT_TOKENS:
        for cached in FIT_CACHED:
            samples.append(sample([(tokens, cached)], 0, 0, source.prefill(tokens, cached) / 1e3))
    for batch in FIT_BATCHES:
        for context in FIT_CONTEXTS:
            if batch * context <= kv_tokens:
                samples.append(sample([], batch, batch * context, source.decode(batch, context) / 1e3))
                for tokens in FIT_TOKENS[:5]:
                    seconds = source.mixed(tokens, batch, context) / 1e3
                    samples.append(sample([(tokens, 0)], batch, batch * context, seconds))
    return fit_step_cost(samples)
