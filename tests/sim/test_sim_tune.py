"""The analytic ratio, the search for the best split on made-up clusters, and both on simulated ones."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.real_traces import AZURE, real_trace
from tests.sim.search_traffic import traffic

from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.ratio import ratio_of
from twinpool.sim.readers import read_trace
from twinpool.sim.search import Job, Runner, Trial, allowed_misses, capacities, nearest, runner, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, slice_time
from twinpool.sim.tune import CHUNKS, EDGE, busiest, tune

SMALL = Settings(profile="h100_sxm/llama-3.1-8b/tp1")
N = 400
FIGURES = dict.fromkeys(
    ("goodput_rps", "goodput_rps_per_gpu", "attainment", "cost_per_million_tokens", "tokens_per_joule"), 1.0
)

# --- the analytic ratio ----------


def constant(n: int, prompt: int, output: int) -> Trace:
    trace = traffic(n)
    return replace(trace, prompt=array("q", [prompt] * n), output=array("q", [output] * n))


def test_what_one_worker_carries_by_hand() -> None:
    base = replace(SMALL, closed_form=True, max_batch=100)
    profile = load_profile(base.profile)
    ratio = ratio_of(constant(50, 3000, 101), base)
    assert ratio.prefill == pytest.approx(0.95 / profile.fit.prefill(3000, 0, 2048))
    context = round(3000 + 101 / 2)
    batch = max(b for b in range(1, 101) if profile.fit.decode(b, b * context) <= 0.045)
    assert ratio.decode == pytest.approx(0.9 * batch / (100 * profile.fit.decode(batch, batch * context)))
    assert ratio.link == pytest.approx(0.8 * profile.link_bytes_per_s / (3000 * profile.kv_bytes_per_token))
    tight = ratio_of(constant(50, 3000, 101), replace(base, kv_tokens=10 * context))
    assert tight.decode == pytest.approx(0.9 * 9 / (100 * profile.fit.decode(9, 9 * context)))


def test_answers_of_one_token_need_no_decode_worker() -> None:
    ratio = ratio_of(constant(10, 1000, 1), SMALL)
    assert ratio.decode == math.inf
    assert ratio.rate(2, 6) == min(2 * ratio.prefill, 2 * ratio.link)


def test_prefixes_that_were_seen_cost_no_prefill() -> None:
    trace = constant(10, 1024, 10)
    same = replace(trace, block_tokens=512, hashes=array("q", [1, 2] * 10), offsets=array("q", range(0, 22, 2)))
    other = replace(same, hashes=array("q", range(20)))
    assert ratio_of(other, SMALL).prefill == ratio_of(trace, SMALL).prefill
    assert ratio_of(same, SMALL).prefill > 2 * ratio_of(trace, SMALL).prefill


def test_every_split_is_in_the_order_once() -> None:
    order = ratio_of(traffic(), SMALL).order(12)
    assert sorted(order) == list(range(1, 12))
    ratio = ratio_of(traffic(), SMALL)
    rates = [ratio.rate(p, 12 - p) for p in order]
    assert rates == sorted(rates, reverse=True)


# --- the part that is looked at first ----------


def paced(gaps: Sequence[float]) -> Trace:
    n = len(gaps)
    arrival = array("d", [sum(gaps[: i + 1]) for i in range(n)]) if n < 100 else array("d")
    if not arrival:
        now = 0.0
        for gap in gaps:
            now += gap
            arrival.append(now)
    zeros = array("q", bytes(8 * (n + 1)))
    return Trace("paced", 0, arrival, array("q", [100] * n), array("q", [10] * n), array("q"), zeros)


def test_the_busiest_part() -> None:
    gaps = [1.0] * 8000 + [0.25] * 2000 + [1.0] * 6000
    assert busiest(paced(gaps), 100.0) == (8000.0, 8500.0)
    longer = busiest(paced(gaps), 700.0)  # an eighth takes 500 s, a sixth 1,166
    assert longer is not None
    assert longer[1] - longer[0] == pytest.approx(500 + 666)
    assert busiest(paced(gaps), 1e5) is None
    assert busiest(paced(gaps[:7000]), 1.0) is None
    none = array("q", [-1] * len(gaps))
    assert busiest(replace(paced(gaps), after=none, think=array("d", gaps)), 100.0) is None


# --- made-up clusters ----------


class Clusters:
    """In place of a ``Runner``: each split and chunk size has the capacity, a place on the grid, that is made up."""

    processes = 2

    def __init__(self, trace: Trace, capacity_of: Callable[[int, int], int]) -> None:
        self.trace = trace
        self.capacity_of = capacity_of
        self.jobs: list[Job] = []

    def trials(self, jobs: Sequence[Job]) -> list[Trial]:
        self.jobs += jobs
        return [self.trial(job) for job in jobs]

    def trial(self, job: Job) -> Trial:
        over = nearest(job.speed) - self.capacity_of(job.settings.prefill, job.settings.chunk_tokens)
        n = len(self.trace if job.window is None else slice_time(self.trace, *job.window))
        allowed = allowed_misses(n, job.target)
        misses = min(n, round(allowed * 2.0 ** min(20.0, over / 6)))
        return (
            Trial(n, min(misses, allowed), figures=FIGURES)
            if over <= 0
            else Trial(n, allowed + 1, allowed / max(allowed, misses))
        )


def tuned(made: Clusters, gpus: int = 12) -> dict[str, Any]:
    return tune(cast(Runner, made), made.trace, SMALL, gpus, 0.99).figures()


OPEN = traffic(N)


@settings(deadline=None)
@given(st.lists(st.integers(-200, 400), min_size=11, max_size=11))
def test_no_split_is_better_whatever_the_landscape(heights: list[int]) -> None:
    """Peaks anywhere, as many as there may be."""
    made = Clusters(OPEN, lambda prefill, chunk: heights[prefill - 1] - (chunk != 2048) * 50)
    found = tuned(made)
    best = heights[found["prefill"] - 1]
    assert best >= max(heights) - EDGE
    assert found["capacity"] == speed_of(best)
    assert {each["prefill"] for each in found["tried"]} == set(range(1, 12))
    assert found["runs"] == len(made.jobs)
    around = {(each["prefill"], each["chunk_tokens"]): each for each in found["neighbours"]}
    for (prefill, chunk), each in around.items():
        true = heights[prefill - 1] - (chunk != 2048) * 50
        margin = 1 - speed_of(true) / speed_of(best)
        most = 1.0 if each["margin_at_most"] is None else each["margin_at_most"]
        assert each["margin_at_least"] <= margin + 1e-5 <= most + 2e-5
        assert most - each["margin_at_least"] < 0.1 or best - true > 32
    wanted = {(p, found["chunk_tokens"]) for p in (found["prefill"] - 1, found["prefill"] + 1) if 1 <= p <= 11}
    assert wanted < set(around)


@settings(deadline=None)
@given(st.integers(1, 11), st.sampled_from(CHUNKS), st.integers(-1, 1))
def test_chunk_sizes_and_splits_that_depend_on_each_other(peak: int, chunk: int, lean: int) -> None:
    """The best split moves with the chunk size: once one wins, the splits are tried again."""
    wanted = CHUNKS.index(chunk)

    def height(prefill: int, tokens: int) -> int:
        place = CHUNKS.index(tokens)
        return 200 - 30 * abs(place - wanted) - 10 * abs(prefill - peak - lean * (place - wanted))

    found = tuned(Clusters(OPEN, height))
    assert height(found["prefill"], found["chunk_tokens"]) >= 200 - EDGE


def test_a_part_that_misleads_is_overruled_by_the_whole() -> None:
    trace = paced([1.0] * 20_000)
    inside = {1: 100, 2: 110, 3: 105, 4: 60}
    whole = {1: 100, 2: 140, 3: 170, 4: 300}  # what is far off on the part is not tried on the whole: 4 stays unseen

    class Parted(Clusters):
        def trial(self, job: Job) -> Trial:
            heights = inside if job.window is not None else whole
            self.capacity_of = lambda prefill, chunk: heights[prefill] - 100 * (chunk != 2048)
            return super().trial(job)

    made = Parted(trace, lambda prefill, chunk: 0)
    found = tune(cast(Runner, made), trace, SMALL, 5, 0.99).figures()
    assert found["part_s"] is not None
    assert (found["prefill"], found["capacity"]) == (3, speed_of(170))
    assert {each["prefill"] for each in found["tried"]} == {1, 2, 3}
    assert {each["prefill"] for each in found["tried_on_part"]} == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("gpus", "profile", "sentence"),
    [
        (1, SMALL.profile, "give --gpus 2 or more"),
        (7, "h100_sxm/llama-3.1-70b/tp4", "a worker of h100_sxm/llama-3.1-70b/tp4 has 4 GPUs"),
    ],
)
def test_too_few_gpus(gpus: int, profile: str, sentence: str) -> None:
    made = Clusters(OPEN, lambda prefill, chunk: 0)
    with pytest.raises(ConfigError, match=sentence):
        tune(cast(Runner, made), OPEN, replace(SMALL, profile=profile), gpus, 0.99)


def test_no_split_has_a_capacity() -> None:
    made = Clusters(OPEN, lambda prefill, chunk: -(10**6))
    with pytest.raises(ConfigError, match="these workers cannot"):
        tune(cast(Runner, made), OPEN, SMALL, 3, 0.99)


# --- simulated clusters ----------


def test_two_workers_have_one_split() -> None:
    trace = traffic(60, rate=8.0)
    with runner(trace, 2) as made:
        found = tune(made, trace, Settings(), 9, 0.9)
    figures = found.figures()
    assert (figures["prefill"], figures["decode"], figures["gpus_per_worker"]) == (1, 1, 4)
    assert figures["attainment"] >= 0.9
    assert figures["cost_per_million_tokens"] > 0
    assert figures["tokens_per_joule"] > 0
    assert {each["chunk_tokens"] for each in figures["tried"]} == set(CHUNKS)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("gpus", "profile"), [(16, Settings().profile), (4, SMALL.profile)])
def test_within_three_percent_of_every_split_on_the_azure_trace(gpus: int, profile: str) -> None:
    trace, _ = read_trace(real_trace(AZURE))
    base = Settings(profile=profile)
    with runner(trace) as made:
        found = tune(made, trace, base, gpus, 0.99)
        workers = gpus // load_profile(profile).gpus
        chunk = found.best.chunk_tokens
        every = [replace(base, prefill=p, decode=workers - p, chunk_tokens=chunk) for p in range(1, workers)]
        best = max(each.speed for each in capacities(made, every, 0.99, start=found.capacity, tolerance=0.01))
    assert found.capacity >= 0.97 * best
