"""A core with fake workers on a virtual clock, checked after every event.

Checked are: bookings agree, actions go to workers that are up and concern attempts that live, requests end once,
positions go on without a gap, ticks lead somewhere.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable

from tests.router.fake_worker import FakeWorker

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy import LeastSeconds
from twinpool.router.policy.base import Policy
from twinpool.router.request import Request
from twinpool.router.state import Limits

TICKS_IN_A_MOMENT = 50
STEPS_IN_A_MOMENT = 5000
STARTS = (ev.SendReserve, ev.SendLend, ev.SendPrefill, ev.SendPull, ev.SendDecode)
Order = (
    ev.SendReserve | ev.SendLend | ev.SendPrefill | ev.SendPull | ev.SendDecode | ev.SendRelease | ev.SendYield
    | ev.SendCancel | ev.SendRenew
)  # fmt: skip


class FakeCluster:
    """Driver of a core: virtual time, fake workers, and the checks above."""

    def __init__(self, policy: Policy | None = None, limits: Limits | None = None) -> None:
        self.core = Core(policy or LeastSeconds(), limits)
        self.now = 0.0
        self.workers: dict[int, FakeWorker] = {}
        self.requests: dict[int, Request] = {}
        self.outputs: dict[int, int] = {}  # rid -> output tokens that came
        self.ended: dict[int, ev.Finish | ev.Refuse] = {}
        self.shown: dict[int, float] = {}
        self.stops: dict[int, int] = {}  # rid -> output length at which the model stops by itself
        self.expired: list[int] = []  # attempts whose lease ran out at a worker
        self.held = 0  # prompt blocks that decode workers find in their cache
        self.lent = 1000  # blocks that a worker has, at most, of those that it is asked to lend
        self.loans = 0  # that were asked for
        self.faults = dict.fromkeys(("no_room", "mute", "bad_pull"), 0)  # how many of the next ones go wrong
        self.heard: deque[ev.Event] = deque(maxlen=200)  # from workers
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._ticks_since = (0.0, 0)

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something at a virtual time."""
        heapq.heappush(self._heap, (when, next(self._order), what))

    def use(self, fault: str) -> bool:
        """Whether this one is to go wrong."""
        if self.faults[fault] == 0:
            return False
        self.faults[fault] -= 1
        return True

    # --- from outside ----------

    def join(self, up: ev.WorkerUp) -> FakeWorker:
        """A worker dials in."""
        worker = self.workers[up.worker] = FakeWorker(self, up)
        self.deliver(up)
        return worker

    def kill(self, worker: int) -> None:
        """Its process is gone, and all that was on its way from and to it."""
        del self.workers[worker]
        self.deliver(ev.WorkerLost(worker))

    def submit(self, request: Request) -> Request:
        """A request arrives."""
        self.requests[request.rid] = request
        self.outputs[request.rid] = request.emitted
        self.deliver(ev.Submit(request))
        return request

    def receive(self, event: ev.Event, position: int = 0) -> None:
        """An event of a worker; tokens are counted as the live dispatcher does."""
        self.heard.append(event)
        if isinstance(event, ev.Emitted):
            request = self.core.state.attempt_of(event.worker, event.attempt)
            if request is not None:
                assert position == self.outputs[request.rid], f"token at {position}, due: {self.outputs[request.rid]}"
                self.outputs[request.rid] += event.count
        self.deliver(event)

    # --- the core ----------

    def deliver(self, event: ev.Event) -> None:
        """One event into the core, its actions out, everything checked."""
        actions = self.core.on(event, self.now)
        self.core.state.check_integrity()
        for index, action in enumerate(actions):
            state = self.core.state
            if isinstance(action, STARTS) and action.attempt not in (state.by_attempt | state.loans | state.moves):
                cancel = ev.SendCancel(action.worker, action.attempt)
                assert cancel in actions[index:], f"{action} for a dead attempt"
            self._perform(action)
        for request in self.core.state.requests.values():
            assert request.emitted == self.outputs[request.rid]

    def _perform(self, action: ev.Action) -> None:
        if isinstance(action, ev.Finish | ev.Refuse):
            rid = action.request.rid
            assert rid not in self.ended, f"request {rid} ended twice"
            assert action.request.over
            self.ended[rid] = action
        elif isinstance(action, ev.Show):
            assert action.rid not in self.shown, f"request {action.rid} is shown twice"
            assert action.rid not in self.ended
            self.shown[action.rid] = self.now
        else:
            self._send(action)

    def _send(self, action: Order) -> None:
        worker = self.workers.get(action.worker)
        assert worker is not None, f"{action} for a worker that is not up"
        worker.hear(action)

    # --- time ----------

    def run(self, seconds: float) -> None:
        """Let that much virtual time pass."""
        until = self.now + seconds
        steps = 0
        while True:
            tick = self.core.next_tick()
            due = self._heap[0][0] if self._heap else math.inf
            when = min(tick, due)
            if when > until:
                self.now = until
                return
            steps = steps + 1 if when <= self.now else 0
            assert steps < STEPS_IN_A_MOMENT, "what is said and done leads nowhere"
            self.now = max(self.now, when)
            if due <= tick:
                heapq.heappop(self._heap)[2]()
            else:
                self._tick()

    def _tick(self) -> None:
        self.deliver(ev.Tick())
        assert self.core.next_tick() > self.now, "a tick must not ask for itself"
        since, ticks = self._ticks_since
        self._ticks_since = (since, ticks + 1) if self.now - since < 1e-4 else (self.now, 0)
        assert ticks < TICKS_IN_A_MOMENT, "ticks lead nowhere"

    def run_until_ended(self, seconds: float) -> float:
        """Let time pass until every request has ended; how long that took. AssertionError after ``seconds``."""
        start = self.now
        while len(self.ended) < len(self.requests):
            left = sorted(self.requests.keys() - self.ended.keys())
            assert self.now < start + seconds, f"requests {left} did not end"
            self.run(0.25)
        return self.now - start

    def check_empty(self) -> None:
        """Every request has ended and all that was on its way has come: nobody may hold anything."""
        state = self.core.state
        assert self.ended.keys() == self.requests.keys()
        assert not state.requests
        assert not state.by_attempt
        assert not state.loans
        assert not state.moves
        assert not state.unhomed
        assert len(state.queue) == 0
        for worker in state.pool.workers.values():
            assert not worker.attempts
            assert not worker.booked
        for fake in self.workers.values():
            assert not fake.jobs, f"{fake.up.name} still has attempts {sorted(fake.jobs)}"
