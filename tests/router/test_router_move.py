"""Sequences of a worker that leaves the decode pool go on elsewhere: what the core asks for, what every fault costs."""

from __future__ import annotations

import pytest
from tests.router.core_cell import D2, Cell, D, P, names, ready, verified
from tests.router.fake_worker import BLOCK, BLOCK_BYTES, request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.move import AT_ONCE
from twinpool.router.policy import LeastSeconds
from twinpool.router.request import Phase, Request

PROMPT = 10  # tokens; two full blocks
FULL = PROMPT // BLOCK


def moving(emitted: int = 5) -> tuple[Cell, Request]:
    """A request that decodes on D, attempt 1, and moves to D2: loan 2 at D, reservation 3 at D2."""
    cell = Cell()
    request = cell.reach(Phase.DECODING, request_of(1, PROMPT, hashes=list(range(FULL)), max_tokens=50))
    assert request.decode == D
    cell.on(ev.Emitted(D, 1, emitted - 2))
    cell.on(worker_up(D2, "decode", blocks=400))
    actions = cell.on(ev.WorkerDraining(D))
    need = cell.core.state.pool.workers[D].held[1]
    assert actions == [ev.SendLend(D, request, 2, FULL), ev.SendReserve(D2, request, 3, -(-need // BLOCK))]
    assert request.attempt == 1
    return cell, request


def lent(count: int = FULL) -> ev.BlocksReady:
    answer = ready(2, 0, count)
    answer.worker = D
    return answer


def came() -> ev.BlocksVerified:
    return ev.BlocksVerified(D2, 3, 0, FULL, FULL * BLOCK_BYTES, 0.001, "fake")


def yielded() -> tuple[Cell, Request]:
    """D was told to stop it."""
    cell, request = moving()
    assert cell.on(ev.Reserved(D2, 3, 0)) == []
    (pull,) = cell.on(lent())
    assert isinstance(pull, ev.SendPull)
    assert (pull.worker, pull.attempt, pull.peer, pull.first, len(pull.blocks)) == (D2, 3, D, 0, 4 * FULL)
    assert cell.on(came()) == [ev.SendYield(D, 1)]
    return cell, request


def stayed(cell: Cell, request: Request) -> None:
    """It goes on where it is, nothing of the move is left, and it is not tried again."""
    state = cell.core.state
    assert (request.attempt, request.decode, request.move, state.moves) == (1, D, None, {})
    state.room_changed = True
    assert cell.on(ev.Tick()) == []
    assert cell.on(ev.Ended(D, 1, "stop"))[-1] == ev.Finish(request)
    assert not state.leaving or not state.leaving[0].decodes


def test_it_goes_on_elsewhere_with_all_its_tokens() -> None:
    cell, request = yielded()
    cell.on(ev.Emitted(D, 1, 2))  # these were under way
    actions = cell.on(ev.AttemptLost(D, 1, "preempted", False))
    assert actions[:2] == [ev.SendCancel(D, 2), ev.SendCancel(D2, 3)]
    (prefill,) = actions[2:]
    assert prefill == ev.SendPrefill(D2, request, 4, True, False, FULL * BLOCK)
    assert (request.length, request.moves, request.losses) == (PROMPT + 7, 1, 0)
    assert "moved here from" in request.reason
    cell.on(ev.Emitted(D2, 4, 1))
    cell.on(ev.Emitted(D2, 4, 3))
    assert cell.on(ev.Ended(D2, 4, "stop"))[-1] == ev.Finish(request)
    assert request.emitted == 11
    assert request.kv_bytes > 0


def test_nothing_is_pulled_that_is_there() -> None:
    cell, _ = moving()
    cell.on(lent())
    assert cell.on(ev.Reserved(D2, 3, FULL)) == [ev.SendYield(D, 1)]


@pytest.mark.parametrize(
    "fault",
    [ev.NoRoom(D2, 3), ev.AttemptLost(D2, 3, "LEASE", True), ev.AttemptLost(D, 2, "LEASE", True), ev.WorkerLost(D2)],
    ids=["no room", "reservation lost", "loan lost", "target dies"],
)
def test_a_fault_before_it_yields_costs_nothing(fault: ev.Event) -> None:
    cell, request = moving()
    cell.on(fault)
    stayed(cell, request)


def test_a_source_that_has_nothing_more() -> None:
    cell, request = moving()
    cell.on(ev.Reserved(D2, 3, 0))
    assert names(cell.on(lent(0))) == ["SendCancel", "SendCancel"]
    stayed(cell, request)


def test_a_transfer_that_fails() -> None:
    cell, request = moving()
    cell.on(ev.Reserved(D2, 3, 0))
    cell.on(lent())
    assert names(cell.on(ev.BlocksBad(D2, 3, "TIMEOUT"))) == ["SendCancel", "SendCancel"]
    stayed(cell, request)


def test_kv_that_changed_in_memory_is_not_decoded_from() -> None:
    cell, request = moving()
    cell.on(ev.Reserved(D2, 3, 0))
    cell.on(lent())
    actions = cell.on(ev.BlocksBad(D2, 3, "CHECKSUM"))
    assert ev.SendCancel(D, 2, True) in actions
    assert ev.SendCancel(D, 1, True) in actions
    assert (request.losses, request.attempts) == (1, 2)


def test_a_move_that_is_late() -> None:
    cell, request = moving()
    move = request.move
    assert move is not None
    cell.on(ev.Reserved(D2, 3, 0))
    while request.move is not None:
        actions = cell.tick()
    assert cell.now == pytest.approx(move.until)
    assert actions == [ev.SendCancel(D, 2), ev.SendCancel(D2, 3)]
    stayed(cell, request)


def test_it_ends_before_it_moved() -> None:
    cell, request = moving()
    actions = cell.on(ev.Ended(D, 1, "stop"))
    assert actions == [ev.SendCancel(D, 2), ev.SendCancel(D2, 3), ev.Finish(request)]
    assert cell.core.state.leaving == []


def test_the_client_goes() -> None:
    cell, request = moving()
    actions = cell.on(ev.Cancel(1))
    assert all(ev.SendCancel(*held) in actions for held in ((D, 1), (D, 2), (D2, 3)))
    assert request.over


def test_its_worker_dies_meanwhile() -> None:
    cell, request = moving()
    actions = cell.on(ev.WorkerLost(D))
    assert ev.SendCancel(D2, 3) in actions
    assert (request.losses, request.attempts, request.moves) == (1, 2, 0)


def test_its_goal_dies_after_it_was_told_to_yield() -> None:
    cell, request = yielded()
    cell.on(worker_up(4, "decode"))
    cell.on(ev.WorkerLost(D2))
    assert request.attempt == 1
    cell.on(ev.AttemptLost(D, 1, "preempted", False))
    assert (request.losses, request.attempts, request.moves, request.prefill) == (0, 2, 0, P)


def test_less_than_a_block_is_computed_again() -> None:
    cell = Cell()
    request = request_of(1, 3, hashes=[], max_tokens=50)
    cell.on(ev.Submit(request))
    for event in (ev.Reserved(D, 1, 0), ev.Emitted(P, 1, 1), ready(1, 0, 1), verified(1, 0, 1), ev.Emitted(D, 1, 1)):
        cell.on(event)
    cell.on(worker_up(D2, "decode", blocks=400))
    assert names(cell.on(ev.WorkerDraining(D))) == ["SendReserve"]
    assert cell.on(ev.Reserved(D2, 3, 0)) == [ev.SendYield(D, 1)]
    assert names(cell.on(ev.AttemptLost(D, 1, "preempted", False))) == ["SendCancel", "SendPrefill"]


def test_a_few_at_a_time() -> None:
    cell = Cell()
    requests = [
        cell.reach(Phase.DECODING, request_of(i, PROMPT, hashes=list(range(10 * i, 10 * i + FULL)), max_tokens=8))
        for i in range(1, AT_ONCE + 3)
    ]
    cell.on(worker_up(D2, "decode", blocks=4000))
    actions = cell.on(ev.WorkerDraining(D))
    assert names(actions) == ["SendLend", "SendReserve"] * AT_ONCE
    moves = [request.move for request in requests if request.move is not None]
    assert names(cell.on(ev.NoRoom(D2, moves[0].number)))[-2:] == ["SendLend", "SendReserve"]


def test_nobody_to_go_to() -> None:
    cell = Cell()
    request = cell.reach(Phase.DECODING, request_of(1, PROMPT, hashes=list(range(FULL)), max_tokens=50))
    assert cell.on(ev.WorkerDraining(D)) == []
    actions = cell.on(worker_up(D2, "decode"))
    assert names(actions) == ["SendLend", "SendReserve"]
    assert request.move is not None


def test_a_prompt_that_was_under_way_moves_once_it_decodes() -> None:
    cell = Cell("local")
    request = request_of(1, PROMPT, hashes=list(range(FULL)), max_tokens=50)
    cell.on(ev.Submit(request))
    assert (request.path, request.decode) == ("local", D)
    cell.on(worker_up(D2, "decode", blocks=400))
    assert cell.on(ev.WorkerDraining(D)) == []
    assert names(cell.on(ev.Emitted(D, 1, 1)))[-2:] == ["SendLend", "SendReserve"]


def test_a_role_change_moves_them_too_and_a_change_back_does_not_hurt() -> None:
    cell = Cell()
    request = cell.reach(Phase.DECODING, request_of(1, PROMPT, hashes=list(range(FULL)), max_tokens=50))
    cell.on(worker_up(D2, "decode"))
    assert names(cell.on(ev.RolesSet(D, ("prefill",)))) == ["SendLend", "SendReserve"]
    assert cell.on(ev.RolesSet(D, ("decode",))) == []
    assert cell.core.state.leaving == []
    assert request.move is not None
    assert isinstance(cell.core.policy, LeastSeconds)


def short_of_memory(policy: LeastSeconds | None = None, emitted: int = 40) -> tuple[Cell, Request]:
    """A request that decodes on D, attempt 1, for longer than was predicted; D2 is there."""
    cell = Cell(policy=policy)
    request = cell.reach(Phase.DECODING, request_of(1, PROMPT, hashes=list(range(FULL)), max_tokens=50))
    cell.on(ev.Emitted(D, 1, emitted - 2))
    cell.on(worker_up(D2, "decode", blocks=400))
    return cell, request


def test_it_goes_on_elsewhere_before_memory_runs_out() -> None:
    cell, request = short_of_memory()
    actions = cell.on(ev.Short(D, 1))
    assert names(actions) == ["SendLend", "SendReserve"]
    cell.on(ev.Reserved(D2, 3, 0))
    cell.on(lent())
    assert cell.on(came()) == [ev.SendYield(D, 1)]
    (*_, prefill) = cell.on(ev.AttemptLost(D, 1, "preempted", False))
    assert prefill == ev.SendPrefill(D2, request, 4, True, False, FULL * BLOCK)
    assert request.moves == 1
    cell.on(ev.Emitted(D2, 4, 1))
    assert cell.on(ev.Short(D2, 4)) == [], "once is enough"


def test_what_decodes_there_is_booked_anew() -> None:
    cell, request = short_of_memory()
    worker = cell.core.state.pool.workers[D]
    worker.book(1, 1, PROMPT + 5)  # what was predicted of it
    cell.on(ev.Short(D, 1))
    assert worker.held[1] >= PROMPT + 50, "max_tokens caps it"
    assert worker.context == worker.decodes[1] == PROMPT + 40
    assert request.output_to_come == 50 - request.emitted_before


def test_a_worker_without_room_gets_nobody() -> None:
    cell, request = short_of_memory()
    cell.on(ev.WorkerLost(D2))
    assert cell.on(ev.Short(D, 1)) == []
    cell.on(worker_up(D2, "decode", blocks=9))
    assert cell.on(ev.Short(D, 1)) == []
    assert (request.attempt, request.decode, request.move) == (1, D, None)


def test_nobody_moves_where_the_policy_does_not_rebalance() -> None:
    cell, _ = short_of_memory(LeastSeconds("split", rebalance="off"))
    before = cell.core.state.pool.workers[D].held[1]
    assert cell.on(ev.Short(D, 1)) == []
    assert cell.core.state.pool.workers[D].held[1] == before


def test_a_warning_of_an_attempt_that_is_over_or_does_not_decode_yet() -> None:
    cell = Cell()
    cell.reach(Phase.FIRST)
    cell.on(worker_up(D2, "decode", blocks=400))
    assert cell.on(ev.Short(D, 1)) == [], "its KV is still on the way"
    assert cell.on(ev.Short(P, 1)) == []
    assert cell.on(ev.Short(D, 7)) == []
