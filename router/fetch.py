"""Fetch before prefill: KV that another worker has cached comes while the prefill worker computes for others. Pure.

    Lend to the source, Reserve to the prefill worker        both at once, beside the decode reservation
    Pull, when both have answered: what the latter has not   verified like any other transfer
    Prefill, when that is verified, failed, or late          what is not there is computed

A loan has a number of its own, like an attempt: the source holds the blocks under a lease of that number. No fault of a
fetch costs the attempt: whatever happens, by ``until`` the prefill begins with what is there.
"""

from __future__ import annotations

from typing import Final

from twinpool.router import events as ev
from twinpool.router.policy.base import Placement
from twinpool.router.request import NOBODY, Fetch, Ready, Request
from twinpool.router.state import State
from twinpool.router.worker import Worker

PATIENCE: Final = 2.0  # times the predicted seconds, and then
MIN_PATIENCE_S: Final = 0.050
PULL_MARGIN_S: Final = 0.250  # the receiver gives up so much later by itself, should its router not say so

OK: Final = "OK"
GONE: Final = "GONE"  # the source has no more of it than the prefill worker
LATE: Final = "LATE"
SOURCE_LOST: Final = "SOURCE_LOST"
CHECKSUM: Final = "CHECKSUM"


def pull_of(fetch: Fetch, receiver: Worker, number: int, now: float) -> ev.SendPull | None:
    """What to pull when both ends have answered; None where the source has nothing that the receiver has not."""
    ready = fetch.ready
    assert ready is not None, "the source has not answered"
    first, end = fetch.held, min(ready.first + ready.count, fetch.tokens // receiver.block_size)
    if first < ready.first or first >= end:
        return None
    fetch.pulled = end
    blocks, sums = ready.blocks[4 * first : 4 * end], ready.sums[8 * first : 8 * end]
    timeout_s = max(0.0, fetch.until - now) + PULL_MARGIN_S
    return ev.SendPull(receiver.id, number, fetch.source, first, blocks, sums, timeout_s)


class Fetches:
    """Drives the fetches of a cell. Methods that return a bool say whether the fetch is over by that."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        self._state = state

    def begin(self, request: Request, placement: Placement, now: float) -> None:
        """Ask the source to keep the blocks and the prefill worker for room."""
        state = self._state
        source, worker = state.pool.workers[placement.source], state.pool.workers[placement.prefill]
        own = placement.cached - placement.fetched
        fetch = Fetch(source.id, source.name, placement.cached, own, placement.fetch_s, now)
        fetch.until = now + MIN_PATIENCE_S + PATIENCE * placement.fetch_s
        request.fetch, request.loan = fetch, state.next_attempt
        state.next_attempt += 1
        state.loans[request.loan] = request
        source.book(request.loan, request.rid, placement.cached)
        size = worker.block_size
        seconds = placement.fetched // size * worker.block_bytes / state.bytes_per_s
        source.carry(seconds, now)
        worker.carry(seconds, now)
        blocks = -(-(request.length + placement.local) // size)
        hashes = -(-placement.cached // source.index_tokens)
        state.actions.append(ev.SendLend(source.id, request, request.loan, hashes))
        state.actions.append(ev.SendReserve(worker.id, request, request.attempt, blocks))
        state.wake_at(fetch.until, request, request.loan)

    def room(self, request: Request, held: int, now: float) -> bool:
        """The prefill worker has booked room, and ``held`` leading blocks."""
        fetch = request.fetch
        if fetch is None or not request.loan or fetch.held != NOBODY:
            return False
        fetch.held = held
        return self._pull(request, fetch, now)

    def lent(self, request: Request, event: ev.BlocksReady, now: float) -> bool:
        """The source holds blocks, perhaps fewer than were asked for."""
        fetch = request.fetch
        if fetch is None or fetch.ready is not None or event.worker != fetch.source:
            return False
        fetch.ready = Ready(event.first, event.count, event.blocks, event.sums)
        return self._pull(request, fetch, now)

    def _pull(self, request: Request, fetch: Fetch, now: float) -> bool:
        if fetch.ready is None or fetch.held == NOBODY:
            return False
        receiver = self._state.pool.workers[request.prefill]
        pull = pull_of(fetch, receiver, request.attempt, now)
        if pull is None:
            self.end(request, OK if fetch.held * receiver.block_size >= fetch.tokens else GONE, now)
            return True
        self._state.actions.append(pull)
        return False

    def verified(self, request: Request, event: ev.BlocksVerified, now: float) -> bool:
        """The blocks are at the prefill worker."""
        fetch = request.fetch
        if fetch is None or not request.loan or event.first + event.count != fetch.pulled:
            return False
        fetch.blocks = event.count
        self.end(request, OK, now)
        return True

    def late(self, request: Request, now: float) -> bool:
        """Whether it has had its time: then the prompt is computed from what the worker has."""
        fetch = request.fetch
        if fetch is None or not request.loan or now < fetch.until:
            return False
        self.end(request, LATE, now)
        return True

    def end(self, request: Request, outcome: str, now: float) -> None:
        """The loan goes back; the prefill is predicted anew, with what is there. It must have a loan."""
        fetch, worker = request.fetch, self._state.pool.workers[request.prefill]
        assert fetch is not None, f"request {request.rid} fetches nothing"
        fetch.outcome, fetch.ended_at = outcome, now
        size = worker.block_size
        cached = fetch.cached if fetch.held == NOBODY else fetch.held * size
        if outcome == OK:
            cached = max(cached, fetch.pulled * size)
        cached = min(cached, (request.length - 1) // size * size)
        self._state.end_loan(request, now, outcome == CHECKSUM)
        worker.progress(request.attempt, request.length - cached, cached, 1.0, now)
