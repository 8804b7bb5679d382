"""The steps of one emulated worker: what is computed when, as ``workers/scheduler.py`` plans it, in closed form.

While a prompt waits or is computed every step is one wake. Without prompts nothing is touched until something changes:
``decode.py`` knows the boundaries, ``memory.py`` the blocks. What must be known at a moment in between is worked out
when it is asked for:

- What is to be computed differently has its effect at the first boundary at or after the moment: the next wake.
- Blocks that growing sequences took are counted when it matters. As long as all of them came from free blocks, it
  makes no difference when they are counted; else they are before anything else happens to the memory, and a plan that
  would evict a cached unit, or finds no block, is a wake.
- Cancelling, dying and stalling are rare: the steps that are over are settled first, then the running one is changed.
"""

from __future__ import annotations

import math
from typing import Final

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.sim.decode import Batch
from twinpool.sim.members import Members
from twinpool.sim.memory import Memory, next_news
from twinpool.sim.net import Net
from twinpool.sim.sequence import GONE, NEVER, RUNNING

COUNT_EVERY: Final = 256  # steps, after which growth is counted though there is no need


class Steps:
    """See the module's docstring."""

    __slots__ = (
        "_ahead", "_batch", "_busy_s", "_cost", "_end", "_id", "_max_batch", "_memory", "_net", "_predicted",
        "_report_at", "_seconds", "_single", "_single_s", "_size", "_stalled", "_uneven", "_wanted", "members",
        "mixed_s", "prefill_s",
    )  # fmt: skip

    def __init__(
        self, id: int, net: Net, cost: Cost, memory: Memory, batch: Batch, members: Members, max_batch: int, size: int
    ) -> None:
        self.members = members
        self.prefill_s = self.mixed_s = 0.0  # seconds of steps with prompts, without and with decodes
        self._id = id
        self._net = net
        self._cost = cost
        self._memory = memory
        self._batch = batch
        self._max_batch = max_batch
        self._size = size  # of blocks
        self._single_s = 0.0  # of steps of decodes alone that were not in closed form
        self._ahead = 0  # steps that run until the next wake; 0: none
        self._end = math.inf  # when they are over; without any: when to plan
        self._single = False  # one step, of ``_seconds``: not the closed form
        self._seconds = 0.0
        self._busy_s = 0.0  # of them without a stall
        self._predicted = 0.0  # of those by the cost
        self._uneven = len(net.work) > 0  # prompts take longer or shorter than the cost says
        self._stalled = -math.inf  # nothing is computed until then
        self._report_at = math.inf  # the router waits for news of free blocks
        self._wanted = 0  # so many; 0: it waits for none

    @property
    def decode_s(self) -> float:
        """Seconds of steps of decodes alone."""
        return self._single_s + self._batch.busy_s

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

    def forget(self, attempt: int, now: float) -> None:
        """Nobody wants the attempt any more, whatever it is here."""
        members = self.members
        sequence = members.held.pop(attempt, None)
        in_step = False
        if sequence is None:
            sequence = members.prompts.take_out(attempt)
            if sequence is not None:
                in_step = sequence.in_step
            else:
                sequence = members.running.pop(attempt, None)
                if sequence is None:
                    return
                self._settle(now)
                in_step = members.stop_decoding(sequence)
        sequence.state = GONE
        if in_step:
            members.leaving.append(sequence)
        else:
            self.sync(now, 0)
            self._memory.release(sequence)
        self.gave_back(now)

    def gave_back(self, now: float) -> None:
        """Blocks may be free that were not: the router may wait for them."""
        if self._wanted:
            self.report_room(self._wanted, now)

    def give_up(self, attempt: int, now: float) -> None:
        """A running attempt goes on elsewhere: tokens that were drawn have left, then it is preempted."""
        sequence = self.members.running.get(attempt)
        if sequence is None:
            return
        self._settle(now)
        if sequence.join != NEVER:
            self.members.tell_tokens(sequence, now)
        self.forget(attempt, now)
        self._net.tell(ev.AttemptLost(self._id, attempt, "preempted", False), now)

    def sync(self, now: float, wanted: int) -> bool:
        """Call this before blocks are given back, or ``wanted`` ones taken. Whether those can be needed for growth."""
        batch, memory = self._batch, self._memory
        last = batch.step + self._ahead - 1
        rounds = (last - batch.grown) // self._size + 1 if batch.grow_at <= last else 0
        if memory.free >= wanted + batch.count * (rounds + 1):
            return False
        if self._ahead > 1:
            last = batch.step + batch.first_at(now) - 1
        blocks = batch.grow_to(last)
        if blocks:
            memory.allocate(blocks)
        return True

    def taken(self, now: float) -> None:
        """Blocks were taken, so growth may come to cached units, or to an end, earlier."""
        if self._ahead > 1:
            batch, memory = self._batch, self._memory
            spare = memory.available - batch.count
            if spare < 0:
                self.interrupt(now)
                return
            steps = batch.quiet_until(min(memory.quiet(), spare), batch.step + self._ahead) - batch.step
            if steps < self._ahead:
                self._wait(steps)

    def report_room(self, blocks: int, now: float) -> None:
        """The router was refused room for so many: it hears of the first report (workers/reporter.py) that has them."""
        self._wanted = blocks
        if self._report_at == math.inf:
            self._report_at = next_news(now, self._memory.phase)
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
        """The worker dies."""
        self._settle(now)
        self.members.die(now)
        self._ahead = 0
        self._end = self._report_at = math.inf
        self._wish()

    def _settle(self, now: float) -> None:
        """Goes on to the step that runs now, and makes it one whose seconds do not depend on the batch any more."""
        if not self._ahead:
            return
        self.sync(now, self._memory.blocks)
        if self._single:
            return
        batch = self._batch
        steps = batch.first_at(now) - 1 if self._ahead > 1 else 0
        if steps:
            batch.advance(steps)
        self._single = True
        self._seconds = self._busy_s = self._predicted = batch.seconds(1)
        self._wait(1)

    def _wait(self, steps: int) -> None:
        """Wake when so many steps are over."""
        self._ahead = steps
        self._end = end = self._batch.end_after(self._seconds) if self._single else self._batch.end_of(steps)
        self._net.wake_at(self._id, end if end < self._report_at else self._report_at)

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
        self.sync(now, self._memory.blocks)
        free = self._memory.available
        self._report_at = math.inf
        if free >= self._wanted:
            self._wanted = 0
            self._net.tell(ev.Reported(self._id, free, 0, 0, 0, 0.0), now)
        elif self._ahead:
            self.report_room(self._wanted, now)  # else nothing here ends by itself

    def _finish(self, now: float) -> None:
        batch, members, steps = self._batch, self.members, self._ahead
        if batch.grow_at < batch.step + steps:
            self.sync(now, 0)
        self._ahead = 0
        if not self._single:
            batch.advance(steps)
        else:
            if not members.prompts.chunks:
                self._single_s += self._busy_s
            elif batch.count:
                self.mixed_s += self._busy_s
            else:
                self.prefill_s += self._busy_s
            if members.seats.crowded:
                members.seats.advance(self._seconds)
            else:
                batch.advance_by(self._seconds, batch.count, batch.felt)
        members.finish(self._seconds, self._predicted, now)
        if self._wanted:
            self.gave_back(now)

    # --- a plan ----------

    def _plan(self, now: float) -> None:
        batch, members = self._batch, self.members
        if members.joining:
            members.join()
        if batch.count > self._max_batch or members.seats.crowded:
            blocks = batch.grow_to(batch.step - 1)
            if blocks:
                self._memory.allocate(blocks)
            members.take_turns(self._max_batch)
        step = batch.step
        if batch.grow_at <= step:
            most = batch.count * ((step - batch.grown) // self._size + 1)
            if self._memory.free < most + batch.count or step - batch.grown > COUNT_EVERY:
                self._grow(now)
        if self._memory.available < batch.count:
            members.warn(now)
        if members.prompts.waiting or members.seats.crowded or now < self._stalled:
            self._begin_single(now)
        elif batch.count:
            self._begin_many()
        else:
            self._idle()

    def _idle(self) -> None:
        self._end = math.inf
        if self._report_at < math.inf:
            self._wish()

    def _begin_many(self) -> None:
        """Decodes alone, until somebody has a first or a last token or a plan takes a cached unit's blocks."""
        batch, memory = self._batch, self._memory
        step, stop = batch.step, batch.step + 1
        if not self.members.fresh:
            stop = batch.ends_at
            if batch.grow_at < stop and memory.free < batch.count * ((stop - 1 - batch.grown) // self._size + 2):
                blocks = batch.grow_to(step)
                if blocks:
                    memory.allocate(blocks)
                spare = memory.available - batch.count
                if spare < 0:
                    spare = self.members.spare
                stop = batch.quiet_until(min(memory.quiet(), spare), stop)
        self._single = False
        self._wait(stop - step)

    def _begin_single(self, now: float) -> None:
        """One step that has chunks beside the decodes, or takes longer, or is not of all that decode."""
        batch, members = self._batch, self.members
        count, context = batch.count, batch.context
        itl_s = batch.tightest_s() if count else math.inf
        if members.seats.crowded:
            here = [sequence for sequence in members.seats.chosen if sequence.state == RUNNING]
            count, context = len(here), sum([batch.length(sequence) for sequence in here])
            itl_s = min([sequence.itl_s for sequence in here], default=math.inf)
        parts = members.prompts.cut(itl_s, count, context) if members.prompts.waiting else None
        if parts:
            seconds = self._cost.step(parts, count, context)
        elif count:
            seconds = self._cost.decode(count, context)
        elif batch.count:
            seconds = 0.0  # everybody in the step was preempted
        else:
            self._idle()
            return
        self._predicted = seconds
        if self._uneven and parts:
            seconds = self._true_s(seconds, count, context)
        self._busy_s = seconds
        if now < self._stalled:
            seconds += self._stalled - now
        self._seconds = seconds
        self._single = True
        self._wait(1)

    def _true_s(self, seconds: float, batch: int, context: int) -> float:
        """What prompts add to a step takes as long as it really does; the decodes beside them as predicted."""
        alone = self._cost.decode(batch, context) if batch else 0.0
        return alone + (seconds - alone) * self.members.prompts.stretch()

    def _grow(self, now: float) -> None:
        """Each sequence that needs a block gets one; where there is none, others have to go."""
        memory = self._memory
        need = self._batch.grow_to(self._batch.step)
        while need > memory.available:
            need -= self.members.preempt(now)
        if need:
            memory.allocate(need)
