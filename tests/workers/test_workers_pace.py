"""What one step says of the prompts in it."""

from __future__ import annotations

import pytest

from twinpool.cost import StepCost
from twinpool.workers.blocks import BlockPool
from twinpool.workers.pace import MOST, mean_pace, pace_seen
from twinpool.workers.scheduler import Mode, Scheduler, Sequence


def test_a_mean_is_by_tokens_and_exactly_one_where_all_are() -> None:
    assert mean_pace([(100, 1.2), (300, 0.8)]) == pytest.approx(0.9)
    assert mean_pace([(3, 1.0), (7, 1.0)]) == 1.0
    assert mean_pace([]) == 1.0


def test_decodes_are_taken_off_both_sides() -> None:
    assert pace_seen(0.052, 0.045, 0.020, 1.0) == pytest.approx(32 / 25)
    assert pace_seen(0.130, 0.100, 0.0, 1.0) == pytest.approx(1.3)


@pytest.mark.parametrize(("actual", "silent"), [(0.0119, True), (0.0121, False), (0.0081, True), (0.0079, False)])
def test_two_milliseconds_are_no_news(actual: float, silent: bool) -> None:
    assert (pace_seen(actual, 0.010, 0.0, 1.0) == 0.0) is silent


@pytest.mark.parametrize(("actual", "silent"), [(1.019, True), (1.021, False), (0.981, True), (0.979, False)])
def test_two_percent_are_no_news(actual: float, silent: bool) -> None:
    assert (pace_seen(actual, 1.0, 0.3, 1.0) == 0.0) is silent


def test_what_goes_on_as_it_did_is_no_news() -> None:
    assert pace_seen(0.050, 0.045, 0.020, 1.2) == 0.0
    assert pace_seen(0.045, 0.045, 0.020, 1.2) == pytest.approx(1.0)  # faster than it was


def test_one_step_is_believed_only_so_far() -> None:
    assert pace_seen(5.0, 0.045, 0.020, 1.0) == MOST
    assert pace_seen(0.001, 0.045, 0.020, 1.0) == 1 / MOST
    assert pace_seen(0.3, 0.1, 0.1, 1.0) == 1.0  # chunks that cost nothing say nothing


def test_what_a_step_shows_cuts_the_next_chunk() -> None:
    """21 ms a chunk of 16 beside a decode of 5, of 22.5 that its SLO leaves; this prompt takes 1.25 times as long."""
    cost = StepCost(c0=0.004, a=0.001, b=0.0, d0=0.0, d1=0.0, d2=0.0)
    s = Scheduler(BlockPool(64, 4), cost, 64, 8)
    assert s.reserve(1, [], 1) == 0
    s.seal_received(1, 0, 1)
    s.start_decode(Sequence(1, 3, [], Mode.DECODE, 0.025), 0.0)
    assert s.add(Sequence(2, 60, [2000 + i for i in range(15)], Mode.PREFILL, 1.0), 0.0)
    now, news = 0.0, []
    counts: list[int] = []
    for stretch in (1.0, 1.25, 1.25, 1.0):
        step = s.plan(now)
        assert step is not None
        assert step.alone_s == pytest.approx(0.005)
        counts.append(step.chunks[0].count)
        now += step.alone_s + stretch * (step.predicted_s - step.alone_s)
        news.append(s.done(step, now).news)
    assert counts == [16, 16, 12, 12]
    assert news == [False, True, False, True]
