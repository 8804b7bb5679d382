"""The steps of one emulated worker: what is computed when, as ``workers/scheduler.py`` plans it, in closed form.

While a prompt waits or is computed every step is one wake. Without prompts nothing is touched until something changes:
``decode.py`` knows the boundaries, ``memory.py`` the blocks. What must be known at a moment in between is worked out
when it is asked for:

- What is to be computed differently has its effect at the first boundary at or after the moment: the next wake.
- Blocks that growing sequences took are counted (``sync``) before anything else happens to the memory. As long as that
  touches no cached unit only the order matters; a plan that would evict one, or finds no block, is a wake.
- Cancelling, dying and stalling are rare: the steps that are over are settled first, then the running one is changed.
"""

from __future__ import annotations

import math

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.sim.decode import Batch
from twinpool.sim.gaps import Runs
from twinpool.sim.memory import Memory, next_news
from twinpool.sim.net import Net
from twinpool.sim.seats import Seats
from twinpool.sim.sequence import GONE, HELD, NEVER, RUNNING, Sequence
from twinpool.workers.chunks import ITL_SHARE, plan_chunks
from twinpool.workers.sequence import BATCH_RANK

NEWS_S, NEWS_SHARE = 0.002, 0.02  # a step that is off its prediction by more than both is news (workers/worker.py)
ZEROS = bytes(1 << 12)  # block columns, of which only the length means anything


class Steps:
    """See the module's docstring. ``held``: sequences that are in no step, reserved for or computed."""

    __slots__ = (
        "_ahead", "_batch", "_chunk_tokens", "_chunks", "_cost", "_counts", "_end", "_fresh", "_id",
        "_joining", "_leaving", "_max_batch", "_memory", "_net", "_order", "_predicted", "_queues", "_ready",
        "_report_at", "_running", "_seats", "_seconds", "_single", "_size", "_stalled", "_turn", "_unit", "held",
    )  # fmt: skip

    def __init__(
        self,
        id: int,
        net: Net,
        cost: Cost,
        memory: Memory,
        runs: Runs,
        *,
        block_size: int,
        chunk_tokens: int,
        max_batch: int,
    ) -> None:
        self.held: dict[int, Sequence] = {}
        self._id = id
        self._net = net
        self._cost = cost
        self._memory = memory
        self._size = block_size
        self._unit = memory.unit_blocks * block_size
        self._chunk_tokens = chunk_tokens
        self._max_batch = max_batch
        self._batch = Batch(cost, runs, block_size)
        self._seats = Seats(id, net, self._batch)
        self._queues: tuple[dict[int, Sequence], dict[int, Sequence]] = ({}, {})  # prompts; the second: batch class
        self._running: dict[int, Sequence] = {}
        self._joining: list[Sequence] = []  # of these, who decodes from the next plan on
        self._fresh: list[Sequence] = []  # draw their first token here in the step that runs
        self._leaving: list[Sequence] = []  # gone, but in the step that runs: their blocks are still in use
        self._ready: list[Sequence] = []  # have blocks to announce after this step
        self._order = 0
        self._turn = 0
        self._ahead = 0  # steps that run until the next wake; 0: none
        self._end = math.inf  # when they are over; without any: when to plan
        self._single = False  # one step, of ``_seconds``: not the closed form
        self._seconds = 0.0
        self._predicted = 0.0
        self._chunks: list[Sequence] = []
        self._counts: list[int] = []  # their tokens
        self._stalled = -math.inf  # nothing is computed until then
        self._report_at = math.inf  # the router waits for news of free blocks

    # --- sequences come and go ----------

    def add(self, sequence: Sequence, now: float) -> None:
        """A prompt whose blocks are booked."""
        sequence.order = self._order
        self._order += 1
        self._queues[sequence.rank >= BATCH_RANK][sequence.attempt] = sequence
        self.interrupt(now)

    def decode(self, sequence: Sequence, now: float) -> None:
        """A sequence that was held and whose blocks are all here; ``length`` and ``left`` are set."""
        del self.held[sequence.attempt]
        sequence.order = self._order
        self._order += 1
        sequence.fresh = True
        self._seat(sequence)
        self.interrupt(now)

    def forget(self, attempt: int, now: float) -> None:
        """Nobody wants the attempt any more, whatever it is here."""
        sequence = self.held.pop(attempt, None)
        if sequence is None:
            sequence = self._queues[0].pop(attempt, None) or self._queues[1].pop(attempt, None)
        if sequence is not None:
            in_step = sequence.in_step
        else:
            sequence = self._running.pop(attempt, None)
            if sequence is None:
                return
            in_step = self._stop_decoding(sequence, now)
        sequence.state = GONE
        if in_step:
            self._leaving.append(sequence)
        else:
            self.sync(now)
            self._free(sequence)

    def _stop_decoding(self, sequence: Sequence, now: float) -> bool:
        """Takes a running one out; whether it is in the step that runs."""
        if sequence.join == NEVER:
            self._joining.remove(sequence)
            return False
        batch = self._batch
        self._settle(now)
        self._seats.close(sequence)
        if batch.step > sequence.join:
            sequence.full = (batch.length(sequence) - 1) // self._size
        batch.leave(sequence, GONE)
        return self._ahead > 0 and self._seats.decodes(sequence)

    def _seat(self, sequence: Sequence) -> None:
        sequence.turn = self._turn
        self._turn += 1
        self._running[sequence.attempt] = sequence
        self._joining.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._memory.release(sequence.hashes, sequence.sealed, sequence.full, sequence.blocks)

    # --- between two wakes ----------

    def interrupt(self, now: float) -> None:
        """Something is to be planned: at the first boundary at or after now."""
        if not self._ahead:
            if self._end != now:
                self._end = now
                self._wish()
        elif self._ahead > 1:
            steps = self._batch.first_at(now)
            if steps < self._ahead:
                self._wait(steps)

    def sync(self, now: float) -> None:
        """Count the blocks that growing sequences took until now."""
        batch = self._batch
        if self._ahead > 1 and batch.may_grow(batch.step + self._ahead):
            blocks = batch.grow_to(batch.step + batch.first_at(now) - 1)
            if blocks:
                self._memory.allocate(blocks)

    def taken(self) -> None:
        """Blocks were taken: growth may come to cached units earlier. Call ``sync`` before taking them."""
        batch = self._batch
        if self._ahead > 1:
            stop = batch.step + self._ahead
            if batch.may_grow(stop):
                steps = batch.quiet_until(self._memory.quiet(), stop) - batch.step
                if steps < self._ahead:
                    self._wait(steps)

    def report_soon(self, now: float) -> None:
        """The router was refused room: it is told of free blocks with the next report, as by workers/reporter.py."""
        if self._report_at == math.inf:
            self._report_at = next_news(now)
            self._wish()

    def stall(self, now: float, seconds: float) -> None:
        """Nothing is computed for so long; messages are heard all the same."""
        more = now + seconds - max(now, self._stalled)
        if more <= 0.0:
            return
        self._stalled = now + seconds
        if self._ahead:
            self._settle(now)
            self._seconds += more
            self._wait(1)

    def stop(self, now: float) -> None:
        """The worker dies: tokens of the steps that are over have left before."""
        self._settle(now)
        for sequence in self._running.values():
            if sequence.join != NEVER:
                self._tell_tokens(sequence, now)
                self._seats.close(sequence)
        self.held.clear()
        for place in (*self._queues, self._running):
            place.clear()
        self._ahead = 0
        self._end = self._report_at = math.inf
        self._wish()

    def _settle(self, now: float) -> None:
        """Goes on to the step that runs now, and makes it one whose seconds do not depend on the batch any more."""
        if not self._ahead or self._single:
            return
        batch = self._batch
        self.sync(now)
        steps = batch.first_at(now) - 1 if self._ahead > 1 else 0
        if steps:
            batch.advance(steps)
        self._single = True
        self._seconds = self._predicted = batch.seconds(1)
        self._wait(1)

    def _wait(self, steps: int) -> None:
        """Wake when so many steps are over."""
        self._ahead = steps
        self._end = self._batch.end_after(self._seconds) if self._single else self._batch.end_of(steps)
        self._wish()

    def _wish(self) -> None:
        self._net.wake_at(self._id, self._end if self._end < self._report_at else self._report_at)

    # --- a wake ----------

    def wake(self, now: float) -> None:
        """The steps that ran are over, or something waits to be planned."""
        if now >= self._report_at:
            self._report(now)
        if now < self._end:
            self._wish()
            return
        self._memory.now = now
        if self._ahead:
            self._finish(now)
        else:
            self._batch.begin(now)
        self._plan(now)

    def _report(self, now: float) -> None:
        self.sync(now)
        free = self._memory.available
        self._net.tell(ev.Reported(self._id, free, 0, 0, 0, 0.0), now)
        self._report_at = math.inf
        if not free:
            self.report_soon(now)

    def _finish(self, now: float) -> None:
        batch, steps = self._batch, self._ahead
        if batch.may_grow(batch.step + steps):
            blocks = batch.grow_to(batch.step + steps - 1)
            if blocks:
                self._memory.allocate(blocks)
        self._ahead = 0
        if self._seats.crowded:
            self._seats.advance(self._seconds)
        elif self._single:
            batch.advance_by(self._seconds, batch.count, batch.felt)
        else:
            batch.advance(steps)
        if self._leaving:
            for sequence in self._leaving:
                self._free(sequence)
            self._leaving.clear()
        if self._chunks:
            self._finish_with_chunks(now)
        else:
            drawn = self._drawn()
            if drawn:
                self._speak(drawn, now)

    def _finish_with_chunks(self, now: float) -> None:
        drawn = self._progress(now)
        decoded = self._drawn()
        if decoded:
            drawn += decoded
        if drawn:
            self._speak(drawn, now)
        for sequence in self._ready:
            self.announce(sequence, now)
        self._ready.clear()

    def _progress(self, now: float) -> list[Sequence]:
        """Chunks were computed; returns whose prompt is done, in order."""
        done: list[Sequence] = []
        seconds = self._seconds
        off = abs(seconds - self._predicted) > max(NEWS_S, NEWS_SHARE * self._predicted)
        size, unit = self._size, self._unit
        for i, sequence in enumerate(self._chunks):
            sequence.in_step = False
            if sequence.state == GONE:
                continue
            sequence.step_s += seconds
            sequence.computed = computed = sequence.computed + self._counts[i]
            sequence.full = computed // size
            if unit:
                self._seal(sequence, min(computed // unit, len(sequence.hashes)))
            last = computed >= sequence.prompt_len
            if last or off or sequence.misjudged:
                sequence.misjudged = False
                news = ev.Progressed(self._id, sequence.attempt, computed, sequence.cached, sequence.step_s)
                self._net.tell(news, now)
            if sequence.transfer:
                self._ready.append(sequence)
            if last:
                done.append(sequence)
        self._chunks = []
        return done

    def _seal(self, sequence: Sequence, units: int) -> None:
        """Its leading units are final."""
        if units > sequence.sealed:
            double = self._memory.seal(sequence.hashes, sequence.sealed, units)
            if double:
                self._memory.give(double)
            sequence.sealed = units

    def announce(self, sequence: Sequence, now: float) -> None:
        """Tell of blocks that are final and were not told of."""
        computed, first = sequence.computed, sequence.announced
        end = -(-computed // self._size) if computed >= sequence.prompt_len else computed // self._size
        count = end - first
        if count > 0:
            sequence.announced = end
            blocks = ZEROS[: 4 * count] if 4 * count <= len(ZEROS) else bytes(4 * count)
            self._net.tell(ev.BlocksReady(self._id, sequence.attempt, first, count, blocks, b""), now)

    def _drawn(self) -> list[Sequence]:
        """Decoding sequences of which the router must hear: first tokens here and last ones, in the batch's order."""
        batch = self._batch
        fresh = self._fresh
        if fresh:
            self._fresh = []
            for sequence in fresh:  # the last token of the prompt was not to be reused, but its block is full now
                if sequence.state == RUNNING and self._unit:
                    self._seal(sequence, len(sequence.hashes))
        if batch.next_end() > batch.step:
            return [sequence for sequence in fresh if sequence.state == RUNNING] if fresh else fresh
        ended = batch.ended()
        if fresh:
            ended += [s for s in fresh if s.state == RUNNING and s.end != batch.step]
        if len(ended) > 1:
            ended.sort(key=_turn)
        return ended

    def _speak(self, drawn: list[Sequence], now: float) -> None:
        """These drew a token that is told of; those that are over are freed."""
        batch, over = self._batch, []
        for sequence in drawn:
            if sequence.state == RUNNING:
                if sequence.fresh:
                    self._seats.first_token(sequence)
                self._tell_tokens(sequence, now)
                if sequence.end == batch.step:
                    over.append(sequence)
                    del self._running[sequence.attempt]
                    self._seats.close(sequence)
                    sequence.full = (batch.length(sequence) - 1) // self._size
                    batch.leave(sequence, GONE)
                    self._free(sequence)
            elif self._first_token(sequence, now):
                over.append(sequence)
        for sequence in over:
            request = sequence.request
            reason = "length" if self._net.outputs[request.rid] >= request.max_tokens else "stop"
            self._net.tell(ev.Ended(self._id, sequence.attempt, reason), now)

    def _first_token(self, sequence: Sequence, now: float) -> bool:
        """A prompt is computed; whether that was all."""
        self._net.tell(ev.Emitted(self._id, sequence.attempt, 1), now)
        del self._queues[sequence.rank >= BATCH_RANK][sequence.attempt]
        sequence.left -= 1
        if sequence.left <= 0:
            sequence.state = GONE
            self._free(sequence)
            return True
        if sequence.local:
            sequence.length += 1
            self._seat(sequence)
        else:
            sequence.state = HELD
            sequence.received = -(-sequence.computed // self._size)
            self.held[sequence.attempt] = sequence
        return False

    def _tell_tokens(self, sequence: Sequence, now: float) -> None:
        count = self._batch.step - sequence.join - sequence.told
        if count > 0:
            sequence.told += count
            self._net.tell(ev.Emitted(self._id, sequence.attempt, count), now)

    # --- a plan ----------

    def _plan(self, now: float) -> None:
        batch = self._batch
        if self._joining:
            for sequence in self._joining:
                batch.join(sequence)
                if sequence.fresh:
                    self._fresh.append(sequence)
            self._joining = []
        seats = self._seats
        if batch.count > self._max_batch or seats.crowded:
            self._turn = seats.take_turns(self._running, self._max_batch, self._turn)
            here = seats.chosen if seats.crowded else self._running.values()
            self._fresh = [sequence for sequence in here if sequence.fresh]  # some came before and had to wait
        if batch.may_grow(batch.step + 1):
            self._grow(now)
        if self._queues[0] or self._queues[1] or seats.crowded or now < self._stalled:
            self._begin_single(now)
        elif batch.count:
            self._begin_many()
        else:
            self._end = math.inf
            if self._report_at < math.inf:
                self._wish()

    def _begin_many(self) -> None:
        """Decodes alone, until somebody has a first or a last token or a plan takes a cached unit's blocks."""
        batch = self._batch
        self._single = False
        steps = 1
        if not self._fresh:
            stop = batch.next_end()
            if batch.may_grow(stop):
                stop = batch.quiet_until(self._memory.quiet(), stop)
            steps = stop - batch.step
        self._ahead = steps
        self._end = batch.end_of(steps)
        self._wish()

    def _begin_single(self, now: float) -> None:
        """One step that has chunks beside the decodes, or takes longer, or is not of all that decode."""
        batch, seats = self._batch, self._seats
        count, context, itl_s = batch.count, batch.context, batch.tightest_s()
        if seats.crowded:
            here = [sequence for sequence in seats.chosen if sequence.state == RUNNING]
            count, context = len(here), sum([batch.length(sequence) for sequence in here])
            itl_s = min([sequence.itl_s for sequence in here], default=math.inf)
        parts = self._cut_chunks(itl_s, count, context) if self._queues[0] or self._queues[1] else []
        if parts:
            seconds = self._cost.step(parts, count, context)
        elif count:
            seconds = self._cost.decode(count, context)
        elif batch.count:
            seconds = 0.0  # everybody in the step was preempted
        else:
            self._end = math.inf
            return
        self._predicted = seconds
        self._seconds = seconds + max(0.0, self._stalled - now)
        self._single = True
        self._wait(1)

    def _cut_chunks(self, itl_s: float, count: int, context: int) -> list[tuple[int, int]]:
        """Chunks of the waiting prompts, first come first served: (tokens, computed before)."""
        first, second = self._queues
        prompts = first.values() if not second else [*first.values(), *second.values()]
        limit_s = ITL_SHARE * itl_s
        counts = plan_chunks(prompts, limit_s, count, context, self._cost, self._chunk_tokens, self._size)
        parts: list[tuple[int, int]] = []
        for sequence, tokens in zip(prompts, counts, strict=False):  # the rest has to wait
            sequence.in_step = True
            self._chunks.append(sequence)
            parts.append((tokens, sequence.computed))
        self._counts = counts
        return parts

    def _grow(self, now: float) -> None:
        """Each sequence that needs a block gets one; where there is none, others have to go."""
        memory = self._memory
        need = self._batch.grow_to(self._batch.step)
        while need > memory.available:
            need -= self._preempt(self._victim(), now)
        if need:
            memory.allocate(need)

    def _victim(self) -> Sequence:
        """The youngest sequence of the lowest class."""
        worst: Sequence | None = None
        for place in (*self._queues, self._running):
            for sequence in place.values():
                if worst is None or (sequence.rank, sequence.order) > (worst.rank, worst.order):
                    worst = sequence
        assert worst is not None, "a block is wanted, so there is a sequence"
        return worst

    def _preempt(self, sequence: Sequence, now: float) -> int:
        """Out with it, between two steps; whether it wanted a block itself."""
        batch = self._batch
        wanted = 0
        if sequence.state == RUNNING:
            del self._running[sequence.attempt]
            self._tell_tokens(sequence, now)
            self._seats.close(sequence)
            if batch.step > sequence.join:
                sequence.full = (batch.length(sequence) - 1) // self._size
            wanted = int(batch.needs_block(sequence))
            batch.leave(sequence, GONE)
            sequence.blocks -= wanted  # counted, but never taken
        else:
            del self._queues[sequence.rank >= BATCH_RANK][sequence.attempt]
            sequence.state = GONE
        self._free(sequence)
        self._net.tell(ev.AttemptLost(self._id, sequence.attempt, "preempted", False), now)
        return wanted


def _turn(sequence: Sequence) -> int:
    return sequence.turn
