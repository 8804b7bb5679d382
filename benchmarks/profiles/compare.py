"""How close a profile's grids are to the tables they were made from, on random points that are no knots."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from tables import Source

from twinpool.cost_grid import Grids
from twinpool.sim.profiles import Profile

SEED = 20260711
POINTS = 500
MIXED_POINTS = 100
CLOSE, FAR = 0.03, 0.08  # on 95 % of points, on all
MOST_TOKENS, MOST_BATCH = 100_000, 256


class Errors(NamedTuple):
    """Relative errors of one kind of step."""

    close: float  # share of points within CLOSE
    p95: float
    worst: float

    @classmethod
    def of(cls, errors: list[float]) -> Errors:
        """From the errors of the points."""
        size = np.abs(np.array(errors))
        return cls(float((size <= CLOSE).mean()), float(np.quantile(size, 0.95)), float(size.max()))

    def cells(self) -> str:
        """For the table."""
        return f"{self.close:.1%} | {self.p95:.2%} | {self.worst:.2%}"


class Comparison(NamedTuple):
    """One profile."""

    profile: Profile
    prefill: Errors
    decode: Errors
    together: Errors
    mixed: Errors
    shared: Errors
    fall: float  # the most that a step of decodes gets shorter by one more sequence of the same context, as a share
    bytes: int

    @property
    def good(self) -> bool:
        """Within CLOSE on 95 % of points, within FAR on all."""
        return self.together.close >= 0.95 and self.together.worst <= FAR

    def line(self) -> str:
        """A row of the table."""
        p = self.profile
        columns = [part.cells() for part in (self.together, self.prefill, self.decode, self.mixed, self.shared)]
        fit = f"{self.fall:.1%} | {p.fit_mean_error:.1%} | {p.fit_worst_error:.1%}"
        return f"| {p.name} | {' | '.join(columns)} | {fit} | {p.kv_tokens:,} | {self.bytes / 1000:.0f} |"


def _draw(rng: np.random.Generator, low: int, high: int, *, even: bool) -> int:
    """A whole number, evenly over the range or over its logarithm."""
    if even:
        return int(rng.integers(low, high + 1))
    return int(np.exp(rng.uniform(np.log(low), np.log(high + 1))))


def compare(profile: Profile, source: Source, grids: Grids, size: int) -> Comparison:
    """Half of the points prompts, half decodes; half of each evenly spread, half over the logarithm."""
    rng = np.random.default_rng(SEED)
    prefill: list[float] = []
    decode: list[float] = []
    mixed: list[float] = []
    shared: list[float] = []
    xs, cs = set(grids.attention_tokens), set(grids.attention_cached)
    bs, ks = set(grids.decode_batch), set(grids.decode_context)
    while len(prefill) < POINTS // 2:
        even = len(prefill) % 2 == 0
        tokens, cached = _draw(rng, 16, MOST_TOKENS, even=even), _draw(rng, 1, MOST_TOKENS + 1, even=even) - 1
        if tokens not in xs or cached not in cs:
            truth = source.prefill(tokens, cached) / 1e3
            prefill.append(profile.cost.step([(tokens, cached)], 0, 0) / truth - 1.0)
    while len(decode) < POINTS // 2:
        even = len(decode) % 2 == 0
        batch, context = _draw(rng, 1, MOST_BATCH, even=even), _draw(rng, 16, MOST_TOKENS, even=even)
        if batch * context <= profile.kv_tokens and (batch not in bs or context not in ks):
            decode.append(profile.cost.decode(batch, batch * context) / (source.decode(batch, context) / 1e3) - 1.0)
    while len(mixed) < MIXED_POINTS:
        tokens, batch = _draw(rng, 16, 8192, even=False), _draw(rng, 1, MOST_BATCH, even=False)
        context = _draw(rng, 16, MOST_TOKENS, even=False)
        if batch * context <= profile.kv_tokens:
            truth = source.mixed(tokens, batch, context) / 1e3
            mixed.append(profile.cost.step([(tokens, 0)], batch, batch * context) / truth - 1.0)
    while len(shared) < MIXED_POINTS:
        prompts, tokens = int(rng.integers(2, 17)), _draw(rng, 16, 1024, even=False)
        cached = _draw(rng, 1, 8192, even=False) - 1
        truth = source.together(prompts, tokens, cached) / 1e3
        shared.append(profile.cost.step([(tokens, cached)] * prompts, 0, 0) / truth - 1.0)
    parts = [Errors.of(errors) for errors in (prefill, decode, prefill + decode, mixed, shared)]
    return Comparison(profile, *parts, _worst_fall(profile), size)


def _worst_fall(profile: Profile) -> float:
    """See ``Comparison.fall``."""
    worst = 0.0
    for context in (16, 64, 256, 512, 1024, 2048, 4096, 6000, 8192, 16384, 32768, 65536):
        most = min(MOST_BATCH, profile.kv_tokens // context)
        steps = [profile.cost.decode(batch, batch * context) for batch in range(1, most + 1)]
        worst = max([worst, *(1.0 - after / before for before, after in pairwise(steps))])
    return worst


def report(compared: list[Comparison], version: str, backend: str) -> str:
    """results.md."""
    kinds = ("all", "prompts", "decodes", "mixed", "together")
    columns = [f"{kind}: within {CLOSE:.0%} | p95 | worst" for kind in kinds]
    columns += ["fall", "fit: mean", "worst", "KV tokens", "kB"]
    head = f"""# Profiles: how close the grids are to their source

    python benchmarks/profiles/make.py --check

{POINTS} random points a profile that are no knots of its grids (seed {SEED}): half prompts of 16 to {MOST_TOKENS:,}
tokens after 0 to {MOST_TOKENS:,} cached ones, half decodes of 1 to {MOST_BATCH} sequences of 16 to {MOST_TOKENS:,}
tokens that fit the KV memory; half evenly spread, half over the logarithm. Compared with aiconfigurator {version},
backend {backend}. Asked for: within {CLOSE:.0%} on 95 % of the points, within {FAR:.0%} on all. Most of the error is
not interpolation: aiconfigurator's tables fall here and there by up to 15 % when a step's tokens or context grow, and
the grids never do (tables.py says how they are made so).

Beside what is asked for: *mixed*, {MIXED_POINTS} steps of a prompt and decodes; *together*, {MIXED_POINTS} steps of 2
to 16 prompts of 16 to 1,024 tokens after 0 to 8,192; *fall*, the most that a step of decodes gets shorter by one more
sequence of the same context (kernels like some batch sizes better); *fit*, the closed form of cost.py over prompts,
decodes and mixed steps.

| profile | {" | ".join(columns)} |
|---{"|---" * (3 * len(kinds) + 5)}|
"""
    return head + "\n".join(one.line() for one in compared) + "\n"
