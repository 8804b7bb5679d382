"""Prompts in line: several short ones run in one step, and one more begins with those that are next."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.router.line import Commitment, Line

MOST = 100  # tokens of a step


def line(*tokens: int, now: float = 0.0) -> Line:
    """Prompts 1, 2, ... committed at once, 10 ms a token."""
    made = Line()
    for number, count in enumerate(tokens, 1):
        made.add(number, Commitment(count / 100, count, 0), now, MOST)
    return made


def test_what_comes_later_waits_for_the_next_step() -> None:
    made = line(30, 30, 30)
    assert (made.running, made.behind) == (1, 60)
    assert made.end(0.1) == pytest.approx(0.9)
    assert made.begins_by(0.3, 0.1, 40, MOST)
    assert not made.begins_by(0.3, 0.1, 41, MOST)
    assert not made.begins_by(0.2, 0.1, 40, MOST)
    assert made.begins_by(0.9, 0.1, 500, MOST), "behind all"


def test_those_that_fit_run_together() -> None:
    made = line(30, 30, 30, 80)
    made.remove(1, 0.35, MOST)
    assert (made.running, made.running_tokens, made.behind) == (2, 60, 80)
    assert made.end(0.35) == pytest.approx(1.75)
    assert made.end(9.0) == pytest.approx(9.8), "late, but no earlier than what follows"
    made.remove(3, 0.5, MOST)  # nobody wants it any more
    assert (made.running, made.running_tokens) == (1, 30)
    made.change(2, 0.1, 10, 0.6, MOST)  # news: it begins a step, and the long one fits into it
    assert (made.running, made.running_tokens, made.since) == (2, 90, 0.6)


def test_a_long_one_runs_alone() -> None:
    made = line(5, 300, 50)
    made.remove(1, 0.05, MOST)
    assert (made.running, made.behind) == (1, 50)
    assert made.begins(MOST) == pytest.approx(3.05)
    assert made.begins_within(0.1, MOST) == pytest.approx(2.95)
    assert line(5, 300).begins(MOST) == pytest.approx(3.05), "the next step is full"
    assert line(5, 300).begins_within(0.1, MOST) == math.inf
    assert Line().begins_within(0.1, MOST) == math.inf


EVENT = st.tuples(st.sampled_from(["add", "change", "remove"]), st.integers(1, 6), st.integers(1, 150))


@given(st.lists(EVENT, max_size=30), st.integers(1, 120))
def test_whatever_happens(events: list[tuple[str, int, int]], tokens: int) -> None:
    made, now = Line(), 0.0
    for what, number, count in events:
        now += count / 1000
        if what == "add" and number not in made.prompts:
            made.add(number, Commitment(count / 100, count, 0), now, MOST)
        elif what == "change" and number in made.prompts:
            made.change(number, count / 100, count, now, MOST)
        elif what == "remove" and number in made.prompts:
            made.remove(number, now, MOST)
        made.check_integrity()
        if not made.prompts:
            assert made.end(now) == now
            continue
        end = made.end(now)
        assert end >= now
        assert made.begins_by(end, now, tokens, MOST)
        if end > now and not made.begins_by(now, now, tokens, MOST):
            assert not made.begins_by(min(made.begins(MOST), end) - 1e-6, now, tokens, MOST)
