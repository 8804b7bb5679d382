"""What any policy must do for the requests that meet their SLO: work with a release and a due time, at least.

A request that meets its SLO has all its prompt tokens in KV by its first token. Blocks that some earlier request has as
well may come from a cache; ``least_uncached`` counts every block once, for the request that brings it first. For any
set of requests that are served this is no more than what must be computed for them, and it must be computed between
arrival and first-token deadline of the request it is counted for: a block nobody has asked for before cannot be there
earlier, if that request is served it is there in time, and no token is counted for two requests. So the counts of a
served set add up, even if requests that bring blocks to others are themselves never served. What limited memory adds
is in bound_cache.py. Whoever finds no more in caches than so many tokens of each request computes the rest of each for
that request alone (``uncached_of``), between the same times.

Decoding: every token after the first takes a step with the request in its batch and at least its prompt as context
(a token drawn by the prompt of a resumed attempt is left out: no loss is a policy's choice). Gaps add up to at most
``itl_s`` times their number, the mean of the worst tenth being no less than the mean of all, so these steps end by the
first-token deadline plus that, and they start after the prompt is computed.

Both are counted in seconds of one step after another (bound_cost.py), divided by the workers that may do them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from twinpool.cost import Cost
from twinpool.errors import ConfigError
from twinpool.router.pool import UNLOADED_CHUNK
from twinpool.sim.bound_cache import Reuse, reuse_of
from twinpool.sim.bound_context import Contexts, contexts_of
from twinpool.sim.bound_cost import Amounts, Engine, Shape
from twinpool.sim.bound_lines import Floats
from twinpool.sim.bound_misses import Ints, Jobs, Pairs
from twinpool.sim.trace import NO_REQUEST, Trace

CLOSE = 1.0 + 1e-9  # what exceeds a limit by less is rounding


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds: TTFT ``ttft_s + ttft_factor * unloaded prefill``, ITL as the mean of the worst tenth."""

    ttft_s: float = 1.0
    ttft_factor: float = 2.0
    itl_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Fleet:
    """Workers by what they may ever do. Decode workers that may prefill (the ``local`` path) count as ``both``."""

    prefill: int = 0  # prefill only
    decode: int = 0  # decode only
    both: int = 0
    engine: Engine = field(default_factory=Engine)

    @property
    def workers(self) -> int:
        """All."""
        return self.prefill + self.decode + self.both

    def __post_init__(self) -> None:
        if min(self.prefill, self.decode, self.both) < 0:
            raise ConfigError("a number of workers is negative: give 0 or more of each kind")
        if not (self.prefill + self.both and self.decode + self.both):
            raise ConfigError("no worker may prefill, or none may decode: a bound needs some of each, or of both")


@dataclass(frozen=True, slots=True)
class Uncached:
    """Columns, one entry a request: what must be computed for it at least."""

    tokens: Floats
    places: Floats  # sum of position + 1/2 over these tokens
    sharers: Floats  # requests that may compute some of them: itself, and all with the first block it brings


@dataclass(frozen=True, slots=True)
class Demand:
    """Work on one kind of workers. Columns, one entry a piece; ``seconds`` if they all shared it."""

    owner: Ints  # request
    start: Floats  # seconds after the arrival
    end: Floats  # seconds after the arrival
    seconds: Floats
    token_s: float = 0.0  # of a prompt token that is computed once more

    def at(self, arrival: Floats, stretch: float = 1.0) -> Jobs:
        """The pieces with the requests arriving at ``arrival``, due ``stretch`` times as long after."""
        when = arrival[self.owner]
        return Jobs(self.owner, when + self.start, when + stretch * self.end, self.seconds)


Span = tuple[Ints, Floats, Floats]  # owner, start, end


@dataclass(frozen=True, slots=True)
class Needs:
    """What demands are made of. Columns, one entry for each request that may be served."""

    shape: Shape
    fleet: Fleet
    amounts: Amounts  # ``alones`` without the prompt: that depends on the speed
    contexts: Contexts
    prefill: Span
    decode: Span

    def demands(self, arrival: Floats) -> list[Demand]:
        """On all workers (what presses most comes first), on those that may prefill, on those that may decode: right
        where requests arrive at ``arrival`` or further apart."""
        counted, _, window = self.decode
        steps = self.amounts.sequences
        alones = self.amounts.alones + steps * self.contexts.counted(arrival[counted], window, steps)
        need, fleet = replace(self.amounts, alones=alones), self.fleet
        first, second = fleet.prefill + fleet.both, fleet.decode + fleet.both
        prompts = self.shape.prefill(need)
        demands = [
            _demand(self.prefill, prompts.prefill, first, prompts.token),
            _demand(self.decode, self.shape.decode(need).decode, second),
        ]
        if fleet.both:
            work = self.shape.mixed(need)
            kinds = ((self.prefill, work.prefill), (self.decode, work.decode))
            parts = [_demand(span, some, fleet.workers) for span, some in kinds]
            columns = zip(*[(part.owner, part.start, part.end, part.seconds) for part in parts], strict=True)
            owner, start, end, seconds = [np.concatenate(pair) for pair in columns]
            demands.insert(0, Demand(owner, start, end, seconds, work.token / fleet.workers))
        return demands


def _demand(span: Span, seconds: Floats, workers: int, token_s: float = 0.0) -> Demand:
    owner, start, end = span
    some = seconds > 0.0
    return Demand(owner[some], start[some], end[some], seconds[some] / workers, token_s / workers)


@dataclass(frozen=True, slots=True)
class Offer:
    """A trace as the bound sees it."""

    arrival: Floats
    prompt: Floats
    hopeless: NDArray[np.bool_]  # requests that miss on an idle cluster
    demands: list[Demand]
    limit: Floats  # of the first token, seconds after the arrival
    reuse: Reuse
    memory: float  # KV tokens of all workers; inf: unknown
    needs: Needs

    def pairs(self, demand: Demand, arrival: Floats, stretch: float = 1.0) -> Pairs | None:
        """What has to be computed once more since memory is limited."""
        if not (demand.token_s and self.memory < math.inf):
            return None
        return self.reuse.pairs(arrival, self.limit, self.memory, demand.token_s, stretch)

    def until(self, speed: float) -> Offer:
        """The same with demands that are right at speeds up to this one; those it is made with are at any."""
        return replace(self, demands=self.needs.demands(self.arrival / speed))

    def rising(self) -> Offer:
        """What is left of it of which no more can be served at a higher speed: all work from the arrival on, all memory
        there may be."""
        demands = [replace(demand, start=np.zeros_like(demand.start)) for demand in self.demands]
        return replace(self, demands=demands, memory=math.inf)


def least_uncached(trace: Trace) -> Uncached:
    """Each block counted for the first request that has it; tokens behind the last full block, and the last token of a
    prompt that is cached whole, for their own request."""
    prompt = np.asarray(trace.prompt, dtype=np.float64)
    offsets, size = np.asarray(trace.offsets), trace.block_tokens
    full = np.diff(offsets)
    behind = full * float(size)
    tokens = prompt - behind
    places = tokens * (behind + prompt) / 2.0
    sharers = np.ones(len(trace))
    if len(trace.hashes):
        _, first, counts = np.unique(np.asarray(trace.hashes), return_index=True, return_counts=True)
        owner = np.searchsorted(offsets, first, side="right") - 1
        index = first - offsets[owner]
        tokens += np.bincount(owner, minlength=len(trace)) * float(size)
        places += np.bincount(owner, (index + 0.5) * size * size, minlength=len(trace))
        np.maximum.at(sharers, owner, counts.astype(np.float64))
    nothing = tokens < 1.0
    return Uncached(np.where(nothing, 1.0, tokens), np.where(nothing, prompt - 0.5, places), sharers)


def uncached_of(trace: Trace, cached: Sequence[int] | Ints) -> Uncached:
    """Each request computes for itself what follows ``cached`` tokens of its prompt; the last token in any case.

    Raises ConfigError where these are no parts of the prompts.
    """
    prompt, found = np.asarray(trace.prompt, dtype=np.float64), np.asarray(cached, dtype=np.float64)
    if found.shape != prompt.shape or not ((found >= 0.0) & (found <= prompt)).all():
        raise ConfigError("cached tokens must be given for each request, from 0 to all of its prompt")
    tokens = np.maximum(1.0, prompt - found)
    return Uncached(tokens, tokens * (prompt - tokens / 2.0), np.ones(len(trace)))


def offer(trace: Trace, cost: Cost, fleet: Fleet, slo: Slo, cached: Sequence[int] | Ints | None = None) -> Offer:
    """The least work of every request whose arrival does not depend on others, for each kind of workers.

    A request of a closed loop that follows another may come at any time; it counts only where it is hopeless.
    ``cached``: tokens of each prompt that are found in caches at most; None: all that can be. Raises ConfigError on an
    empty trace, or where ``cached`` does not fit it.
    """
    if not len(trace):
        raise ConfigError("the trace has no requests: nothing to bound")
    uncached = least_uncached(trace) if cached is None else uncached_of(trace, cached)
    prompt, output = (np.asarray(column, dtype=np.float64) for column in (trace.prompt, trace.output))
    limit = slo.ttft_s + slo.ttft_factor * _unloaded(trace, cost)
    shape = Shape(cost, fleet.engine, int((prompt + output).max(initial=1.0)))
    latency = shape.latency(uncached.tokens, uncached.places)
    slow = np.array([cost.decode(1, context) for context in trace.prompt]) > slo.itl_s * CLOSE
    hopeless = (latency > limit * CLOSE) | (slow & (output > 2.0))  # a first token held back hides one gap, not two
    if fleet.engine.kv_tokens:
        hopeless |= prompt > fleet.engine.kv_tokens
    open_loop = np.ones(len(trace), dtype=bool)
    if trace.after is not None:
        open_loop = np.asarray(trace.after) == NO_REQUEST
    owner = np.flatnonzero(open_loop & ~hopeless)
    amounts = _amounts(prompt, output, uncached, owner)
    end = limit[owner]
    prefill = (owner, np.zeros(len(owner)), end)
    decode = (owner, np.minimum(latency[owner], end), end + amounts.sequences * slo.itl_s)
    needs = Needs(shape, fleet, amounts, contexts_of(trace, owner), prefill, decode)
    memory = fleet.workers * fleet.engine.kv_tokens or math.inf
    if cached is not None:
        memory = math.inf  # what leaves it and is computed again is in what is not found
    arrival = np.asarray(trace.arrival, dtype=np.float64)
    demands = needs.demands(np.zeros_like(arrival))
    return Offer(arrival, prompt, hopeless, demands, limit, reuse_of(trace, owner), memory, needs)


def _amounts(prompt: Floats, output: Floats, uncached: Uncached, owner: Ints) -> Amounts:
    """Of the requests ``owner``. Decode step ``j`` reads the prompt and at least ``j - 1`` tokens more."""
    steps = output[owner] - 1.0
    grown = steps * (steps - 1.0) / 2.0
    contexts = steps * prompt[owner] + grown
    length, tokens, places, sharers = [
        column[owner] for column in (prompt, uncached.tokens, uncached.places, uncached.sharers)
    ]
    return Amounts(length, tokens, places, sharers, steps, contexts, grown)


def _unloaded(trace: Trace, cost: Cost) -> Floats:
    """Seconds that the TTFT SLO is measured in: each prompt alone, without cache."""
    lengths, which = np.unique(np.asarray(trace.prompt), return_inverse=True)
    return np.array([cost.prefill(length, 0, UNLOADED_CHUNK) for length in lengths.tolist()])[which]
