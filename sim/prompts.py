"""Prompts of one emulated worker: who waits, what of them goes into a step, and what is told after it."""

from __future__ import annotations

import math

from twinpool.classes import BATCH_RANK
from twinpool.cost import ITL_SHARE, Cost
from twinpool.router import events as ev
from twinpool.sim.memory import Memory
from twinpool.sim.net import Net
from twinpool.sim.planned_cost import PlannedCost
from twinpool.sim.sequence import GONE, Sequence
from twinpool.workers.chunks import blocks_to_announce, plan_chunks, put_in_order
from twinpool.workers.pace import mean_pace, pace_seen

ZEROS = bytes(1 << 12)  # block columns, of which only the length means anything


class Prompts:
    """In order of commitment, batch class last. ``waiting``: how many, those in the step that runs included."""

    __slots__ = (
        "_batch", "_chunk_tokens", "_context", "_cost", "_counts", "_first", "_id", "_last", "_memory", "_net", "_pace",
        "_parts", "_planned", "_size", "_unit", "chunks", "ready", "tokens", "waiting",
    )  # fmt: skip

    def __init__(self, id: int, net: Net, cost: Cost, memory: Memory, block_size: int, chunk_tokens: int) -> None:
        self._id = id
        self._net = net
        self._cost: Cost = cost.planned if isinstance(cost, PlannedCost) else cost  # by which it is planned
        self._planned = isinstance(cost, PlannedCost)  # steps last as another cost says
        self._memory = memory
        self._size = block_size
        self._unit = memory.unit_blocks * block_size
        self._chunk_tokens = chunk_tokens
        self._first: dict[int, Sequence] = {}
        self._last: dict[int, Sequence] = {}  # batch class
        self._counts: list[int] = []  # tokens of the chunks
        self._pace = 1.0  # of the chunks together, as expected
        self._batch = self._context = 0  # what decodes beside them
        self._parts: list[tuple[int, int]] = []  # (tokens, computed before) of each
        self.waiting = 0
        self.ready: list[Sequence] = []  # have blocks to announce, perhaps
        self.chunks: list[Sequence] = []  # whose chunks are in the step that runs
        self.tokens = 0  # computed so far

    def add(self, sequence: Sequence) -> None:
        """A prompt whose blocks are booked."""
        put_in_order(self._last if sequence.rank >= BATCH_RANK else self._first, sequence.attempt, sequence)
        self.waiting += 1

    def take_out(self, attempt: int) -> Sequence | None:
        """A prompt is not to be computed any more, or done; None where it does not wait here."""
        sequence = self._first.pop(attempt, None) or self._last.pop(attempt, None)
        if sequence is not None:
            self.waiting -= 1
        return sequence

    def all(self) -> list[Sequence]:
        """Those that wait, in order."""
        return [*self._first.values(), *self._last.values()]

    def clear(self) -> None:
        """Forget everything."""
        self._first.clear()
        self._last.clear()
        self.chunks = []
        self.waiting = 0

    def cut(self, itl_s: float, batch: int, context: int) -> list[tuple[int, int]]:
        """Chunks for a step beside ``batch`` sequences: (tokens, computed before) of each."""
        prompts = self.all() if self._last else list(self._first.values())
        limit_s = ITL_SHARE * itl_s if batch else math.inf
        self._counts = counts = plan_chunks(
            prompts, limit_s, batch, context, self._cost, self._chunk_tokens, self._size
        )
        self._batch, self._context = batch, context
        self._parts = parts = []
        paced = False
        for i, tokens in enumerate(counts):
            sequence = prompts[i]
            sequence.in_step = True
            self.chunks.append(sequence)
            parts.append((tokens, sequence.computed))
            paced = paced or sequence.pace != 1.0
        self._pace = mean_pace([(counts[i], prompts[i].pace) for i in range(len(counts))]) if paced else 1.0
        return parts

    def stretch(self) -> float:
        """How many times as long as predicted the chunks of the step take: each by its tokens, as its request does."""
        tokens, work = 0, 0.0
        for i, sequence in enumerate(self.chunks):
            count = self._counts[i]
            tokens += count
            work += count * sequence.work
        return work / tokens

    def computed(self, seconds: float, predicted: float, now: float) -> list[Sequence]:
        """The step of the chunks is over; returns whose prompt is done, in order. Those still wait.

        ``predicted``: its seconds by the cost that says how long steps last.
        """
        done: list[Sequence] = []
        pace = 0.0
        if self._planned:
            predicted = self._cost.step(self._parts, self._batch, self._context)
        if seconds != predicted or self._pace != 1.0:
            alone = self._cost.decode(self._batch, self._context) if self._batch else 0.0
            pace = pace_seen(seconds, predicted, alone, self._pace)
        size, unit = self._size, self._unit
        chunks, self.chunks = self.chunks, []
        for i, sequence in enumerate(chunks):
            count = self._counts[i]
            self.tokens += count
            sequence.in_step = False
            if sequence.state == GONE:
                continue
            sequence.step_s += seconds
            if pace > 0.0:
                sequence.pace = pace
            sequence.computed = computed = sequence.computed + count
            sequence.full = computed // size
            if unit:
                units = computed // unit
                if units > len(sequence.hashes):
                    units = len(sequence.hashes)
                if units > sequence.sealed:
                    self._memory.seal(sequence, units)
            last = computed >= sequence.prompt_len
            if last:
                done.append(sequence)
            if last or pace > 0.0 or sequence.misjudged:
                sequence.misjudged = False
                progressed = ev.Progressed(
                    self._id, sequence.attempt, computed, sequence.cached, sequence.step_s, sequence.pace
                )
                self._net.tell(progressed, now)
            if sequence.transfer:
                self.ready.append(sequence)
        return done

    def announce_ready(self, now: float) -> None:
        """Tell of what the last step made final."""
        for sequence in self.ready:
            self.announce(sequence, now)
        self.ready.clear()

    def announce(self, sequence: Sequence, now: float) -> None:
        """Tell of blocks that are final, as far as they are to be told of now."""
        first = sequence.announced
        end = blocks_to_announce(sequence.computed, sequence.prompt_len, first, self._size)
        count = end - first
        if count > 0:
            sequence.announced = end
            blocks = ZEROS[: 4 * count] if 4 * count <= len(ZEROS) else bytes(4 * count)
            self._net.tell(ev.BlocksReady(self._id, sequence.attempt, first, count, blocks, b""), now)
