"""What goes into the next step of a worker, and whose blocks are whose. Sans-IO: time is an argument.

The caller's loop is ``plan`` -> compute -> ``done``, one step at a time; everything else may be called at any moment,
also while a step runs. The life of an attempt here::

    add -----> waiting --chunks--> (PREFILL) held --release--> gone
                  `------------------> (LOCAL) running --finish--> gone, or held
    reserve -> held --seal_received, start_decode--> (DECODE) running --finish--> gone, or held
    any: cancel; waiting and running: preempted when decoding needs a block and none is left

A step is: all decoding sequences (at most ``max_batch``, in turns above that), then chunks of prompts in the order in
which the router committed them, batch-class prompts after all others; ``chunks.py`` says how many tokens of them.

All blocks that a prompt needs are taken when it is added, so what is in can go on: it never waits for room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from twinpool.classes import BATCH_RANK
from twinpool.cost import ITL_SHARE, Cost
from twinpool.workers.blocks import BlockPool, IntegrityError
from twinpool.workers.chunks import blocks_to_announce, plan_chunks, put_in_order
from twinpool.workers.pace import mean_pace, pace_seen
from twinpool.workers.preemption import first_to_go, to_warn
from twinpool.workers.sequence import Chunk, Holding, Load, Mode, Outcome, Ready, Sequence, Step

__all__ = ["Chunk", "Holding", "Load", "Mode", "Outcome", "Ready", "Scheduler", "Sequence", "Step"]


class Scheduler:
    """Plans the steps of one worker over its pool. ``cost`` may be replaced between steps, by a better fit."""

    __slots__ = (
        "_held", "_leaving", "_order", "_queues", "_running", "_step", "chunk_tokens", "cost", "max_batch", "pool",
    )  # fmt: skip

    def __init__(self, pool: BlockPool, cost: Cost, chunk_tokens: int, max_batch: int) -> None:
        if chunk_tokens < 1 or max_batch < 1:
            raise ValueError(f"chunk_tokens and max_batch must be at least 1, not {chunk_tokens} and {max_batch}")
        self.pool = pool
        self.cost = cost
        self.chunk_tokens = chunk_tokens
        self.max_batch = max_batch
        self._queues: tuple[dict[int, Sequence], dict[int, Sequence]] = ({}, {})  # prompts; the second: batch class
        self._running: dict[int, Sequence] = {}
        self._held: dict[int, Holding] = {}
        self._leaving: dict[int, Sequence] = {}  # cancelled, but in the step that runs: their blocks are still in use
        self._step: Step | None = None
        self._order = 0

    # --- sequences come -------------------------------------------------------------------------------------------

    def can_add(self, sequence: Sequence) -> bool:
        """Whether ``add`` will find room now. Changes nothing."""
        return self.pool.can_book(self._reusable(sequence), self._blocks_for(sequence))

    def add(self, sequence: Sequence, now: float) -> bool:
        """Takes in a PREFILL or LOCAL sequence and all blocks its prompt needs; False: no room, nothing was taken.

        A reservation of the same attempt is used up, whatever the answer: what was received for it is found as cached
        prefix, and as many blocks as it had are kept if they can be. Call ``announce`` next where it transfers. Raises
        ValueError on a sequence that is no new prompt, has not the hashes of just its full blocks, or runs here.
        """
        size = self.pool.block_size
        if sequence.mode is Mode.DECODE or sequence.computed or len(sequence.hashes) != sequence.length // size:
            raise ValueError(f"attempt {sequence.attempt} is not a prompt with the hashes of its full blocks")
        if sequence.length < 1 or self.sequence(sequence.attempt) is not None:
            raise ValueError(f"attempt {sequence.attempt} is empty or runs already")
        total = self._blocks_for(sequence)
        reserved = self._held.pop(sequence.attempt, None)
        if reserved is not None:
            self.pool.release(reserved.table, reserved.keep)
            if self.pool.can_book(self._reusable(sequence), len(reserved.table)):
                total = max(total, len(reserved.table))
        if not self.pool.can_book(self._reusable(sequence), total):
            return False
        sequence.table, sequence.sealed = self.pool.book(self._reusable(sequence), total)
        sequence.computed = sequence.cached = sequence.sealed * size
        self._join(sequence, now)
        put_in_order(self._queues[sequence.rank >= BATCH_RANK], sequence.attempt, sequence)
        return True

    def reserve(self, attempt: int, hashes: Seq[int], blocks: int, keep: int = 0) -> int | None:
        """Books ``blocks`` blocks for a sequence to come whose full prompt blocks have ``hashes``.

        Returns how many leading ones are here already, None where there is no room. Raises ValueError if the attempt is
        known here. ``keep``: see Sequence.
        """
        if attempt in self._held or self.sequence(attempt) is not None:
            raise ValueError(f"attempt {attempt} is here already")
        if not self.pool.can_book(hashes, blocks):
            return None
        table, held = self.pool.book(hashes, blocks)
        self._held[attempt] = Holding(attempt, table, list(hashes[:blocks]), held, held, keep)
        return held

    def targets(self, attempt: int, first: int, count: int) -> list[int]:
        """Pool indices to receive blocks ``first``.. of a reservation into; the caller writes to no others.

        Raises KeyError without a reservation, ValueError where the range is not inside it or has blocks that are
        received: these may be shared.
        """
        holding = self._held[attempt]
        end = first + count
        if not holding.received <= first <= end <= len(holding.table):
            raise ValueError(f"blocks {first} to {end} are not among {holding.received} to {len(holding.table)}")
        if not holding.early.isdisjoint(range(first, end)):
            raise ValueError(f"some of blocks {first} to {end} are received already")
        return holding.table[first:end]

    def seal_received(self, attempt: int, first: int, count: int) -> int:
        """Blocks ``first``.. were received and verified: full ones enter the prefix cache, first to last.

        Returns how many leading blocks are received now. Raises KeyError without a reservation, ValueError outside it.
        """
        holding = self._held[attempt]
        if first < 0 or count < 0 or first + count > len(holding.table):
            raise ValueError(f"blocks {first} to {first + count} are outside of {len(holding.table)} reserved ones")
        holding.early.update(range(max(first, holding.received), first + count))
        while holding.received in holding.early:
            holding.early.remove(holding.received)
            holding.received += 1
        holding.sealed = self._seal(holding.table, holding.hashes, holding.sealed, holding.received)
        return holding.received

    def start_decode(self, sequence: Sequence, now: float) -> None:
        """Turns what is held for the attempt into a running DECODE sequence.

        Raises KeyError where nothing is held, ValueError where KV of a token before the last is missing: nothing is
        ever decoded from blocks that were not computed here or verified.
        """
        holding = self._held[sequence.attempt]
        needed = -(-(sequence.length - 1) // self.pool.block_size)
        if sequence.mode is not Mode.DECODE or holding.received < needed:
            raise ValueError(f"attempt {sequence.attempt} needs {needed} blocks to decode, {holding.received} are here")
        del self._held[sequence.attempt]
        sequence.table = holding.table
        sequence.sealed = holding.sealed
        sequence.computed = sequence.length - 1
        self._join(sequence, now)
        self._running[sequence.attempt] = sequence

    # --- steps ----------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step | None:
        """The next step; None where there is nothing to do. Raises RuntimeError while a step is not done."""
        if self._step is not None:
            raise RuntimeError("the step before is not done")
        decodes = self._next_decodes()
        preempted = self._grow(decodes)
        context = sum([sequence.length for sequence in decodes])
        chunks = self._chunks(decodes, context)
        if not (decodes or chunks or preempted):
            return None
        alone_s = self.cost.decode(len(decodes), context) if decodes else 0.0
        predicted_s, pace = alone_s, 1.0
        if chunks:
            predicted_s = self.cost.step([(c.count, c.start) for c in chunks], len(decodes), context)
            pace = mean_pace([(c.count, c.sequence.pace) for c in chunks])
        for sequence in (*decodes, *[chunk.sequence for chunk in chunks]):
            sequence.in_step = True
        self._step = Step(chunks, decodes, preempted, self._warned(), predicted_s, alone_s, pace, now)
        return self._step

    def done(self, step: Step, now: float) -> Outcome:
        """The step was computed: KV of its tokens is in the pool, and who was to draw a token has drawn it.

        Call ``finish`` next for those whose token ended them. Raises RuntimeError if it is not the planned step.
        """
        self._end(step)
        step_s = now - step.started_s
        pace = pace_seen(step_s, step.predicted_s, step.alone_s, step.pace)
        outcome = Outcome([], [], [], step_s, news=pace > 0.0)
        for chunk in step.chunks:
            if not chunk.sequence.cancelled:
                chunk.sequence.pace = pace or chunk.sequence.pace
                self._advance_prompt(chunk, outcome)
        block_size = self.pool.block_size
        for sequence in step.decodes:
            if not sequence.cancelled:
                sequence.step_s += outcome.step_s
                sequence.computed = sequence.length
                sequence.length += 1
                if sequence.computed // block_size > sequence.sealed:
                    self._seal_computed(sequence)
                outcome.sampled.append(sequence)
        return outcome

    def announce(self, sequence: Sequence) -> Ready | None:
        """Final blocks of a transferring sequence that are to be announced now; None where there are none."""
        if not sequence.transfer:
            return None
        first = sequence.announced
        count = blocks_to_announce(sequence.computed, sequence.prompt_len, first, self.pool.block_size)
        if count <= first:
            return None
        sequence.announced = count
        return Ready(sequence, first, sequence.table[first:count])

    # --- sequences go ---------------------------------------------------------------------------------------------

    def finish(self, attempt: int, keep: bool = False) -> bool:
        """The sequence is over; ``keep``: its blocks are held until ``release``. False where it does not run here.

        Raises ValueError to keep a sequence that is in the step that runs: its last block is not final.
        """
        sequence = self._running.get(attempt)
        if sequence is None:
            return attempt in self._held if keep else self.release(attempt)
        if sequence.in_step and keep:
            raise ValueError(f"attempt {attempt} is in the step that runs")
        del self._running[attempt]
        self._seal_computed(sequence)
        if keep:
            self._hold(sequence)
        else:
            self._drop(sequence)
        return True

    def release(self, attempt: int) -> bool:
        """Frees what is held for an attempt, reserved or computed; False where nothing is.

        Blocks of a reservation are free at once: call it only when nothing writes to them any more.
        """
        holding = self._held.pop(attempt, None)
        if holding is None:
            return False
        self.pool.release(holding.table, holding.keep)
        return True

    def cancel(self, attempt: int) -> bool:
        """Forgets the attempt, whatever it is here; False where it is unknown.

        Blocks of a sequence in the step that runs are freed when that is done.
        """
        if self.release(attempt):
            return True
        for place in (*self._queues, self._running):
            sequence = place.pop(attempt, None)
            if sequence is not None:
                self._drop(sequence)
                return True
        return False

    # --- questions ------------------------------------------------------------------------------------------------

    def sequence(self, attempt: int) -> Sequence | None:
        """The waiting or running sequence of an attempt, or a cancelled one that is still in the step that runs."""
        for place in (*self._queues, self._running, self._leaving):
            sequence = place.get(attempt)
            if sequence is not None:
                return sequence
        return None

    def holding(self, attempt: int) -> Holding | None:
        """What is held for an attempt that is not in steps. Borrowed: not to be changed."""
        return self._held.get(attempt)

    def load(self) -> Load:
        """How much is here now."""
        context = sum([sequence.length for sequence in self._running.values()])
        waiting, pool = sum(map(len, self._queues)), self.pool
        return Load(len(self._running), waiting, context, pool.free_blocks, pool.cached_blocks)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every block is accounted for and every sequence has the blocks of its KV."""
        sequences = [s for place in (*self._queues, self._running, self._leaving) for s in place.values()]
        self.pool.check_integrity([s.table for s in sequences] + [h.table for h in self._held.values()])
        size = self.pool.block_size
        faults = [
            f"attempt {s.attempt}: {s.computed} of {s.length} tokens computed, {s.sealed} of {len(s.table)} sealed"
            for s in sequences
            if s.computed >= s.length or s.computed > len(s.table) * size or s.sealed * size > s.computed
        ]
        faults += [
            f"attempt {h.attempt}: {h.sealed} blocks sealed, {h.received} received of {len(h.table)}"
            for h in self._held.values()
            if not h.sealed <= h.received <= len(h.table)
        ]
        if self._leaving and self._step is None:
            faults.append(f"{len(self._leaving)} cancelled attempts hold blocks, and no step runs")
        if faults:
            raise IntegrityError(faults)

    # --- parts ----------------------------------------------------------------------------------------------------

    def _reusable(self, sequence: Sequence) -> Seq[int]:
        """Hashes of blocks that may come from the cache: the last token must be computed, or none could be drawn."""
        return sequence.hashes[: (sequence.length - 1) // self.pool.block_size]

    def _blocks_for(self, sequence: Sequence) -> int:
        tokens = sequence.length + (sequence.mode is Mode.LOCAL)
        return -(-tokens // self.pool.block_size)

    def _join(self, sequence: Sequence, now: float) -> None:
        sequence.order = self._order
        sequence.added_s = now
        self._order += 1

    def _next_decodes(self) -> list[Sequence]:
        if len(self._running) <= self.max_batch:
            return list(self._running.values())
        decodes = list(self._running.values())[: self.max_batch]
        for sequence in decodes:  # to the end: they are the last to have their turn again
            del self._running[sequence.attempt]
            self._running[sequence.attempt] = sequence
        return decodes

    def _grow(self, decodes: list[Sequence]) -> list[Sequence]:
        """Gives each of ``decodes`` the block of its next position; who had to go for that, off ``decodes`` too."""
        size = self.pool.block_size
        short = [sequence for sequence in decodes if len(sequence.table) * size < sequence.length]
        preempted: list[Sequence] = []
        while not self.pool.can_allocate(len(short)):
            victim = self._victim()
            preempted.append(victim)
            if victim in decodes:
                decodes.remove(victim)
            if victim in short:
                short.remove(victim)
        for sequence in short:
            sequence.table += self.pool.allocate(1)
        return preempted

    def _warned(self) -> list[Sequence]:
        running, free = list(self._running.values()), self.pool.free_blocks
        return to_warn(running, [len(s.table) for s in running], free) if free < len(running) else []

    def _chunks(self, decodes: list[Sequence], context: int) -> list[Chunk]:
        """Chunks of the waiting prompts beside ``decodes``, which have ``context`` tokens together."""
        prompts = [*self._queues[0].values(), *self._queues[1].values()]
        if not prompts:
            return []
        limit_s = ITL_SHARE * min([sequence.itl_s for sequence in decodes], default=math.inf)
        size, batch = self.pool.block_size, len(decodes)
        counts = plan_chunks(prompts, limit_s, batch, context, self.cost, self.chunk_tokens, size)
        planned = zip(prompts, counts, strict=False)  # the rest has to wait
        return [Chunk(s, s.computed, count, s.computed + count == s.prompt_len) for s, count in planned]

    def _victim(self) -> Sequence:
        """Takes out the youngest sequence of the lowest class and frees its blocks."""
        worst = first_to_go([s for place in (*self._queues, self._running) for s in place.values()])
        self.cancel(worst.attempt)
        return worst

    def _end(self, step: Step) -> None:
        if step is not self._step:
            raise RuntimeError("this is not the step that runs")
        self._step = None
        for sequence in (*step.decodes, *[chunk.sequence for chunk in step.chunks]):
            sequence.in_step = False
        for sequence in self._leaving.values():
            self.pool.release(sequence.table, sequence.keep)
        self._leaving = {}

    def _advance_prompt(self, chunk: Chunk, outcome: Outcome) -> None:
        sequence = chunk.sequence
        sequence.step_s += outcome.step_s
        sequence.computed += chunk.count
        self._seal_computed(sequence)
        outcome.progressed.append(sequence)
        ready = self.announce(sequence)
        if ready is not None:
            outcome.ready.append(ready)
        if not chunk.last:
            return
        sequence.length += 1
        outcome.sampled.append(sequence)
        del self._queues[sequence.rank >= BATCH_RANK][sequence.attempt]
        if sequence.mode is Mode.LOCAL:
            self._running[sequence.attempt] = sequence
        else:
            self._hold(sequence)

    def _hold(self, sequence: Sequence) -> None:
        received = -(-sequence.computed // self.pool.block_size)
        held = Holding(sequence.attempt, sequence.table, sequence.hashes, received, sequence.sealed, sequence.keep)
        self._held[sequence.attempt] = held

    def _drop(self, sequence: Sequence) -> None:
        sequence.cancelled = True
        if sequence.in_step:
            self._leaving[sequence.attempt] = sequence
        else:
            self.pool.release(sequence.table, sequence.keep)

    def _seal_computed(self, sequence: Sequence) -> None:
        full = sequence.computed // self.pool.block_size
        sequence.sealed = self._seal(sequence.table, sequence.hashes, sequence.sealed, full)

    def _seal(self, table: list[int], hashes: list[int], first: int, end: int) -> int:
        """Seals blocks ``first`` to ``end - 1`` whose hashes are known; returns how many leading ones are sealed."""
        end = min(end, len(hashes))
        for index in range(first, end):
            table[index] = self.pool.seal(table[index], hashes[index])
        return max(first, end)
