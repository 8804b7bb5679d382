"""Hints that a trace's requests give: who goes on with whom, and how wrong they are."""

from __future__ import annotations

from array import array

import pytest

from twinpool.errors import ConfigError
from twinpool.sim.generate import generate
from twinpool.sim.returns import with_returns
from twinpool.sim.trace import Trace, limit


def trace_of(*prompts: list[int]) -> Trace:
    """A request a second with these blocks."""
    offsets = array("q", [0])
    for blocks in prompts:
        offsets.append(offsets[-1] + len(blocks))
    n = len(prompts)
    return Trace(
        "t", 16, array("d", range(n)), array("q", [16 * len(blocks) + 1 for blocks in prompts]), array("q", [1] * n),
        array("q", [block for blocks in prompts for block in blocks]), offsets,
    )  # fmt: skip


def test_a_prompt_goes_on_with_the_one_that_ended_in_its_later_half() -> None:
    trace = trace_of([1, 2, 3], [9], [1, 2, 3, 4], [9, 5, 6, 7], [1, 2, 3, 4, 8])
    assert with_returns(trace, "oracle").returns == [True, False, True, False, False]
    assert with_returns(trace, "follow_ups").returns == [False, False, True, False, True]


def test_a_closed_loop_says_it_itself() -> None:
    trace = generate("agentic", requests=300, seed=3)
    assert trace.after is not None
    hinted = with_returns(trace, "oracle")
    hinted.check_integrity()
    assert hinted.returns is not None
    assert {i for i in range(300) if hinted.returns[i]} >= {before for before in trace.after if before >= 0}
    assert limit(hinted, 10).returns == hinted.returns[:10]


def test_some_of_it_can_be_wrong() -> None:
    trace = generate("chat", requests=1000, seed=3)
    right, wrong = with_returns(trace, "oracle").returns, with_returns(trace, "oracle", 0.2, seed=5).returns
    assert right is not None
    assert wrong is not None
    assert 150 < sum(a != b for a, b in zip(right, wrong, strict=True)) < 250


def test_unknown_hints_are_refused() -> None:
    trace = trace_of([1])
    with pytest.raises(ConfigError, match="no hint 'guess'"):
        with_returns(trace, "guess")
    with pytest.raises(ConfigError, match="0 to 1"):
        with_returns(trace, "oracle", 2.0)
