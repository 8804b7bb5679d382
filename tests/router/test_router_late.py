"""Who can be in time, who waits for whom, and what becomes of those that are late."""

from __future__ import annotations

import pytest
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import COST, request_of, worker_up
from tests.router.policy_views import NOW, ask, busy, cell

from twinpool.router import events as ev
from twinpool.router.policy import LeastSeconds, Passed, Placement, Refusal
from twinpool.router.policy.least_seconds import PASSED


def test_a_busy_worker_with_more_cached_is_waited_for() -> None:
    view = cell("prefill", "prefill", "decode")
    view.index.change(1, list(range(80)), [], False)  # 320 of 400 tokens: 32 ms less
    busy(view, 1, 0.025)
    policy = LeastSeconds("split", fetch="off")
    assert policy.on_room(ask(), view, NOW) == PASSED, "there in 34 ms, here in 49"
    busy(view, 1, 0.025, attempt=51)
    placement = policy.on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert placement.prefill == 0, "there only in 59 ms"


@pytest.mark.parametrize("hashes", [False, True])
def test_who_will_be_late_here_waits_for_a_worker_that_is_in_time(hashes: bool) -> None:
    view = cell("prefill", "prefill", "decode")
    if hashes:
        view.index.change(1, list(range(90)), [], False)
    busy(view, 1, 0.025)
    answer = LeastSeconds("split", fetch="off").on_room(ask(deadline=NOW + 0.04), view, NOW)
    assert isinstance(answer, Passed)
    assert (answer.late_s > 0.0) == (not hashes)


def test_late_is_by_how_much() -> None:
    view = cell("prefill", "decode")
    seconds = COST.prefill(400, 0, 512)
    answer = LeastSeconds("split").on_room(ask(deadline=NOW + seconds - 0.01), view, NOW)
    assert isinstance(answer, Passed)
    assert answer.late_s == pytest.approx(0.01)


def test_in_time_is_what_still_is_where_the_prompt_is_off_as_usual() -> None:
    view = cell("prefill", "prefill", "decode")
    seconds = COST.prefill(400, 0, 512)
    policy = LeastSeconds("split")
    tight = ask(deadline=NOW + 1.09 * seconds)
    assert isinstance(policy.on_room(tight, view, NOW), Placement)
    view.pool.workers[0].pace.spread = 0.1
    answer = policy.on_room(tight, view, NOW)
    assert isinstance(answer, Passed)
    assert answer.late_s == pytest.approx(0.01 * seconds)
    assert isinstance(policy.on_room(ask(deadline=NOW + 1.11 * seconds), view, NOW), Placement)
    view.index.change(1, list(range(50)), [], False)
    assert isinstance(policy.on_room(tight, view, NOW), Placement), "less to compute, less to be off by"


def test_prompts_that_were_off_are_kept_in_mind() -> None:
    cluster = FakeCluster(LeastSeconds("split"))
    cluster.join(worker_up(0, "prefill", blocks=400))
    worker = cluster.core.state.pool.workers[0]
    cluster.submit(request_of(0, 40, 1))
    attempt = next(iter(worker.prefills))
    cluster.core.on(ev.Progressed(0, attempt, 16, 0, 0.1, 1.4), cluster.now)
    assert worker.pace.spread == 0.0, "it is not over"
    cluster.core.on(ev.Progressed(0, attempt, 40, 0, 0.2, 1.4), cluster.now)
    assert worker.pace.spread > 0.0


def test_late_ones_are_served_by_whoever_has_room() -> None:
    request = ask(deadline=NOW - 1.0)
    request.late = True
    assert isinstance(LeastSeconds().on_room(request, cell("prefill", "decode"), NOW), Placement)


def test_who_was_started_before_is_never_late() -> None:
    request = ask(deadline=NOW - 1.0)
    request.first_at = NOW - 2.0
    assert isinstance(LeastSeconds().on_room(request, cell("prefill", "decode"), NOW), Placement)


def test_late_ones_may_be_refused_but_not_for_slow_hardware() -> None:
    policy = LeastSeconds("split", late="refuse")
    view = cell("prefill", "decode")
    request = ask(deadline=NOW + 0.04)
    request.arrival = NOW - 1.0
    answer = policy.on_room(request, view, NOW)
    assert isinstance(answer, Refusal)
    assert answer.reason == "LATE"
    assert answer.retry_s == pytest.approx(COST.prefill(400, 0, 512) - 0.04)
    request.arrival = NOW  # then no worker could ever have been in time
    assert isinstance(policy.on_room(request, view, NOW), Passed)


def test_those_in_time_go_before_those_that_are_late() -> None:
    cluster = FakeCluster(LeastSeconds("split"))
    cluster.join(worker_up(0, "prefill", blocks=400))
    cluster.join(worker_up(1, "decode", blocks=400, max_batch=40))
    long = [request_of(rid, 400, 2, ttft_s=0.6) for rid in range(6)]  # a quarter of a second each
    short = [request_of(rid, 20, 2, ttft_s=1.1) for rid in range(6, 12)]
    for request in (*long, *short):
        cluster.submit(request)
    cluster.run_until_ended(10.0)
    in_time = [r.rid for r in (*long, *short) if cluster.shown[r.rid] <= r.deadline]
    assert set(range(6, 12)) < set(in_time), "in order of deadline alone the short ones would wait for all long ones"
    assert len(in_time) >= 7
    assert not any(isinstance(end, ev.Refuse) for end in cluster.ended.values())
