"""Statistics from runs against the gaps written out one by one."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.gap_traffic import expand, expand_all, traffic

from twinpool.sim import gap_pool, gaps
from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gaps import GapLog, Runs, quantile, rank, request_gaps

QUANTILES = (0.0, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


def same(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-15, abs_tol=1e-20)


def check_requests(workers: list[Runs], log: GapLog, requests: int) -> None:
    """Every request against its gaps, sorted and summed without rounding."""
    found = request_gaps(workers, log, requests)
    for i, mine in enumerate(expand(workers, log, requests)):
        assert found.gaps[i] == len(mine)
        if not mine:
            assert found.worst[i] == found.longest[i] == found.mean[i] == 0.0
            continue
        wanted = math.ceil(Fraction(len(mine), 10))
        assert found.longest[i] == max(mine)
        assert same(found.worst[i], math.fsum(sorted(mine)[-wanted:]) / wanted)
        assert same(found.mean[i], math.fsum(mine) / len(mine))


def check_pool(workers: list[Runs], log: GapLog) -> None:
    """Quantiles to the last bit."""
    everything = expand_all(workers, log)
    pool = GapPool(workers, log)
    assert pool.count == len(everything)
    if everything:
        assert same(pool.mean, math.fsum(everything) / len(everything))
        for q in QUANTILES:
            assert pool.quantile(q) == everything[rank(q, len(everything)) - 1]


@pytest.mark.parametrize("rate", [0.05, 2.0, 12.0])
def test_traffic_is_exact(rate: float) -> None:
    workers, log = traffic(300, 3, seed=7, rate=rate)
    check_requests(workers, log, 300)
    check_pool(workers, log)


@st.composite
def runs_of_a_worker(draw: st.DrawFn) -> Runs:
    """Gaps of at least 0, rising, falling, equal, or so nearly equal that rounding makes ties."""
    runs = Runs()
    for _ in range(draw(st.integers(0, 12))):
        first = draw(st.sampled_from([0.0, 1e-9, 0.015, 0.02, 0.02, 1.0]) | st.floats(1e-6, 100.0))
        count = draw(st.integers(1, 40))
        step = draw(st.sampled_from([0.0, 0.0, 1e-300, 1e-19, -1e-19, 3e-18, 1e-6]) | st.floats(-0.5, 0.5))
        falls = step < 0.0 and first + (count - 1) * step < 0.1 * first
        runs.add(first, -0.9 * first / count if falls else step, count, draw(st.integers(1, 5)))
    return runs


@st.composite
def logs(draw: st.DrawFn) -> tuple[list[Runs], GapLog, int]:
    workers = draw(st.lists(runs_of_a_worker(), max_size=3))
    requests = draw(st.integers(1, 6))
    log = GapLog()
    for _ in range(draw(st.integers(0, 10)) if workers else 0):
        worker = draw(st.integers(0, len(workers) - 1))
        lo = draw(st.integers(0, len(workers[worker])))
        log.add_span(draw(st.integers(0, requests - 1)), worker, lo, draw(st.integers(lo, len(workers[worker]))))
    for _ in range(draw(st.integers(0, 5))):
        log.add_single(draw(st.integers(0, requests - 1)), draw(st.sampled_from([0.0, 0.02]) | st.floats(0.0, 50.0)))
    return workers, log, requests


@given(logs())
@settings(max_examples=80, deadline=None)
def test_odd_runs_are_exact(case: tuple[list[Runs], GapLog, int]) -> None:
    check_requests(*case)
    check_pool(*case[:2])


@given(logs(), st.sampled_from([0, 1, 4]))
@settings(max_examples=40, deadline=None)
def test_bisection_finds_the_same(case: tuple[list[Runs], GapLog, int], spread: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gap_pool, "SPREAD", spread)
        check_pool(*case[:2])


def test_small_blocks_and_few_levels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    workers, log = traffic(200, 2, seed=3, rate=4.0)
    expected = request_gaps(workers, log, 200)
    for name, value in (("BLOCK_RUNS", 1), ("BLOCK_GAPS", 1), ("BLOCK_ROWS", 1), ("LEVELS", 2), ("SAMPLE", 1)):
        monkeypatch.setattr(gaps, name, value)
        for column, before in zip(request_gaps(workers, log, 200), expected, strict=True):
            assert np.array_equal(column, before)


def test_a_request_on_two_workers_with_a_pause() -> None:
    early, late = Runs(), Runs()
    early.add(0.020, 0.001, 5, 1)
    late.add(0.010, 0.0, 9, 3)
    log = GapLog()
    log.add_single(1, 2.5)
    log.add_span(1, 1, 0, 1)
    log.add_span(1, 0, 0, 1)
    found = request_gaps([early, late], log, 3)
    assert found.gaps.tolist() == [0, 15, 0]
    assert found.worst[1] == (2.5 + 0.024) / 2
    assert found.longest.tolist() == [0.0, 2.5, 0.0]


def test_pool_does_not_write_out_gaps() -> None:
    runs = Runs()
    runs.add(0.01, 1e-12, 10**9, 64)
    runs.add(0.01, 1e-12, 10**9, 64)
    pool = GapPool([runs], GapLog())
    assert pool.count == 128 * 10**9
    assert pool.quantile(0.25) == 0.01 + (10**9 // 4 - 1) * 1e-12
    assert pool.quantile(1.0) == 0.01 + (10**9 - 1) * 1e-12


def test_sums_stay_exact_far_into_a_long_run() -> None:
    runs = Runs()
    runs.add(1e6, 0.0, 100, 1)
    runs.add(1e-3, 1e-9, 7, 1)
    runs.add(1e6, 0.0, 100, 1)
    log = GapLog()
    log.add_span(0, 0, 1, 2)
    check_requests([runs], log, 1)


def test_no_gaps_at_all() -> None:
    found = request_gaps([], GapLog(), 2)
    assert [column.tolist() for column in found] == [[0, 0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    assert all(len(column) == 0 for column in request_gaps([Runs()], GapLog(), 0))
    pool = GapPool([Runs()], GapLog())
    assert (pool.count, pool.mean) == (0, 0.0)
    with pytest.raises(ValueError, match="no quantile"):
        pool.quantile(0.5)


@pytest.mark.parametrize(
    ("request_id", "worker", "lo", "hi"), [(2, 0, 0, 1), (-1, 0, 0, 1), (0, 2, 0, 1), (0, -1, 0, 1), (0, 0, 1, 0),
                                           (0, 0, 0, 2), (0, 1, 0, 1), (0, 0, -1, 1)],
)  # fmt: skip
def test_spans_that_are_not_there(request_id: int, worker: int, lo: int, hi: int) -> None:
    full = Runs()
    full.add(0.02, 0.0, 3, 1)
    log = GapLog()
    log.add_span(request_id, worker, lo, hi)
    with pytest.raises(ValueError, match=r"not there|not one of"):
        request_gaps([full, Runs()], log, 2)


def test_a_run_has_a_gap() -> None:
    runs = Runs()
    runs.add(0.02, 0.0, 0, 1)
    with pytest.raises(ValueError, match="without a gap"):
        GapPool([runs], GapLog())


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=50), st.integers(0, 1000))
def test_quantile_is_the_smallest_value_with_its_share_below(values: list[float], thousandths: int) -> None:
    found = quantile(np.array(values), thousandths / 1000)

    def enough(value: float) -> bool:
        return 1000 * sum(other <= value for other in values) >= thousandths * len(values)

    assert found in values
    assert enough(found)
    assert thousandths == 0 or not any(enough(value) for value in values if value < found)


def test_rank_reads_decimals() -> None:
    assert rank(0.07, 100) == 7
    assert math.ceil(0.07 * 100) == 8
    assert [rank(q, 10) for q in (0.0, 0.1, 0.11, 1.0)] == [1, 1, 2, 10]
    for q, count in ((0.5, 0), (-0.1, 3), (1.1, 3), (math.nan, 3)):
        with pytest.raises(ValueError, match="no quantile"):
            rank(q, count)
