"""Drained workers, and such as run out of memory, live and simulated: the same sequences go on elsewhere, then."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from tests.parity.simulated import drains, one_at_a_time, simulate
from tests.parity.test_parity_decisions import compare
from tests.parity.test_parity_fetch import actions
from tests.parity.test_parity_live import traffic

from twinpool.sim.settings import Settings

BASE = one_at_a_time(Settings(prefill=2, decode=3, kv_tokens=40_960, block_size=512))


@pytest.mark.parametrize("seed", [4, 5])
def test_a_drained_decode_worker(seed: int) -> None:
    trace = traffic(100, rate=25.0, seed=seed)
    when = trace.arrival[50] + 0.0171
    live, simulated = compare(trace, replace(BASE, failures=drains(("d0", when))))
    assert {seen.outcome for seen in live.requests} == {"ok"}
    moved = actions(simulated.log, "SendYield")
    assert len(moved) >= 2
    plain = simulate(trace, BASE)
    assert max(now for now, _ in moved) < when + 1.0
    assert not actions(plain.log, "SendYield")


def test_two_of_three() -> None:
    trace = traffic(100, rate=25.0, seed=6)
    live, simulated = compare(
        trace, replace(BASE, failures=drains(("d2", trace.arrival[40] + 0.0171), ("d0", trace.arrival[60] + 0.0093)))
    )
    assert {seen.outcome for seen in live.requests} == {"ok"}
    assert len(actions(simulated.log, "SendYield")) > 5


def test_a_drained_worker_that_does_both() -> None:
    trace = traffic(100, rate=20.0, seed=2)
    settings = replace(BASE, prefill=0, decode=0, both=4, failures=drains(("b1", trace.arrival[50] + 0.0171)))
    live, simulated = compare(trace, settings)
    assert {seen.outcome for seen in live.requests} == {"ok"}
    assert actions(simulated.log, "SendYield")


def test_memory_that_runs_out() -> None:
    """Workers warn at the same steps, and the core knows as much of their sequences on both sides.

    In this traffic no two workers answer in one moment: what they say then has no order. Nor is a block of output
    asked for again by who was preempted: live it may be cached, in the simulator it never is.
    """
    trace = traffic(100, rate=12.0, seed=7)
    longer = replace(trace, output=array("q", [8 * tokens for tokens in trace.output]))
    live, simulated = compare(longer, replace(BASE, kv_tokens=12 * 512))
    warned = [
        [(event, round(now, 8)) for now, event, _ in log if event[0] == "Short"] for log in (live.log, simulated.log)
    ]
    assert warned[0] == warned[1]
    assert len(actions(simulated.log, "SendYield")) >= 3
    assert any(event[0] == "AttemptLost" for _, event, _ in live.log)
