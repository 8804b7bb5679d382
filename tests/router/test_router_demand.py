"""Rates of events that fade, and how long who waits will have waited."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.router.demand import FADE_S, Demand, Rate


def test_a_steady_rate_is_found() -> None:
    rate = Rate()
    for step in range(4000):
        rate.add(1.0, step * 0.05)
    assert rate.per_s(200.0) == pytest.approx(20.0, rel=0.01)
    assert rate.per_s(200.0 + FADE_S) == pytest.approx(20.0 / math.e, rel=0.01)


@given(st.lists(st.tuples(st.floats(0.0, 100.0), st.floats(0.0, 1.0)), max_size=20))
def test_events_add_up_and_fade_each_by_itself(events: list[tuple[float, float]]) -> None:
    rate = Rate()
    for when, weight in sorted(events):
        rate.add(weight, when)
    alone = sum(weight / FADE_S * math.exp((when - 100.0) / FADE_S) for when, weight in events)
    assert rate.per_s(100.0) == pytest.approx(alone, abs=1e-12)


def test_the_wait_is_littles_law() -> None:
    waiting = {1: "a", 2: "b", 3: "c"}
    demand = Demand(waiting)
    assert demand.wait_s(50.0) == 0.0, "nobody was placed yet: nothing to tell by"
    demand.placed.add(1.0, 50.0)
    assert demand.wait_s(50.0) == pytest.approx(2 * FADE_S), "two beside the one in hand"
    del waiting[2], waiting[3]
    assert demand.wait_s(50.0) == 0.0
