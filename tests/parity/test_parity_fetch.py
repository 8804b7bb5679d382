"""Fetches live and simulated: the same decisions at the same times, also where one is late or its source dies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.parity.live import Turn
from tests.parity.simulated import SimRun, deaths, differences, one_at_a_time, simulate
from tests.parity.test_parity_decisions import compare
from tests.parity.test_parity_kv_losses import live_with_losses, no_block_of_output
from tests.parity.test_parity_live import traffic

from twinpool.router import fetch
from twinpool.router.request import Request
from twinpool.sim.settings import Settings

BASE = one_at_a_time(Settings(prefill=3, decode=2, kv_tokens=40_960, block_size=512))
TRACE = traffic(120, rate=14.0, seed=9)


def actions(log: list[Turn], name: str) -> list[tuple[float, tuple[object, ...]]]:
    return [(now, action) for now, _, said in log for action in said if action[0] == name]


def pulls(run: SimRun) -> list[tuple[float, tuple[object, ...]]]:
    """(time, SendPull) of fetches: only these have a time of their own."""
    return [(now, action) for now, action in actions(run.log, "SendPull") if action[-1]]


def test_prefixes_are_fetched_alike() -> None:
    live, simulated = compare(TRACE, BASE)
    assert len(pulls(simulated)) > 10
    assert len(actions(live.log, "SendLend")) == len(actions(simulated.log, "SendLend"))
    plain = simulate(TRACE, replace(BASE, parameters={"fetch": "off"}))
    assert sum(simulated.loop.record.cached) > sum(plain.loop.record.cached)
    assert not actions(plain.log, "SendLend")


@pytest.mark.skipif(hasattr(Request, "__mypyc_attrs__"), reason="constants of compiled files cannot be replaced")
def test_fetches_that_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt begins while the bytes are on the link; when they come that means nothing."""
    monkeypatch.setattr(fetch, "PATIENCE", 0.5)
    monkeypatch.setattr(fetch, "MIN_PATIENCE_S", 0.0)
    _, simulated = compare(TRACE, BASE)
    begun = {action[2] for _, action in pulls(simulated)}
    late = {action[3]: action[-1] for _, action in actions(simulated.log, "SendPrefill") if action[3] in begun}
    assert sum(cached == 0 for cached in late.values()) > 3


def test_prefixes_that_were_evicted_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router hears of it half a second late."""
    trace = no_block_of_output(TRACE)
    settings = replace(BASE, kv_tokens=24 * 512, kv_delay_s=0.5)
    live, _ = live_with_losses(trace, settings, monkeypatch)
    simulated = simulate(trace, settings)
    assert differences(live, simulated) == []
    assert len(pulls(simulated)) < len(actions(simulated.log, "SendLend"))


@pytest.mark.parametrize("number", range(4))
def test_a_source_that_dies_in_mid_fetch(number: int) -> None:
    """Its bytes are on the link: the prompt is computed, no attempt is lost by that."""
    begun = pulls(simulate(TRACE, BASE))[3 * number]
    source = BASE.names()[int(str(begun[1][3]))]
    settings = replace(BASE, failures=deaths((source, begun[0] + 0.0013)))
    live, simulated = compare(TRACE, settings)
    assert {seen.outcome for seen in live.requests} == {"ok"}
    attempt = begun[1][2]
    (started,) = [now for now, action in actions(simulated.log, "SendPrefill") if action[3] == attempt]
    assert started > begun[0]
