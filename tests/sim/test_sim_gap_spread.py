"""What single gaps take more or less: quantiles of all gaps with it, against writing all sums out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gap_spread import BIN_S, QUANTILES, SpreadGaps, gap_spread
from twinpool.sim.gaps import GapLog, Runs, quantile
from twinpool.sim.generate import generate
from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings

SECONDS = st.floats(0.0, 0.5)


def pool_of(gaps: list[float], runs: list[tuple[float, float, int, int]] | None = None) -> GapPool:
    """Single gaps, and runs of (first, increment, gaps, sequences that felt them)."""
    kept, log = Runs(), GapLog()
    for first, increment, count, batch in runs or []:
        kept.add(first, increment, count, batch)
    for gap in gaps:
        log.add_single(0, gap)
    return GapPool([kept], log)


@given(gaps=st.lists(SECONDS, min_size=1, max_size=40), spread=st.lists(st.floats(-0.1, 0.3), min_size=1, max_size=8))
def test_quantiles_are_those_of_all_sums(gaps: list[float], spread: list[float]) -> None:
    spreading = SpreadGaps(pool_of(gaps), spread)
    sums = np.sort(np.add.outer(gaps, spread).ravel())
    for q in (0.1, 0.5, 0.9, 0.99):
        place = max(0, int(np.ceil(q * len(gaps) - 1e-9)) * len(spread) - 1)  # ranks are those of the gaps
        assert spreading.quantile(q) == pytest.approx(max(0.0, sums[place]), abs=1.5 * BIN_S)


def test_runs_count_as_often_as_they_were_felt() -> None:
    pool = pool_of([0.3], [(0.010, 0.001, 5, 3), (0.100, -0.010, 4, 2)])
    gaps = [0.3, *np.repeat(0.010 + 0.001 * np.arange(5), 3), *np.repeat(0.100 - 0.010 * np.arange(4), 2)]
    assert pool.binned(BIN_S).sum() == len(gaps) == pool.count
    for q in (0.2, 0.5, 0.8, 0.99):
        assert SpreadGaps(pool, [0.0]).quantile(q) == pytest.approx(quantile(np.sort(gaps), q), abs=1.5 * BIN_S)
        assert SpreadGaps(pool, []).quantile(q) == pool.quantile(q)


def test_steps_and_edge_are_summed() -> None:
    rng = np.random.default_rng(0)
    steps, outside = rng.exponential(0.002, 5000), rng.exponential(0.005, 5000)
    spread = np.array(gap_spread(steps, outside))
    assert len(spread) == QUANTILES
    assert spread.std() == pytest.approx(np.sqrt(0.002**2 + 2 * 0.005**2), rel=0.1)
    assert abs(spread.mean()) < 0.0002
    assert gap_spread(np.zeros(0), np.zeros(0)) == (0.0,) * QUANTILES


def test_a_profile_with_a_spread_changes_quantiles_of_gaps_and_no_decision() -> None:
    trace = generate("chat", requests=200, rate=4.0, seed=1)
    plain = replay(trace, Settings(prefill=1, decode=1))
    wide = replay(trace, Settings(prefill=1, decode=1, gap_spread_s=(-0.004, 0.0, 0.004)))
    assert wide.digest == plain.digest
    before, after = plain.summary(), wide.summary()
    assert after["itl_ms"]["p99"] > before["itl_ms"]["p99"]
    assert after["itl_ms"]["mean"] == before["itl_ms"]["mean"]
    assert after["attainment"] == before["attainment"]
