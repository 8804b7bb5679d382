"""How many prefill and decode workers a trace needs, from means alone: where the search for the best split begins.

Symbols: lambda requests a second, P and D workers, n prompt and o output tokens, c = E[(n + o/2)*o] / E[o] tokens that
a sequence has in KV while it decodes, b sequences in a batch, tau = T_d(b, b*c) seconds of a step::

    prefill    lambda <= P * rho_p / E[T_p(n - ideal prefix hits)]
    decode     lambda <= D * rho_d * b / (E[o - 1] * tau),   b the largest with tau <= 0.9 * ITL SLO and
                                                             b*c <= 0.97 * KV tokens of a worker
    links      lambda <= min(P, D) * 0.8 * bytes a second / (E[n] * bytes a token)

The first token is the prefill worker's. Bursts, caches that forget, decode workers that prefill: none of it is in here,
so simulation has the last word.
"""

from __future__ import annotations

from dataclasses import dataclass

from twinpool.cost import ITL_SHARE, Cost
from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

RHO_PREFILL = 0.95  # share of a prefill worker's time that late binding keeps busy: 0.93 to 0.98
RHO_DECODE = 0.9
MEMORY_SHARE = 0.97
LINK_SHARE = 0.8
SAMPLE = 20_000  # requests looked at


@dataclass(frozen=True, slots=True)
class Ratio:
    """What one worker of each pool can carry, in requests a second."""

    prefill: float
    decode: float
    link: float  # one pair of link ends

    def rate(self, prefill: int, decode: int) -> float:
        """Requests a second that so many workers can carry."""
        return min(prefill * self.prefill, decode * self.decode, min(prefill, decode) * self.link)

    def order(self, workers: int) -> list[int]:
        """All numbers of prefill workers, the most promising first; equal ones as far as possible from either end."""
        return sorted(range(1, workers), key=lambda p: (-self.rate(p, workers - p), abs(2 * p - workers), p))


def ratio_of(trace: Trace, settings: Settings) -> Ratio:
    """From the lengths and hash ids of a trace, and the profile and SLO of the settings.

    Raises ConfigError for an unknown profile and an empty trace.
    """
    if not len(trace):
        raise ConfigError("the trace is empty: give one with at least one request")
    profile = load_profile(settings.profile)
    cost: Cost = profile.fit if settings.closed_form else profile.cost
    n = min(len(trace), SAMPLE)
    prompts, outputs = trace.prompt[:n], trace.output[:n]
    work = sum(
        cost.prefill(p - hits, hits, settings.chunk_tokens) for p, hits in zip(prompts, _hits(trace, n), strict=True)
    )
    rates = (settings.link_bytes_per_s or profile.link_bytes_per_s) * LINK_SHARE
    sent = sum(prompts) * profile.kv_bytes_per_token
    return Ratio(
        prefill=n * RHO_PREFILL / work,
        decode=_decode_rate(
            cost, settings, prompts.tolist(), outputs.tolist(), settings.kv_tokens or profile.kv_tokens
        ),
        link=n * rates / sent,
    )


def _hits(trace: Trace, n: int) -> list[int]:
    """Tokens of each prompt that an infinite cache would know; one token is always computed."""
    seen: set[int] = set()
    hits = []
    for i in range(n):
        blocks = trace.block_hashes(i)
        known = next((place for place, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks[known:])
        hits.append(min(known * trace.block_tokens, trace.prompt[i] - 1))
    return hits


def _decode_rate(cost: Cost, settings: Settings, prompts: list[int], outputs: list[int], kv_tokens: int) -> float:
    """Requests a second of one decode worker at its largest batch."""
    steps = sum(outputs) - len(outputs)
    if not steps:
        return float("inf")
    context = max(1, round(sum((n + o / 2) * o for n, o in zip(prompts, outputs, strict=True)) / sum(outputs)))
    most = max(1, min(settings.max_batch, int(MEMORY_SHARE * kv_tokens / context)))
    allowed = ITL_SHARE * settings.itl_s
    batch = next((b for b in range(most, 1, -1) if cost.decode(b, b * context) <= allowed), 1)
    return RHO_DECODE * batch * len(outputs) / (steps * cost.decode(batch, batch * context))
