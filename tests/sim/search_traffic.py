"""Small open-loop traffic for tests that simulate many times."""

from __future__ import annotations

import random
from array import array
from itertools import accumulate

from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, no_hashes

CLUSTER = Settings(prefill=1, decode=1)


def traffic(n: int = 120, rate: float = 4.0, seed: int = 1, prompt: int = 1500, output: int = 40) -> Trace:
    """Poisson arrivals, uniform lengths up to twice the given means, no hashes."""
    rng = random.Random(seed)
    return Trace(
        "small",
        0,
        array("d", accumulate(rng.expovariate(rate) for _ in range(n))),
        array("q", [rng.randint(1, 2 * prompt) for _ in range(n)]),
        array("q", [rng.randint(1, 2 * output) for _ in range(n)]),
        array("q"),
        no_hashes(n),
    )
