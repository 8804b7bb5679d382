"""The cell's decisions as a sans-IO state machine: ``on(event, now) -> actions``. Only here a request changes phase.

It never awaits, reads no clock and draws no random number: the live router is a thin asyncio loop around it, the
simulator a thin heap loop. ``next_tick`` says when it wants a ``Tick``; every deadline and lease hangs on that.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Any, Final

from mypy_extensions import mypyc_attr

from twinpool.classes import BATCH_RANK
from twinpool.router import events as ev
from twinpool.router.admission import NO_RANK
from twinpool.router.attempt import Attempts
from twinpool.router.policy.base import NOBODY, Passed, Placement, Policy, Refusal, View
from twinpool.router.request import Phase, Request
from twinpool.router.state import Limits, State
from twinpool.router.worker import MEMORY_LIMIT, Worker

RENEWALS_PER_LEASE: Final = 3
MIN_TICK_S: Final = 0.001  # between two looks at a worker that is later than predicted
FILL_BELOW: Final = 0.85  # of the prefill workers may compute prompts when one of the batch class is added
MAX_PASSED: Final = 24  # requests, of those in order of deadline, that may be passed over
HOPELESS = Refusal("fits no worker", 0.0)


@mypyc_attr(allow_interpreted_subclasses=True)
class Core:
    """One cell. Not thread-safe; one driver."""

    def __init__(self, policy: Policy, limits: Limits | None = None) -> None:
        self.policy = policy
        self.state = State(limits or Limits(), policy.by_deadline)
        self.attempts = Attempts(self.state)
        self._short_since: dict[str, float] = {"prefill": 0.0, "decode": 0.0}  # since when a pool has been empty
        self._renew_at = math.inf
        self._room_at = math.inf  # when a worker is predicted to have room for the head of the queue
        self._newcomer: Request | None = None  # all that changed is that it came
        self._passed: Request | None = None  # of those passed over, the first to be late
        self._blocked: Request | None = None  # whom nobody had room for: those behind it wait with it
        self.tick_bound = math.inf  # no Tick is wanted before
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            ev.Submit: self._submit, ev.Cancel: self._cancel, ev.Tick: self._tick,
            ev.WorkerUp: self._worker_up, ev.WorkerLost: self._worker_lost, ev.WorkerDraining: self._worker_draining,
            ev.RolesSet: self._roles_set, ev.Reported: self._reported, ev.KvChanged: self._kv_changed,
            ev.Short: self._short, ev.Reserved: self.attempts.reserved, ev.NoRoom: self.attempts.no_room,
            ev.Progressed: self.attempts.progressed, ev.BlocksReady: self.attempts.blocks_ready,
            ev.BlocksVerified: self.attempts.blocks_verified, ev.BlocksBad: self.attempts.blocks_bad,
            ev.Emitted: self.attempts.emitted, ev.Ended: self.attempts.ended, ev.AttemptLost: self.attempts.lost,
        }  # fmt: skip

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """Take one event; the caller performs the returned actions in order. ``now`` never goes back."""
        state = self.state
        state.actions = []
        self._handlers[type(event)](event, now)
        if state.room_changed:
            if state.queue.waiting or state.unhomed or state.leaving or self.policy.early:
                self._use_room(now)
            else:
                state.room_changed = False
                self._room_at = math.inf
        when = self._renew_at if self._renew_at < self._room_at else self._room_at
        if state.timers and state.timers[0][0] < when:
            when = state.timers[0][0]
        self.tick_bound = when
        return state.actions

    def next_tick(self) -> float:
        """When a Tick is wanted next; infinity if nothing waits for time. ``tick_bound`` is cheap, and never later."""
        timer = self.state.next_timer()
        when = self._renew_at if self._renew_at < self._room_at else self._room_at
        self.tick_bound = when if when < timer else timer
        return self.tick_bound

    def _use_room(self, now: float) -> None:
        state = self.state
        newcomer, self._newcomer = self._newcomer, None
        if newcomer is not None and len(state.queue) > 1 and not self.policy.early and not state.queue.mixed:
            state.room_changed = False
            self._place_newcomer(newcomer, now)
        while state.room_changed:
            state.room_changed = False
            if state.unhomed:
                self._find_decoders(now)
            if state.leaving:
                self.attempts.move_off(self.policy, now)
            if self.policy.early:
                self._send_bound(now)
            if state.queue.waiting:
                self._passed = self._place_waiting(now)
        self._room_at = math.inf
        if state.queue.waiting:
            self._room_at = max(self.policy.next_room(state.view(), now), now + MIN_TICK_S)
            passed = self._passed
            if passed is not None and now < passed.deadline < self._room_at:
                self._room_at = passed.deadline  # from then on it is late

    def _place_newcomer(self, request: Request, now: float) -> None:
        """Who waited already found no worker, and none got more room since."""
        state, blocked = self.state, self._blocked
        if blocked is not None and (blocked.turn, blocked.rid) < (request.turn, request.rid):
            return
        answer = self._place(request, state.view(), now)
        if not isinstance(answer, Passed):
            return
        if answer.late_s > 0.0:
            state.queue.postpone(request, request.deadline + answer.late_s - now)
        elif self._passed is None or request.deadline < self._passed.deadline:
            self._passed = request

    # --- requests ----------

    def _submit(self, event: ev.Submit, now: float) -> None:
        state, request = self.state, event.request
        request.arrival = now
        request.work_s = state.pool.unloaded_s(request.prompt_len)
        request.deadline = now + request.ttft_s + request.ttft_factor * request.work_s
        state.requests[request.rid] = request
        if state.queue.full:
            state.refuse(request, "RESOURCE_EXHAUSTED", "QUEUE_FULL", "the queue is full: come back later", now, 1.0)
        elif (problem := self._never_fits(request)) is not None:
            state.refuse(request, "INVALID_ARGUMENT", "KV_TOO_SMALL", problem, now)
        else:
            state.enqueue(request, now)
            if request.rank < BATCH_RANK:  # others wait until little else is computed, whoever comes
                self._newcomer = request
            for moment in (request.give_up, request.queue_until):
                state.wake_at(moment, request)

    def _never_fits(self, request: Request) -> str | None:
        """Why no workers like those connected could ever serve the request; None if some could."""
        if request.length + request.left <= self.state.pool.common_room:
            return None
        problems = [
            next(filter(None, (self._too_small(request, role) for role in way)), None) for way in self._ways(request)
        ]
        return None if None in problems else problems[-1]

    def _ways(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """Pools that can serve what is left of the request; see ``Policy.needs``."""
        return (("decode",),) if request.rid in self.state.unhomed else self.policy.needs(request)

    def _too_small(self, request: Request, role: str) -> str | None:
        need = request.length + (request.left if role == "decode" else 0)
        room = int(MEMORY_LIMIT * self.state.pool.largest(role))
        if not 0 < room < need:
            return None
        return (
            f"the request needs {need} tokens of KV memory and the largest {role} worker has {room}: "
            "shorten the prompt, lower max_tokens, or give workers more KV memory"
        )

    def _cancel(self, event: ev.Cancel, now: float) -> None:
        request = self.state.requests.get(event.rid)
        if request is not None:
            self.state.refuse(request, "CANCELLED", "CANCELLED", "the request was cancelled", now)

    # --- placing ----------

    def _place_waiting(self, now: float) -> Request | None:
        """Those that can be in time, in order; then those that cannot. Returns the most urgent one passed over."""
        state = self.state
        share = state.orders.prefill_share() if state.large else state.pool.prefill_share
        below = NO_RANK if share < FILL_BELOW else BATCH_RANK
        view = state.view()
        first: Request | None = None
        passed = 0
        self._blocked = None
        for entry in state.queue.order(below):
            request = state.queue.valid(entry)
            if request is None:
                continue
            answer = self._place(request, view, now)
            if answer is None or passed >= MAX_PASSED:
                self._blocked = request
                return first
            if isinstance(answer, Passed):
                if answer.late_s > 0.0:
                    state.queue.postpone(request, request.deadline + answer.late_s - now)
                    continue
                if first is None or request.deadline < first.deadline:
                    first = request
                passed += 1
            elif state.queue.mixed:
                state.room_changed = True  # shares moved: begin again
                return first
        while (late := state.queue.late()) is not None:
            answer = self._place(late, view, now)
            if answer is None or isinstance(answer, Passed):
                break
        return first

    def _place(self, request: Request, view: View, now: float) -> Placement | Refusal | Passed | None:
        """Do what the policy says; a request that fits no worker is refused."""
        state = self.state
        if request.length + request.left > state.pool.common_room and self._refuse_hopeless(request, now):
            return HOPELESS
        answer = self.policy.on_room(request, view, now)
        if isinstance(answer, Placement):
            state.placed(request, answer, now)
            if request.charged_output < 0:
                state.queue.charge(request, answer.seconds, answer.cached, request.output_to_come, now)
            if self.policy.early:
                state.bind(request, answer)
                self._send_bound_of(state.pool.workers[answer.prefill], now)
            else:
                self._start(request, answer, now)
        elif isinstance(answer, Refusal):
            state.refuse(request, "RESOURCE_EXHAUSTED", answer.reason, answer.message, now, answer.retry_s)
        return answer

    def _start(self, request: Request, placement: Placement, now: float) -> None:
        if placement.decode == placement.prefill and not placement.local:
            placement = placement._replace(path="local")  # one worker: nothing moves
        self.attempts.start(request, placement, now)
        self._renew_at = min(self._renew_at, now + self._renew_every)

    def _send_bound(self, now: float) -> None:
        for worker in self.state.pool.workers.values():
            if worker.bound:
                self._send_bound_of(worker, now)

    def _send_bound_of(self, worker: Worker, now: float) -> None:
        """First come, first served, as far as memory goes."""
        while worker.bound:
            request, placement, _ = worker.bound[0]
            output = request.output_to_come if placement.local else 0
            if not worker.fits(request.length + output):
                return
            if placement.local and len(worker.prefills) + worker.batch >= worker.max_batch:
                return
            self.state.unbind(request)
            if not placement.local and not self._may_decode(placement.decode, request):
                placement = placement._replace(decode=NOBODY)  # found again when somebody has room
            self._start(request, placement, now)

    def _may_decode(self, worker: int, request: Request) -> bool:
        """Whether a decode worker that was chosen earlier is still there and has room."""
        tokens = request.length + request.output_to_come
        return any(other.id == worker and other.fits(tokens) for other in self.state.pool.decode)

    def _find_decoders(self, now: float) -> None:
        """Give KV that waits at its prefill worker a decode worker, in order of deadline."""
        unhomed = self.state.unhomed
        view = self.state.view()
        for request in sorted(unhomed.values(), key=lambda r: (r.deadline, r.rid)):
            decode = self.policy.decode_for(request, view, now)
            if decode == NOBODY and self._refuse_hopeless(request, now):
                continue
            if decode == NOBODY:
                return
            del unhomed[request.rid]
            self.attempts.reserve(request, decode, now)

    # --- workers ----------

    def _worker_up(self, event: ev.WorkerUp, now: float) -> None:
        assert event.worker not in self.state.pool.workers, f"worker {event.worker} is up already"
        self.state.pool.add(Worker(event))
        self._roles_changed(now)

    def _worker_lost(self, event: ev.WorkerLost, now: float) -> None:
        worker = self.state.pool.remove(event.worker)
        if worker is None:
            return
        self.state.index.forget(event.worker)
        self._placed_anew(worker, now)
        for attempt in list(worker.attempts):
            request = self.state.by_attempt.get(attempt)
            if request is None:
                self.attempts.loan_lost(attempt, now)
            else:
                self.state.lose(request, f"worker {worker.name} died", now, gone=event.worker)

    def _worker_draining(self, event: ev.WorkerDraining, now: float) -> None:
        worker = self.state.pool.workers[event.worker]
        worker.draining = True
        self._placed_anew(worker, now)

    def _roles_set(self, event: ev.RolesSet, now: float) -> None:
        worker = self.state.pool.workers[event.worker]
        worker.leaves_decode = "decode" not in event.roles and (worker.leaves_decode or "decode" in worker.roles)
        worker.roles = event.roles
        self._placed_anew(worker, now)

    def _placed_anew(self, worker: Worker, now: float) -> None:
        """Its roles changed, or it is gone: who waits in its line is placed anew."""
        self._roles_changed(now)
        for request in [bound.request for bound in worker.bound]:
            worker.unbind(request)
            self.state.enqueue(request, now)

    def _roles_changed(self, now: float) -> None:
        pool = self.state.pool
        pool.sort()
        self.state.leaving = [w for w in pool.workers.values() if w.decodes and (w.draining or w.leaves_decode)]
        for role in self._short_since:
            if pool.has(role):
                self._short_since[role] = math.inf
            elif self._short_since[role] == math.inf:
                self._short_since[role] = now
        for request in self.state.requests.values():
            if request.attempt == 0 or request.rid in self.state.unhomed:
                self.state.wake_at(now + self.state.limits.no_worker_wait_s, request)
        self.state.room_changed = True

    def _refuse_hopeless(self, request: Request, now: float) -> bool:
        """Workers come and go, outputs grow: a request that fits no worker must not stand before others for ever."""
        problem = self._never_fits(request)
        if problem is not None:
            self.state.refuse(request, "INVALID_ARGUMENT", "KV_TOO_SMALL", problem, now)
        return problem is not None

    def _reported(self, event: ev.Reported, now: float) -> None:
        worker = self.state.pool.workers.get(event.worker)
        if worker is None:
            return
        if event.running > 0 and event.waiting == 0:
            worker.saw_decode(event.running, event.context, event.step_s)
        if worker.reported(event.free):
            self.state.room_changed = True

    def _kv_changed(self, event: ev.KvChanged, now: float) -> None:
        if event.worker in self.state.pool.workers:
            self.state.index.change(event.worker, event.stored, event.removed, event.reset)

    def _short(self, event: ev.Short, now: float) -> None:
        self.attempts.relieve(event, self.policy, now)

    # --- time ----------

    @property
    def _renew_every(self) -> float:
        return self.state.limits.lease_s / RENEWALS_PER_LEASE

    def _tick(self, event: ev.Tick, now: float) -> None:
        timers = self.state.timers
        while timers and timers[0][0] <= now:
            _, rid, attempt = heapq.heappop(timers)
            request = self.state.requests.get(rid)
            if request is not None and (request.awaits(attempt) or attempt == request.attempt):
                self._look_at(request, now)
        if self._renew_at <= now:
            self._renew(now)
        self.state.room_changed = True

    def _look_at(self, request: Request, now: float) -> None:
        """Whatever a deadline of this request asks for now."""
        self.attempts.look_at_ways(request, now)
        if now >= request.give_up:
            self.state.refuse(request, "DEADLINE_EXCEEDED", "DEADLINE", "the caller's deadline passed", now)
        elif request.phase == Phase.QUEUED or request.rid in self.state.unhomed:
            self._look_at_waiting(request, now)
        elif self._reservation_overdue(request, now):
            self.state.lose(request, "the decode worker did not answer a reservation", now)
        if not request.over and request.first_at >= 0.0 and now >= request.deadline:
            self.state.show(request)

    def _reservation_overdue(self, request: Request, now: float) -> bool:
        if request.decode == NOBODY or request.reserved or request.path != "split":
            return False
        return now >= request.reserved_at + self.state.limits.reserve_wait_s

    def _look_at_waiting(self, request: Request, now: float) -> None:
        if request.attempts == 0 and now >= request.queue_until:
            message = f"not started within {now - request.arrival:.1f} s: the cell is overloaded"
            self.state.refuse(request, "RESOURCE_EXHAUSTED", "QUEUE_TIMEOUT", message, now, 1.0)
            return
        for role in self._missing(request):
            until = max(request.arrival, self._short_since[role]) + self.state.limits.no_worker_wait_s
            if now >= until:
                message = f"no {role} worker is connected: start one (twinpool worker --role {role}), or retry later"
                self.state.refuse(request, "UNAVAILABLE", "NO_WORKER", message, now, 1.0)
                return
            self.state.wake_at(until, request)

    def _missing(self, request: Request) -> list[str]:
        """Empty pools without which the request cannot be served."""
        missing: list[str] = []
        for way in self._ways(request):
            empty = [role for role in way if self._short_since[role] < math.inf]
            if not empty and not any(self._too_small(request, role) for role in way):
                return []
            missing = missing or empty
        return missing

    def _renew(self, now: float) -> None:
        busy = False
        for worker in self.state.pool.workers.values():
            if worker.attempts:
                busy = True
                self.state.actions.append(ev.SendRenew(worker.id, list(worker.attempts)))
        self._renew_at = now + self._renew_every if busy else math.inf
