"""The bound as a whole: against clusters that draw lots and every policy; its capacity, its deciles, bad input."""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import replace

import numpy as np
import pytest
from tests.sim.bound_cluster import SmallCluster, random_trace, trace_of

from twinpool.cost import LLAMA_70B_H100_TP4, StepCost
from twinpool.errors import ConfigError
from twinpool.router.policy.registry import policy_names
from twinpool.router.pool import UNLOADED_CHUNK
from twinpool.sim.bound import bound, bound_capacity, bound_of, capacity_of, deciles, offer_of
from twinpool.sim.bound_cost import Engine
from twinpool.sim.bound_work import Fleet, Slo, offer
from twinpool.sim.replay import replay
from twinpool.sim.settings import Failure, Settings
from twinpool.sim.trace import Trace

SLOW = StepCost(c0=0.02, a=0.004, b=1e-5, d0=0.04, d1=0.002, d2=4e-5)  # a small engine, so that steps are few


def worst_decile(trace: Trace, met: set[int]) -> float:
    """Share of the tenth of prompt lengths of which the smallest share met its limits."""
    return min(len(met.intersection(some.tolist())) / len(some) for some in deciles(trace.prompt) if len(some))


def contest(instances: int, seed: int) -> tuple[int, int]:
    """Random instances on random clusters; (misses of the bound, misses of the policies), never the other way round."""
    rng = random.Random(seed)
    totals = [0, 0]
    for _ in range(instances):
        trace = random_trace(rng, rng.choice((3, 6, 10, 20, 30)), rng.choice((0.05, 0.3, 1.0)))
        engine = Engine(rng.choice((16, 48, 96)), rng.choice((2, 8)), rng.choice((0, 300, 400, 2000)))
        pools = rng.choice(((1, 1, 0), (2, 1, 0), (0, 0, 1), (0, 0, 3), (1, 0, 1), (1, 1, 1)))
        fleet = Fleet(*pools, engine=engine)
        slo = Slo(rng.choice((0.3, 1.0)), rng.choice((0.0, 2.0)), rng.choice((0.08, 0.15, 0.4)))
        if engine.kv_tokens and max(p + o for p, o in zip(trace.prompt, trace.output, strict=True)) > engine.kv_tokens:
            continue
        made = offer(trace, SLOW, fleet, slo)
        least = bound_of(made, 1.0).misses
        unloaded = [SLOW.prefill(tokens, 0, UNLOADED_CHUNK) for tokens in trace.prompt]
        met = SmallCluster(trace, SLOW, fleet, rng).run(slo, unloaded)
        assert len(trace) - len(met) >= least
        worst = worst_decile(trace, met)
        assert worst == 0.0 or least <= bound_of(made, 1.0, worst).misses <= len(trace) - len(met)
        totals[0] += least
        totals[1] += len(trace) - len(met)
    return totals[0], totals[1]


def test_no_cluster_that_draws_lots_beats_it() -> None:
    least, missed = contest(40, 6)
    assert 0.2 * missed < least


@pytest.mark.full
@pytest.mark.timeout(600)
def test_no_cluster_beats_it_on_a_thousand_instances() -> None:
    least, missed = contest(1000, 7)
    assert 0.2 * missed < least


def race(instances: int, seed: int) -> None:
    """Every policy there is, on random clusters in the simulator: none has fewer misses than the bound."""
    rng = random.Random(seed)
    for _ in range(instances):
        trace = random_trace(rng, rng.choice((4, 8, 20, 40)), rng.choice((0.005, 0.02, 0.1)), rng.choice((16, 256)))
        settings = Settings(
            *rng.choice(((1, 1, 0), (2, 1, 0), (0, 0, 1), (0, 0, 3), (1, 0, 1), (2, 2, 0))),
            policy=rng.choice(policy_names()), chunk_tokens=rng.choice((256, 2048)), max_batch=rng.choice((4, 64)),
            kv_tokens=rng.choice((0, 8000)), closed_form=rng.random() < 0.5,
            ttft_s=rng.choice((0.03, 0.1, 0.5)), ttft_factor=rng.choice((0.0, 1.0, 2.0)),
            itl_s=rng.choice((0.017, 0.025, 0.05)),
        )  # fmt: skip
        columns = replay(trace, settings).columns
        met = set(np.flatnonzero(columns.attained()).tolist())
        made, missed, worst = offer_of(trace, settings), len(trace) - len(met), worst_decile(trace, met)
        least = bound_of(made, 1.0).misses
        assert least <= missed, settings
        assert worst == 0.0 or least <= bound_of(made, 1.0, worst).misses <= missed, settings
        assert bound(trace, settings, cached=columns.cached).misses <= missed, settings


def test_no_policy_beats_it_in_the_simulator() -> None:
    race(15, 9)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_no_policy_beats_it_on_a_thousand_instances() -> None:
    race(1000, 10)


def steady(n: int, per_s: float, seed: int = 8) -> Trace:
    rng = random.Random(seed)
    arrival = sorted(rng.random() * n / per_s for _ in range(n))
    prompt = [min(30_000, int(rng.lognormvariate(7.0, 1.0)) + 1) for _ in range(n)]
    return trace_of(arrival, prompt, [rng.randint(1, 200) for _ in range(n)])


def test_capacity_is_where_the_bound_meets_the_target() -> None:
    trace, settings = steady(300, 5.0), Settings(prefill=2, decode=2, closed_form=True)
    found = bound_capacity(trace, settings, 0.97)
    assert bound(trace, settings, found).share < 0.97
    assert bound(trace, settings, found / 1.02).share >= 0.97
    assert bound_capacity(trace, settings, 0.9) > found
    assert bound_capacity(trace, Settings(prefill=3, decode=3, closed_form=True), 0.97) > 1.3 * found
    assert bound_capacity(trace, Settings(prefill=2, decode=2), 0.97) == pytest.approx(found, rel=0.15)


def test_little_memory_lowers_the_capacity() -> None:
    turns = [c for new in range(300) for c in (new, new - 60, new - 120) if c >= 0]
    n = len(turns)
    chains = [[1000 * c + k for k in range(250)] for c in turns]
    trace = trace_of([0.2 * i for i in range(n)], [4000] * n, [2] * n, chains)
    settings = Settings(both=2, prefill=0, decode=0, closed_form=True)
    capacities = [bound_capacity(trace, replace(settings, kv_tokens=kv), 0.95) for kv in (400_000, 100_000, 5_000)]
    assert capacities[0] > 1.2 * capacities[1]
    assert capacities[1] > 1.2 * capacities[2]


def test_deciles_are_those_of_a_summary() -> None:
    for n in (7, 10, 123):
        trace = steady(n, 60.0)
        result = replay(trace, Settings(prefill=1, decode=1, policy="round_robin"))
        attained = result.columns.attained()
        shares = [float(attained[some].mean()) if len(some) else None for some in deciles(trace.prompt)]
        assert result.figures()["attainment_by_decile"] == shares
        assert n < 123 or min(share for share in shares if share is not None) < 1.0


def test_asking_for_every_decile_lowers_the_bound() -> None:
    trace, settings = steady(1000, 5.0), Settings(prefill=0, decode=0, both=4, closed_form=True)
    plain = bound_capacity(trace, settings, 0.95)
    found = [bound_capacity(trace, settings, 0.95, share) for share in (0.01, 0.8, 0.9, 0.95)]
    assert found[0] == plain
    assert plain > 1.01 * found[2] > 1.01 * found[3]
    assert found == sorted(found, reverse=True)
    assert bound(trace, settings, found[3], 0.95).misses > 50 >= bound(trace, settings, found[3]).misses
    nobody = bound(trace, settings, 30.0, 0.9)
    assert (nobody.share, nobody.misses) == (0.0, 1000)


def test_who_finds_less_in_caches_has_a_lower_bound() -> None:
    chains = [[1000 * (i % 40) + k for k in range(250)] for i in range(300)]
    trace = trace_of([0.2 * i for i in range(300)], [4100] * 300, [10] * 300, chains)
    settings = Settings(both=2, prefill=0, decode=0, closed_form=True)
    first = [0] * 40 + [4000] * 260  # as an unlimited cache would have it
    nothing = [0] * 300
    plain, all_found, none_found = [bound_capacity(trace, settings, 0.97, None, c) for c in (None, first, nothing)]
    assert all_found == pytest.approx(plain, rel=0.01)
    assert none_found < 0.6 * plain
    assert bound(trace, settings, plain / 1.1, None, nothing).share < 0.97 <= bound(trace, settings, plain / 1.1).share


def test_hopeless_requests_count_in_their_decile() -> None:
    trace = trace_of([0.0] * 20, [100] * 19 + [500_000], [1] * 20)
    settings = Settings(prefill=1, decode=1, closed_form=True)
    assert bound(trace, settings).misses == bound(trace, settings, 1.0, 0.5).misses == 1
    assert bound(trace, settings, 1.0, 0.51).misses == 20
    assert bound_capacity(trace, settings, 0.9, 0.51) == 0.0


def test_no_speed_above_the_capacity_is_allowed() -> None:
    chains = [[1000 * (i % 40) + k for k in range(250)] for i in range(300)]
    trace = trace_of([0.2 * i for i in range(300)], [4000] * 300, [40] * 300, chains)
    for kv_tokens in (400_000, 20_000):
        settings = Settings(both=2, prefill=0, decode=0, closed_form=True, kv_tokens=kv_tokens)
        found = bound_capacity(trace, settings, 0.97)
        assert bound(trace, settings, found / 1.02).share >= 0.97
        for times in (1.0, 1.01, 1.1, 1.5, 3.0, 100.0):
            assert bound(trace, settings, found * times).share < 0.97


def test_workers_without_a_role_do_not_help() -> None:
    trace, engine = steady(300, 5.0), Engine(kv_tokens=400_000)
    found = [
        capacity_of(offer(trace, LLAMA_70B_H100_TP4, fleet, Slo()), 0.95)
        for fleet in (Fleet(2, 2, engine=engine), Fleet(2, 9, engine=engine), Fleet(4, 0, 4, engine))
    ]
    assert found[0] == pytest.approx(found[1], rel=0.01)
    assert found[2] > 2.0 * found[0]


def test_what_no_speed_can_change() -> None:
    settings = Settings(prefill=1, decode=1, closed_form=True)
    one = trace_of([0.0], [1000], [10])
    assert bound(one, settings).share == 1.0
    assert bound(one, settings).exact
    assert bound_capacity(one, settings, 1.0) == math.inf
    short = Settings(prefill=1, decode=1, closed_form=True, ttft_s=0.01, ttft_factor=0.0)
    assert bound(one, short).hopeless == bound(one, short).misses == 1
    assert bound_capacity(one, short, 1.0) == 0.0
    slow_tokens = Settings(prefill=1, decode=1, closed_form=True, itl_s=0.01)
    assert bound(one, slow_tokens).hopeless == 1  # a decode step alone takes longer
    assert bound(trace_of([0.0], [1000], [2]), slow_tokens).hopeless == 0  # the one gap can be hidden
    assert bound(trace_of([0.0], [500_000], [1]), settings).hopeless == 1  # larger than a worker's memory


def test_followers_of_a_closed_loop_may_come_at_any_time() -> None:
    flood = trace_of([0.0] * 40, [8000] * 40, [1] * 40)
    settings = Settings(prefill=1, decode=1, closed_form=True)
    assert bound(flood, settings).misses > 20
    after, think = array("q", [-1] + [0] * 39), array("d", [0.0] * 40)
    loop = Trace(**{name: getattr(flood, name) for name in ("name", "block_tokens", "arrival", "prompt", "output",
                 "hashes", "offsets")}, after=after, think=think)  # fmt: skip
    assert bound(loop, settings).misses == 0


def test_workers_that_change_roles_may_do_everything() -> None:
    trace = steady(20, 5.0)
    settings = Settings(prefill=2, decode=2)
    changed = Settings(prefill=2, decode=2, failures=(Failure(1.0, "both", "p0"),))
    assert len(offer_of(trace, settings).demands) == len(offer_of(trace, changed).demands) == 3
    decode = [offer_of(trace, given).demands[2].seconds.sum() for given in (settings, changed)]
    assert decode[0] == pytest.approx(2.0 * decode[1])  # four workers may decode in place of two


def test_bad_input_is_refused() -> None:
    trace, settings = steady(5, 5.0), Settings()
    with pytest.raises(ConfigError, match="no requests"):
        bound(trace_of([], [], []), settings)
    with pytest.raises(ConfigError, match="target"):
        bound_capacity(trace, settings, 1.5)
    with pytest.raises(ConfigError, match="target"):
        bound(trace, settings, 1.0, 0.0)
    with pytest.raises(ConfigError, match="speed"):
        bound(trace, settings, 0.0)
    with pytest.raises(ConfigError, match="may decode"):
        Fleet(prefill=3)
