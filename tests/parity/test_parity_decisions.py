"""The same decisions at the same times, live and simulated: the live code on a virtual clock against the simulator.

Both sides know of a block only what a trace's hashes say. Where a hash stands for more than one block of a worker the
simulator evicts whole hashes, and where a prompt's end has no hash it cannot find it again after a loss: so here a
block is what a hash stands for, or there are no hashes and nothing is lost.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from tests.parity.live import LiveRun, run_live
from tests.parity.simulated import SimRun, deaths, differences, live_settings, one_at_a_time, simulate
from tests.parity.test_parity_live import traffic
from tests.sim.real_traces import AZURE, MOONCAKE, real_trace

from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

Cancels = tuple[tuple[int, float], ...]
BASE = one_at_a_time(Settings(prefill=2, decode=2, kv_tokens=40_960, block_size=512))
PLAIN = one_at_a_time(Settings(prefill=2, decode=2, kv_tokens=40_960))


def compare(trace: Trace, settings: Settings, cancels: Cancels = ()) -> tuple[LiveRun, SimRun]:
    live = run_live(trace, live_settings(trace, settings, cancels))
    simulated = simulate(trace, settings, cancels)
    assert differences(live, simulated) == []
    return live, simulated


def short(trace: Trace, count: int, most: int = 30) -> Trace:
    """The first ``count`` requests, outputs cut to ``most`` tokens: each costs the live code 0.1 ms or more."""
    ends = trace.offsets[count]
    return replace(
        trace,
        arrival=trace.arrival[:count],
        prompt=trace.prompt[:count],
        output=array("q", [min(most, output) for output in trace.output[:count]]),
        hashes=trace.hashes[:ends],
        offsets=trace.offsets[: count + 1],
        after=trace.after[:count] if trace.after is not None else None,
        think=trace.think[:count] if trace.think is not None else None,
        tenant=None, klass=None, session=None, tail=None,
    )  # fmt: skip


def some_leave(trace: Trace) -> Cancels:
    """Every seventh client goes, between 3 ms and 0.8 s after it came."""
    return tuple((i, trace.arrival[i] + 0.003 + 0.0203 * (i % 40)) for i in range(0, len(trace), 7))


def test_a_split_cluster() -> None:
    live, _ = compare(traffic(100, rate=9.0), BASE)
    assert {seen.path for seen in live.requests} == {"split", "local"}
    assert sum(seen.cached for seen in live.requests) > 0


def test_workers_that_do_both() -> None:
    compare(traffic(100, rate=9.0, seed=2), replace(BASE, prefill=0, decode=0, both=4))


@pytest.mark.parametrize(("rebalance", "seed"), [("off", 2), ("on", 8)])
def test_memory_that_is_too_small_for_all(rebalance: str, seed: int) -> None:
    """Sequences outgrow what was predicted of them, and some are preempted.

    (Seed 2, on: one comes back to a block that its own output filled, which no hash of a trace names.)
    """
    trace = traffic(100, rate=12.0, seed=seed)
    longer = replace(trace, output=array("q", [8 * tokens for tokens in trace.output]))
    live, _ = compare(longer, replace(BASE, kv_tokens=8 * 512, parameters={"rebalance": rebalance}))
    assert max(seen.attempts for seen in live.requests) > 1, "nobody was preempted"


@pytest.mark.parametrize("rule", ["lru", "segmented", "frequency"])
def test_what_goes_first_when_the_cache_is_full(rule: str) -> None:
    trace = traffic(120, rate=9.0, seed=8)
    hinted = replace(trace, returns=[i % 3 == 0 for i in range(len(trace))])
    settings = replace(BASE, kv_tokens=24 * 512, eviction=rule)
    live, _ = compare(hinted, settings)
    assert simulate(trace, settings).log != simulate(hinted, settings).log, "the hints changed nothing"
    assert sum(seen.cached for seen in live.requests) > 0


def test_clients_that_go() -> None:
    trace = traffic(100, rate=9.0, seed=4)
    live, _ = compare(trace, BASE, some_leave(trace))
    assert sum(seen.outcome == "CANCELLED" for seen in live.requests) > 5


@pytest.mark.parametrize("worker", ["p0", "p1", "d0", "d1"])
def test_a_worker_that_dies(worker: str) -> None:
    trace = traffic(80, rate=12.0, seed=5)
    live, _ = compare(trace, replace(BASE, failures=deaths((worker, trace.arrival[40] + 0.017))))
    assert {seen.outcome for seen in live.requests} == {"ok"}


def test_requests_of_one_moment() -> None:
    trace = traffic(100, rate=9.0, seed=6)
    compare(replace(trace, arrival=array("d", [float(int(when)) for when in trace.arrival])), BASE)


def test_prompts_that_take_longer_or_shorter_than_predicted() -> None:
    """What the worker sees of a prompt cuts its chunks and reaches the router, on both sides alike."""
    trace, settings = traffic(100, rate=9.0, seed=9), replace(BASE, prefill_error=0.3)
    live, _ = compare(trace, settings)
    paces = {event[-1] for _, event, _ in live.log if event[0] == "Progressed"}
    assert len(paces) > 20
    assert min(paces) < 0.7 < 1.45 < max(paces)
    assert live.log != run_live(trace, live_settings(trace, BASE)).log


def test_without_hashes() -> None:
    trace = traffic(100, rate=9.0, seed=7)
    compare(replace(trace, block_tokens=0, hashes=array("q"), offsets=array("q", bytes(8 * 101))), PLAIN)


def test_turns_that_wait_for_each_other() -> None:
    trace = short(generate("chat", requests=100, rate=3.0, seed=1, block_tokens=16), 100, 20)
    compare(trace, PLAIN)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["mooncake", "azure", "chat"])
def test_a_thousand_requests(kind: str) -> None:
    """Of three kinds of traffic, with clients that go; a worker dies where lost prompts can be told from new ones."""
    if kind == "mooncake":
        trace = short(read_trace(real_trace(MOONCAKE))[0], 1000)
        settings = replace(BASE, prefill=2, decode=2, kv_tokens=0, failures=deaths(("d0", trace.arrival[500] + 0.017)))
    elif kind == "azure":
        trace, settings = short(read_trace(real_trace(AZURE))[0], 1000), PLAIN
    else:
        trace = short(generate("chat", requests=1000, rate=3.0, seed=1, block_tokens=16), 1000)
        settings = replace(PLAIN, failures=deaths(("p1", 60.017)))
    compare(trace, settings, some_leave(trace))
