"""The capacity search: its grid, its brackets on made-up and on simulated clusters, its processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.search_traffic import CLUSTER, traffic

from twinpool.errors import ConfigError, TwinpoolError
from twinpool.sim.replay import replay
from twinpool.sim.search import (
    FARTHEST,
    Job,
    Runner,
    Search,
    Trial,
    allowed_misses,
    capacities,
    capacity,
    nearest,
    runner,
    speed_of,
    splits,
    trial,
)
from twinpool.sim.settings import Settings
from twinpool.sim.trace import limit, slice_time, speed

N = 1000
ALLOWED = 10


@pytest.fixture(scope="module")
def made() -> Iterator[Runner]:
    with runner(traffic(), 2) as two:
        yield two


@given(st.integers(1, 10**6), st.floats(0.01, 1.0))
def test_allowed_misses_are_as_many_as_the_target_leaves(requests: int, target: float) -> None:
    misses = allowed_misses(requests, target)
    assert (requests - misses) / requests >= target
    assert misses == requests or (requests - misses - 1) / requests < target


@pytest.mark.parametrize("target", [0.0, -1.0, 1.1, float("nan")])
def test_a_target_is_a_share(target: float) -> None:
    with pytest.raises(ConfigError, match="give one above 0"):
        allowed_misses(10, target)


def test_the_grid_rises_in_half_percents() -> None:
    speeds = [speed_of(k) for k in range(-FARTHEST, FARTHEST + 1)]
    assert [nearest(each) for each in speeds] == list(range(-FARTHEST, FARTHEST + 1))
    ratios = [high / low for low, high in pairwise(speeds)]
    assert 1.00499 < min(ratios) <= max(ratios) < 1.00501
    with pytest.raises(ConfigError, match="no traffic"):
        nearest(0.0)


# --- brackets ----------


def cluster(capacity_at: int, steepness: float) -> Callable[[int], Trial]:
    """Misses that grow with the speed and pass what is allowed just above ``capacity_at``; cut short beyond."""

    def run(k: int) -> Trial:
        over = k - capacity_at
        misses = min(N, max(0, round(ALLOWED * 2.0 ** min(20.0, over * steepness))))
        misses = min(misses, ALLOWED) if over <= 0 else max(misses, ALLOWED + 1)
        return Trial(N, min(misses, ALLOWED + 1), min(1.0, (ALLOWED + 1) / misses) if misses else 1.0)

    return run


def solve(search: Search, run: Callable[[int], Trial], width: int, stride: int = 1) -> int:
    """Rounds until the bracket is narrow."""
    rounds = 0
    while not search.done(stride):
        places = search.next_places(width)
        assert 1 <= len(places) <= max(1, width)
        assert sorted(set(places)) == places
        assert any(k not in search.trials for k in places)
        search.take({k: run(k) for k in places})
        rounds += 1
    return rounds


@given(
    st.integers(-FARTHEST, FARTHEST - 1), st.floats(0.0005, 3.0), st.integers(-300, 300), st.integers(1, 9),
    st.integers(1, 40),
)  # fmt: skip
def test_the_bracket_closes_on_the_capacity(at: int, steepness: float, start: int, width: int, jump: int) -> None:
    search = Search(CLUSTER, ALLOWED, start, jump)
    rounds = solve(search, cluster(at, steepness), width)
    assert (search.low, search.high) == (at, at + 1)
    assert rounds <= 40
    assert search.problem(0.99) is None


def test_from_a_good_guess_a_few_runs_are_enough() -> None:
    counts = []
    for off in range(-60, 61, 5):
        search = Search(CLUSTER, ALLOWED, 300 + off)
        solve(search, cluster(300, 0.1), 1)
        counts.append(len(search.trials))
    assert max(counts) <= 14
    assert sum(counts) / len(counts) < 10


@given(st.integers(1, 4), st.sets(st.integers(-40, 60)))
def test_what_is_not_monotone_ends_below_every_miss(width: int, holes: set[int]) -> None:
    plain = cluster(40, 0.2)
    search = Search(CLUSTER, ALLOWED, 0)
    solve(search, lambda k: Trial(N, ALLOWED + 1) if k in holes else plain(k), width)
    assert search.low is not None
    assert search.high == search.low + 1
    missed = [k for k, each in search.trials.items() if each.misses > ALLOWED]
    assert search.low < min(missed)


def test_a_coarse_bracket_is_kept_when_it_gets_finer() -> None:
    search = Search(CLUSTER, ALLOWED, 0)
    solve(search, cluster(100, 0.1), 2, stride=8)
    before = dict(search.trials)
    assert search.low is not None
    assert search.high is not None
    assert search.low <= 100 < search.high <= search.low + 8
    assert search.meets(search.low - 1) is True
    assert search.meets(search.high + 5) is False
    solve(search, cluster(100, 0.1), 2)
    assert (search.low, search.trials.items() >= before.items()) == (100, True)


def test_no_capacity_says_why() -> None:
    never = Search(CLUSTER, ALLOWED, 0)
    solve(never, lambda k: Trial(N, N, 0.1), 2)
    assert "these workers cannot" in str(never.problem(0.99))
    large = Search(CLUSTER, ALLOWED, 0)
    solve(large, lambda k: Trial(N, 11, 1.0, unservable=11), 1)
    assert "11 of 1000 requests are larger than any worker's KV memory" in str(large.problem(0.99))
    always = Search(CLUSTER, ALLOWED, 0)
    solve(always, lambda k: Trial(N, 0), 1)
    assert "the trace is too small" in str(always.problem(0.99))


# --- runs ----------


@pytest.mark.parametrize("factor", [2.0, 4.0, 20.0])
@pytest.mark.parametrize("settings", [CLUSTER, replace(CLUSTER, itl_s=0.0165)])
def test_a_run_cut_short_decides_as_the_whole_one(factor: float, settings: Settings) -> None:
    fast = speed(traffic(240), factor)
    whole = trial(fast, settings)
    assert whole.attained == float(replay(fast, settings).columns.attained().mean())
    assert whole.progress == 1.0
    for target in (0.99, 0.9, 0.5):
        allowed = allowed_misses(240, target)
        short = trial(fast, settings, target)
        assert (short.misses > allowed) == (whole.misses > allowed)
        assert short.misses <= whole.misses
        if whole.misses > 5 * allowed + 50:
            assert short.progress < 1.0


@pytest.mark.parametrize(("processes", "start"), [(1, 3.0), (2, 0.2)])
def test_a_capacity_is_met_and_half_a_percent_more_is_not(processes: int, start: float) -> None:
    steps: list[tuple[float, float]] = []
    with runner(traffic(60), processes) as few:
        found = capacity(few, CLUSTER, 0.95, start=start, step=lambda low, high: steps.append((low, high)))
    k = nearest(found.speed)
    assert found.speed == speed_of(k)
    assert trial(speed(traffic(60), speed_of(k)), CLUSTER).attained >= 0.95
    assert trial(speed(traffic(60), speed_of(k + 1)), CLUSTER).attained < 0.95
    assert steps[-1] == (speed_of(k), speed_of(k + 1))


def test_capacities_side_by_side(made: Runner) -> None:
    several = splits(CLUSTER, 3)
    assert [(each.prefill, each.decode, each.both) for each in several] == [(1, 2, 0), (2, 1, 0)]
    ends: list[tuple[float, float]] = []
    found = capacities(made, several, 0.9, start=4.0, tolerance=0.05, step=lambda low, high: ends.append((low, high)))
    for settings, each in zip(several, found, strict=True):
        high = min(high for low, high in ends if low == each.speed)  # of either, where both are equally good
        assert high / each.speed < 1.05
        assert trial(speed(traffic(), each.speed), settings).attained >= 0.9
        assert trial(speed(traffic(), high), settings).attained < 0.9


def test_an_slo_that_cannot_be_met(made: Runner) -> None:
    with pytest.raises(ConfigError, match="these workers cannot"):
        capacity(made, replace(CLUSTER, itl_s=0.001), 0.99)


def test_jobs_in_other_processes_are_as_here(made: Runner) -> None:
    jobs = [Job(CLUSTER, 2.0), Job(CLUSTER, 5.0, 0.9), Job(CLUSTER, 1.0, 0.0, (5.0, 20.0))]
    over: list[None] = []
    found = made.trials(jobs, lambda: over.append(None))
    parts = [traffic(), traffic(), slice_time(traffic(), 5.0, 20.0)]
    assert found == [trial(speed(part, job.speed), CLUSTER, job.target) for part, job in zip(parts, jobs, strict=True)]
    assert len(over) == 3
    here = replay(speed(traffic(), 2.0), CLUSTER).figures()
    assert found[0].figures == here
    (summary,) = made.summaries(jobs[:1])
    assert {key: each for key, each in summary.items() if "wall" not in key} == here
    assert found[1].progress == 1.0 or found[1].figures is None


def test_what_a_job_raises_is_raised_here(made: Runner) -> None:
    with pytest.raises(ConfigError, match="no policy nobody"):
        made.trials([Job(replace(CLUSTER, policy="nobody"))])


def test_a_killed_process_is_explained() -> None:
    def kill() -> None:
        with runner(limit(traffic(), 5), 1) as broken:
            broken._pool.submit(os._exit, 1)
            broken.trials([Job(CLUSTER)])

    with pytest.raises(TwinpoolError, match="fewer --processes"):
        kill()


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="the trace is empty"), runner(traffic(0)):
        pass
