"""The bound: against shared blocks by brute force, steps of the cost models, clusters that draw lots, and policies."""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from tests.sim.bound_cluster import SmallCluster

from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, Cost, StepCost
from twinpool.errors import ConfigError
from twinpool.router.policy.registry import policy_names
from twinpool.router.pool import UNLOADED_CHUNK
from twinpool.sim.bound import bound, bound_capacity, bound_of, capacity_of, deciles, offer_of
from twinpool.sim.bound_cache import Reuse, reuse_of
from twinpool.sim.bound_context import contexts_of
from twinpool.sim.bound_cost import Amounts, Engine, Shape, Totals
from twinpool.sim.bound_lines import line_below
from twinpool.sim.bound_misses import unfinished
from twinpool.sim.bound_work import Fleet, Slo, least_uncached, offer, uncached_of
from twinpool.sim.profiles import load_profile
from twinpool.sim.replay import replay
from twinpool.sim.settings import Failure, Settings
from twinpool.sim.trace import Trace, no_hashes

SLOW = StepCost(c0=0.02, a=0.004, b=1e-5, d0=0.04, d1=0.002, d2=4e-5)  # a small engine, so that steps are few


def trace_of(
    arrival: list[float], prompt: list[int], output: list[int], blocks: list[list[int]] | None = None, size: int = 16
) -> Trace:
    n = len(arrival)
    hashes, offsets = array("q"), no_hashes(n)
    for i, ids in enumerate(blocks or []):
        hashes.extend(ids)
        offsets[i + 1] = len(hashes)
    return Trace(
        "made", size if blocks else 0, array("d", arrival), array("q", prompt), array("q", output), hashes, offsets
    )


def random_trace(rng: random.Random, n: int, gap_s: float, size: int = 16) -> Trace:
    """Prompts that branch off each other: a tree of blocks."""
    arrival, prompt, output, now = [], [], [], 0.0
    chains: list[list[int]] = []
    for i in range(n):
        arrival.append(now)
        now += rng.expovariate(1.0 / gap_s) * (rng.random() < 0.7)
        parent = rng.choice(chains)[: rng.randint(0, 6)] if chains and rng.random() < 0.6 else []
        chains.append(parent + [1000 * i + k for k in range(rng.randint(0, 8))])
        prompt.append(max(1, len(chains[-1]) * size + rng.randint(0, size - 1)))
        output.append(rng.choice((1, 2, 3, rng.randint(1, 30))))
    return trace_of(arrival, prompt, output, chains, size)


# --- work ---------------------------------------------------------------------------------------------------------


def test_every_block_is_counted_once_for_whoever_brings_it() -> None:
    trace = trace_of([0.0, 1.0, 2.0], [40, 48, 32], [1, 1, 1], [[1, 2], [1, 3, 4], [1, 2]])
    uncached = least_uncached(trace)
    assert uncached.tokens.tolist() == [40, 32, 1]  # of the third only its last token is sure to be computed
    assert uncached.places.tolist() == [40 * 20.0, 32 * (16 + 16.0), 31.5]
    assert uncached.sharers.tolist() == [3, 1, 1]


def test_what_is_not_found_in_caches_is_computed_for_its_own_request() -> None:
    trace = trace_of([0.0, 1.0, 2.0], [40, 48, 32], [1, 1, 1], [[1, 2], [1, 3, 4], [1, 2]])
    uncached = uncached_of(trace, [0, 16, 32])
    assert uncached.tokens.tolist() == [40, 32, 1]
    assert uncached.places.tolist() == [40 * 20.0, 32 * (16 + 16.0), 31.5]
    assert uncached.sharers.tolist() == [1, 1, 1]
    for wrong in ([0, 16], [0, 16, 33], [-1, 0, 0]):
        with pytest.raises(ConfigError, match="cached"):
            uncached_of(trace, wrong)


def served_at_best(trace: Trace, seconds: float, limit: float) -> int:
    """Most requests of which one server can do all blocks in time, each block once: all subsets tried."""
    n, size = len(trace), trace.block_tokens
    first: dict[int, float] = {}
    for i in range(n):
        for block in trace.block_hashes(i):
            first.setdefault(block, trace.arrival[i])
    for count in range(n, 0, -1):
        for served in combinations(range(n), count):
            due: dict[int, float] = {}
            pieces = []
            for i in served:
                end = trace.arrival[i] + limit
                for block in trace.block_hashes(i):
                    due.setdefault(block, end)
                own = trace.prompt[i] - size * len(trace.block_hashes(i))
                pieces.append((trace.arrival[i], end, own * seconds))
            pieces += [(first[block], end, size * seconds) for block, end in due.items()]
            if unfinished(*zip(*sorted(pieces), strict=True)) <= 1e-9:
                return count
    return 0


def test_counting_blocks_for_their_first_request_never_counts_too_much() -> None:
    """Brute force of the problem itself: a served set shares its blocks, whoever came first."""
    rng = random.Random(4)
    cost = StepCost(c0=0.0, a=0.01, b=0.0, d0=0.0, d1=0.0, d2=0.0)
    fleet = Fleet(both=1, engine=Engine(chunk_tokens=64, max_batch=4))
    misses = 0
    for _ in range(60):
        trace = random_trace(rng, rng.randint(1, 6), 0.3)
        trace = trace_of(list(trace.arrival), [p + 1 for p in trace.prompt], [1] * len(trace),
                         [trace.block_hashes(i) for i in range(len(trace))])  # fmt: skip
        found = bound_of(offer(trace, cost, fleet, Slo(1.0, 0.0, 1.0)), 1.0)
        assert found.misses <= len(trace) - served_at_best(trace, 0.01, 1.0)
        misses += found.misses
    assert misses > 15


# --- memory -------------------------------------------------------------------------------------------------------


def least_again(reuse: Reuse, arrival: list[float], limit: float, memory: float) -> float:
    """Fewest tokens computed once more: every choice of pairs to keep tried, whole pairs only."""
    spans = [
        (arrival[i] + limit, arrival[j], tokens)
        for i, j, tokens in zip(reuse.first, reuse.second, reuse.tokens, strict=True)
        if arrival[j] > arrival[i] + limit
    ]
    best = math.inf
    for kept in range(1 << len(spans)):
        chosen = [span for bit, span in enumerate(spans) if kept >> bit & 1]
        if all(sum(s[2] for s in chosen if s[0] <= when < s[1]) <= memory for when, _, _ in chosen):
            best = min(best, sum(span[2] for bit, span in enumerate(spans) if not kept >> bit & 1))
    return best


def test_no_choice_of_what_to_keep_computes_less_again() -> None:
    rng = random.Random(11)
    forced = near = 0.0
    for _ in range(200):
        trace = random_trace(rng, rng.randint(3, 9), 2.0)
        reuse = reuse_of(trace, np.arange(len(trace)))
        memory, limit = 16.0 * rng.randint(1, 8), rng.choice((0.5, 1.0))
        found = reuse.pairs(np.asarray(trace.arrival), np.full(len(trace), limit), memory, 1.0)
        least = least_again(reuse, list(trace.arrival), limit, memory)
        bounded = 0.0 if found is None else found.seconds.sum() - found.credit
        assert bounded <= least + 1e-9
        forced, near = forced + least, near + max(0.0, bounded)
    assert near > 0.3 * forced > 0.0


def test_blocks_that_cannot_wait_in_memory_are_work_again() -> None:
    """Two conversations in turns, each with all memory can hold."""
    turns = 20
    trace = trace_of([5.0 * i for i in range(turns)], [640] * turns, [1] * turns,
                     [list(range(100 * (i % 2), 100 * (i % 2) + 40)) for i in range(turns)])  # fmt: skip
    reuse = reuse_of(trace, np.arange(turns))
    assert reuse.tokens.tolist() == [640.0] * (turns - 2)
    arrival, limit = np.asarray(trace.arrival), np.full(turns, 1.0)
    assert reuse.pairs(arrival, limit, 1280.0, 1.0) is None  # both fit
    half = reuse.pairs(arrival, limit, 640.0, 1.0)
    assert half is not None
    assert (half.seconds.sum() - half.credit) / reuse.tokens.sum() == pytest.approx(0.43, abs=0.05)
    nothing = reuse.pairs(arrival, limit, 1.0, 1.0)
    assert nothing is not None
    assert (nothing.seconds.sum() - nothing.credit) / reuse.tokens.sum() > 0.99


def test_little_memory_lowers_the_capacity() -> None:
    turns = [c for new in range(300) for c in (new, new - 60, new - 120) if c >= 0]
    n = len(turns)
    chains = [[1000 * c + k for k in range(250)] for c in turns]
    trace = trace_of([0.2 * i for i in range(n)], [4000] * n, [2] * n, chains)
    settings = Settings(both=2, prefill=0, decode=0, closed_form=True)
    capacities = [bound_capacity(trace, replace(settings, kv_tokens=kv), 0.95) for kv in (400_000, 100_000, 5_000)]
    assert capacities[0] > 1.2 * capacities[1]
    assert capacities[1] > 1.2 * capacities[2]


# --- context ------------------------------------------------------------------------------------------------------


def most_counted(trace: Trace, window: list[float], steps: list[int]) -> float:
    """Sum over blocks of the most decode steps of requests of which no two windows overlap: all choices tried."""
    users: dict[int, list[int]] = {}
    for i in range(len(trace)):
        for block in trace.block_hashes(i):
            users.setdefault(block, []).append(i)
    total = 0
    for sharing in users.values():
        choices = [some for count in range(len(sharing) + 1) for some in combinations(sharing, count)]
        apart = [
            some for some in choices
            if all(trace.arrival[i] + window[i] < trace.arrival[j] for i, j in combinations(some, 2))
        ]  # fmt: skip
        total += max(sum(steps[i] for i in some) for some in apart)
    return float(total * trace.block_tokens)


def test_no_step_counts_a_block_twice_and_none_could_count_more() -> None:
    rng = random.Random(12)
    shared = 0
    for _ in range(100):
        trace = random_trace(rng, rng.randint(2, 9), 2.0)
        n = len(trace)
        window, steps = [rng.choice((0.5, 1.0, 5.0, 20.0)) for _ in range(n)], [rng.randint(1, 9) for _ in range(n)]
        contexts = contexts_of(trace, np.arange(n))
        counted = contexts.counted(np.asarray(trace.arrival), np.array(window), np.array(steps, dtype=np.float64))
        own = [trace.prompt[i] - 16 * len(trace.block_hashes(i)) for i in range(n)]
        blocks = float(np.dot(counted - own, steps))
        assert blocks == most_counted(trace, window, steps)
        for speed in (1.0, 0.7, 0.1):  # in what is in memory at any time, at the speed and at lower ones
            arrival = [at / speed for at in trace.arrival]
            for now in arrival:
                there = [i for i in range(n) if arrival[i] <= now <= arrival[i] + window[i]]
                distinct = len({block for i in there for block in trace.block_hashes(i)})
                assert sum(counted[i] for i in there) <= 16 * distinct + sum(own[i] for i in there)
                shared += sum(16 * len(trace.block_hashes(i)) for i in there) > 16 * distinct
        slower = contexts.counted(np.asarray(trace.arrival) / 0.1, np.array(window), np.array(steps, dtype=np.float64))
        assert np.dot(slower - own, steps) >= blocks
    assert shared > 300


def test_a_block_is_counted_for_those_that_never_meet() -> None:
    trace = trace_of([0.0, 1.0, 10.0], [40, 40, 70], [9, 9, 9], [[1, 2], [1, 2], [1, 2, 3, 4]])
    counted = contexts_of(trace, np.arange(3)).counted
    arrival, window = np.asarray(trace.arrival), np.full(3, 5.0)
    assert counted(arrival, window, np.array([8.0, 9.0, 8.0])).tolist() == [8, 40, 70]
    assert counted(arrival, window, np.array([9.0, 8.0, 8.0])).tolist() == [40, 8, 70]
    assert counted(0.0 * arrival, window, np.array([9.0, 8.0, 8.0])).tolist() == [40, 8, 38]


# --- cost ---------------------------------------------------------------------------------------------------------


def test_a_line_is_under_all_points_and_touches() -> None:
    x, y = np.array([1.0, 2.0, 4.0]), np.array([3.0, 3.5, 7.0])
    line = line_below(x, y, 3.0)
    assert np.all(line.const + line.slope * x <= y + 1e-12)
    assert line.const + line.slope * 3.0 == pytest.approx(5.25, rel=1e-5)
    assert line_below(x, y, 100.0).const >= 0.0


COSTS: dict[str, Cost] = {
    "closed form": LLAMA_70B_H100_TP4,
    "8b": LLAMA_8B_H100_TP1,
    "grid": load_profile("h100_sxm/llama-3.1-70b/tp4").cost,
    "other grid": load_profile("b200_sxm/llama-3.1-8b/tp1").cost,
}


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_no_step_is_cheaper_than_the_sum_of_its_rates(cost: Cost) -> None:
    rng = random.Random(5)
    engine = Engine(chunk_tokens=512, max_batch=32, kv_tokens=200_000)
    shape = Shape(cost, engine, 40_000)
    for mean in (300.0, 9000.0):
        totals = Totals(1e6, 1e6 * mean, 2e5, 2e5 * mean, 1e5 * mean, 544)
        for floor in shape._floors(totals):
            for _ in range(10):
                step, lengths, lasts = random_step(rng, engine)
                chunks, batch, context = step
                alone = min(context, engine.kv_tokens)
                least = floor.sequence * batch + floor.context * context + floor.alone * alone
                for (tokens, cached), length, last in zip(chunks, lengths, lasts, strict=True):
                    attended = floor.line.const * tokens + floor.line.slope * tokens * (cached + tokens / 2)
                    lost = float(floor.chunks.lost(floor.line, np.array([float(length)]))[0]) if last else 0.0
                    least += floor.token * tokens + attended - lost
                assert least <= cost.step(*step) * (1.0 + 1e-9)


def random_step(
    rng: random.Random, engine: Engine
) -> tuple[tuple[list[tuple[int, int]], int, int], list[int], list[bool]]:
    """(chunks, batch, context), length of each chunk's prompt, whether it ends it: at most one does not."""
    room = rng.choice((1, 16, 40, engine.chunk_tokens, engine.chunk_tokens))
    chunks: list[tuple[int, int]] = []
    lengths, lasts = [], []
    while room and len(chunks) < 6 and rng.random() < 0.9:
        tokens, cached = rng.randint(1, room), rng.choice((0, rng.randint(0, 200), rng.randint(0, 39_000)))
        last = rng.random() < 0.7
        chunks.append((tokens, cached))
        lengths.append(cached + tokens + (0 if last else 100))
        lasts.append(last)
        room -= tokens
        if not last:
            break
    batch = rng.choice((0, 1, rng.randint(1, engine.max_batch))) if chunks else 1
    return (chunks, batch, sum(rng.randint(1, 40_000) for _ in range(batch))), lengths, lasts


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_floors_are_near_what_a_prefill_pool_takes(cost: Cost) -> None:
    """A bound that is valid but far away would be of no use."""
    prompt = np.array([500.0, 2000.0, 9000.0, 30_000.0])
    ones = np.ones(4)
    need = Amounts(prompt, prompt, prompt * prompt / 2.0, ones, ones, ones, ones)
    shape = Shape(cost, Engine(), 40_000)
    alone = [cost.prefill(int(tokens), 0, 2048) for tokens in prompt]
    assert 0.95 * sum(alone) < shape.prefill(need).prefill.sum() <= sum(alone) * (1.0 + 1e-9)
    latency = shape.latency(need.tokens, need.places)
    assert np.all(latency <= np.array(alone) * (1.0 + 1e-9))
    assert np.all(latency > 0.85 * np.array(alone))


# --- the whole ----------------------------------------------------------------------------------------------------


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
