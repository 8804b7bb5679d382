"""Live migration: a sequence that decodes goes on at another worker; its client sees a gap of a few steps. Pure.

    Lend to the worker it is on, Reserve to the other     both at once; it goes on decoding meanwhile
    Pull, when both have answered                         the KV of its prompt, verified like any other transfer
    Yield, when that is verified                          it is preempted where it is, and says so after its last token
    Prefill (and decode) at the other                     finds the prompt cached, computes what was written since

The loan and the reservation have numbers of their own, as those of a fetch. Whatever fails before the yield costs
nothing: the sequence goes on where it is. What fails after it is a preemption, and planned again like any other.

Sequences move from workers that leave the decode pool (drained ones, and those that got other roles), and from those
whose KV memory runs out: these say whom they would preempt first, some steps before (workers/preemption.py). For want
of memory a sequence moves once: what it has written is computed again, and it is the youngest where it comes to.
"""

from __future__ import annotations

from typing import Final

from twinpool.router import events as ev
from twinpool.router.fetch import CHECKSUM, MIN_PATIENCE_S, PATIENCE, pull_of
from twinpool.router.policy.base import NOBODY, Placement, Policy
from twinpool.router.request import Move, Ready, Request
from twinpool.router.state import State
from twinpool.router.worker import Worker

AT_ONCE: Final = 4  # moves from one worker: more would share its link, and all be slow


class Moves:
    """Drives the moves of a cell."""

    __slots__ = ("_state",)

    def __init__(self, state: State) -> None:
        self._state = state

    def empty(self, policy: Policy, now: float) -> None:
        """Begin what can be begun for workers that leave the decode pool."""
        state = self._state
        state.leaving = [worker for worker in state.leaving if worker.decodes]
        view = state.view()
        for worker in state.leaving:
            under_way = _under_way(state, worker)
            for request in [state.by_attempt[attempt] for attempt in worker.decodes]:
                if under_way >= AT_ONCE:
                    break
                if not _may_move(request, worker):
                    continue
                target = policy.decode_for(request, view, now)
                if target == NOBODY:
                    return
                self._begin(request, worker, state.pool.workers[target], now)
                under_way += 1

    def relieve(self, request: Request, policy: Policy, now: float) -> None:
        """KV memory runs out where it decodes, and it would be preempted first: it goes where there is room, if any is.

        By its bookings the worker had room, so these are put right before.
        """
        state = self._state
        worker = state.pool.workers[request.decode]
        state.book_anew(worker)
        if request.moves or not _may_move(request, worker) or _under_way(state, worker) >= AT_ONCE:
            return
        state.predict_output(request)
        worker.book(request.attempt, request.rid, request.length + request.output_to_come)
        target = policy.decode_for(request, state.view(), now)
        if target not in (NOBODY, worker.id):
            self._begin(request, worker, state.pool.workers[target], now)

    def _begin(self, request: Request, source: Worker, target: Worker, now: float) -> None:
        state = self._state
        tokens = len(request.hashes) * source.index_tokens
        seconds = tokens // target.block_size * target.block_bytes / state.bytes_per_s
        loan, number = state.next_attempt, state.next_attempt + 1
        state.next_attempt += 2
        request.move = move = Move(source.id, source.name, tokens, seconds, now, target.id, loan, number)
        move.until = now + MIN_PATIENCE_S + PATIENCE * seconds
        state.moves[loan] = state.moves[number] = request
        need = source.held[request.attempt]
        target.book(number, request.rid, need)
        if request.hashes:
            source.book(loan, request.rid, 0)  # it has these blocks in any case
            source.carry(seconds, now)
            target.carry(seconds, now)
            state.actions.append(ev.SendLend(source.id, request, loan, len(request.hashes)))
        else:
            move.ready = Ready(0, 0, b"", b"")
        state.actions.append(ev.SendReserve(target.id, request, number, -(-need // target.block_size)))
        state.wake_at(move.until, request, loan)

    def reserved(self, request: Request, event: ev.Reserved, now: float) -> None:
        """The other worker has room, and ``held`` leading blocks."""
        move = request.move
        assert move is not None, f"request {request.rid} does not move"
        move.held = event.held
        self._pull(request, move, now)

    def lent(self, request: Request, event: ev.BlocksReady, now: float) -> None:
        """The worker that it is on holds its blocks."""
        move = request.move
        assert move is not None, f"request {request.rid} does not move"
        move.ready = Ready(event.first, event.count, event.blocks, event.sums)
        self._pull(request, move, now)

    def _pull(self, request: Request, move: Move, now: float) -> None:
        if move.ready is None or move.held == NOBODY or move.pulled:
            return
        target = self._state.pool.workers[move.target]
        pull = pull_of(move, target, move.number, now)
        if pull is not None:
            self._state.actions.append(pull)
        elif move.held * target.block_size >= move.tokens:
            self._yield(request, move)
        else:
            self.end(request, now)

    def verified(self, request: Request, event: ev.BlocksVerified) -> None:
        """The blocks are at the other worker."""
        move = request.move
        assert move is not None, f"request {request.rid} does not move"
        request.kv_bytes += event.bytes
        request.backend = event.backend
        self._yield(request, move)

    def _yield(self, request: Request, move: Move) -> None:
        move.yields = True
        self._state.actions.append(ev.SendYield(move.source, request.attempt))

    def bad(self, request: Request, event: ev.BlocksBad, now: float) -> None:
        """They did not come. Where they do not match their sums the sequence itself decodes from KV that changed."""
        self.end(request, now, event.reason == CHECKSUM)
        if event.reason == CHECKSUM:
            request.suspect = True
            self._state.lose(request, "KV changed in memory (CHECKSUM)", now)

    def look_at(self, request: Request, now: float) -> None:
        """Time passed: a move that is late is given up."""
        move = request.move
        if move is not None and not move.yields and now >= move.until:
            self.end(request, now)

    def end(self, request: Request, now: float, suspect: bool = False) -> None:
        """Given up: the sequence stays where it is."""
        request.stays = True
        self._state.end_move(request, now, suspect)

    def arrive(self, request: Request, now: float) -> Placement | None:
        """It has yielded; None where it has nowhere to go on (any more). Call it before the attempt is dropped."""
        state, move = self._state, request.move
        if move is None or not move.yields:
            return None
        worker = state.pool.workers[move.target]
        length = request.prompt_len + request.emitted
        cached = min(max(move.held, move.pulled), (length - 1) // worker.block_size) * worker.block_size
        seconds = worker.prompt_s(length - cached, cached, request.itl_s)
        return Placement(worker.id, worker.id, "local", f"moved here from {move.source_name}", cached, seconds)


def _under_way(state: State, worker: Worker) -> int:
    """Moves from this worker."""
    return sum([1 for attempt in worker.decodes if state.by_attempt[attempt].move is not None])


def _may_move(request: Request, worker: Worker) -> bool:
    """Whether it decodes there by now, and its KV can be named or is less than a block."""
    if request.move is not None or request.stays or request.decode != worker.id:
        return False
    if not request.hashes and request.length >= worker.index_tokens:
        return False
    return request.prefill_done and request.left > 0 and (request.path == "local" or request.transferred_at >= 0.0)
