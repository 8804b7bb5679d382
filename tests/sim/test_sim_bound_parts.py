"""Parts of the bound: shared blocks, memory and context by brute force, rates under steps of the cost models."""

from __future__ import annotations

import math
import random
from itertools import combinations

import numpy as np
import pytest
from tests.sim.bound_cluster import random_trace, trace_of

from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, Cost, StepCost
from twinpool.errors import ConfigError
from twinpool.sim.bound import bound_of
from twinpool.sim.bound_cache import Reuse, reuse_of
from twinpool.sim.bound_context import contexts_of
from twinpool.sim.bound_cost import Amounts, Engine, Shape, Totals
from twinpool.sim.bound_lines import line_below
from twinpool.sim.bound_misses import unfinished
from twinpool.sim.bound_work import Fleet, Slo, least_uncached, offer, uncached_of
from twinpool.sim.profiles import load_profile
from twinpool.sim.trace import Trace

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
