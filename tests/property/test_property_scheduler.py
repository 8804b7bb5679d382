"""The scheduler under arbitrary use, with a model of the KV: nothing is computed from, or over, wrong content."""

from __future__ import annotations

from array import array
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from twinpool.blockhash import block_hashes
from twinpool.cost import ITL_SHARE, StepCost
from twinpool.workers.blocks import BlockPool
from twinpool.workers.scheduler import Mode, Outcome, Ready, Scheduler, Sequence, Step

BLOCKS, SIZE, CHUNK_TOKENS, MAX_BATCH = 14, 3, 9, 3
COST = StepCost(c0=1e-3, a=1e-3, b=3e-4, d0=4e-3, d1=2e-4, d2=1e-5)
KEY = bytes(32)
PARENTS: dict[int, int] = {}  # block hash -> hash of the block before, of all texts seen
LENGTHS = st.integers(1, 20)
TEXTS = st.integers(0, 2)
PICK = st.integers(0, 1 << 16)
ITL_S = st.sampled_from([0.004, 0.012, 0.03])

Text = tuple[int, ...]


def text_of(number: int, length: int) -> Text:
    """One of a few texts; they share their first tokens."""
    return tuple(min(position // 4, number) for position in range(length))


def next_token(text: Text) -> int:
    """What greedy decoding would draw: a function of all tokens before."""
    return sum(text) % 3


def hashes_of(text: Text) -> list[int]:
    hashes = block_hashes(KEY, array("I", text), SIZE)
    PARENTS.update(pairwise(reversed(hashes)))
    return hashes


def expected_s(step: Step) -> float:
    """Seconds of a step in which each prompt takes as many times as long as predicted as in its last one."""
    context = sum(sequence.length for sequence in step.decodes)
    seconds = before = step.alone_s
    for i, chunk in enumerate(step.chunks):
        after = COST.step([(c.count, c.start) for c in step.chunks[: i + 1]], len(step.decodes), context)
        seconds += chunk.sequence.pace * (after - before)
        before = after
    return seconds


class KvModel:
    """What is written at each position of each block: the text up to there, as KV depends on all of it."""

    def __init__(self) -> None:
        self.content: list[list[Text | None]] = [[None] * SIZE for _ in range(BLOCKS)]

    def write(self, table: list[int], text: Text, start: int, end: int) -> None:
        for position in range(start, end):
            self.content[table[position // SIZE]][position % SIZE] = text[: position + 1]

    def holds(self, table: list[int], text: Text, end: int, start: int = 0) -> bool:
        return all(
            self.content[table[position // SIZE]][position % SIZE] == text[: position + 1]
            for position in range(start, end)
        )


class SchedulerMachine(RuleBasedStateMachine):
    """A worker and its router at once; ``texts`` has every attempt that the scheduler must know."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, SIZE)
        self.scheduler = Scheduler(self.pool, COST, CHUNK_TOKENS, MAX_BATCH)
        self.kv = KvModel()
        self.texts: dict[int, Text] = {}
        self.computed: dict[int, int] = {}  # prompt tokens computed or cached so far
        self.announced: dict[int, int] = {}
        self.step: Step | None = None
        self.attempt = 0
        self.now = 0.0

    def new(self, number: int, length: int) -> tuple[int, Text]:
        self.attempt += 1
        return self.attempt, text_of(number, length)

    def pick(self, attempts: list[int], pick: int) -> int | None:
        return attempts[pick % len(attempts)] if attempts else None

    def forget(self, attempt: int) -> None:
        for table in (self.texts, self.computed, self.announced):
            table.pop(attempt, None)

    def announce(self, ready: Ready) -> None:
        """Announced blocks follow each other, and are final."""
        attempt, end = ready.sequence.attempt, ready.first + len(ready.blocks)
        assert ready.first == self.announced[attempt]
        self.announced[attempt] = end
        text = self.texts[attempt]
        table = [0] * ready.first + ready.blocks
        assert self.kv.holds(table, text, min(end * SIZE, ready.sequence.prompt_len), ready.first * SIZE)

    # --- sequences come and go ------------------------------------------------------------------------------------

    def add_prompt(self, attempt: int, text: Text, mode: Mode, itl_s: float, rank: int) -> None:
        sequence = Sequence(attempt, len(text), hashes_of(text), mode, itl_s, rank, mode is Mode.PREFILL)
        could = self.scheduler.can_add(sequence)
        added = self.scheduler.add(sequence, self.now)
        assert added or not could
        if not added:
            self.forget(attempt)
            return
        self.texts[attempt] = text
        self.computed[attempt], self.announced[attempt] = sequence.cached, 0
        assert sequence.cached < len(text)
        assert self.kv.holds(sequence.table, text, sequence.cached)
        ready = self.scheduler.announce(sequence)
        if ready is not None:
            self.announce(ready)

    @rule(number=TEXTS, length=LENGTHS, local=st.booleans(), itl_s=ITL_S, rank=TEXTS)
    def add(self, number: int, length: int, local: bool, itl_s: float, rank: int) -> None:
        attempt, text = self.new(number, length)
        self.add_prompt(attempt, text, Mode.LOCAL if local else Mode.PREFILL, itl_s, rank)

    @rule(number=TEXTS, length=LENGTHS, extra=st.integers(0, 2))
    def reserve(self, number: int, length: int, extra: int) -> None:
        attempt, text = self.new(number, length)
        held = self.scheduler.reserve(attempt, hashes_of(text), -(-length // SIZE) + extra)
        if held is not None:
            self.texts[attempt] = text
            holding = self.scheduler.holding(attempt)
            assert holding is not None
            assert self.kv.holds(holding.table, text, held * SIZE)

    def reserved(self) -> list[int]:
        """Attempts whose prompt is not all here yet."""
        found = []
        for attempt, text in self.texts.items():
            holding = self.scheduler.holding(attempt)
            if holding is not None and attempt not in self.computed and holding.received * SIZE < len(text):
                found.append(attempt)
        return found

    @rule(pick=PICK, skip=st.integers(0, 2), count=st.integers(1, 4))
    def receive(self, pick: int, skip: int, count: int) -> None:
        attempt = self.pick(self.reserved(), pick)
        if attempt is None:
            return
        text, holding = self.texts[attempt], self.scheduler.holding(attempt)
        assert holding is not None
        first = holding.received + skip
        count = min(count, -(-len(text) // SIZE) - first)
        if count < 1 or not holding.early.isdisjoint(range(first, first + count)):
            return
        targets = self.scheduler.targets(attempt, first, count)
        start, end = first * SIZE, min((first + count) * SIZE, len(text))
        self.check_private(targets)
        self.kv.write([0] * first + targets, text, start, end)
        self.scheduler.seal_received(attempt, first, count)

    @rule(pick=PICK, itl_s=ITL_S, rank=TEXTS)
    def start_decode(self, pick: int, itl_s: float, rank: int) -> None:
        """Of a reservation that is complete, or a prompt that was computed here."""
        attempts = [a for a in self.texts if self.scheduler.holding(a) is not None and a not in self.reserved()]
        attempt = self.pick(attempts, pick)
        if attempt is None:
            return
        text = self.texts[attempt]
        if attempt not in self.computed:  # the token that was drawn elsewhere
            text += (next_token(text),)
        self.forget(attempt)
        self.texts[attempt] = text
        sequence = Sequence(attempt, len(text), hashes_of(text), Mode.DECODE, itl_s, rank)
        self.scheduler.start_decode(sequence, self.now)
        assert self.kv.holds(sequence.table, text, len(text) - 1)

    @rule(pick=PICK)
    def start_decode_too_early(self, pick: int) -> None:
        attempt = self.pick(self.reserved(), pick)
        if attempt is not None:
            sequence = Sequence(attempt, len(self.texts[attempt]) + 1, [], Mode.DECODE, 0.02)
            with pytest.raises(ValueError, match="to decode"):
                self.scheduler.start_decode(sequence, self.now)

    @rule(pick=PICK, local=st.booleans())
    def compute_what_was_reserved(self, pick: int, local: bool) -> None:
        attempt = self.pick(self.reserved(), pick)
        if attempt is not None:
            self.add_prompt(attempt, self.texts[attempt], Mode.LOCAL if local else Mode.PREFILL, 0.02, 0)

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        attempt = self.pick(list(self.texts), pick)
        if attempt is not None:
            assert self.scheduler.cancel(attempt)
            assert not self.scheduler.cancel(attempt)
            self.forget(attempt)

    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        attempt = self.pick([a for a in self.texts if self.scheduler.holding(a) is not None], pick)
        if attempt is not None:
            assert self.scheduler.release(attempt)
            self.forget(attempt)

    @rule(pick=PICK, keep=st.booleans())
    def finish(self, pick: int, keep: bool) -> None:
        sequences = [self.scheduler.sequence(attempt) for attempt in self.texts]
        running = [s.attempt for s in sequences if s is not None and s.computed >= s.prompt_len - 1 + (s.mode < 2)]
        attempt = self.pick(running, pick)
        if attempt is None:
            return
        sequence = self.scheduler.sequence(attempt)
        assert sequence is not None
        keep = keep and not sequence.in_step
        assert self.scheduler.finish(attempt, keep)
        if keep:
            self.computed[attempt] = len(self.texts[attempt])
        else:
            self.forget(attempt)

    # --- steps ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.step is None)
    @rule()
    def plan(self) -> None:
        busy = bool(self.scheduler.load().running or self.scheduler.load().waiting)
        self.step = step = self.scheduler.plan(self.now)
        assert (step is not None) == busy
        if step is None:
            return
        for sequence in step.preempted:
            self.forget(sequence.attempt)
        assert len(step.decodes) <= MAX_BATCH
        load = self.scheduler.load()
        assert len(step.decodes) == min(load.running, MAX_BATCH) or step.preempted
        assert bool(step.chunks) == bool(load.waiting)
        self.check_chunks(step)

    def check_chunks(self, step: Step) -> None:
        tokens = 0
        for chunk in step.chunks:
            attempt = chunk.sequence.attempt
            assert chunk.start == self.computed[attempt]
            end = chunk.start + chunk.count
            assert chunk.last == (end == len(self.texts[attempt]))
            assert chunk.last or end % SIZE == 0
            tokens += chunk.count
        floor = len(step.chunks) == 1 and tokens <= SIZE
        assert tokens <= CHUNK_TOKENS
        if step.decodes and step.chunks and not floor:
            assert expected_s(step) <= ITL_SHARE * min(s.itl_s for s in step.decodes) + 1e-12
        keys = [(c.sequence.rank == 2, c.sequence.attempt) for c in step.chunks]  # as the router committed them
        assert all(before < after for before, after in pairwise(keys))
        assert all(chunk.last for chunk in step.chunks[:-1])

    @precondition(lambda self: self.step is not None)
    @rule(seconds=st.floats(0.0, 1.0))
    def done(self, seconds: float) -> None:
        step = self.step
        assert step is not None
        self.now += seconds
        self.compute(step)
        self.step = None
        self.draw(step)
        outcome = self.scheduler.done(step, self.now)
        assert outcome.step_s >= 0.0
        self.check_outcome(step, outcome)

    @precondition(lambda self: self.step is None)
    @rule(count=st.integers(2, 6))
    def run(self, count: int) -> None:
        for _ in range(count):
            self.plan()
            if self.step is not None:
                self.done(0.01)
                self.scheduler.check_integrity()

    def compute(self, step: Step) -> None:
        """As an engine does, as late as it may: reads what is before, writes its own, into blocks of nobody else."""
        for sequence, start, count in [
            *((chunk.sequence, chunk.start, chunk.count) for chunk in step.chunks),
            *((sequence, sequence.length - 1, 1) for sequence in step.decodes),
        ]:
            if sequence.cancelled:
                self.check_private(sequence.table[start // SIZE : -(-(start + count) // SIZE)])
                continue
            text = self.texts[sequence.attempt]
            assert sequence.computed == start
            assert self.kv.holds(sequence.table, text, start)
            self.check_private(sequence.table[start // SIZE : -(-(start + count) // SIZE)])
            self.kv.write(sequence.table, text, start, start + count)
            if sequence.attempt in self.computed and sequence.computed < sequence.prompt_len:
                self.computed[sequence.attempt] += count

    def draw(self, step: Step) -> None:
        """The worker's part: new tokens, and the hashes of what they fill."""
        for sequence in [*(chunk.sequence for chunk in step.chunks if chunk.last), *step.decodes]:
            if not sequence.cancelled:
                text = self.texts[sequence.attempt]
                text += (next_token(text),)
                self.texts[sequence.attempt] = text
                sequence.hashes.extend(hashes_of(text)[len(sequence.hashes) :])

    def check_outcome(self, step: Step, outcome: Outcome) -> None:
        drew = [*(chunk.sequence for chunk in step.chunks if chunk.last), *step.decodes]
        assert outcome.sampled == [sequence for sequence in drew if not sequence.cancelled]
        for ready in outcome.ready:
            self.announce(ready)
        for sequence in outcome.sampled:
            assert sequence.length == len(self.texts[sequence.attempt]) == sequence.computed + 1
            if sequence.mode is Mode.PREFILL:
                holding = self.scheduler.holding(sequence.attempt)
                assert holding is not None
                assert self.announced[sequence.attempt] == holding.received == len(holding.table) or (
                    holding.received < len(holding.table)  # what a reservation had in excess
                )

    # --- always ---------------------------------------------------------------------------------------------------

    def check_private(self, blocks: list[int]) -> None:
        """Only one owner: what is written now is nobody else's prefix."""
        tables = [s.table for s in map(self.scheduler.sequence, range(1, self.attempt + 1)) if s is not None]
        tables += [h.table for h in map(self.scheduler.holding, range(1, self.attempt + 1)) if h is not None]
        for block in blocks:
            assert sum(table.count(block) for table in tables) == 1

    @invariant()
    def books_are_right(self) -> None:
        self.scheduler.check_integrity()

    @invariant()
    def cached_is_closed_under_prefixes(self) -> None:
        cached = set(self.pool.cached_hashes())
        assert all(PARENTS[value] in cached for value in cached if value in PARENTS)

    @invariant()
    def every_attempt_is_known(self) -> None:
        for attempt in self.texts:
            sequence = self.scheduler.sequence(attempt)
            assert (sequence is None) != (self.scheduler.holding(attempt) is None)

    def teardown(self) -> None:
        for attempt in list(self.texts):
            assert self.scheduler.cancel(attempt)
        if self.step is not None:
            self.scheduler.done(self.step, self.now)
        assert self.scheduler.plan(self.now) is None
        self.pool.check_integrity([])
        assert self.pool.free_blocks == BLOCKS


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
