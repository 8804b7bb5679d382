"""What is predicted wrong or heard late: exactly that is disturbed, from a seed, and the rest is as it was."""

from __future__ import annotations

import statistics
from array import array
from dataclasses import replace
from typing import Any

import pytest
from tests.sim.search_traffic import traffic

from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.sim.disturbance import factors, outputs_of, work_of
from twinpool.sim.generate import generate
from twinpool.sim.kv_feed import KvFeed, KvFrame
from twinpool.sim.replay import build, replay, run
from twinpool.sim.search import runner
from twinpool.sim.settings import Failure, Settings
from twinpool.sim.trace import Trace

CLUSTER = Settings(prefill=2, decode=2, kv_tokens=60_000)
WRONG: dict[str, dict[str, Any]] = {
    "prefill": {"prefill_error": 0.1}, "output": {"output_error": 0.5}, "late": {"kv_delay_s": 0.5},
    "lost": {"kv_loss": 0.8},
}  # fmt: skip


@pytest.fixture(scope="module")
def chats() -> Trace:
    """Turns that share prefixes, so that it matters who holds what."""
    return generate("chat", requests=300, rate=12.0, seed=5)


# --- factors ----------


def test_factors_are_lognormal_with_mean_one() -> None:
    drawn = factors(40_000, 0.5, 3, "x")
    assert statistics.fmean(drawn) == pytest.approx(1.0, abs=0.01)
    logs = factors(40_000, 0.5, 3, "x")
    assert logs == drawn
    assert factors(100, 0.5, 3, "x") == drawn[:100]
    assert factors(100, 0.5, 4, "x") != drawn[:100]
    assert factors(100, 0.5, 3, "y") != drawn[:100]


def test_lengths_keep_their_sum_and_their_bounds() -> None:
    trace = traffic(4000, output=200)
    settings = replace(CLUSTER, output_error=0.5)
    outputs = outputs_of(trace, settings)
    assert sum(outputs) == pytest.approx(sum(trace.output), rel=1e-3)
    assert 1 <= min(outputs) <= max(outputs) <= max(trace.output)
    assert outputs_of(trace, CLUSTER) is trace.output
    short = replace(settings, max_tokens=50)
    assert all(o <= max(50, own) for o, own in zip(outputs_of(trace, short), trace.output, strict=True))
    assert not work_of(trace, CLUSTER)


def test_nothing_to_disturb() -> None:
    empty = replace(traffic(1), arrival=array("d"), prompt=array("q"), output=array("q"), offsets=array("q", [0]))
    assert not outputs_of(empty, replace(CLUSTER, output_error=0.5))


# --- runs ----------


@pytest.mark.parametrize("what", WRONG)
def test_the_same_seed_is_the_same_run_and_another_is_not(what: str, chats: Trace) -> None:
    settings = replace(CLUSTER, **WRONG[what])
    first, again = replay(chats, settings), replay(chats, settings)
    other = replay(chats, replace(settings, error_seed=1))
    plain = replay(chats, CLUSTER)
    assert first.digest == again.digest
    assert first.digest != plain.digest
    assert (first.digest == other.digest) is (what == "late")  # nothing is drawn for that
    assert first.summary()["completed"] == len(chats)


def test_a_seed_without_errors_is_nothing(chats: Trace) -> None:
    assert replay(chats, CLUSTER).digest == replay(chats, replace(CLUSTER, error_seed=7)).digest


def test_errors_do_not_depend_on_the_policy() -> None:
    trace = traffic(60)
    settings = replace(CLUSTER, prefill_error=0.3, output_error=0.5)
    runs = [build(trace, replace(settings, policy=policy)) for policy in ("least_seconds", "dynamo")]
    assert runs[0].work == runs[1].work
    assert runs[0].outputs == runs[1].outputs


def test_prompt_work_takes_what_it_takes_and_decoding_what_it_did() -> None:
    """Alone in the cluster: a first token is as late as the factor says, the step as the grid does."""
    trace = replace(traffic(1), prompt=array("q", [4000]), output=array("q", [50]))
    settings = Settings(prefill=1, decode=1, parameters={"paths": "split"}, prefill_error=0.5)
    plain, wrong = replay(trace, replace(settings, prefill_error=0.0)), replay(trace, settings)
    (factor,) = work_of(trace, settings)
    busy, truly = plain.workers[0].busy_prefill_s, wrong.workers[0].busy_prefill_s
    assert truly == pytest.approx(factor * busy)
    assert float(wrong.columns.ttft()[0] - plain.columns.ttft()[0]) == pytest.approx(truly - busy)
    assert wrong.workers[1].busy_decode_s == pytest.approx(plain.workers[1].busy_decode_s)


def test_results_tell_the_outputs_that_were(chats: Trace) -> None:
    settings = replace(CLUSTER, output_error=0.5)
    assert list(replay(chats, settings).columns.output) == list(outputs_of(chats, settings))


def test_no_bound_is_claimed_for_work_that_nobody_foresaw() -> None:
    with runner(traffic(300, rate=8.0), 1) as made:
        bounds = [
            made.bound(replace(Settings(prefill=1, decode=1), **WRONG[what]), 0.99).result()
            for what in ("output", "lost")
        ]
    assert bounds[0] == float("inf") != bounds[1]


@pytest.mark.parametrize(
    "wrong", [{"prefill_error": -0.1}, {"output_error": 4.0}, {"kv_delay_s": float("nan")}, {"kv_loss": 1.01}]
)
def test_errors_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be from 0 to"):
        replace(CLUSTER, **wrong)


# --- messages ----------


def frame(event: ev.KvChanged, life: int = 0) -> KvFrame:
    return KvFrame(life, event)


def test_a_gap_is_noticed_at_the_next_message_and_only_everything_closes_it() -> None:
    feed = KvFeed(0.0, 0)
    first, lost, third, everything, last = [
        frame(ev.KvChanged(0, [i], [], i == 3)) for i in range(5)
    ]  # the fourth is an answer
    assert all(feed.leaves(each) for each in (first, lost, third, everything, last))
    assert feed.taken(first)
    assert not feed.taken(third)
    assert not feed.in_step(0)
    assert feed.taken(everything)
    assert feed.taken(last)
    assert feed.in_step(0)
    assert (feed.sent, feed.lost, feed.dropped) == (5, 0, 1)


def test_what_says_nothing_is_not_sent_but_an_empty_cache_is_news() -> None:
    feed = KvFeed(0.0, 0)
    assert not feed.leaves(frame(ev.KvChanged(0, [], [], False)))
    assert feed.leaves(frame(ev.KvChanged(0, [], [], True)))
    assert feed.sent == 1


def test_losses_of_a_worker_do_not_depend_on_others() -> None:
    def lost(lives: list[int]) -> list[bool]:
        feed = KvFeed(0.5, 1)
        arrives = [(life, feed.leaves(frame(ev.KvChanged(life, [1], [], False), life))) for life in lives]
        return [here for life, here in arrives if life == 0]

    alone = lost([0] * 40)
    assert alone == lost([0, 1, 1] * 40)
    assert 5 < sum(alone) < 35


def test_lost_events_are_healed(chats: Trace) -> None:
    """Where the last message of a worker was taken the index knows its cache, whatever was lost before."""
    loop = build(chats, replace(CLUSTER, kv_loss=0.2))
    run(loop)
    feed = loop.feed
    assert feed is not None
    assert feed.lost > 50
    assert feed.asked > 50
    known = 0
    for number, worker in loop.workers.items():
        while loop.kv_news:
            loop.core.on(loop.kv_news.popleft()[1], loop.now)
        under_way = any(isinstance(b, KvFrame) and b.event.worker == number for _, _, _, _, b in loop.heap)
        if not under_way and feed.in_step(loop.run_of[number]):
            known += 1
            held = loop.core.state.index._held.get(number, set())
            assert held == set(worker._memory._refs)
    assert known


def test_what_a_worker_said_in_a_former_life_is_not_heard(chats: Trace) -> None:
    when = chats.arrival[150]
    gone = (Failure(when, "die", "p0"), Failure(when + 0.2, "return", "p0"))
    loop = build(chats, replace(CLUSTER, failures=gone, kv_delay_s=2.0))
    said: list[ev.KvChanged] = []
    left: list[ev.KvChanged] = []
    loop.call_at(when + 0.1, lambda now: said.extend(news for _, news in loop.kv_news if news.worker == 0))
    loop.call_at(when + 0.2001, lambda now: left.extend(news for _, news in loop.kv_news if news.worker == 0))
    run(loop)
    assert any(news.stored for news in said)
    assert not left


def test_nor_where_some_are_lost(chats: Trace) -> None:
    when = chats.arrival[150]
    gone = (Failure(when, "die", "p0"), Failure(when + 0.2, "return", "p0"))
    loop = build(chats, replace(CLUSTER, failures=gone, kv_loss=1e-9))
    run(loop)
    assert loop.run_of[0] == 4
    loop.kv_news.clear()
    for life in (0, 4):
        late = KvFrame(life, ev.KvChanged(0, [1], [], True))
        loop._kv_comes(late, loop.now)
    assert [news for _, news in loop.kv_news] == [late.event]
