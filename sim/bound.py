"""The clairvoyant bound: no policy meets the SLO of a larger share of offered requests on these workers.

It relaxes everything a policy cannot change but for three facts. (1) What is served must be computed: prompt tokens
once, with free transfer, and a decode step for each token after the first (bound_work.py); blocks once more where no
eviction rule could have kept them in the KV memory of all workers together (bound_cache.py). (2) A step takes at least
the sum of rates over what is in it (bound_cost.py). (3) A worker does one step after another. Proof that the shares
below are upper bounds:

Let ``S`` be the requests that a policy serves within both SLOs. A step that does work counted for ``i`` in ``S`` starts
at ``i``'s arrival or later, since it is planned with what is there, and ends by the due time of that work, since its
tokens are shown no earlier. So the steps with work that is released and due in ``[s, e]`` lie in ``[s, e]``. The steps
of one worker do not overlap: their seconds, and with them the work by (1) and (2), are at most ``workers * (e - s)``.
This for all intervals is just the condition for one preemptive server as fast as all workers to do the work in time
(first due first; the busy interval before a miss would break it). So ``S`` is served by that server, for prompt work on
the workers that may prefill, for decode work on those that may decode, for both together on all; and the misses of such
a server are bounded from below (bound_misses.py). Requests that miss on an idle cluster, since one worker after the
other computes a prompt chunk by chunk, miss in any case. Up to ``EXACT`` requests the relaxed problem is solved
exactly; above, the larger of the bounds ``by_size`` and ``by_interval`` is used for each kind of workers.

Speed-up divides all arrivals. Leave out limited memory, count context as at an infinite speed (bound_context.py), and
let decode work begin at the arrival: then a set that can be served at some speed can be at any lower one, since the
pieces of an interval, from the first of their arrivals to the last due time, have a longer one there. So if the bound
is under the target at some speed it is at all above, and bisection finds one. From there downwards a range of speeds is
ruled out at a time. If a set is served at a speed ``v`` between ``low`` and ``high``, the same schedule ``v / low``
times as slow has requests arrive as at ``low`` and does each piece between its release there and ``high / low`` times
its limit after the arrival; so where a server fails to do that, with context and time in memory counted as at ``high``,
the bound is under the target in all of the range. Ranges get shorter where they are not ruled out, down to
``TOLERANCE``.

Where a share of every tenth of prompt lengths is asked for, too, the policies are those that reach it: of each tenth no
more of the requests outside ``S`` may be than that leaves, and sets that break this count as none (bound_misses.py).

``cached`` makes it another bound: of those that find in caches no more tokens of each request than so many, such as
some real run found. It is none on all policies: one that keeps other blocks, or sends requests elsewhere, may be better
(and what a run refused it never looked for, so has as 0). From this bound to the other is what knowing who comes back
can give at most; from the run to this one, what is left to scheduling.

What is left out makes the bound loose, never wrong: what an eviction rule cannot know, links, latencies, batches that
are never as full, steps cut short for the ITL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from twinpool.cost import Cost
from twinpool.errors import ConfigError
from twinpool.sim.bound_cost import Engine
from twinpool.sim.bound_lines import Floats
from twinpool.sim.bound_misses import EXACT, Caps, Ints, exact, least_misses
from twinpool.sim.bound_work import Fleet, Offer, Slo, offer
from twinpool.sim.profiles import load_profile
from twinpool.sim.result import DECILES
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

ROLE_CHANGES = ("prefill", "decode", "both")
TOLERANCE = 0.001
STRIDE = 4.0  # between speeds while there is no bracket
ROUGH = 1.05  # bracket of the first bisection, and range of speeds that is ruled out at a time at first
RANGE = 1e6  # times or parts of the first guess within which a bracket is looked for


@dataclass(frozen=True, slots=True)
class Bound:
    """``share``: of offered requests that can meet both SLOs at most; ``misses``: those that cannot, at least."""

    share: float
    misses: int
    hopeless: int  # of the misses, those that would miss on an idle cluster
    exact: bool  # the relaxed problem's optimum, not only a bound on it


Tokens = Sequence[int] | Ints  # one entry a request


def bound(
    trace: Trace,
    settings: Settings,
    speed: float = 1.0,
    decile: float | None = None,
    cached: Tokens | None = None,
) -> Bound:
    """For the cluster, profile and SLOs of ``settings`` at a speed-up; its policy does not matter.

    ``decile``: of those only that meet both SLOs for this share of every tenth of prompt lengths (``deciles``); a share
    of 0.0 where there is none. ``cached``: of those only that find no more tokens of each prompt in caches than this.
    Raises ConfigError on an empty trace, an unknown profile, a speed that is not above 0, a share outside 0 to 1 or
    cached tokens that are not of these prompts.
    """
    return bound_of(offer_of(trace, settings, cached), speed, decile)


def bound_capacity(
    trace: Trace,
    settings: Settings,
    target: float = 0.99,
    decile: float | None = None,
    cached: Tokens | None = None,
) -> float:
    """Speed-up from which on no policy meets both SLOs for ``target`` of the offered requests.

    ``decile``: and for this share of every tenth of prompt lengths. ``cached``: of the policies that find no more than
    this in caches, as in ``bound``. About 0.3 % above the largest speed at which the bound allows it. 0.0: at no speed;
    inf: at any, as far as this bound knows. Raises ConfigError as ``bound`` does, and on a target outside 0 to 1.
    """
    return capacity_of(offer_of(trace, settings, cached), target, decile)


def deciles(prompt: Sequence[int] | Floats) -> list[Ints]:
    """The requests of each tenth of prompt lengths, as ``attainment_by_decile`` of a summary has them (result.py)."""
    return np.array_split(np.argsort(np.asarray(prompt), kind="stable"), DECILES)


def offer_of(trace: Trace, settings: Settings, cached: Tokens | None = None) -> Offer:
    """What the trace asks of the cluster of ``settings``. Workers whose roles are changed may do everything."""
    profile = load_profile(settings.profile)
    cost: Cost = profile.fit if settings.closed_form else profile.cost
    engine = Engine(
        max(settings.chunk_tokens, settings.block_size), settings.max_batch, settings.kv_tokens or profile.kv_tokens
    )
    moves = any(failure.what in ROLE_CHANGES for failure in settings.failures)
    prefill = 0 if moves else settings.prefill
    fleet = Fleet(prefill=prefill, both=settings.workers - prefill, engine=engine)
    least_s = settings.edge_s + min(settings.edge_spread_s, default=0.0)
    slo = Slo(settings.ttft_s - least_s, settings.ttft_factor, settings.itl_s)
    return offer(trace, cost, fleet, slo, cached)


def bound_of(made: Offer, speed: float, decile: float | None = None) -> Bound:
    """``bound`` of an offer."""
    if not 0.0 < speed < math.inf:
        raise ConfigError(f"a speed of {speed:g} is no traffic: give a factor above 0")
    n = len(made.arrival)
    misses = min(n, _misses(made.until(speed), speed, None, _caps(made, decile)))
    return Bound(1.0 - misses / n, misses, int(made.hopeless.sum()), n <= EXACT)


def capacity_of(made: Offer, target: float, decile: float | None = None) -> float:
    """``bound_capacity`` of an offer."""
    allowed, caps = _allowed(len(made.arrival), _share(target)), _caps(made, decile)
    rising = made.rising()
    high = _bisect(lambda speed: _misses(rising, speed, allowed, caps) > allowed, _start(made))
    if not 0.0 < high < math.inf:
        return high
    least, ratio, grows, below = high / RANGE, ROUGH, True, made.until(high)
    while ratio > 1.0 + TOLERANCE:
        if _misses(below, high / ratio, allowed, caps, ratio) > allowed:
            high /= ratio
            if high < least:
                return 0.0
            ratio = min(STRIDE, ratio * ratio) if grows else ratio
            below = made.until(high)
        else:
            ratio, grows = math.sqrt(ratio), False
    return high


def _share(target: float) -> float:
    if not 0.0 < target <= 1.0:
        raise ConfigError(f"a target of {target:g} is not a share: give one above 0 and up to 1")
    return target


def _caps(made: Offer, decile: float | None) -> Caps | None:
    """How many may miss of each tenth of prompt lengths, beside the hopeless; negative where these are too many."""
    if decile is None:
        return None
    members = deciles(made.prompt)
    group = np.empty(len(made.prompt), dtype=np.int64)
    for which, some in enumerate(members):
        group[some] = which
    most = [_allowed(len(some), _share(decile)) - int(made.hopeless[some].sum()) for some in members]
    return Caps(group, np.array(most, dtype=np.int64))


def _allowed(n: int, target: float) -> int:
    """The most misses of ``n`` with which ``target`` is met."""
    misses = min(n, int(n * (1.0 - target)) + 1)
    while misses and (n - misses) / n < target:
        misses -= 1
    return misses


def _misses(made: Offer, speed: float, allowed: int | None, caps: Caps | None, stretch: float = 1.0) -> int:
    """Misses at all speeds from ``speed`` to ``stretch`` times it; above ``allowed`` it does not matter how many.

    More than there are requests where ``caps`` cannot be kept.
    """
    arrival, hopeless = made.arrival / speed, int(made.hopeless.sum())
    if caps is not None and caps.most.min() < 0:
        return len(arrival) + 1
    demands = [demand for demand in made.demands if len(demand.owner)]
    enough = None if allowed is None else allowed - hopeless
    most = exact([demand.at(arrival, stretch) for demand in demands], caps) if len(arrival) <= EXACT else 0
    for demand in demands:
        pairs = made.pairs(demand, arrival, stretch)
        if (enough is None or most <= enough) and (pairs or len(arrival) > EXACT):
            most = max(most, least_misses(demand.at(arrival, stretch), enough, pairs, caps))
    return hopeless + most


def _start(made: Offer) -> float:
    """The speed at which the most loaded kind of workers has just as much time as work."""
    work = max((float(demand.seconds.sum()) for demand in made.demands), default=0.0)
    time = float(made.arrival[-1] - made.arrival[0])
    return time / work if time > 0.0 and work > 0.0 else 1.0


def _bisect(fails: Callable[[float], bool], start: float) -> float:
    """The end of a rough bracket that fails; 0.0 or inf where all speeds within ``RANGE`` do, or none."""
    low = high = start
    if fails(start):
        while fails(low := low / STRIDE if low < start else start / 1.25):
            high = low
            if low < start / RANGE:
                return 0.0
    else:
        while not fails(high := high * STRIDE if high > start else start * 1.25):
            low = high
            if high > start * RANGE:
                return math.inf
    while high > low * ROUGH:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fails(middle) else (middle, high)
    return high
