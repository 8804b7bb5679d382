"""KV events that are late or lost: the live router and workers heal the gaps, and the simulator does so alike.

Frames are lost and delayed between the worker's link and the dispatcher; numbers, gaps, snapshots are the product's.
Output is cut so that it never fills a block: of blocks that nobody can ask for the simulator's workers do not tell.
"""

from __future__ import annotations

import asyncio
import random
from array import array
from collections import Counter
from dataclasses import replace

import pytest
from tests.parity.live import LiveRun, run_live
from tests.parity.simulated import decisions, differences, live_settings, one_at_a_time, simulate
from tests.parity.test_parity_live import traffic

from twinpool.proto import frames
from twinpool.router.dispatch import Dispatcher
from twinpool.router.links import WorkerLink
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

BASE = one_at_a_time(Settings(prefill=2, decode=2, kv_tokens=40_960, block_size=512))
LONGEST_OUTPUT = 40


def no_block_of_output(trace: Trace) -> Trace:
    """Prompts end far enough before a block does."""
    prompt = [tokens - 60 if tokens % 512 > 512 - LONGEST_OUTPUT - 5 else tokens for tokens in trace.prompt]
    return replace(trace, prompt=array("q", prompt))


def live_with_losses(trace: Trace, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> tuple[LiveRun, Counter[str]]:
    """The live code where the settings' share of KvEvents never reaches the dispatcher, and the rest late."""
    take = Dispatcher._kv_events
    counted: Counter[str] = Counter()
    draws: dict[int, random.Random] = {}

    def received(self: Dispatcher, link: WorkerLink, frame: frames.KvEvents) -> None:
        if frame.sequence == 0:  # what a worker begins with
            take(self, link, frame)
            return
        counted["sent"] += 1
        counted["snapshots"] += frame.reset
        draw = draws.setdefault(link.id, random.Random(f"kv {settings.error_seed} {link.id}"))
        if draw.random() < settings.kv_loss:
            counted["lost"] += 1
        elif settings.kv_delay_s:
            asyncio.get_running_loop().call_later(settings.kv_delay_s, take, self, link, frame)
        else:
            take(self, link, frame)

    monkeypatch.setattr(Dispatcher, "_kv_events", received)
    return run_live(trace, live_settings(trace, settings)), counted


@pytest.mark.parametrize(
    ("loss", "delay_s"), [(0.0, 0.5), (0.02, 0.0), (0.3, 0.0), (0.3, 0.05)], ids=["late", "lost", "many", "both"]
)
def test_gaps_heal_alike(loss: float, delay_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = no_block_of_output(traffic(150, rate=9.0, seed=11))
    settings = replace(BASE, kv_loss=loss, kv_delay_s=delay_s, error_seed=3)
    live, counted = live_with_losses(trace, settings, monkeypatch)
    simulated = simulate(trace, settings)
    assert differences(live, simulated) == []
    feed = simulated.loop.feed
    if feed is None:
        assert counted["lost"] == 0
        return
    assert (feed.sent, feed.lost, feed.asked) == (counted["sent"], counted["lost"], counted["snapshots"])
    assert feed.lost > 0


def test_it_matters_that_they_are_late() -> None:
    trace = no_block_of_output(traffic(150, rate=9.0, seed=11))
    index = {i: i for i in range(len(trace))}
    in_time, late = (decisions(simulate(trace, replace(BASE, kv_delay_s=s)).log, index) for s in (0.0, 0.5))
    assert in_time != late
