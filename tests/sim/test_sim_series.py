"""What a report draws of a run, against sums made in other ways."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.report_traffic import SETTINGS, traffic

from twinpool.sim.replay import replay
from twinpool.sim.result import Result
from twinpool.sim.series import BINS, KINDS, SHARES, BusyLog, Series, lengths, observe, series_of
from twinpool.sim.settings import Failure


@pytest.fixture(scope="module")
def run() -> tuple[Result, BusyLog]:
    return observe(traffic(), SETTINGS)


@pytest.fixture(scope="module")
def series(run: tuple[Result, BusyLog]) -> Series:
    return series_of("least_seconds", *run)


stretches = st.lists(st.tuples(st.floats(0, 90), st.floats(0, 50)), max_size=20)


@given(stretches)
def test_lengths_are_overlaps_over_widths(pairs: list[tuple[float, float]]) -> None:
    edges = np.linspace(0.0, 100.0, 8)
    starts = np.array([start for start, _ in pairs])
    ends = np.array([start + more for start, more in pairs])
    expected = [
        sum(max(0.0, min(end, high) - max(start, low)) for start, end in zip(starts, ends, strict=True)) / (high - low)
        for low, high in pairwise(edges)
    ]
    assert lengths(starts, ends, edges) == pytest.approx(expected, abs=1e-9)


def test_busy_log_by_worker_and_kind() -> None:
    log = BusyLog()
    log.add(0, 0.0, 1.0, "prefill")
    log.add(1, 0.0, 4.0, "decode")
    log.add(0, 1.5, 2.5, "mixed")
    edges = np.array([0.0, 2.0, 4.0])
    assert log.shares(0, edges).tolist() == [0.75, 0.25]
    assert log.shares(0, edges, "mixed").tolist() == [0.25, 0.25]
    assert log.shares(1, edges).tolist() == [1.0, 1.0]
    assert log.shares(2, edges).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="idle"):
        log.add(0, 3.0, 4.0, "idle")


def test_observing_changes_nothing(run: tuple[Result, BusyLog]) -> None:
    assert run[0].figures() == replay(traffic(), SETTINGS).figures()


def test_busy_time_is_that_of_the_totals(run: tuple[Result, BusyLog], series: Series) -> None:
    result, log = run
    edges = series.edges + result.columns.arrival.min()
    width = edges[1] - edges[0]
    for number, worker in enumerate(result.workers):
        for kind in KINDS:
            expected = pytest.approx(getattr(worker, f"busy_{kind}_s"), rel=1e-9, abs=1e-9)
            assert width * log.shares(number, edges, kind).sum() == expected
    assert series.busy is not None
    assert series.busy.shape == (4, BINS)
    assert series.busy.max() <= 1.0 + 1e-9
    assert series.busy.max() > 0.5


def test_a_stalled_and_a_dead_worker_are_not_busy() -> None:
    failures = (Failure(2.0, "die", "p0"), Failure(4.0, "stall", "d1", 1.0))
    result, log = observe(traffic(), replace(SETTINGS, failures=failures))
    edges = np.array([0.0, 2.05, 20.0])
    assert log.shares(0, edges)[0] > 0.0
    assert log.shares(0, edges)[1] == pytest.approx(0.0, abs=1e-12)  # a difference of sums
    assert result.figures() == replay(traffic(), replace(SETTINGS, failures=failures)).figures()


def test_courses_add_up(run: tuple[Result, BusyLog], series: Series) -> None:
    columns = run[0].columns
    width = series.edges[1] - series.edges[0]
    assert series.edges[0] == 0.0
    assert series.edges[-1] == pytest.approx(columns.duration_s())
    assert width * series.waiting.sum() == pytest.approx(columns.ttft().sum())  # Little's law
    assert width * series.decoding.sum() == pytest.approx((columns.ended - columns.shown).sum())
    assert series.waiting_at.sum(axis=0) == pytest.approx(series.waiting, abs=1e-9)
    assert series.decoding_at.sum(axis=0) == pytest.approx(series.decoding, abs=1e-9)
    offered, _ = np.histogram(columns.arrival - columns.arrival.min(), series.edges)
    assert np.isnan(series.attained).tolist() == (offered == 0).tolist()
    assert np.nansum(series.attained * offered) / len(columns) == pytest.approx(series.summary["attainment"])


def test_distributions_agree_with_the_summary(series: Series) -> None:
    for values, key in ((series.ttft, "ttft_ms"), (series.itl, "itl_ms")):
        assert (np.diff(values) >= 0.0).all()
        for percentile in (50, 90, 99):
            assert 1000.0 * values[SHARES.index(percentile / 100)] == series.summary[key][f"p{percentile}"]
    assert 1000.0 * series.transfer[SHARES.index(0.99)] == series.summary["transfer_ms"]["p99"]
