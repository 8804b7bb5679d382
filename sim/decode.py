"""The decoding sequences of one emulated worker, from change to change instead of step by step.

While the same B sequences decode, step j (from 0) after the last change takes, on one straight piece of
``cost.row(B)``, ``T_j = alpha + beta * (K + j*B)``: each sequence has one token more to read. So n steps take::

    S(n) = n*(alpha + beta*K) + beta*B * n*(n - 1)/2

and the first boundary at or after a moment is the root of that quadratic, put right by whole steps. Where K crosses a
break of the row the next piece begins. Boundaries carry the part that a float of their time cannot hold, so that
errors do not add up over steps.

Steps are numbered: ``step`` have been completed at ``start``, where step number ``step`` begins. Sequences end after a
step known from the day they join, and need blocks at steps known as well: a block more at ``grows`` and every
``block_size`` steps from there on. How many do at which step is counted modulo ``block_size``.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from typing import Final

from twinpool.cost import Cost, DecodeRow
from twinpool.sim.gaps import Runs
from twinpool.sim.sequence import NEVER, RUNNING, Sequence

CLEAR: Final = 1e-6  # a root that is farther than this from a whole number is not rounded to the wrong side of it


class Batch:
    """See the module's docstring. Nothing here knows of memory, prompts or messages.

    Growth is counted when asked for (``grow_to``); until then it is as if it had not been.
    """

    __slots__ = (
        "_alpha", "_beta", "_cost", "_elapsed", "_elapsed_of", "_ends", "_fitted", "_growing", "_lost", "_phases",
        "_rows", "_size", "_slos", "_starts", "_until", "busy_s", "context", "count", "ends_at", "felt", "grow_at",
        "grown", "runs", "start", "step",
    )  # fmt: skip

    def __init__(self, cost: Cost, runs: Runs, block_size: int) -> None:
        self.runs = runs
        self.start = 0.0  # the last boundary that was looked at
        self.step = 0  # steps completed then
        self.count = 0  # B
        self.context = 0  # K at ``start``: tokens that the step from there on reads
        self.felt = 0  # of B those that have drawn a token here before: they feel the next gap
        self.ends_at = NEVER  # after this step somebody has drawn a last token
        self.busy_s = 0.0  # seconds in steps of decodes alone, in closed form
        self._cost = cost
        self._lost = 0.0  # of ``start``
        self._slos: dict[float, int] = {}  # ITL SLO -> sequences
        self._ends: list[tuple[int, int, Sequence]] = []  # heap of (step, turn): stale ones are met and dropped
        # the straight piece in use
        self._rows: dict[int, DecodeRow] = {}
        self._fitted = False
        self._alpha = 0.0
        self._beta = 0.0
        self._until = 0.0  # K where it ends
        self._elapsed_of = 0
        self._elapsed = 0.0
        # blocks
        self._size = block_size
        self.grown = -1  # the plans up to this step's are counted
        self.grow_at = NEVER  # no plan of an earlier step takes blocks that are not counted
        self._growing = 0  # sequences that take a block every ``block_size`` steps
        self._phases = [0] * block_size  # of them, how many at which step modulo block_size
        self._starts: list[tuple[int, int, Sequence]] = []  # heap of (grows, turn): who will be one of them

    # --- who decodes ----------

    def join(self, sequence: Sequence) -> None:
        """From the step that begins at ``start`` on; ``length``, ``left`` and ``blocks`` say what it is then."""
        step = self.step
        sequence.state = RUNNING
        sequence.join = step
        sequence.end = end = step + sequence.left
        if end < self.ends_at:
            self.ends_at = end
        self.count += 1
        self.context += sequence.length
        self._fitted = False
        if not sequence.fresh:
            self.felt += 1
            sequence.low = len(self.runs.count)
        itl_s = sequence.itl_s
        self._slos[itl_s] = self._slos.get(itl_s, 0) + 1
        heapq.heappush(self._ends, (end, sequence.turn, sequence))
        spare = sequence.blocks * self._size - sequence.length
        sequence.grows = grows = step + spare + 1 if spare >= 0 else step
        if grows < end:
            heapq.heappush(self._starts, (grows, sequence.turn, sequence))
            if grows < self.grow_at:
                self.grow_at = grows

    def leave(self, sequence: Sequence, state: int) -> None:
        """Out, at ``start``; the growth counted so far is added to its ``blocks``."""
        sequence.state = state
        self.count -= 1
        self.context -= sequence.length + self.step - sequence.join
        self._fitted = False
        if not sequence.fresh:
            self.felt -= 1
        slos, itl_s = self._slos, sequence.itl_s
        if slos[itl_s] == 1:
            del slos[itl_s]
        else:
            slos[itl_s] -= 1
        if sequence.growing:
            self._stop_growing(sequence)
        end, sequence.grows, sequence.end = sequence.end, NEVER, NEVER
        if end == self.ends_at:
            self._find_next_end()

    def skip_growth(self, sequence: Sequence) -> None:
        """It will have no part in the step that begins now, so it needs no block for it: all comes one step later."""
        if sequence.growing:
            self._stop_growing(sequence)
        sequence.grows += 1
        if sequence.grows <= sequence.end:
            heapq.heappush(self._starts, (sequence.grows, sequence.turn, sequence))
            if sequence.grows < self.grow_at:
                self.grow_at = sequence.grows

    def sat_out(self, sequence: Sequence) -> None:
        """It had no part in the step that is over."""
        sequence.join += 1
        sequence.end += 1
        heapq.heappush(self._ends, (sequence.end, sequence.turn, sequence))
        self._find_next_end()

    def length(self, sequence: Sequence) -> int:
        """Tokens of a sequence at ``start``."""
        return sequence.length + self.step - sequence.join

    def tightest_s(self) -> float:
        """The smallest ITL SLO; infinity where nothing decodes."""
        least = math.inf
        for itl_s in self._slos:  # a handful of classes
            if itl_s < least:
                least = itl_s
        return least

    def ended(self) -> list[Sequence]:
        """Takes those out of the heap that have drawn their last token at ``start``, in their order."""
        found: list[Sequence] = []
        while self.ends_at <= self.step:
            found.append(heapq.heappop(self._ends)[2])
            self._find_next_end()
        return found

    def _find_next_end(self) -> None:
        ends = self._ends
        while ends and ends[0][2].end != ends[0][0]:
            heapq.heappop(ends)
        self.ends_at = ends[0][0] if ends else NEVER

    # --- time ----------

    def begin(self, now: float) -> None:
        """Something is computed again, from now on."""
        self.start = now
        self._lost = 0.0
        self._elapsed_of = 0
        self.grown = self.step - 1  # the last plan found nobody left

    def seconds(self, steps: int) -> float:
        """S: seconds of the next steps."""
        if not self._fitted:
            self._fit()
        count, context = self.count, self.context
        if context + (steps - 1) * count < self._until:
            total = steps * (self._alpha + self._beta * context)
            if steps > 1:
                total += self._beta * count * (steps * (steps - 1) * 0.5)
        else:
            total = self._seconds_across(steps)
        self._elapsed_of = steps
        self._elapsed = total
        return total

    def end_of(self, steps: int) -> float:
        """The boundary after that many more steps."""
        return self.start + (self._lost + self.seconds(steps))

    def end_after(self, seconds: float) -> float:
        """The boundary after one step of that many seconds."""
        return self.start + (self._lost + seconds)

    def first_at(self, now: float) -> int:
        """The fewest steps, at least one, with a boundary at or after ``now``."""
        if not self._fitted:
            self._fit()
        rest = now - self.start - self._lost
        if rest <= 0.0:
            return 1
        count, context = self.count, self.context
        guess = _root(rest, self._alpha + self._beta * context, self._beta * count)
        steps = math.ceil(guess)
        if context + (steps - 1) * count >= self._until:
            steps = self._steps_across(rest)
        elif CLEAR < steps - guess < 1.0 - CLEAR:
            return steps
        steps = max(1, steps)
        while steps > 1 and self.end_of(steps - 1) >= now:
            steps -= 1
        while self.end_of(steps) < now:
            steps += 1
        return steps

    def advance(self, steps: int) -> None:
        """Go on by whole steps of decodes alone: nobody ends before the last of them."""
        if self._elapsed_of != steps:
            self.seconds(steps)
        count, context = self.count, self.context
        after = context + steps * count
        if self.felt:
            if after - count < self._until:
                self.runs.add(self._alpha + self._beta * context, self._beta * count, steps, self.felt)
            else:
                self._add_runs_across(steps)
        self.context = after
        if after >= self._until:
            self._fitted = False
        self.busy_s += self._elapsed
        self._move(steps, self._elapsed)

    def advance_by(self, seconds: float, tokens: int, felt: int) -> None:
        """Go on by one step of any kind, in which ``tokens`` sequences drew one and ``felt`` of them a gap."""
        if felt:
            self.runs.add(seconds, 0.0, 1, felt)
        if tokens:
            self.context += tokens
            self._fitted = False
        self._move(1, seconds)

    def _move(self, steps: int, seconds: float) -> None:
        self.step += steps
        self._elapsed_of = 0
        before, more = self.start, self._lost + seconds
        self.start = after = before + more
        part = after - before
        self._lost = (before - (after - part)) + (more - part)  # Knuth: what the sum is short of

    def _fit(self) -> None:
        count = self.count
        row = self._rows.get(count)
        if row is None:
            row = self._rows[count] = self._cost.row(count)
        breaks = row.breaks
        piece = bisect_right(breaks, self.context) - 1
        self._alpha = row.alpha[piece]
        self._beta = row.beta[piece]
        self._until = breaks[piece + 1] if piece + 1 < len(breaks) else math.inf
        self._fitted = True
        self._elapsed_of = 0

    # --- over breaks of the row ----------

    def _pieces(self, steps: int) -> list[tuple[float, float, int]]:
        """(first, increment, steps) on each piece that the next steps begin on."""
        count, context = self.count, self.context
        row = self._rows[count]
        breaks = row.breaks
        piece = bisect_right(breaks, context) - 1
        found: list[tuple[float, float, int]] = []
        while steps:
            here = steps
            if piece + 1 < len(breaks):
                here = min(steps, max(0, -(-(breaks[piece + 1] - context) // count)))
            if here:
                found.append((row.alpha[piece] + row.beta[piece] * context, row.beta[piece] * count, here))
            context += here * count
            steps -= here
            piece += 1
        return found

    def _seconds_across(self, steps: int) -> float:
        total = 0.0
        for first, more, here in self._pieces(steps):
            total += here * first + more * (here * (here - 1) * 0.5)
        return total

    def _add_runs_across(self, steps: int) -> None:
        for first, more, here in self._pieces(steps):
            self.runs.add(first, more, here, self.felt)

    def _steps_across(self, rest: float) -> int:
        """``first_at``, give or take one, where ``rest`` seconds are left."""
        high = 1
        while self._seconds_across(high) < rest:
            high *= 2
        steps = 0
        for first, more, here in self._pieces(high):
            whole = here * first + more * (here * (here - 1) * 0.5)
            if whole >= rest:
                return steps + math.ceil(_root(rest, first, more))
            rest -= whole
            steps += here
        return steps

    # --- blocks ----------

    def grow_to(self, step: int) -> int:
        """Blocks that the plans up to that step's take and that were not counted yet. Counts them."""
        more = step - self.grown
        if more <= 0:
            return 0
        blocks, size, phases = 0, self._size, self._phases
        if self._growing:
            rounds, rest = divmod(more, size)
            blocks = rounds * self._growing
            if rest:
                first = (self.grown + 1) % size
                blocks += sum(phases[first : first + rest])
                if first + rest > size:
                    blocks += sum(phases[: first + rest - size])
        starts = self._starts
        while starts and starts[0][0] <= step:
            grows, _, sequence = heapq.heappop(starts)
            if sequence.grows == grows and not sequence.growing:
                sequence.growing = True
                self._growing += 1
                phases[grows % size] += 1
                blocks += (step - grows) // size + 1
        self.grown = step
        if self._growing:
            self.grow_at = step + 1
        else:
            self.grow_at = starts[0][0] if starts else NEVER
        return blocks

    def quiet_until(self, blocks: int, step: int) -> int:
        """The step below ``step`` whose plan may take more than ``blocks`` with those before it, else ``step``.

        Call it when all up to the plan in hand is counted. May be early: it does not look behind who begins to grow.
        """
        starts = self._starts
        while starts and (starts[0][2].grows != starts[0][0] or starts[0][2].growing):
            heapq.heappop(starts)
        size, at, growing = self._size, self.grown, self._growing
        cap = min(step, starts[0][0]) if starts else step
        if growing:
            rounds = blocks // growing
            blocks -= rounds * growing
            at += rounds * size
            while at + 1 < cap:
                at += 1
                blocks -= self._phases[at % size]
                if blocks < 0:
                    return at
        return cap

    def blocks(self, sequence: Sequence) -> int:
        """What a sequence that decodes has by the plans that are counted."""
        rounds = (self.grown - sequence.grows) // self._size + 1 if sequence.growing else 0
        return sequence.blocks + rounds

    def needs_block(self, sequence: Sequence) -> bool:
        """Whether the plan of the step that begins now takes a block for it."""
        since = self.step - sequence.grows
        return since >= 0 and since % self._size == 0

    def _stop_growing(self, sequence: Sequence) -> None:
        sequence.growing = False
        self._growing -= 1
        self._phases[sequence.grows % self._size] -= 1
        rounds = (self.grown - sequence.grows) // self._size + 1
        sequence.blocks += rounds
        sequence.grows += rounds * self._size
        if not self._growing:
            self.grow_at = self._starts[0][0] if self._starts else NEVER


def _root(rest: float, first: float, more: float) -> float:
    """n with ``n*first + more*n*(n - 1)/2 == rest``, in the form that loses no digits; all above 0 but ``more``."""
    slope = first - 0.5 * more
    return 2.0 * rest / (slope + math.sqrt(slope * slope + 2.0 * more * rest))
