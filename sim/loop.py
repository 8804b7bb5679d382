"""The virtual clock: one core, its emulated workers, and every message between them, in order of time.

Four sources are merged: arrivals (sorted), messages to workers and to the core (constant latency, so each is a plain
queue; news of caches leave by each worker's own clock and are put in order), and a heap of what workers, links and the
scenario want at a time. Where times are equal the order is: messages to the core, messages to workers, the heap in
order of wishing, arrivals, ticks. It never depends on hashing.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

from twinpool.errors import TwinpoolError
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.request import Phase, Request
from twinpool.sim.gaps import Runs
from twinpool.sim.kv_feed import KvFeed, KvFrame
from twinpool.sim.links import Links
from twinpool.sim.record import Recorder
from twinpool.sim.result import COMPLETED, REFUSED
from twinpool.sim.worker import SimWorker

WAKE: Final = 0
PULLED: Final = 1
ARRIVE: Final = 2
CALL: Final = 3
KV_LEAVES: Final = 4
KV_COMES: Final = 5
KV_ASKED: Final = 6
# Numbers of actions in the digest. Leases never run out here, so renewals are left out.
NUMBERS: dict[type, int] = {
    ev.SendReserve: 1, ev.SendPrefill: 2, ev.SendPull: 3, ev.SendDecode: 4, ev.SendRelease: 5, ev.SendCancel: 6,
    ev.SendLend: 10, ev.SendYield: 11,
}  # fmt: skip
SHOW: Final = 7
FINISH: Final = 8
REFUSE: Final = 9
LOSSES = (ev.WorkerLost, ev.AttemptLost)
ENDS = (ev.Finish, ev.Refuse)


class SimulationError(TwinpoolError):
    """The simulated cluster stands still although requests are unfinished: a defect, never a property of a trace."""

    code = "INTERNAL"
    default_reason = "SIMULATION"


class Arrivals:
    """When requests come, and how to make each; closed loops add theirs as earlier ones end."""

    __slots__ = ("followers", "make", "order", "think", "times")

    def __init__(self, times: Sequence[float], make: Callable[[int], Request]) -> None:
        self.times = times
        self.make = make
        self.order: Sequence[int] = range(len(times))  # of open arrivals, sorted by time
        self.followers: dict[int, list[int]] = {}  # rid -> who comes after it
        self.think: Sequence[float] = ()


class Loop:
    """See the module's docstring. ``latency_s``: one way between router and workers; ``setup_s``: of each transfer.

    ``work``: see ``Net``. News of prefix caches are ``kv_delay_s`` late and, with a ``feed``, some are lost.
    """

    __slots__ = (
        "arrivals", "core", "done", "down", "feed", "heap", "kv_latency_s", "kv_news", "latency_s", "links", "lives",
        "max_queue_s", "missed", "now", "outputs", "record", "run_of", "runs", "seq", "setup_s", "spare_misses", "tick",
        "up", "wakes", "watch", "work", "workers",
    )  # fmt: skip

    def __init__(
        self,
        core: Core,
        arrivals: Arrivals,
        outputs: Sequence[int],
        links: Links,
        *,
        latency_s: float,
        setup_s: float,
        max_queue_s: float = math.inf,
        watch: Callable[[int, float], None] | None = None,
        work: Sequence[float] = (),
        kv_delay_s: float = 0.0,
        feed: KvFeed | None = None,
    ) -> None:
        self.core = core
        self.arrivals = arrivals
        self.outputs = outputs
        self.work = work
        self.feed = feed
        self.kv_latency_s = latency_s + kv_delay_s
        self.links = links
        self.latency_s = latency_s
        self.setup_s = setup_s
        self.max_queue_s = max_queue_s
        self.watch = watch  # called with (requests over, now) now and then
        self.done = 0
        self.missed = 0  # requests refused, or shown too late
        self.spare_misses = len(outputs)  # with more of them the run ends early
        self.now = 0.0
        self.tick = math.inf  # the core wants none before
        self.record = Recorder(len(outputs))
        self.workers: dict[int, SimWorker] = {}
        self.lives: dict[int, list[SimWorker]] = {}  # by id: those that died, too
        self.down: deque[tuple[float, ev.Send]] = deque()
        self.up: deque[tuple[float, ev.Event]] = deque()
        self.kv_news: deque[tuple[float, ev.KvChanged]] = deque()
        self.heap: list[tuple[float, int, int, int, Any]] = []
        self.runs: list[Runs] = []  # of all workers that ever were
        self.run_of: dict[int, int] = {}  # worker -> index of its own
        self.wakes: dict[int, float] = {}  # worker -> the one valid time
        self.seq = 0

    # --- what a worker may call (Net) ----------

    def tell(self, event: ev.Event, now: float) -> None:
        """News for the core."""
        self.up.append((now + self.latency_s, event))

    def wake_at(self, worker: int, when: float) -> None:
        """The one time at which this worker wants to be woken."""
        if self.wakes.get(worker) == when:
            return
        self.wakes[worker] = when
        if when < math.inf:
            self.seq += 1
            heapq.heappush(self.heap, (when, self.seq, WAKE, worker, None))

    def link(self, sender: int, receiver: int, nbytes: int, now: float) -> float:
        """Book both ends of a transfer; when its last byte is there."""
        return self.links.book(sender, receiver, nbytes, now) + self.setup_s

    def transferred(
        self, worker: int, attempt: int, first: int, count: int, nbytes: int, started: float, when: float
    ) -> None:
        """Tell the worker at ``when`` that these blocks are there."""
        self.push(when, PULLED, worker, (attempt, first, count, nbytes, when - started))

    def kv(self, worker: int, stored: list[int], removed: list[int], due: float) -> None:
        """Changes of a prefix cache; the core hears of them before its first event after they could have come."""
        event = ev.KvChanged(worker, stored, removed, False)
        if self.feed is None:
            news, when = self.kv_news, due + self.kv_latency_s
            place = len(news)
            while place and news[place - 1][0] > when:  # of the others' clocks, at most 20 ms away
                place -= 1
            news.insert(place, (when, event))
        else:
            self.push(due, KV_LEAVES, worker, KvFrame(self.run_of[worker], event))

    def span(self, request: Request, worker: int, low: int, high: int) -> None:
        """Tokens of a request that came with the gaps of runs ``low`` to ``high - 1``."""
        self.record.gaps.add_span(request.rid, self.run_of[worker], low, high)

    # --- driving ----------

    def add_worker(self, worker: SimWorker, up: ev.WorkerUp) -> None:
        """A worker comes, or comes back."""
        if up.worker in self.lives:  # what is under way of its former life nobody wants
            news = [each for each in self.kv_news if each[1].worker != up.worker]
            self.kv_news.clear()
            self.kv_news.extend(news)
        self.workers[up.worker] = worker
        self.lives.setdefault(up.worker, []).append(worker)
        self.wakes[up.worker] = math.inf
        self.run_of[up.worker] = len(self.runs)
        self.runs.append(worker.runs)
        self.decide(up, self.now)

    def lose_worker(self, worker: int, now: float) -> None:
        """A worker dies: what it said before still arrives, then its link breaks."""
        gone = self.workers.pop(worker, None)
        if gone is not None:
            gone.stop(now)
            self.tell(ev.WorkerLost(worker), now)

    def push(self, when: float, kind: int, a: int, b: Any) -> None:
        """Something to do at a time."""
        self.seq += 1
        heapq.heappush(self.heap, (when, self.seq, kind, a, b))

    def call_at(self, when: float, what: Callable[[float], None]) -> None:
        """A scenario's doing: ``what(now)`` at a time."""
        self.push(when, CALL, 0, what)

    def run(self) -> None:
        """Until every request is over. Raises SimulationError if that never happens."""
        order, times = self.arrivals.order, self.arrivals.times
        up, down, heap, workers, wakes = self.up, self.down, self.heap, self.workers, self.wakes
        position, count = 0, len(order)
        infinity = math.inf
        arrival = times[order[0]] if count else infinity
        requests, spare = len(self.outputs), self.spare_misses
        while self.done < requests and self.missed <= spare:
            when = up[0][0] if up else infinity
            source = 0
            if down and down[0][0] < when:
                when, source = down[0][0], 1
            if heap and heap[0][0] < when:
                when, source = heap[0][0], 2
            if arrival < when:
                when, source = arrival, 3
            if self.tick < when:
                sooner, self.tick = self.tick, self.core.next_tick()
                if self.tick > sooner:
                    continue  # it was a bound
                when, source = self.tick, 4
            if when == infinity:
                raise self._stuck()
            self.now = when
            if source == 0:
                self.decide(up.popleft()[1], when)
            elif source == 1:
                action = down.popleft()[1]
                worker = workers.get(action.worker)
                if worker is not None:
                    worker.take(action, when)
            elif source == 2:
                _, _, kind, a, b = heapq.heappop(heap)
                if kind != WAKE:
                    self._happen(kind, a, b, when)
                elif wakes[a] == when:
                    wakes[a] = infinity
                    workers[a].wake(when)
            elif source == 3:
                self._arrive(order[position], when)
                position += 1
                arrival = times[order[position]] if position < count else infinity
            else:
                self.decide(ev.Tick(), when)
        self.record.seal()

    def _stuck(self) -> SimulationError:
        state = self.core.state
        left = [f"{r.rid} ({r.phase.name.lower()})" for r in list(state.requests.values())[:5]]
        return SimulationError(
            f"nothing can happen after {self.now:.6f} s and {len(self.outputs) - self.done} requests are not over, "
            f"first {', '.join(left) or 'those not arrived'}: please report this with the trace and the flags"
        )

    def _happen(self, kind: int, a: int, b: Any, now: float) -> None:
        """What was wished for this time, besides a wake."""
        if kind == PULLED:
            worker = self.workers.get(a)
            if worker is not None:
                attempt, first, count, nbytes, seconds = b
                worker.pulled(attempt, first, count, nbytes, seconds, now)
        elif kind == ARRIVE:
            self._arrive(a, now)
        elif kind == CALL:
            b(now)
        elif kind == KV_LEAVES:
            self._kv_leaves(b, now)
        elif kind == KV_COMES:
            self._kv_comes(b, now)
        else:
            self._kv_asked(a, now)

    # --- news of prefix caches of which some are lost: kv_feed.py ----------

    def _kv_leaves(self, frame: KvFrame, now: float) -> None:
        assert self.feed is not None
        if self.feed.leaves(frame):
            self.push(now + self.kv_latency_s, KV_COMES, frame.event.worker, frame)

    def _kv_comes(self, frame: KvFrame, now: float) -> None:
        assert self.feed is not None
        worker = frame.event.worker
        if self.run_of[worker] != frame.life:
            return  # it is back with an empty cache
        if self.feed.taken(frame):
            self.kv_news.append((now, frame.event))
        else:
            self.push(now + self.latency_s, KV_ASKED, worker, None)

    def _kv_asked(self, number: int, now: float) -> None:
        worker = self.workers.get(number)
        if worker is not None and self.feed is not None:
            self.feed.asked += 1
            event = ev.KvChanged(number, worker.snapshot(now), [], True)
            self._kv_leaves(KvFrame(self.run_of[number], event), now)

    def _arrive(self, rid: int, now: float) -> None:
        request = self.arrivals.make(rid)
        request.queue_until = now + max(self.max_queue_s, request.ttft_s)
        self.decide(ev.Submit(request), now)

    def decide(self, event: ev.Event, now: float) -> None:
        """One event into the core, its actions out."""
        core, kv_news = self.core, self.kv_news
        while kv_news and kv_news[0][0] <= now:
            core.on(kv_news.popleft()[1], now)
        if isinstance(event, LOSSES):
            self._note_loss(event)
        actions = core.on(event, now)
        if isinstance(event, ev.Emitted):
            self._note_token(event, now)
        for action in actions:
            if isinstance(action, ev.Send):
                self.record.decided(now, NUMBERS[type(action)], action.worker, action.attempt)
                self._send(now + self.latency_s, action)
            elif isinstance(action, ev.Show):
                self._shown(action.rid, now)
            elif isinstance(action, ENDS):
                self._ended(action, now)
        self.tick = core.tick_bound

    def _ended(self, action: ev.Finish | ev.Refuse, now: float) -> None:
        request = action.request
        finished = isinstance(action, ev.Finish)
        self.record.decided(now, FINISH if finished else REFUSE, request.rid, request.attempts)
        shown_at = self.record.shown[request.rid]
        if shown_at < 0.0 or (shown_at == now and now > request.deadline):  # the latter: its only token
            self.missed += 1
        self._over(request, now, COMPLETED if finished else REFUSED)

    def _shown(self, rid: int, now: float) -> None:
        self.record.decided(now, SHOW, rid, 0)
        self.record.shown[rid] = now
        request = self.core.state.requests.get(rid)
        if request is not None and now > request.deadline:
            self.missed += 1

    def _send(self, when: float, action: ev.Send) -> None:
        """What one moment sends to a worker leaves in one write: it arrives together, before what later ones get."""
        down = self.down
        if not down or down[-1][0] != when:
            down.append((when, action))
            return
        place = len(down)
        while place and down[place - 1][0] == when and down[place - 1][1].worker != action.worker:
            place -= 1
        if place and down[place - 1][0] == when:
            down.insert(place, (when, action))
        else:
            down.append((when, action))

    def _over(self, request: Request, now: float, outcome: int) -> None:
        record, rid = self.record, request.rid
        record.close(request, now, outcome)
        self.done += 1
        if self.watch is not None and self.done % 256 == 0:
            self.watch(self.done, now)
        for follower in self.arrivals.followers.get(rid, ()):
            when = max(now + self.arrivals.think[follower], self.arrivals.times[follower])
            self.push(when, ARRIVE, follower, None)

    # --- gaps that no decode step explains ----------

    def _note_token(self, event: ev.Emitted, now: float) -> None:
        """First tokens of an attempt, here and after the hand-over; all others are in runs."""
        request = self.core.state.by_attempt.get(event.attempt)
        if request is None:
            return
        record, rid = self.record, request.rid
        if event.worker == request.prefill and request.phase == Phase.FIRST:
            if request.attempts > 1 and record.joined[rid] >= 0.0:
                record.gaps.add_single(rid, now - record.latest.pop(rid, record.joined[rid]))
            record.joined[rid] = now
        elif event.worker == request.decode and request.decoding_at == now and request.path == "split":
            shown = record.shown[rid]  # not yet: the first token was held, and leaves together with this one
            record.gaps.add_single(rid, now - max(record.joined[rid], shown) if shown >= 0.0 else 0.0)
            record.joined[rid] = now

    def _note_loss(self, event: ev.WorkerLost | ev.AttemptLost) -> None:
        """Attempts end before their request does: when their last tokens came."""
        state = self.core.state
        if isinstance(event, ev.WorkerLost):
            worker = state.pool.workers.get(event.worker)
            rids = list(worker.attempts.values()) if worker is not None else []
        else:
            request = state.by_attempt.get(event.attempt)
            rids = [] if request is None else [request.rid]
        record = self.record
        for rid in rids:
            if state.requests[rid].phase == Phase.DECODING:
                record.latest[rid] = record.joined[rid] + self._decoded_s(rid)

    def _decoded_s(self, rid: int) -> float:
        """Seconds of the latest span of a request."""
        log = self.record.gaps
        for i in range(len(log.request) - 1, -1, -1):
            if log.request[i] == rid:
                return sum(self.runs[log.worker[i]].expand(log.lo[i], log.hi[i]))
        return 0.0
