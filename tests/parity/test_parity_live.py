"""The live code on a virtual clock: complete, the same every time, as slow as it must be, and nothing left behind."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from array import array
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from tests.parity.live import LiveRun, Settings, run_live

from twinpool.router.state import Limits
from twinpool.sim.trace import Trace

SPLIT = Settings(roles=(("prefill",), ("prefill",), ("decode",), ("decode",)), blocks=2000, limits=Limits(lease_s=3.0))


def traffic(count: int, rate: float = 6.0, seed: int = 1) -> Trace:
    """Prompts of 30 to 3,000 tokens of eight families that share prefixes, outputs of up to 40."""
    draw = random.Random(seed)
    arrival, prompt, output = array("d"), array("q"), array("q")
    hashes, offsets = array("q"), array("q", [0])
    now = 0.0
    for i in range(count):
        now += draw.expovariate(rate)
        arrival.append(now)
        prompt.append(draw.randint(30, 3000))
        output.append(draw.randint(1, 40))
        family, shared = draw.randrange(8), draw.randint(0, 4)
        for depth in range(prompt[i] // 512):
            hashes.append(100 * family + depth if depth < shared else 1000 * (i + 1) + depth)
        offsets.append(len(hashes))
    return Trace("traffic", 512, arrival, prompt, output, hashes, offsets)


@cache
def run_of_200() -> LiveRun:
    return run_live(traffic(200), SPLIT)


def test_everything_ends_well_and_not_faster_than_the_engines_can() -> None:
    trace, run, cost = traffic(200), run_of_200(), SPLIT.cost
    late = 0
    for i, seen in enumerate(run.requests):
        assert seen.outcome == "ok"
        assert len(seen.tokens) == trace.output[i]
        assert seen.tokens == sorted(seen.tokens)
        assert seen.ended == seen.tokens[-1]
        prefill_s = cost.prefill(trace.prompt[i] - seen.cached, seen.cached, SPLIT.chunk_tokens)
        assert seen.cached <= trace.prompt[i] - 1
        ways = 2 if seen.path == "local" or trace.output[i] == 1 else 4  # a reservation comes before
        first = seen.shown - seen.arrival
        assert first >= prefill_s + ways * SPLIT.latency_s - 1e-9
        steps_s = (trace.output[i] - 1) * cost.decode(1, trace.prompt[i])
        assert seen.ended - seen.arrival >= prefill_s + steps_s + ways * SPLIT.latency_s - 1e-9
        late += first > 2.0 * prefill_s + 0.1
    assert late < 20, "these workers are not busy"


def test_kv_moves_once_and_only_where_it_must() -> None:
    trace, run = traffic(200), run_of_200()
    block_bytes = SPLIT.block_size * SPLIT.token_bytes
    paths = {seen.path for seen in run.requests}
    assert paths == {"split", "local"}
    for i, seen in enumerate(run.requests):
        blocks = -(-trace.prompt[i] // SPLIT.block_size)
        if seen.path == "local" or trace.output[i] == 1:
            assert seen.kv_bytes == 0
        else:
            assert block_bytes <= seen.kv_bytes <= blocks * block_bytes
            assert seen.kv_bytes % block_bytes == 0
            assert seen.prefill != seen.decode
    assert sum(seen.cached for seen in run.requests) > 50_000


def test_where_engines_are_exact_progress_is_told_of_ends_and_misjudged_prefixes_only() -> None:
    trace, run = traffic(200), run_of_200()
    predicted = {say[3]: say[6] for _, _, says in run.log for say in says if say[0] == "SendPrefill"}
    told: dict[int, list[tuple[int, int]]] = {}
    for _, event, _ in run.log:
        if event[0] == "Progressed":
            _, _, attempt, done, cached, *_ = event
            told.setdefault(attempt, []).append((done, cached))
    assert sum(prompt > SPLIT.chunk_tokens for prompt in trace.prompt) > 20
    assert sorted(says[-1][0] for says in told.values()) == sorted(trace.prompt)
    for attempt, says in told.items():
        for _, cached in says[:-1]:
            assert len(says) == 2
            assert cached != predicted[attempt]


def test_a_second_run_is_the_same_to_the_last_bit() -> None:
    assert run_live(traffic(50), SPLIT).digest() == run_live(traffic(50), SPLIT).digest()


@pytest.mark.full
def test_a_run_in_another_process_is_the_same_to_the_last_bit() -> None:
    code = (
        "from tests.parity.test_parity_live import SPLIT, run_live, traffic;"
        "print(run_live(traffic(200), SPLIT).digest())"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == run_of_200().digest(), done.stderr


def test_clients_that_go_leave_nothing() -> None:
    trace = traffic(120, rate=20.0, seed=2)
    gone = {i: trace.arrival[i] + (i % 40) * 0.02 for i in range(0, 120, 2)}
    run = run_live(trace, Settings(roles=SPLIT.roles, blocks=2000, limits=SPLIT.limits, cancels=tuple(gone.items())))
    outcomes = [seen.outcome for seen in run.requests]
    assert outcomes[1::2] == ["ok"] * 60
    cancelled = [i for i, outcome in enumerate(outcomes) if outcome == "CANCELLED"]
    assert len(cancelled) > 20
    assert all(run.requests[i].ended == gone[i] for i in cancelled)


def test_workers_that_die_cost_time_and_no_request() -> None:
    trace = traffic(120, rate=20.0, seed=3)
    roles = (*SPLIT.roles, ("prefill", "decode"))
    dead = ((0, trace.arrival[30] + 0.01), (3, trace.arrival[60] + 0.01))
    run = run_live(trace, Settings(roles=roles, blocks=2000, limits=SPLIT.limits, deaths=dead))
    assert {seen.outcome for seen in run.requests} == {"ok"}
    assert [len(seen.tokens) for seen in run.requests] == list(trace.output)
    assert sum(seen.attempts > 1 for seen in run.requests) >= 2
    lost = [(now, event[1]) for now, event, _ in run.log if event[0] == "WorkerLost"]
    assert lost == [(when + SPLIT.latency_s, worker) for worker, when in dead]


def test_followers_arrive_when_their_turn_comes() -> None:
    base = traffic(6)
    after, think = array("q", [-1, 0, 1, -1, 3, 3]), array("d", [0.0, 1.0, 2.0, 0.0, 0.5, 0.25])
    trace = replace(base, after=after, think=think)
    seen = run_live(trace, SPLIT).requests
    assert seen[0].arrival == base.arrival[0]
    assert seen[2].arrival == seen[1].ended + 2.0
    assert seen[5].arrival == seen[3].ended + 0.25
