"""How far the truth is from what is predicted: factors for each request, drawn before a run from a seed.

A factor is lognormal with mean 1, ``exp(sigma * z - sigma**2 / 2)`` with z standard normal: the work of all requests
together stays what it was, so that what a run loses it loses to the error. Factors belong to rows of the trace: they do
not depend on its speed, on the policy, or on what else is disturbed.
"""

from __future__ import annotations

import math
import random
from array import array
from typing import Final

from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

ROUNDS: Final = 8  # of making up for what is cut off; each leaves a fraction of the one before


def factors(count: int, sigma: float, seed: int, what: str) -> array[float]:
    """One for each of so many requests, of the given logarithmic standard deviation; ``what``: for its own draws."""
    rng = random.Random(f"{what} {seed}")
    shift = sigma * sigma / 2.0
    return array("d", [math.exp(sigma * rng.gauss(0.0, 1.0) - shift) for _ in range(count)])


def work_of(trace: Trace, settings: Settings) -> array[float]:
    """By row, how many times as long as predicted the prompt work takes; empty where all of it is exact."""
    if not settings.prefill_error:
        return array("d")
    return factors(len(trace), settings.prefill_error, settings.error_seed, "prefill")


def most_tokens(trace: Trace, settings: Settings) -> int:
    """What every request asks for at most; one whose row has more asks for that."""
    return settings.max_tokens or max(trace.output, default=1)


def outputs_of(trace: Trace, settings: Settings) -> array[int]:
    """By row, output tokens that a request really has: at least 1, at most what it asks for, as many in all as before.

    Lengths that are cut off at the most are missed elsewhere, so all are made longer by the same share.
    """
    if not settings.output_error or not len(trace):
        return trace.output
    cap = most_tokens(trace, settings)
    drawn = factors(len(trace), settings.output_error, settings.error_seed, "output")
    lengths = [output * factor for output, factor in zip(trace.output, drawn, strict=True)]
    most = [max(cap, output) for output in trace.output]
    total, scale = sum(trace.output), 1.0
    for _ in range(ROUNDS):
        scale *= total / sum([min(high, scale * length) for high, length in zip(most, lengths, strict=True)])
    return array("q", [min(high, max(1, round(scale * o))) for high, o in zip(most, lengths, strict=True)])
