"""Clients that go, deadlines, the queue's bounds, pools without workers, leases: what ends or wakes a request."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from tests.router.core_cell import D2, P2, RUNNING, Cell, D, P, refusal
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import BLOCK, request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.request import Phase
from twinpool.router.state import Limits


@pytest.mark.parametrize("phase", RUNNING)
def test_cancel(phase: Phase) -> None:
    cell = Cell()
    request = cell.reach(phase)
    actions = cell.on(ev.Cancel(1))
    workers = [D] if phase >= Phase.TRANSFERRED else [P, D]
    assert actions[:-1] == [ev.SendCancel(worker, 1) for worker in workers]
    assert refusal(actions).code == "CANCELLED"
    assert request.phase == Phase.CANCELLED
    assert cell.on(ev.Cancel(1)) == []
    assert cell.on(ev.Emitted(D, 1, 1)) == []
    assert not any(worker.attempts for worker in cell.core.state.pool.workers.values())


def test_cancel_while_queued_lets_the_next_one_go() -> None:
    cell = Cell(workers=False)
    cell.on(worker_up(P, "prefill"))
    cell.on(ev.Submit(request_of(1)))  # waits for a decode worker
    single = request_of(2, max_tokens=1, ttft_s=2.0)
    assert cell.on(ev.Submit(single)) == []
    actions = cell.on(ev.Cancel(1))
    assert refusal(actions).code == "CANCELLED"
    assert actions[1:] == [ev.SendPrefill(P, single, 1, False, False)]


@pytest.mark.parametrize("phase", [Phase.QUEUED, *RUNNING])
def test_the_callers_deadline(phase: Phase) -> None:
    cell = Cell(workers=phase != Phase.QUEUED)
    request = request_of(1, give_up=1.5)
    if phase == Phase.QUEUED:
        cell.on(ev.Submit(request))
    else:
        cell.reach(phase, request)
    ends = []
    while not request.over:
        ends = cell.tick()
    refuse = refusal(ends)
    assert (refuse.code, refuse.reason) == ("DEADLINE_EXCEEDED", "DEADLINE")
    assert cell.now == 1.5
    assert not cell.core.state.by_attempt


def test_queue_full() -> None:
    cell = Cell(limits=Limits(max_queue=2), workers=False)
    for rid in (1, 2):
        assert cell.on(ev.Submit(request_of(rid))) == []
    refuse = refusal(cell.on(ev.Submit(request_of(3))))
    assert (refuse.code, refuse.reason, refuse.retry_s) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.0)
    cell.on(ev.Cancel(1))
    assert cell.on(ev.Submit(request_of(4))) == []


def test_queue_timeout() -> None:
    cell = Cell(workers=False)
    request = request_of(1, queue_until=2.0)
    cell.on(ev.Submit(request))
    refuse = refusal(cell.tick())
    assert (refuse.code, refuse.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_TIMEOUT")
    assert cell.now == 2.0


def test_a_lost_attempt_is_no_longer_bound_by_the_queue_timeout() -> None:
    cell = Cell()
    request = cell.reach(Phase.FIRST, request_of(1, queue_until=2.0))
    cell.on(ev.WorkerLost(P))
    while cell.now < 2.0:
        cell.tick()
    assert request.phase == Phase.QUEUED


@pytest.mark.parametrize(
    ("paths", "max_tokens", "up", "missing"),
    [
        ("split", 4, ["prefill"], "decode"),
        ("split", 4, ["decode"], "prefill"),
        ("split", 1, ["decode"], "prefill"),
        ("local", 1, ["prefill"], "decode"),
        ("auto", 4, ["prefill"], "decode"),
        ("auto", 4, ["decode"], ""),
        ("auto", 1, ["decode"], ""),
        ("auto", 1, ["prefill"], ""),
        ("auto", 1, [], "prefill"),
    ],
)
def test_pools_without_workers(paths: str, max_tokens: int, up: list[str], missing: str) -> None:
    cell = Cell(paths, workers=False)
    for number, role in enumerate(up):
        cell.on(worker_up(number, role))
    request = request_of(1, max_tokens=max_tokens)
    cell.on(ev.Submit(request))
    if not missing:
        assert request.attempt == 1
        return
    refuse = refusal(cell.tick())
    assert (refuse.code, refuse.reason) == ("UNAVAILABLE", "NO_WORKER")
    assert f"no {missing} worker" in refuse.message
    assert cell.now == request.arrival + 5.0


def test_a_pool_that_lost_its_last_worker_is_waited_for() -> None:
    cell = Cell()
    request = cell.reach(Phase.DECODING)
    cell.now = 100.0
    cell.on(ev.WorkerLost(D))
    assert request.phase == Phase.QUEUED
    lost_at = cell.now
    while not request.over:
        actions = cell.tick()
    assert refusal(actions).reason == "NO_WORKER"
    assert cell.now == lost_at + 5.0


def test_a_worker_that_joins_in_time_takes_what_waits() -> None:
    cell = Cell()
    request = cell.reach(Phase.DECODING)
    cell.on(ev.WorkerLost(D))
    assert cell.on(worker_up(D, "decode"), after=4.9) == [ev.SendReserve(D, request, 2, 4)]
    cell.on(ev.Reserved(D, 2, 0))
    while cell.now < 20.0:
        cell.tick()
    assert request.phase == Phase.PREFILLING


@pytest.mark.parametrize("back", [False, True])
def test_kv_does_not_wait_for_ever_for_a_pool_without_workers(back: bool) -> None:
    cell = Cell()
    request = cell.reach(Phase.PLACED)
    cell.on(ev.WorkerDraining(D))
    cell.on(ev.NoRoom(D, 1))
    assert request.rid in cell.core.state.unhomed
    if back:
        assert cell.on(worker_up(D2, "decode"), after=4.0) == [ev.SendReserve(D2, request, 1, 4)]
        return
    while not request.over:
        actions = cell.tick()
    assert refusal(actions).reason == "NO_WORKER"
    assert "no decode worker" in refusal(actions).message


def test_kv_too_small_at_once() -> None:
    cell = Cell()
    refuse = refusal(cell.on(ev.Submit(request_of(1, 100, 200))))
    assert (refuse.code, refuse.reason, refuse.retry_s) == ("INVALID_ARGUMENT", "KV_TOO_SMALL", None)
    assert "300 tokens" in refuse.message
    assert f"{int(0.97 * 64 * BLOCK)}" in refuse.message


def test_kv_too_small_once_the_large_worker_is_gone() -> None:
    cell = Cell()
    cell.on(worker_up(D2, "decode", blocks=200))
    request = request_of(1, 100, 200)
    assert cell.on(ev.Submit(request)) == [ev.SendReserve(D2, request, 1, 57)]
    assert refusal(cell.on(ev.WorkerLost(D2))).reason == "KV_TOO_SMALL"


def test_kv_too_small_for_what_waits_at_its_prefill_worker() -> None:
    cell = Cell()
    cell.on(worker_up(D2, "decode", blocks=200))
    request = request_of(1, 150, 150)
    cell.on(ev.Submit(request))
    cell.on(ev.NoRoom(D2, 1))
    actions = cell.on(ev.WorkerLost(D2))
    assert actions[0] == ev.SendCancel(P, 1)
    assert refusal(actions).reason == "KV_TOO_SMALL"


def test_an_output_that_outgrew_the_prefill_workers() -> None:
    cell = Cell(workers=False)
    cell.on(worker_up(P, "prefill", blocks=16))
    cell.on(worker_up(D, "decode"))
    request = request_of(1, 50, 100)
    cell.on(ev.Submit(request))
    cell.on(ev.Reserved(D, 1, 0))
    cell.on(ev.Emitted(P, 1, 1))
    cell.on(ev.Emitted(D, 1, 20))
    refuse = refusal(cell.on(ev.AttemptLost(D, 1, "preempted", False)))
    assert "71 tokens" in refuse.message


def test_leases_are_renewed_while_anything_runs() -> None:
    cell = Cell()
    cell.reach(Phase.PLACED)
    cell.on(ev.Reserved(D, 1, 0))
    renewed = []
    while cell.now < 30.0:
        renewed += [(action.worker, cell.now) for action in cell.tick() if isinstance(action, ev.SendRenew)]
    for worker in (P, D):
        times = [0.0, *(when for number, when in renewed if number == worker)]
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert max(gaps) < Limits().lease_s / 2
    cell.on(ev.Ended(P, 1, "stop"))
    while cell.core.next_tick() < math.inf:
        assert cell.tick() == []
    assert cell.now < 40.0


def test_draining() -> None:
    cell = Cell()
    request = cell.reach(Phase.FIRST)
    cell.on(worker_up(D2, "decode"))
    cell.on(ev.WorkerDraining(D))
    other = request_of(2)
    assert cell.on(ev.Submit(other)) == [ev.SendReserve(D2, other, 2, 4)]
    cell.on(ev.Emitted(D, 1, 1))
    assert cell.on(ev.Ended(D, 1, "stop"))[-1] == ev.Finish(request)


def test_roles_change() -> None:
    cell = Cell()
    cell.on(worker_up(P2, "prefill"))
    cell.on(ev.RolesSet(P2, ("decode",)))
    assert [worker.id for worker in cell.core.state.pool.of("prefill")] == [P]
    cell.on(ev.RolesSet(D, ("prefill",)))
    request = request_of(1)
    assert cell.on(ev.Submit(request)) == [ev.SendReserve(P2, request, 1, 4)]


def test_the_first_token_deadline_follows_the_unloaded_prefill() -> None:
    cell = Cell()
    request = request_of(1, 100)
    request.ttft_factor = 2.0
    cell.on(ev.Submit(request))
    cost = cell.core.state.pool.workers[P].cost
    assert request.deadline == pytest.approx(request.arrival + 1.0 + 2.0 * cost.prefill(100, 0, 2048))


def test_workers_that_come_and_go_with_the_same_number() -> None:
    cluster = FakeCluster()
    for round_ in range(6):
        cluster.join(worker_up(P, "prefill"))
        cluster.join(worker_up(D, "decode"))
        for rid in range(4):
            cluster.submit(request_of(10 * round_ + rid, 20, 6))
        cluster.run(0.01 * round_)
        cluster.kill(D if round_ % 2 else P)
        cluster.run(0.02)
        cluster.kill(P if round_ % 2 else D)
    cluster.join(worker_up(P, "prefill"))
    cluster.join(worker_up(D, "decode"))
    cluster.run_until_ended(20.0)
    cluster.run(1.0)
    cluster.check_empty()
