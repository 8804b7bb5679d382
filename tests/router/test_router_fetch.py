"""A prefix is fetched before its prompt is computed: what the core asks for, and what becomes of every fault."""

from __future__ import annotations

import pytest
from tests.router.core_cell import P2, Cell, D, P, names, phase_of, ready
from tests.router.fake_worker import BLOCK, BLOCK_BYTES, request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.policy import LeastSeconds, make_policy
from twinpool.router.request import Fetch, Phase, Request

S = P2  # has 20 blocks of every prompt, and a prompt to compute
PROMPT = 90
CACHED = 80


def fetching() -> tuple[Cell, Request, Fetch]:
    """A request placed on P, attempt 2, whose prefix S lends as number 3."""
    cell = Cell()
    cell.on(worker_up(S, "prefill"))
    cell.on(ev.KvChanged(S, list(range(100, 150)), [], False))
    busy = request_of(1, 100, hashes=list(range(100, 125)))
    cell.on(ev.Submit(busy))
    assert busy.prefill == S
    cell.on(ev.KvChanged(S, list(range(20)), [], True))
    request = request_of(2, PROMPT, hashes=list(range(PROMPT // BLOCK)))
    actions = cell.on(ev.Submit(request))
    assert [type(action) for action in actions] == [ev.SendLend, ev.SendReserve, ev.SendReserve]
    assert actions[0] == ev.SendLend(S, request, 3, CACHED // BLOCK)
    assert actions[1] == ev.SendReserve(P, request, 2, -(-PROMPT // BLOCK))
    fetch = request.fetch
    assert (request.prefill, request.attempt, request.loan) == (P, 2, 3)
    assert fetch is not None
    assert (fetch.source, fetch.tokens, fetch.cached) == (S, CACHED, 0)
    assert f"{CACHED} tokens from w{S}" in request.reason
    return cell, request, fetch


def lent(count: int = CACHED // BLOCK, worker: int = S) -> ev.BlocksReady:
    answer = ready(3, 0, count)
    answer.worker = worker
    return answer


def came(first: int = 0, count: int = CACHED // BLOCK) -> ev.BlocksVerified:
    return ev.BlocksVerified(P, 2, first, count, count * BLOCK_BYTES, 0.001, "fake")


def cached(actions: list[ev.Action]) -> list[int]:
    """What the prefills that are sent are told to be there."""
    return [action.cached for action in actions if isinstance(action, ev.SendPrefill)]


def outcome(request: Request) -> str:
    assert request.fetch is not None
    return request.fetch.outcome


def test_blocks_come_before_the_prompt() -> None:
    cell, request, fetch = fetching()
    assert cell.on(ev.Reserved(D, 2, 0)) == []
    assert phase_of(request) == Phase.RESERVED
    assert cell.on(lent()) == []
    (pull,) = cell.on(ev.Reserved(P, 2, 0))
    assert isinstance(pull, ev.SendPull)
    assert (pull.worker, pull.attempt, pull.peer, pull.first, len(pull.blocks)) == (P, 2, S, 0, 4 * 20)
    assert 0.0 < pull.timeout_s < 1.0
    actions = cell.on(came())
    assert actions[0] == ev.SendCancel(S, 3)
    assert cached(actions) == [CACHED]
    assert phase_of(request) == Phase.PREFILLING
    assert (fetch.outcome, fetch.blocks, request.loan, request.kv_bytes) == ("OK", 20, 0, 0)


def test_what_the_prefill_worker_has_is_not_pulled() -> None:
    cell, _, _ = fetching()
    cell.on(lent())
    (pull,) = cell.on(ev.Reserved(P, 2, 5))
    assert isinstance(pull, ev.SendPull)
    assert (pull.first, len(pull.blocks), len(pull.sums)) == (5, 4 * 15, 8 * 15)


def test_the_prefill_waits_for_the_decode_room_too() -> None:
    cell, request, _ = fetching()
    cell.on(lent())
    cell.on(ev.Reserved(P, 2, 0))
    assert cached(cell.on(came())) == []
    assert cached(cell.on(ev.Reserved(D, 2, 0))) == [CACHED]
    assert phase_of(request) == Phase.PREFILLING


@pytest.mark.parametrize(("count", "held", "left"), [(0, 0, 0), (3, 3, 12), (2, 4, 16)])
def test_evicted_meanwhile(count: int, held: int, left: int) -> None:
    cell, request, _ = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    cell.on(ev.Reserved(P, 2, held))
    actions = cell.on(lent(count))
    assert cached(actions) == [left]
    assert "SendPull" not in names(actions)
    assert outcome(request) == "GONE"


def test_partly_evicted() -> None:
    cell, request, _ = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    cell.on(ev.Reserved(P, 2, 0))
    assert names(cell.on(lent(7))) == ["SendPull"]
    assert cached(cell.on(came(0, 7))) == [28]
    assert outcome(request) == "OK"


@pytest.mark.parametrize("told", [0, 1, 2])
def test_late(told: int) -> None:
    """Whoever does not answer: the prompt is computed from what is there."""
    cell, request, fetch = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    for event in (ev.Reserved(P, 2, 4), lent())[:told]:
        cell.on(event)
    actions: list[ev.Action] = []
    while not cached(actions):
        actions = cell.tick()
    assert cell.now == pytest.approx(fetch.until)
    assert ev.SendCancel(S, 3) in actions
    assert cached(actions) == [16 if told else 0]
    assert outcome(request) == "LATE"
    before = cell.core.state.next_attempt
    for late in (lent(), ev.Reserved(P, 2, 4), came(4, 16), ev.BlocksBad(P, 2, "TIMEOUT")):
        assert cell.on(late) == []
    assert cell.core.state.next_attempt == before
    assert (request.losses, phase_of(request)) == (0, Phase.PREFILLING)


@pytest.mark.parametrize("pulls", [False, True])
def test_the_source_dies(pulls: bool) -> None:
    cell, request, _ = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    cell.on(ev.Reserved(P, 2, 0))
    if pulls:
        cell.on(lent())
    actions = cell.on(ev.WorkerLost(S))
    assert (cached(actions), outcome(request), request.losses) == ([0], "SOURCE_LOST", 0)


def test_the_source_gives_the_loan_up() -> None:
    cell, request, _ = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    actions = cell.on(ev.AttemptLost(S, 3, "LEASE", True))
    assert (cached(actions), outcome(request), request.losses) == ([0], "SOURCE_LOST", 0)


def test_blocks_that_do_not_verify() -> None:
    cell, request, _ = fetching()
    cell.on(ev.Reserved(D, 2, 0))
    cell.on(ev.Reserved(P, 2, 0))
    cell.on(lent())
    actions = cell.on(ev.BlocksBad(P, 2, "CHECKSUM"))
    assert ev.SendCancel(S, 3, True) in actions, "the source looks at what it has"
    assert (cached(actions), outcome(request), request.losses) == ([0], "CHECKSUM", 0)


def test_the_prefill_worker_dies() -> None:
    cell, request, _ = fetching()
    cell.on(lent())
    actions = cell.on(ev.WorkerLost(P))
    assert ev.SendCancel(S, 3) in actions
    assert (request.losses, request.loan) == (1, 0)
    assert not cell.core.state.loans


def test_the_prefill_worker_has_no_room() -> None:
    cell, request, _ = fetching()
    actions = cell.on(ev.NoRoom(P, 2))
    assert ev.SendCancel(S, 3) in actions
    assert ev.SendCancel(P, 2) in actions
    assert request.losses == 0


def test_the_client_goes() -> None:
    cell, _, _ = fetching()
    cell.on(lent())
    actions = cell.on(ev.Cancel(2))
    assert [action for action in actions if isinstance(action, ev.SendCancel)] == [
        ev.SendCancel(S, 3), ev.SendCancel(P, 2), ev.SendCancel(D, 2)
    ]  # fmt: skip


def test_leases_of_loans_are_renewed() -> None:
    cell, _, _ = fetching()
    cell.core.state.limits = cell.core.state.limits.__class__(lease_s=0.03)
    cell.core._renew_at = cell.now
    renewed = {
        number for action in cell.tick() if isinstance(action, ev.SendRenew) for number in action.attempts
    }  # fmt: skip
    assert 3 in renewed


def test_a_decode_worker_lends_too_and_decodes() -> None:
    """Source and decode worker of one request are the same: two numbers there, neither ends the other."""
    cell = Cell()
    cell.on(ev.KvChanged(D, list(range(20)), [], False))
    request = request_of(1, PROMPT, hashes=list(range(PROMPT // BLOCK)))
    actions = cell.on(ev.Submit(request))
    assert names(actions) == ["SendLend", "SendReserve", "SendReserve"]
    assert request.fetch is not None
    assert (request.fetch.source, request.decode) == (D, D)
    loan = request.loan
    cell.on(ev.Reserved(D, 1, 20))
    cell.on(ev.Reserved(P, 1, 0))
    answer = ready(loan, 0, 20)
    answer.worker = D
    cell.on(answer)
    done = ev.BlocksVerified(P, 1, 0, 20, 20 * BLOCK_BYTES, 0.001, "fake")
    assert names(cell.on(done)) == ["SendCancel", "SendPrefill"]
    assert 1 in cell.core.state.pool.workers[D].held
    cell.on(ev.WorkerLost(D))
    assert request.losses == 1


def test_the_switch() -> None:
    assert LeastSeconds().fetches
    policy = make_policy("least_seconds", {"fetch": "off"})
    assert isinstance(policy, LeastSeconds)
    assert not policy.fetches
