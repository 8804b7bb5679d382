"""The reference for ``SimWorker``: a worker whose real scheduler and block pool run one step after the other.

It is written for being right at a glance, not for speed: boundaries are exact fractions, a step is a wake, a gap is the
difference of two boundaries. Output and unhashed prompt tokens get hashes that nobody can ask for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.router.request import Request
from twinpool.sim.gaps import Runs
from twinpool.sim.memory import news_phase
from twinpool.sim.net import Net
from twinpool.sim.result import WorkerTotals
from twinpool.workers.blocks import BlockPool
from twinpool.workers.scheduler import Chunk, Mode, Ready, Scheduler, Sequence, Step

ANONYMOUS = 1 << 62  # hashes from here on
NEWS_EVERY_S = 0.020


@dataclass(eq=False)
class Job:
    """What the worker, not its scheduler, knows of an attempt."""

    request: Request
    left: int  # tokens to draw
    misjudged: bool = False
    untold: int = 0
    spoke: bool = False  # the router knows of a token of this attempt from this worker and this part of its life
    last: Fraction | None = None  # when it drew its last token here
    low: int = -1  # its open span begins with this run


@dataclass
class Cell:
    """Changes of the cache that are sent together."""

    due: float = -1.0
    net: dict[int, int] = field(default_factory=dict)
    stored: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)


class SteppedWorker:
    """The interface of ``SimWorker``; units are blocks."""

    def __init__(
        self,
        id: int,
        net: Net,
        cost: Cost,
        *,
        blocks: int,
        block_size: int,
        unit_tokens: int,
        block_bytes: int,
        chunk_tokens: int,
        max_batch: int,
        eviction: str = "lru",
    ) -> None:
        assert unit_tokens in (0, block_size)
        self.id = id
        self.runs = Runs()
        self.net = net
        self.size = block_size
        self.block_bytes = block_bytes
        self.pool = BlockPool(blocks, block_size, eviction)
        self.scheduler = Scheduler(self.pool, cost, chunk_tokens, max_batch)
        self.cost = cost
        self.factors: dict[int, float] = {}  # of prompts, by attempt
        self.jobs: dict[int, Job] = {}
        self.decodes: dict[int, Sequence] = {}  # those that SendDecode asked for
        self.cell = Cell()
        self.anonymous = ANONYMOUS
        self.step: Step | None = None
        self.boundary = Fraction(0)
        self.end = Fraction(0)  # of the step
        self.stalled = Fraction(-1)
        self.report_at = math.inf
        self.wanted = 0
        self.dead = False

    def total(self, totals: WorkerTotals) -> None:
        """What it did is not counted: its decisions are what it is for."""
        totals.blocks = self.pool.num_blocks

    @property
    def free_blocks(self) -> int:
        return self.pool.free_blocks

    @property
    def cached_units(self) -> int:
        return sum(value < ANONYMOUS for value in self.pool.cached_hashes())

    # --- messages ----------

    def take(self, action: ev.Action, now: float) -> None:
        match action:
            case ev.SendReserve():
                self.reserve(action, now)
            case ev.SendPrefill():
                self.prefill(action, now)
            case ev.SendPull():
                self.pull(action, now)
            case ev.SendDecode():
                self.decode(action, now)
            case ev.SendRelease() | ev.SendCancel():
                self.forget(action.attempt)
        self.poke(now)

    def hashes(self, request: Request, length: int) -> list[int]:
        """Of all full blocks of ``length`` tokens; those that the trace does not name are new."""
        known = request.hashes[: length // self.size]
        return known + [self.unheard_of() for _ in range(length // self.size - len(known))]

    def unheard_of(self) -> int:
        self.anonymous += 1
        return self.anonymous

    def reserve(self, action: ev.SendReserve, now: float) -> None:
        hashes = self.hashes(action.request, action.request.length - 1)
        held = self.scheduler.reserve(action.attempt, hashes, action.blocks, action.request.keep)
        if held is None:
            self.no_room(action.attempt, action.blocks, now)
        else:
            self.tell(ev.Reserved(self.id, action.attempt, held), now)

    def prefill(self, action: ev.SendPrefill, now: float) -> None:
        request = action.request
        mode = Mode.LOCAL if action.decode else Mode.PREFILL
        hashes = self.hashes(request, request.length)
        sequence = Sequence(
            action.attempt, request.length, hashes, mode, request.itl_s, request.rank, action.transfer, action.attempt,
            request.keep,
        )  # fmt: skip
        if not self.scheduler.add(sequence, now):
            self.no_room(action.attempt, -(-(request.length + action.decode) // self.size), now)
            return
        if self.net.work:
            self.factors[action.attempt] = self.net.work[request.rid]
        left = self.net.outputs[request.rid] - request.emitted
        self.jobs[action.attempt] = Job(request, left, sequence.cached != action.cached)
        ready = self.scheduler.announce(sequence)
        if ready is not None:
            self.announce(ready, now)

    def no_room(self, attempt: int, blocks: int, now: float) -> None:
        self.tell(ev.NoRoom(self.id, attempt), now)
        self.wanted = blocks
        self.report_at = min(self.report_at, slot_after(now, self.id))

    def pull(self, action: ev.SendPull, now: float) -> None:
        if self.scheduler.holding(action.attempt) is None:
            return
        count = len(action.blocks) // 4
        try:
            self.scheduler.targets(action.attempt, action.first, count)
        except ValueError:
            self.tell(ev.BlocksBad(self.id, action.attempt, "RANGE"), now)
            return
        nbytes = count * self.block_bytes
        when = self.net.link(action.peer, self.id, nbytes, now)
        self.net.transferred(self.id, action.attempt, action.first, count, nbytes, now, when)

    def pulled(self, attempt: int, first: int, count: int, nbytes: int, seconds: float, now: float) -> None:
        if self.scheduler.holding(attempt) is None:
            return
        self.scheduler.seal_received(attempt, first, count)
        self.tell(ev.BlocksVerified(self.id, attempt, first, count, nbytes, seconds, "sim"), now)
        self.received(attempt, now)
        self.poke(now)

    def decode(self, action: ev.SendDecode, now: float) -> None:
        request = action.request
        if self.scheduler.holding(action.attempt) is None:
            return
        length = request.prompt_len + request.emitted
        hashes = self.hashes(request, length)
        sequence = Sequence(action.attempt, length, hashes, Mode.DECODE, request.itl_s, request.rank, keep=request.keep)
        self.jobs[action.attempt] = Job(request, self.net.outputs[request.rid] - request.emitted)
        self.decodes[action.attempt] = sequence
        self.received(action.attempt, now)

    def received(self, attempt: int, now: float) -> None:
        sequence, holding = self.decodes.get(attempt), self.scheduler.holding(attempt)
        if sequence is not None and holding is not None and holding.received * self.size >= sequence.length - 1:
            del self.decodes[attempt]
            self.scheduler.start_decode(sequence, now)

    def forget(self, attempt: int) -> None:
        self.decodes.pop(attempt, None)
        job = self.jobs.pop(attempt, None)
        if job is not None:
            self.close(job)
        self.scheduler.cancel(attempt)

    # --- steps ----------

    def poke(self, now: float) -> None:
        """Something happened: plan as soon as all messages of this moment are heard."""
        self.note_changes(now)
        if self.wanted and self.report_at == math.inf:
            self.report_at = slot_after(now, self.id)
        if self.step is None:
            self.net.wake_at(self.id, now)
        else:
            self.wish()

    def wish(self) -> None:
        end = math.inf if self.step is None else float(self.end)
        self.net.wake_at(self.id, min(end, self.report_at))

    def wake(self, now: float) -> None:
        if self.dead:
            return
        if now >= self.report_at:
            room = self.pool.free_blocks >= self.wanted
            self.report_at = math.inf if room or self.step is None else slot_after(now, self.id)
            if room:
                self.wanted = 0
                self.tell(ev.Reported(self.id, self.pool.free_blocks, 0, 0, 0, 0.0), now)
        if self.step is None:
            self.boundary = Fraction(now)
            self.plan(now)
        elif now >= float(self.end):
            self.boundary = self.end
            self.finish(self.step, now)
            self.plan(now)
        self.note_changes(now)
        self.wish()

    def plan(self, now: float) -> None:
        while True:
            self.step = step = self.scheduler.plan(now)
            if step is None:
                return
            for sequence in step.preempted:
                job = self.jobs.pop(sequence.attempt)
                self.speak(sequence.attempt, job, now)
                self.close(job)
                self.tell(ev.AttemptLost(self.id, sequence.attempt, "preempted", False), now)
            if step.warned:
                for attempt in self.scheduler._running:  # in their order
                    self.speak(attempt, self.jobs[attempt], now)
            for sequence in step.warned:
                self.tell(ev.Short(self.id, sequence.attempt), now)
            if step.chunks or step.decodes:
                self.end = max(self.boundary, self.stalled) + Fraction(self.true_s(step))
                return
            self.scheduler.done(step, now)  # all of it was preempted

    def true_s(self, step: Step) -> float:
        """What its prompts add to a step takes as long as their own factors say, weighted by tokens."""
        if not step.chunks or not self.net.work:
            return step.predicted_s
        lengths = [sequence.length for sequence in step.decodes]
        alone = self.cost.decode(len(lengths), sum(lengths)) if lengths else 0.0
        factors = [(chunk.count, self.factors[chunk.sequence.attempt]) for chunk in step.chunks]
        stretch = sum(count * factor for count, factor in factors) / sum(count for count, _ in factors)
        return alone + (step.predicted_s - alone) * stretch

    def finish(self, step: Step, now: float) -> None:
        for sequence in step.decodes:
            if len(sequence.hashes) < sequence.length // self.size:
                sequence.hashes.append(self.unheard_of())
        outcome = self.scheduler.done(step, now)
        for chunk in step.chunks:
            self.report(chunk, outcome.news, now)
        self.count_gaps([s for s in step.decodes if not s.cancelled])
        over = [sequence for sequence in outcome.sampled if self.drew(sequence, now)]
        for sequence in over:
            request = self.jobs.pop(sequence.attempt).request
            reason = "length" if self.net.outputs[request.rid] >= request.max_tokens else "stop"
            self.tell(ev.Ended(self.id, sequence.attempt, reason), now)
        for ready in outcome.ready:
            self.announce(ready, now)

    def report(self, chunk: Chunk, news: bool, now: float) -> None:
        s = chunk.sequence
        if s.cancelled:
            return
        job = self.jobs[s.attempt]
        if chunk.last or news or job.misjudged:
            job.misjudged = False
            self.tell(ev.Progressed(self.id, s.attempt, s.computed, s.cached, s.step_s, s.pace), now)

    def drew(self, sequence: Sequence, now: float) -> bool:
        """It drew a token; whether that was its last."""
        job = self.jobs[sequence.attempt]
        job.untold += 1
        job.left -= 1
        job.last = self.boundary
        first = not job.spoke
        if job.left == 0 or first:
            self.speak(sequence.attempt, job, now)
        if job.left == 0:
            self.close(job)
            self.scheduler.cancel(sequence.attempt)
        return job.left == 0

    def speak(self, attempt: int, job: Job, now: float) -> None:
        if job.untold:
            self.tell(ev.Emitted(self.id, attempt, job.untold), now)
            job.untold, job.spoke = 0, True

    # --- gaps ----------

    def count_gaps(self, decodes: list[Sequence]) -> None:
        """Gaps that end now: one run for all where all began together and nobody sat the step out, else one each."""
        felt = [self.jobs[s.attempt] for s in decodes if self.jobs[s.attempt].last is not None]
        if not felt:
            return
        here = set(map(id, felt))
        apart = [job for job in self.jobs.values() if job.low >= 0 and id(job) not in here]
        if len({job.last for job in felt}) == 1 and not apart:
            for job in felt:
                if job.low < 0:
                    job.low = len(self.runs)
            self.add_run(felt[0], len(felt))
            return
        for job in self.jobs.values():
            self.close(job)
        for job in felt:
            self.add_run(job, 1)
            self.net.span(job.request, self.id, len(self.runs) - 1, len(self.runs))

    def add_run(self, job: Job, batch: int) -> None:
        assert job.last is not None
        self.runs.add(float(self.boundary - job.last), 0.0, 1, batch)

    def close(self, job: Job) -> None:
        if 0 <= job.low < len(self.runs):
            self.net.span(job.request, self.id, job.low, len(self.runs))
        job.low = -1

    # --- news ----------

    def tell(self, event: ev.Event, now: float) -> None:
        self.net.tell(event, now)

    def announce(self, ready: Ready, now: float) -> None:
        count = len(ready.blocks)
        attempt = ready.sequence.attempt
        self.tell(ev.BlocksReady(self.id, attempt, ready.first, count, bytes(4 * count), b""), now)

    def note_changes(self, now: float) -> None:
        """Changes of the cache; what was done and undone in one cell is not told."""
        changes = self.pool.drain_events()
        stored = [value for value in changes.stored if value < ANONYMOUS]
        removed = [value for value in changes.removed if value < ANONYMOUS]
        if not stored and not removed:
            return
        if now >= self.cell.due:
            self.cell = Cell(slot_after(now, self.id))
            self.net.kv(self.id, self.cell.stored, self.cell.removed, self.cell.due)
        total = self.cell.net
        for values, by in ((stored, 1), (removed, -1)):
            for value in values:
                total[value] = total.get(value, 0) + by
        self.cell.stored[:] = [key for key, count in total.items() if count > 0]
        self.cell.removed[:] = [key for key, count in total.items() if count < 0]

    # --- faults ----------

    def stop(self, now: float) -> None:
        for attempt in self.scheduler._running:  # in their order
            self.speak(attempt, self.jobs[attempt], now)
            self.close(self.jobs[attempt])
        if now < self.cell.due:
            self.cell.stored.clear()
            self.cell.removed.clear()
        self.dead = True
        self.jobs.clear()
        self.net.wake_at(self.id, math.inf)

    def stall(self, now: float, seconds: float) -> None:
        until = Fraction(now) + Fraction(seconds)
        more = until - max(Fraction(now), self.stalled)
        if more <= 0:
            return
        self.stalled = until
        if self.step is not None:
            self.end += more
            self.wish()


def slot_after(now: float, worker: int) -> float:
    """The next multiple of 20 ms of the worker's clock."""
    phase = news_phase(worker)
    slot = math.floor((now - phase) / NEWS_EVERY_S)
    while slot * NEWS_EVERY_S + phase <= now:
        slot += 1
    return slot * NEWS_EVERY_S + phase
