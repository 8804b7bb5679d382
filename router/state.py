"""What the core knows: requests, queue, workers, index, estimates; and how a request ends or starts again. Pure.

``core.py`` takes the events, ``attempt.py`` drives one attempt through its phases; both change only this.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Final

from twinpool.router import events as ev
from twinpool.router.admission import Queue
from twinpool.router.demand import Demand
from twinpool.router.kv_index import KvIndex
from twinpool.router.lengths import OutputLengths
from twinpool.router.policy.base import View
from twinpool.router.policy.orders import Orders
from twinpool.router.pool import Pool
from twinpool.router.request import NOBODY, Bound, Phase, Placement, Request
from twinpool.router.worker import Worker

FORGETTING: Final = 0.05  # weight of a new sample in the running means
MIN_TIMERS: Final = 1024
AHEAD: Final = 128  # tokens of output for which a sequence that outgrew its booking is booked on
LARGE_POOL: Final = 33  # workers from which on it is quicker to keep them in order than to ask each


@dataclass(frozen=True)
class Limits:
    """Bounds of a cell; seconds."""

    max_queue: int = 1024
    max_losses: int = 4
    no_worker_wait_s: float = 5.0
    lease_s: float = 10.0
    reserve_wait_s: float = 2.0


class State:
    """One cell's state and the actions of the event in hand."""

    __slots__ = (
        "actions", "by_attempt", "bytes_per_s", "demand", "index", "leaving", "lengths", "limits", "loans", "moves",
        "next_attempt", "orders", "pool", "queue", "requests", "room_changed", "round_trip_s", "timer_limit", "timers",
        "unhomed",
    )  # fmt: skip

    def __init__(self, limits: Limits, by_deadline: bool) -> None:
        self.limits = limits
        self.pool = Pool()
        self.orders = Orders(self.pool)
        self.index = KvIndex()
        self.queue = Queue(limits.max_queue, by_deadline)
        self.demand = Demand(self.queue.waiting)
        self.requests: dict[int, Request] = {}
        self.by_attempt: dict[int, Request] = {}
        self.loans: dict[int, Request] = {}  # by the number of the loan: fetch.py
        self.moves: dict[int, Request] = {}  # by both numbers of the move: move.py
        self.leaving: list[Worker] = []  # with sequences that are to go on elsewhere
        self.unhomed: dict[int, Request] = {}  # KV computed or under way, but no decode worker yet; by rid
        self.timers: list[tuple[float, int, int]] = []  # (time, rid, attempt; 0: whatever attempt)
        self.timer_limit = MIN_TIMERS  # above that the timers of what is over are taken out
        self.actions: list[ev.Action] = []
        self.next_attempt = 1
        self.lengths = OutputLengths()
        self.bytes_per_s = 1e9
        self.round_trip_s = 0.001
        self.room_changed = False

    @property
    def large(self) -> bool:
        """Whether workers are kept in order."""
        return len(self.pool.workers) >= LARGE_POOL

    def view(self) -> View:
        """What a policy may look at."""
        orders = self.orders if self.large else None
        mean = self.lengths.mean
        return View(self.pool, self.index, self.round_trip_s, mean, self.bytes_per_s, orders, self.unhomed, self.demand)

    def wake_at(self, when: float, request: Request, attempt: int = 0) -> None:
        """Look at the request again then, if (with ``attempt``) that attempt is still the one."""
        if when == math.inf:
            return
        heapq.heappush(self.timers, (when, request.rid, attempt))
        if len(self.timers) > self.timer_limit:
            self.timers[:] = [timer for timer in self.timers if timer[1] in self.requests]
            heapq.heapify(self.timers)
            self.timer_limit = max(MIN_TIMERS, 2 * len(self.timers))

    def next_timer(self) -> float:
        """When the first request is to be looked at; timers whose reason is gone are dropped."""
        timers = self.timers
        while timers:
            when, rid, attempt = timers[0]
            request = self.requests.get(rid)
            if request is not None and request.awaits(attempt):
                return when
            heapq.heappop(timers)
        return math.inf

    def attempt_of(self, worker: int, attempt: int) -> Request | None:
        """The request of a live attempt that this worker is part of; None for a late word of a lost one."""
        request = self.by_attempt.get(attempt)
        return request if request is not None and worker in (request.prefill, request.decode) else None

    def enqueue(self, request: Request, now: float) -> None:
        """QUEUED, first or again."""
        request.phase = Phase.QUEUED
        request.bound_to = NOBODY
        self.predict_output(request)
        self.queue.push(request)
        self._wake_if_short(request, now)
        self.room_changed = True

    def predict_output(self, request: Request) -> None:
        """From what ended of late, and what it has written."""
        left = max(1, round(self.lengths.left(request.tenant, request.rank, request.emitted)))
        request.expected_output = request.emitted - request.emitted_before + left

    def book_anew(self, worker: Worker) -> None:
        """What decodes there has grown: at least what each has, and a little.

        All that is predicted of each would keep others out for long: not all come to their ends at once.
        """
        for attempt in worker.decodes:
            request = self.by_attempt[attempt]
            known = request.prompt_len + request.emitted
            tokens = known + min(request.left, AHEAD)
            if tokens > worker.held[attempt]:
                worker.book(attempt, request.rid, tokens)
            worker.grew(attempt, known)

    def placed(self, request: Request, placement: Placement, now: float) -> None:
        """It leaves the queue."""
        self.queue.remove(request)
        self.demand.placed.add(1.0, now)
        worker = self.pool.workers[placement.prefill]
        if "prefill" in worker.roles:
            self.demand.prefilled.add(1.0, now)
        worker.returns.add((placement.cached - placement.fetched) / request.length, now)

    def bind(self, request: Request, placement: Placement) -> None:
        """Out of the queue, to one worker's line: what binds at arrival is never placed again."""
        request.bound_to = placement.prefill
        bound = Bound(request, placement, request.length - placement.cached)
        self.pool.workers[placement.prefill].bind(bound)

    def unbind(self, request: Request) -> None:
        """Out of its worker's line, if it is in one."""
        worker = self.pool.workers.get(request.bound_to)
        request.bound_to = NOBODY
        if worker is not None:
            worker.unbind(request)

    def _wake_if_short(self, request: Request, now: float) -> None:
        """A pool without workers is noticed after a while; ``core`` asks again when one becomes empty."""
        if not (self.pool.prefill and self.pool.decode):
            self.wake_at(now + self.limits.no_worker_wait_s, request)

    def unhome(self, request: Request, now: float) -> None:
        """Its KV waits at the prefill worker until a decode worker has room."""
        self.unhomed[request.rid] = request
        self._wake_if_short(request, now)
        self.room_changed = True

    def show(self, request: Request) -> None:
        """The first token need not be held any longer. Idempotent."""
        if not request.shown:
            request.shown = True
            self.actions.append(ev.Show(request.rid))

    def finish(self, request: Request, reason: str, now: float) -> None:
        """FINISHED: the stream is complete."""
        self.show(request)
        request.ended = reason
        request.phase = Phase.FINISHED
        self._close(request, now)
        self.lengths.add(request.tenant, request.rank, request.emitted)
        self.actions.append(ev.Finish(request))

    def refuse(
        self, request: Request, code: str, reason: str, message: str, now: float, retry_s: float | None = None
    ) -> None:
        """CANCELLED or REJECTED with a gRPC status name, a machine-readable reason and a sentence."""
        request.ended = reason
        request.phase = Phase.CANCELLED if code == "CANCELLED" else Phase.REJECTED
        self._close(request, now)
        self.actions.append(ev.Refuse(request, code, reason, message, retry_s))

    def lose(self, request: Request, why: str, now: float, gone: int = NOBODY) -> None:
        """A fault took the attempt: plan it again with what was sent so far, a bounded number of times."""
        request.losses += 1
        if request.losses >= self.limits.max_losses:
            message = f"given up after {request.losses} lost attempts; the last: {why}"
            self.refuse(request, "UNAVAILABLE", "ATTEMPTS_LOST", message, now, 1.0)
        else:
            self.retry(request, now, gone)

    def retry(self, request: Request, now: float, gone: int = NOBODY) -> None:
        """Back to the queue with the prompt and the tokens sent so far; nobody's fault."""
        self.drop_attempt(request, now, gone)
        request.begin_attempt(0)
        if request.left <= 0:
            self.finish(request, "length", now)
        else:
            self.enqueue(request, now)

    def _close(self, request: Request, now: float) -> None:
        request.finished_at = now
        if self.queue.remove(request):
            self.room_changed = True  # who stood behind it may be next
        elif request.bound_to != NOBODY:
            self.unbind(request)
        self.drop_attempt(request, now, NOBODY)
        self.queue.settle(request)
        del self.requests[request.rid]

    def drop_attempt(self, request: Request, now: float, gone: int) -> None:
        """Free what the attempt holds anywhere; ``gone`` is a worker that needs no telling."""
        if not request.attempt:
            return
        self.by_attempt.pop(request.attempt, None)
        if request.loan:
            self.end_loan(request, now)
        if request.move is not None:
            self.end_move(request, now)
        self.unhomed.pop(request.rid, None)
        for worker_id in (request.prefill, request.decode):
            worker = self.pool.workers.get(worker_id)
            if worker is not None and worker.forget(request.attempt, now) and worker_id != gone:
                self.actions.append(ev.SendCancel(worker_id, request.attempt, request.suspect))
        self.room_changed = True

    def end_loan(self, request: Request, now: float, suspect: bool = False) -> None:
        """The source need not keep its blocks any more; ``suspect``: they did not match their checksums."""
        loan, fetch = request.loan, request.fetch
        request.loan = 0
        self.loans.pop(loan, None)
        source = self.pool.workers.get(fetch.source) if fetch is not None else None
        if source is not None and source.forget(loan, now):
            self.actions.append(ev.SendCancel(source.id, loan, suspect))
            self.room_changed = True

    def end_move(self, request: Request, now: float, suspect: bool = False) -> None:
        """Neither worker need keep anything for it any more."""
        move, request.move = request.move, None
        assert move is not None, f"request {request.rid} does not move"
        for number, worker_id in ((move.loan, move.source), (move.number, move.target)):
            del self.moves[number]
            worker = self.pool.workers.get(worker_id)
            if worker is not None and worker.forget(number, now):
                self.actions.append(ev.SendCancel(worker_id, number, suspect and number == move.loan))
        self.room_changed = True

    def check_integrity(self) -> None:
        """Every booking belongs to a live attempt and every live attempt is booked, or AssertionError."""
        self.index.check_integrity()
        self.orders.check_integrity()
        for worker in self.pool.workers.values():
            worker.check_integrity()
            for attempt, rid in worker.attempts.items():
                borrower = self.loans.get(attempt) or self.moves.get(attempt)
                request = borrower or self.by_attempt.get(attempt)
                assert request is not None, f"{worker.name} holds dead attempt {attempt}"
                assert request.rid == rid, f"{worker.name} has attempt {attempt} for another request"
                if borrower is not None:
                    continue
                assert worker.id in (request.prefill, request.decode), f"{worker.name} has no part in {attempt}"
        for attempt, request in self.by_attempt.items():
            assert request.attempt == attempt
            assert not request.over
            assert self.requests.get(request.rid) is request
        for loan, request in self.loans.items():
            assert request.loan == loan, f"request {request.rid} has loan {request.loan}, not {loan}"
            assert self.by_attempt.get(request.attempt) is request, f"request {request.rid} has a loan, but is over"
            assert request.fetch is not None, f"request {request.rid} has a loan and fetches nothing"
            source = self.pool.workers.get(request.fetch.source)
            assert source is not None, f"the source of request {request.rid} is gone"
            assert loan in source.attempts, f"{source.name} does not know loan {loan}"
        for number, request in self.moves.items():
            assert request.move is not None, f"request {request.rid} does not move"
            assert number in (request.move.loan, request.move.number), f"request {request.rid} has no move {number}"
            assert self.by_attempt.get(request.attempt) is request, f"request {request.rid} moves, but is over"
        for rid, request in self.unhomed.items():
            assert request.decode == NOBODY, f"request {rid} has a decode worker"
            assert self.by_attempt.get(request.attempt) is request, f"request {rid} waits, but is over"
        for request in self.requests.values():
            assert (request.attempt == 0) == (request.phase == Phase.QUEUED), f"request {request.rid} lost its way"
