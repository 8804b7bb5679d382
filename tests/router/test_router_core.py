"""Each edge of the drawn life of a request, event by event (the picture is in router/request.py)."""

from __future__ import annotations

import pytest
from tests.router.core_cell import D2, P2, RUNNING, Cell, D, P, names, phase_of, ready, refusal, verified
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.request import NOBODY, Phase
from twinpool.router.state import Limits

# --- the life ----------


def test_path_split() -> None:
    cell = Cell()
    request = request_of(1)
    assert cell.on(ev.Submit(request)) == [ev.SendReserve(D, request, 1, 4)]
    assert (request.phase, request.prefill, request.decode, request.path) == (Phase.PLACED, P, D, "split")
    assert cell.on(ev.Reserved(D, 1, 0)) == [ev.SendPrefill(P, request, 1, False, True)]
    assert phase_of(request) == Phase.PREFILLING
    assert cell.on(ev.Progressed(P, 1, 8, 4, 0.02, 1.0)) == []
    assert (request.cached, request.compute_s) == (4, 0.02)
    blocks = ready(1, 0, 2)
    assert cell.on(blocks) == [ev.SendPull(D, 1, P, 0, blocks.blocks, blocks.sums)]
    assert cell.on(ev.Emitted(P, 1, 1)) == [ev.SendDecode(D, request, 1), ev.Show(1)]
    assert phase_of(request) == Phase.FIRST
    assert names(cell.on(ready(1, 2, 1))) == ["SendPull"]
    assert cell.on(verified(1, 0, 2)) == []
    assert cell.on(verified(1, 2, 1)) == [ev.SendRelease(P, 1)]
    assert phase_of(request) == Phase.TRANSFERRED
    assert cell.core.state.pool.workers[P].booked == 0
    assert cell.on(ev.Emitted(D, 1, 1)) == []
    assert phase_of(request) == Phase.DECODING
    cell.on(ev.Emitted(D, 1, 2))
    assert cell.on(ev.Ended(D, 1, "length")) == [ev.Finish(request)]
    assert (request.phase, request.emitted, request.ended, request.kv_bytes) == (Phase.FINISHED, 4, "length", 3072)
    stamps = [request.placed_at, request.prefill_started_at, request.first_at, request.transferred_at]
    assert stamps == sorted(stamps)
    assert request.transferred_at <= request.decoding_at <= request.finished_at
    assert not cell.core.state.requests


def test_blocks_that_the_decode_worker_has_are_not_pulled() -> None:
    cell = Cell()
    request = request_of(1)
    cell.on(ev.Submit(request))
    cell.on(ev.Reserved(D, 1, 1))
    blocks = ready(1, 0, 2)
    assert cell.on(blocks) == [ev.SendPull(D, 1, P, 1, blocks.blocks[4:], blocks.sums[8:])]
    cell.on(ev.Emitted(P, 1, 1))
    cell.on(verified(1, 1, 1))
    assert names(cell.on(ready(1, 2, 1))) == ["SendPull"]
    assert cell.on(verified(1, 2, 1)) == [ev.SendRelease(P, 1)]


def test_the_block_of_the_last_token_always_moves() -> None:
    cell = Cell()
    cell.on(ev.Submit(request_of(1, 12)))
    cell.on(ev.Reserved(D, 1, 3))
    assert cell.core.state.requests[1].held == 2


def test_blocks_verified_before_the_first_token_arrives() -> None:
    cell = Cell()
    request = cell.reach(Phase.PREFILLING)
    cell.on(ready(1, 0, 3))
    assert cell.on(verified(1, 0, 3)) == []
    assert cell.on(ev.Emitted(P, 1, 1)) == [ev.SendDecode(D, request, 1), ev.SendRelease(P, 1), ev.Show(1)]
    # The token was the last one after all: its worker says so although its part is released.
    assert cell.on(ev.Ended(P, 1, "stop")) == [ev.SendCancel(D, 1), ev.Finish(request)]


def test_path_local() -> None:
    cell = Cell("local")
    request = request_of(1)
    assert cell.on(ev.Submit(request)) == [ev.SendPrefill(D, request, 1, True, False)]
    assert (request.phase, request.prefill, request.decode) == (Phase.PREFILLING, D, D)
    assert cell.on(ev.Emitted(D, 1, 1)) == [ev.Show(1)]
    assert phase_of(request) == Phase.FIRST
    cell.on(ev.Emitted(D, 1, 1))
    assert phase_of(request) == Phase.DECODING
    assert cell.on(ev.Ended(D, 1, "stop")) == [ev.Finish(request)]


def test_one_token_reserves_and_moves_nothing() -> None:
    cell = Cell()
    request = request_of(1, max_tokens=1)
    assert cell.on(ev.Submit(request)) == [ev.SendPrefill(P, request, 1, False, False)]
    assert cell.on(ev.Emitted(P, 1, 1)) == [ev.Show(1)]
    assert cell.on(ev.Ended(P, 1, "length")) == [ev.Finish(request)]
    assert not cell.core.state.pool.workers[P].attempts


def test_first_token_stops() -> None:
    cell = Cell()
    request = cell.reach(Phase.FIRST)
    assert cell.on(ev.Ended(P, 1, "stop")) == [ev.SendCancel(D, 1), ev.Finish(request)]
    assert request.ended == "stop"


# --- decode room ----------


def crowd(cell: Cell) -> None:
    """Books the decode worker full with one request."""
    cell.on(ev.Submit(request_of(99, 20, 220)))
    cell.core.state.pool.workers[D].book(cell.core.state.requests[99].attempt, 99, 240)


def test_kv_waits_where_no_decode_worker_has_room() -> None:
    cell = Cell()
    crowd(cell)
    request = request_of(1)
    assert cell.on(ev.Submit(request)) == [ev.SendPrefill(P, request, 2, False, True)]
    assert request.decode == NOBODY
    assert "KV waits" in request.reason
    assert cell.on(ready(2, 0, 3)) == []
    assert cell.on(ev.Emitted(P, 2, 1)) == []  # held: nobody knows when the second will come
    actions = cell.on(ev.Cancel(99))
    assert ev.SendReserve(D, request, 2, 4) in actions
    assert names(cell.on(ev.Reserved(D, 2, 0))) == ["SendPull", "SendDecode"]
    assert cell.on(verified(2, 0, 3)) == [ev.SendRelease(P, 2)]
    assert cell.on(ev.Emitted(D, 2, 1)) == [ev.Show(1)]
    assert phase_of(request) == Phase.DECODING


def test_kv_that_waits_is_bounded() -> None:
    cell = Cell()
    crowd(cell)
    cell.on(ev.Submit(request_of(1, 80, ttft_s=60.0)))
    cell.on(ev.Submit(request_of(2, 60, ttft_s=60.0)))
    assert [request.rid for request in cell.core.state.queue] == [2]


def test_no_prompt_is_computed_whose_second_token_would_be_long_in_coming() -> None:
    cell = Cell()
    crowd(cell)
    cell.on(ev.Submit(request_of(1, 10, ttft_s=0.1)))
    assert [request.rid for request in cell.core.state.queue] == [1]
    cell.on(ev.Submit(request_of(2, 10, ttft_s=60.0)))
    assert [request.rid for request in cell.core.state.queue] == [1]


def test_nobody_passes_kv_that_waits_for_a_decode_worker() -> None:
    cell = Cell()
    crowd(cell)
    long, short = request_of(1, 80, ttft_s=60.0), request_of(2, 2, ttft_s=60.0)
    cell.on(ev.Submit(long))
    cell.on(ev.Emitted(P, long.attempt, 1))
    cell.on(ev.Submit(short))
    assert [long.decode, short.decode] == [NOBODY, NOBODY]
    assert "KV waits" in short.reason
    reserved = [action.request.rid for action in cell.on(ev.Cancel(99)) if isinstance(action, ev.SendReserve)]
    assert reserved == [1, 2]


def test_a_held_first_token_is_shown_at_its_deadline() -> None:
    cell = Cell()
    crowd(cell)
    cell.on(ev.Submit(request_of(1)))
    cell.on(ev.Emitted(P, 2, 1))
    deadline = cell.core.state.requests[1].deadline
    shown = [action for _ in range(3) for action in cell.tick() if isinstance(action, ev.Show)]
    assert shown == [ev.Show(1)]
    assert deadline <= cell.now


def test_a_held_first_token_is_shown_though_its_attempt_is_lost() -> None:
    cell = Cell()
    crowd(cell)
    cell.on(ev.Submit(request_of(1)))
    cell.on(ev.Emitted(P, 2, 1))
    cell.on(ev.WorkerLost(P))
    while cell.core.state.requests[1].deadline > cell.now:
        actions = cell.tick()
    assert ev.Show(1) in actions


def test_a_held_first_token_is_shown_while_a_reservation_is_pending() -> None:
    cell = Cell(limits=Limits(reserve_wait_s=100.0))
    crowd(cell)
    request = request_of(1)
    cell.on(ev.Submit(request))
    cell.on(ev.Emitted(P, 2, 1))
    cell.on(ev.Cancel(99))
    assert (request.decode, request.reserved) == (D, False)
    while request.deadline > cell.now:
        actions = cell.tick()
    assert ev.Show(1) in actions


@pytest.mark.parametrize("busy", [P, D])
def test_the_first_token_is_held_while_its_last_blocks_wait_for_a_link(busy: int) -> None:
    cell = Cell()
    request = request_of(1)
    cell.on(ev.Submit(request))
    cell.on(ev.Reserved(D, 1, 0))
    cell.core.state.pool.workers[busy].carry(0.5, cell.now)  # somebody's long prompt
    cell.on(ready(1, 0, 3))
    assert ev.Show(1) not in cell.on(ev.Emitted(P, 1, 1))
    assert ev.Show(1) not in cell.on(verified(1, 0, 3))
    assert cell.on(ev.Emitted(D, 1, 1)) == [ev.Show(1)]


def test_a_busy_link_delays_nothing_that_is_there_already() -> None:
    cell = Cell()
    request = request_of(1)
    cell.on(ev.Submit(request))
    cell.on(ev.Reserved(D, 1, 0))
    cell.on(ready(1, 0, 3))
    cell.on(verified(1, 0, 3))
    cell.core.state.pool.workers[D].carry(0.5, cell.now)
    assert ev.Show(1) in cell.on(ev.Emitted(P, 1, 1))


def test_no_room_at_the_decode_worker_takes_another_one() -> None:
    cell = Cell()
    cell.on(worker_up(D2, "decode"))
    request = request_of(1)
    cell.on(ev.Submit(request))
    actions = cell.on(ev.NoRoom(D, 1))
    assert actions == [ev.SendPrefill(P, request, 1, False, True), ev.SendReserve(D2, request, 1, 4)]
    assert cell.on(ev.Reserved(D, 1, 0)) == []  # not of this one any more
    assert names(cell.on(ready(1, 0, 2))) == []
    assert names(cell.on(ev.Reserved(D2, 1, 0))) == ["SendPull"]


def test_a_full_worker_gets_nothing_until_it_reports() -> None:
    cell = Cell()
    request = cell.reach(Phase.PLACED)
    cell.on(ev.NoRoom(D, 1))
    assert cell.on(ev.Tick()) == []
    assert cell.on(ev.Reported(D, 0, 1, 0, 10, 0.01)) == []
    assert cell.on(ev.Reported(D, 9, 1, 0, 10, 0.01)) == [ev.SendReserve(D, request, 1, 4)]


def test_no_room_at_the_prefill_worker_is_no_loss() -> None:
    cell = Cell()
    request = cell.reach(Phase.PREFILLING)
    assert cell.on(ev.NoRoom(P, 1)) == [ev.SendCancel(D, 1)]
    assert (request.phase, request.losses) == (Phase.QUEUED, 0)
    assert cell.on(ev.Reported(P, 9, 0, 0, 0, 0.0)) == [ev.SendReserve(D, request, 2, 4)]


def test_a_reservation_without_an_answer_is_a_loss() -> None:
    cell = Cell()
    request = cell.reach(Phase.PLACED)
    actions = cell.tick()
    assert actions[1:] == [ev.SendCancel(D, 1), ev.SendReserve(D, request, 2, 4)]
    assert request.losses == 1


def test_a_worker_of_both_pools_keeps_the_kv_that_waited_there() -> None:
    cell = Cell(workers=False)
    cell.on(worker_up(P, "prefill", "decode"))
    cell.on(worker_up(D, "decode"))
    request = request_of(1)
    worker = cell.core.state.pool.workers
    for number in (P, D):
        worker[number].full = True
    cell.on(ev.Submit(request))
    worker[P].full = False
    worker[P].max_batch = 0
    assert cell.on(ev.Tick()) == [ev.SendPrefill(P, request, 1, False, True)]
    cell.on(ready(1, 0, 3))
    cell.on(ev.Emitted(P, 1, 1))
    worker[P].max_batch = 8
    assert cell.on(ev.Tick()) == [ev.SendDecode(P, request, 1)]
    assert phase_of(request) == Phase.TRANSFERRED
    cell.on(ev.Emitted(P, 1, 1))
    assert cell.on(ev.Ended(P, 1, "stop")) == [ev.Finish(request)]


# --- losses ----------


@pytest.mark.parametrize("phase", RUNNING)
@pytest.mark.parametrize("gone", [P, D])
def test_worker_lost(phase: Phase, gone: int) -> None:
    cell = Cell()
    request = cell.reach(phase)
    known = request.emitted
    cell.on(worker_up(P2, "prefill"))
    cell.on(worker_up(D2, "decode"))
    actions = cell.on(ev.WorkerLost(gone))
    if gone == P and phase >= Phase.TRANSFERRED:
        assert (actions, request.attempt) == ([], 1)
        return
    held = [action for action in actions if isinstance(action, ev.SendCancel)]
    released = gone == D and phase >= Phase.TRANSFERRED
    assert held == ([] if released else [ev.SendCancel(P + D - gone, 1)])
    assert (request.phase, request.attempt, request.losses) == (Phase.PLACED, 2, 1)
    assert (request.length, request.left) == (10 + known, 4 - known)
    assert cell.on(ev.Emitted(P + D - gone, 1, 1)) == []  # a late word of the lost attempt
    assert request.emitted == known


def test_losses_are_bounded() -> None:
    cell = Cell()
    request = cell.reach(Phase.PREFILLING)
    for _ in range(3):
        cell.on(ev.AttemptLost(P, request.attempt, "ENGINE", True))
        cell.on(ev.Reserved(D, request.attempt, 0))
        assert phase_of(request) == Phase.PREFILLING
    refuse = refusal(cell.on(ev.AttemptLost(P, request.attempt, "ENGINE", True)))
    assert (refuse.code, refuse.reason, refuse.retry_s) == ("UNAVAILABLE", "ATTEMPTS_LOST", 1.0)
    assert phase_of(request) == Phase.REJECTED


def test_preemptions_do_not_count() -> None:
    cell = Cell("local")
    request = request_of(1, 10, 100)
    cell.on(ev.Submit(request))
    for _ in range(10):
        cell.on(ev.Emitted(D, request.attempt, 1))
        assert cell.on(ev.AttemptLost(D, request.attempt, "preempted", False)) == [
            ev.SendPrefill(D, request, request.attempt, True, False)
        ]
    assert (request.losses, request.attempts, request.emitted) == (0, 11, 10)


def test_blocks_that_do_not_verify_are_a_loss() -> None:
    cell = Cell()
    request = cell.reach(Phase.FIRST)
    assert cell.on(ev.BlocksBad(P, 1, "CHECKSUM")) == []  # not the receiver
    actions = cell.on(ev.BlocksBad(D, 1, "CHECKSUM"))
    assert actions[:2] == [ev.SendCancel(P, 1, suspect=True), ev.SendCancel(D, 1, suspect=True)]
    assert (request.losses, request.emitted, request.length) == (1, 1, 11)


def test_a_prefill_worker_whose_part_is_done_cannot_lose_the_attempt() -> None:
    cell = Cell()
    request = cell.reach(Phase.TRANSFERRED)
    assert cell.on(ev.AttemptLost(P, 1, "LEASE", True)) == []
    assert (request.phase, request.attempt) == (Phase.TRANSFERRED, 1)


def test_all_tokens_came_but_not_the_end() -> None:
    cell = Cell("local")
    request = request_of(1, max_tokens=2)
    cell.on(ev.Submit(request))
    cell.on(ev.Emitted(D, 1, 2))
    assert cell.on(ev.WorkerLost(D)) == [ev.Finish(request)]
    assert request.ended == "length"


@pytest.mark.parametrize("phase", [Phase.PREFILLING, Phase.FIRST, Phase.TRANSFERRED])
def test_late_words_of_a_lost_attempt_change_nothing(phase: Phase) -> None:
    cell = Cell()
    request = cell.reach(phase)
    cell.on(ev.AttemptLost(D, 1, "ENGINE", True))
    before = (request.phase, request.attempt, request.emitted, request.losses, request.ready)
    for late in (
        ev.Reserved(D, 1, 0), ev.NoRoom(D, 1), ev.NoRoom(P, 1), ev.Progressed(P, 1, 8, 0, 0.1, 1.0), ready(1, 0, 2),
        verified(1, 0, 2), ev.BlocksBad(D, 1, "GONE"), ev.Emitted(P, 1, 1), ev.Emitted(D, 1, 1), ev.Ended(D, 1, "stop"),
        ev.AttemptLost(P, 1, "preempted", False), ev.Reserved(7, 2, 0), ev.Ended(7, 2, "stop"),
    ):  # fmt: skip
        assert cell.on(late) == []
    assert (request.phase, request.attempt, request.emitted, request.losses, request.ready) == before


def test_a_whole_life_without_faults_loses_nothing() -> None:
    cluster = FakeCluster()
    cluster.held = 1
    for number, role in enumerate(["prefill", "decode", "decode"]):
        cluster.join(worker_up(number, role))
    for rid in range(30):
        cluster.submit(request_of(rid, 5 + rid, 1 + rid % 7))
        cluster.run(0.004)
    cluster.run_until_ended(5.0)
    cluster.run(1.0)
    cluster.check_empty()
    assert {type(end) for end in cluster.ended.values()} == {ev.Finish}
    assert {(request.attempts, request.losses) for request in cluster.requests.values()} == {(1, 0)}
    assert cluster.shown.keys() == cluster.requests.keys()
