"""Drives one attempt through its phases: reserve, prefill, pull, decode (the picture is in request.py). Pure."""

from __future__ import annotations

import math

from twinpool.classes import BATCH_RANK
from twinpool.cost import ITL_SHARE
from twinpool.router import events as ev
from twinpool.router.fetch import SOURCE_LOST, Fetches
from twinpool.router.move import Moves
from twinpool.router.policy.base import Placement, Policy
from twinpool.router.request import NOBODY, Expected, Phase, Ready, Request
from twinpool.router.state import FORGETTING, State


class Attempts:
    """Handlers of everything a worker says about an attempt, and the two ways to start one."""

    __slots__ = ("_fetches", "_moves", "_state")

    def __init__(self, state: State) -> None:
        self._state = state
        self._fetches = Fetches(state)
        self._moves = Moves(state)

    def start(self, request: Request, placement: Placement, now: float) -> None:
        """PLACED: book the workers, ask for decode room or start the prefill."""
        state = self._state
        request.begin_attempt(state.next_attempt)
        state.next_attempt += 1
        state.by_attempt[request.attempt] = request
        request.attempts += 1
        request.phase = Phase.PLACED
        if request.placed_at < 0:
            request.placed_at = now
            seconds = placement.seconds if placement.source == NOBODY else 0.0
            request.expected = Expected(seconds, placement.cached, request.output_to_come)
        request.prefill = placement.prefill
        request.path, request.reason = placement.path, placement.reason
        worker = state.pool.workers[placement.prefill]
        request.prefill_name = worker.name
        uncached = request.length - placement.cached
        output = request.output_to_come if placement.local else 0
        worker.book(request.attempt, request.rid, request.length + output)
        fills = request.rank >= BATCH_RANK
        worker.commit_prefill(request.attempt, placement.seconds, uncached, placement.cached, now, fills)
        if placement.source != NOBODY:
            self._fetches.begin(request, placement, now)
        if placement.local:
            request.decode, request.decode_name = placement.prefill, worker.name
        elif placement.decode != NOBODY:
            self.reserve(request, placement.decode, now)
            return
        elif request.wants_transfer:
            state.unhome(request, now)
        self._start_prefill(request, now)

    def reserve(self, request: Request, decode: int, now: float) -> None:
        """Book decode room, and ask the worker for it, unless it is the one that has the KV already."""
        state = self._state
        worker = state.pool.workers[decode]
        request.decode, request.decode_name = decode, worker.name
        request.reserved_at = now  # until the answer comes: when it was asked for
        tokens = request.length + request.output_to_come
        worker.book(request.attempt, request.rid, tokens)
        worker.join_decode(request.attempt, request.length, request.itl_s)
        if decode == request.prefill:
            request.reserved = True
            request.held = request.blocks(worker.block_size)
            self._go_on(request, now)
            return
        state.actions.append(ev.SendReserve(decode, request, request.attempt, -(-tokens // worker.block_size)))
        state.wake_at(now + state.limits.reserve_wait_s, request, request.attempt)

    def _start_prefill(self, request: Request, now: float) -> None:
        fetch = request.fetch
        if fetch is not None and request.loan:
            fetch.wanted = True  # from the end of the fetch on
            return
        request.phase = Phase.PREFILLING
        request.prefill_started_at = now
        worker = self._state.pool.workers[request.prefill]
        work = worker.prefills.get(request.attempt) or worker.fills[request.attempt]
        self._state.actions.append(
            ev.SendPrefill(request.prefill, request, request.attempt, request.path == "local", request.wants_transfer,
                           work.cached)
        )  # fmt: skip

    def reserved(self, event: ev.Reserved, now: float) -> None:
        """Decode room is there."""
        state = self._state
        if (mover := state.moves.get(event.attempt)) is not None:
            self._moves.reserved(mover, event, now)
            return
        request = state.attempt_of(event.worker, event.attempt)
        if request is not None and request.fetch is not None and event.worker == request.prefill:
            if self._fetches.room(request, event.held, now):
                self._fetched(request, now)
            return
        if request is None or request.reserved or event.worker != request.decode:
            return
        request.reserved = True
        request.held = min(event.held, (request.length - 1) // state.pool.workers[event.worker].block_size)
        state.round_trip_s += FORGETTING * (now - request.reserved_at - state.round_trip_s)
        request.reserved_at = now
        if request.phase == Phase.PLACED:
            request.phase = Phase.RESERVED
            self._start_prefill(request, now)
        self._pull_ready(request, now)
        self._go_on(request, now)

    def _go_on(self, request: Request, now: float) -> None:
        """With the first token known, the decode worker may go on as soon as it has all blocks."""
        if request.prefill_done:
            self._state.actions.append(ev.SendDecode(request.decode, request, request.attempt))
            self._check_transferred(request, now)

    def no_room(self, event: ev.NoRoom, now: float) -> None:
        """The worker's memory is fuller than booked: another place, or (decode) later."""
        state = self._state
        if (mover := state.moves.get(event.attempt)) is not None:
            self._moves.end(mover, now)
            return
        request = state.attempt_of(event.worker, event.attempt)
        if request is None:
            return
        worker = state.pool.workers[event.worker]
        wanted = request.length + (request.path == "local")
        if event.worker == request.prefill:
            # After a fetch it may have found room for the prompt though it had none for the reservation before.
            state.retry(request, now, gone=event.worker if request.fetch is None else NOBODY)
        else:
            wanted = worker.held[request.attempt]
            worker.forget(request.attempt, now)
            request.decode = NOBODY
            state.unhome(request, now)
            if request.phase == Phase.PLACED:
                self._start_prefill(request, now)
        worker.refused(wanted)

    def progressed(self, event: ev.Progressed, now: float) -> None:
        """Prompt tokens were computed."""
        request = self._state.attempt_of(event.worker, event.attempt)
        if request is None or event.worker != request.prefill:
            return
        if request.attempts == 1:
            request.cached = min(event.cached, request.prompt_len)
        if not request.moves:
            request.compute_s = event.step_s
        worker = self._state.pool.workers[event.worker]
        if event.done >= request.length and len(worker.prefills) == 1 and not (worker.fills or worker.decodes):
            worker.saw_prefill(request.length - event.cached, event.cached, event.step_s)
        if event.done >= request.length:
            worker.pace.saw_request(event.pace)
        worker.progress(event.attempt, request.length - event.done, event.done, event.pace, now)
        if event.done < request.length:  # else its first token, which makes room, is on the way
            self._state.room_changed = True

    def blocks_ready(self, event: ev.BlocksReady, now: float) -> None:
        """Blocks may be pulled, as soon as there is room for them somewhere."""
        if (mover := self._state.moves.get(event.attempt)) is not None:
            self._moves.lent(mover, event, now)
            return
        borrower = self._state.loans.get(event.attempt)
        if borrower is not None:
            if self._fetches.lent(borrower, event, now):
                self._fetched(borrower, now)
            return
        request = self._state.attempt_of(event.worker, event.attempt)
        if request is None or event.worker != request.prefill or not request.wants_transfer:
            return
        request.ready.append(Ready(event.first, event.count, event.blocks, event.sums))
        if request.reserved:
            self._pull_ready(request, now)

    def _pull_ready(self, request: Request, now: float) -> None:
        """Pull what is ready and not held at the receiver already."""
        for ready in request.ready:
            skip = min(ready.count, max(0, request.held - ready.first))
            if skip < ready.count:
                first, blocks, sums = ready.first + skip, ready.blocks[4 * skip :], ready.sums[8 * skip :]
                self._state.actions.append(
                    ev.SendPull(request.decode, request.attempt, request.prefill, first, blocks, sums)
                )
                self._carry(request, ready.count - skip, now)
        request.ready.clear()

    def _carry(self, request: Request, blocks: int, now: float) -> None:
        """Both links are busy with it."""
        state = self._state
        for number in (request.prefill, request.decode):
            worker = state.pool.workers[number]
            worker.carry(blocks * worker.block_bytes / state.bytes_per_s, now)

    def blocks_verified(self, event: ev.BlocksVerified, now: float) -> None:
        """One pull is done."""
        state = self._state
        mover = state.moves.get(event.attempt)
        request = mover or state.attempt_of(event.worker, event.attempt)
        if request is None:
            return
        if event.seconds > 0.0:
            state.bytes_per_s += FORGETTING * (event.bytes / event.seconds - state.bytes_per_s)
        if mover is not None:
            self._moves.verified(mover, event)
            return
        if event.worker == request.prefill:
            if self._fetches.verified(request, event, now):
                self._fetched(request, now)
            return
        request.verified += event.count
        request.kv_bytes += event.bytes
        request.backend = event.backend
        self._check_transferred(request, now)

    def _check_transferred(self, request: Request, now: float) -> None:
        """TRANSFERRED: with everything verified at the decode worker, the prefill worker's copy is not needed."""
        state = self._state
        block_size = state.pool.workers[request.decode].block_size
        missing = request.blocks(block_size) - request.held - request.verified
        if missing > 0 or not request.prefill_done or request.transferred_at >= 0.0:
            return
        request.transferred_at = now
        request.phase = max(request.phase, Phase.TRANSFERRED)
        if request.prefill != request.decode and state.pool.workers[request.prefill].forget(request.attempt, now):
            state.actions.append(ev.SendRelease(request.prefill, request.attempt))
            state.room_changed = True

    def blocks_bad(self, event: ev.BlocksBad, now: float) -> None:
        """Fail closed: nothing is decoded from blocks that did not verify."""
        if (mover := self._state.moves.get(event.attempt)) is not None:
            self._moves.bad(mover, event, now)
            return
        request = self._state.attempt_of(event.worker, event.attempt)
        if request is not None and event.worker == request.prefill:
            self._fetch_failed(request, event.reason, now)
        elif request is not None and event.worker == request.decode:
            request.suspect = event.reason == "CHECKSUM"
            self._state.lose(request, f"KV transfer failed ({event.reason})", now)

    def emitted(self, event: ev.Emitted, now: float) -> None:
        """Tokens came: the attempt's first one, the decode worker's first one, or more."""
        request = self._state.attempt_of(event.worker, event.attempt)
        if request is None:
            return
        request.emitted += event.count
        if not request.prefill_done:
            self._first_token(request, now)
        elif request.phase < Phase.DECODING:
            request.phase = Phase.DECODING
            request.decoding_at = now
            self._state.show(request)

    def _first_token(self, request: Request, now: float) -> None:
        state = self._state
        request.prefill_done = True
        request.phase = Phase.FIRST
        if request.first_at < 0.0:
            request.first_at = now
        worker = state.pool.workers[request.prefill]
        worker.end_prefill(request.attempt, now)
        state.room_changed = True
        if request.path == "local":
            worker.join_decode(request.attempt, request.length, request.itl_s)
            if (worker.draining or worker.leaves_decode) and worker not in state.leaving:
                state.leaving.append(worker)  # its prompt was under way when the worker left the pool
        elif request.reserved:
            self._go_on(request, now)
        if self._predicted_gap(request, now) <= request.itl_s or now >= request.deadline:
            state.show(request)
        elif not request.shown:
            state.wake_at(request.deadline, request)  # whatever becomes of this attempt

    def _predicted_gap(self, request: Request, now: float) -> float:
        """Seconds until the second token at worst: the last blocks' way, the step that runs by then, and its own.

        Blocks that were asked for come behind whatever else is on both links.
        """
        if request.left <= 0 or request.path == "local":
            return 0.0
        if request.decode == NOBODY:
            return math.inf
        state = self._state
        worker = state.pool.workers[request.decode]
        missing = request.blocks(worker.block_size) - request.held - request.verified
        way_s = missing * worker.block_bytes / state.bytes_per_s
        if missing > 0:
            way_s = max(way_s, worker.link_busy - now, state.pool.workers[request.prefill].link_busy - now)
        step = worker.decode_s(max(1, worker.batch), worker.context)
        if worker.prefills or worker.fills:  # chunks fill its steps
            step = max(step, ITL_SHARE * worker.tightest_itl(request.itl_s))
        steps = 2.0 if worker.batch > 1 or worker.prefills or worker.fills else 1.0
        return way_s + steps * step

    def ended(self, event: ev.Ended, now: float) -> None:
        """The sequence is complete; the worker that says so has freed its part."""
        state = self._state
        request = state.attempt_of(event.worker, event.attempt)
        if request is not None:
            state.pool.workers[event.worker].forget(request.attempt, now)
            state.finish(request, event.reason, now)

    def lost(self, event: ev.AttemptLost, now: float) -> None:
        """The worker gave the attempt up."""
        self.loan_lost(event.attempt, now)
        request = self._state.attempt_of(event.worker, event.attempt)
        if request is None or event.attempt not in self._state.pool.workers[event.worker].attempts:
            return  # of another attempt, or a prefill worker whose part is done
        # After a fetch what it lost may have been the reservation, and the prompt be on its way there.
        gone = NOBODY if request.fetch is not None and event.worker == request.prefill else event.worker
        placement = None if event.counts else self._moves.arrive(request, now)
        if event.counts:
            self._state.lose(request, event.reason, now, gone=gone)
        elif placement is not None:
            self._go_on_at(request, placement, now)
        else:
            self._state.retry(request, now, gone=gone)

    # --- moves and fetches ----------

    def move_off(self, policy: Policy, now: float) -> None:
        """Sequences of workers that leave the decode pool go on elsewhere."""
        self._moves.empty(policy, now)

    def relieve(self, event: ev.Short, policy: Policy, now: float) -> None:
        """Memory will not last where it decodes."""
        request = self._state.attempt_of(event.worker, event.attempt)
        if policy.rebalances and request is not None and event.worker == request.decode:
            self._moves.relieve(request, policy, now)

    def _go_on_at(self, request: Request, placement: Placement, now: float) -> None:
        """It yielded, and its prompt is at another worker already."""
        state = self._state
        state.drop_attempt(request, now, request.decode)
        request.begin_attempt(0)
        if request.left <= 0:
            state.finish(request, "length", now)
            return
        state.predict_output(request)
        request.moves += 1
        self.start(request, placement, now)

    def loan_lost(self, loan: int, now: float) -> None:
        """The source of a fetch or one end of a move is gone, or gave it up; any other number means nothing."""
        if (mover := self._state.moves.get(loan)) is not None:
            self._moves.end(mover, now)
        request = self._state.loans.get(loan)
        if request is not None:
            self._fetch_failed(request, SOURCE_LOST, now)

    def look_at_ways(self, request: Request, now: float) -> None:
        """Time passed: for a fetch, or a move."""
        self._moves.look_at(request, now)
        if self._fetches.late(request, now):
            self._fetched(request, now)

    def _fetch_failed(self, request: Request, reason: str, now: float) -> None:
        if request.loan:
            self._fetches.end(request, reason, now)
            self._fetched(request, now)

    def _fetched(self, request: Request, now: float) -> None:
        """A fetch is over: the prefill begins, if all else is ready."""
        if request.fetch is not None and request.fetch.wanted:
            self._start_prefill(request, now)
