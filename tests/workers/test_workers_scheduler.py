"""The worker's scheduler, step by step: what goes in, what comes out, whose blocks are whose."""

from __future__ import annotations

import pytest

from twinpool.cost import StepCost
from twinpool.workers.blocks import BlockPool, IntegrityError
from twinpool.workers.scheduler import Chunk, Load, Mode, Scheduler, Sequence

SIZE = 4
COST = StepCost(c0=0.0, a=1e-3, b=0.0, d0=2e-3, d1=1e-4, d2=0.0)  # a token a millisecond, from two on


def scheduler(blocks: int = 32, chunk_tokens: int = 16, max_batch: int = 8, cost: StepCost = COST) -> Scheduler:
    return Scheduler(BlockPool(blocks, SIZE), cost, chunk_tokens, max_batch)


def prompt(
    attempt: int, length: int, mode: Mode = Mode.PREFILL, *, text: int | None = None, itl_s: float = 1.0,
    rank: int = 0, transfer: bool = False,
) -> Sequence:  # fmt: skip
    """A prompt of its own text; equal ``text`` means equal tokens as far as both go."""
    base = 1000 * (attempt if text is None else text)
    hashes = [base + index for index in range(length // SIZE)]
    return Sequence(attempt, length, hashes, mode, itl_s, rank, transfer)


def run(s: Scheduler, now: float = 0.0) -> list[tuple[int, int, int, bool]]:
    """One step; its chunks as (attempt, start, count, last)."""
    step = s.plan(now)
    if step is None:
        return []
    s.done(step, now)
    s.check_integrity()
    return rows(step.chunks)


def rows(chunks: list[Chunk]) -> list[tuple[int, int, int, bool]]:
    return [(c.sequence.attempt, c.start, c.count, c.last) for c in chunks]


def decoding(s: Scheduler, attempt: int, length: int = 3, *, itl_s: float = 1.0, rank: int = 0) -> Sequence:
    """A sequence that decodes, from a reservation of just the blocks of its KV."""
    blocks = -(-(length - 1) // SIZE)
    assert s.reserve(attempt, [], blocks) == 0
    s.seal_received(attempt, 0, blocks)
    sequence = Sequence(attempt, length, [], Mode.DECODE, itl_s, rank)
    s.start_decode(sequence, 0.0)
    return sequence


def everything_is_free(s: Scheduler) -> bool:
    s.check_integrity()
    return s.pool.free_blocks == s.pool.num_blocks


def test_an_idle_scheduler_has_no_step() -> None:
    s = scheduler()
    assert s.plan(0.0) is None
    assert s.load() == Load(running=0, waiting=0, context=0, free=32, cached=0)


@pytest.mark.parametrize(("chunk_tokens", "max_batch"), [(0, 1), (1, 0)])
def test_limits_of_nothing_are_refused(chunk_tokens: int, max_batch: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        scheduler(chunk_tokens=chunk_tokens, max_batch=max_batch)


def test_a_prompt_goes_chunk_by_chunk_and_is_held_after_its_token() -> None:
    s = scheduler(chunk_tokens=10)
    sequence = prompt(1, 18)
    assert s.add(sequence, 5.0)
    assert s.pool.free_blocks == 32 - 5
    assert run(s) == [(1, 0, 8, False)]  # 10 tokens, down to a block boundary
    assert run(s) == [(1, 8, 10, True)]
    assert (sequence.length, sequence.computed, sequence.added_s) == (19, 18, 5.0)
    assert s.plan(0.0) is None
    assert s.load() == Load(running=0, waiting=0, context=0, free=27, cached=4)
    holding = s.holding(1)
    assert holding is not None
    assert (holding.received, holding.sealed) == (5, 4)
    assert s.release(1)
    assert not s.release(1)
    assert everything_is_free(s)


def test_short_prompts_share_a_step_in_order() -> None:
    s = scheduler(chunk_tokens=16)
    for attempt, length in ((1, 6), (2, 5), (3, 9), (4, 2)):
        assert s.add(prompt(attempt, length), 0.0)
    assert run(s) == [(1, 0, 6, True), (2, 0, 5, True), (3, 0, 4, False)]
    assert run(s) == [(3, 4, 5, True), (4, 0, 2, True)]


def test_batch_prompts_give_way_at_a_chunk_boundary_and_keep_what_is_done() -> None:
    s = scheduler(chunk_tokens=8)
    assert s.add(prompt(1, 20, rank=2), 0.0)
    assert run(s) == [(1, 0, 8, False)]
    assert s.add(prompt(2, 8, rank=1), 0.0)
    assert run(s) == [(2, 0, 8, True)]
    assert run(s) == [(1, 8, 8, False)]


def test_a_cached_prefix_is_not_computed_again_but_the_last_token_is() -> None:
    s = scheduler(chunk_tokens=64)
    s.add(prompt(1, 16, text=7), 0.0)
    run(s)
    longer, same = prompt(2, 19, text=7), prompt(3, 16, text=7)
    assert s.add(longer, 0.0)
    assert s.add(same, 0.0)
    assert (longer.cached, same.cached) == (16, 12)
    assert run(s) == [(2, 16, 3, True), (3, 12, 4, True)]
    assert s.pool.free_blocks == 32 - 5  # the last block of 3 was found to be that of 1
    for attempt in (1, 2, 3):
        s.release(attempt)
    assert everything_is_free(s)


def test_there_is_room_or_there_is_none() -> None:
    s = scheduler(blocks=4)
    assert not s.can_add(prompt(1, 17))
    assert not s.add(prompt(1, 17), 0.0)
    assert not s.add(prompt(2, 16, Mode.LOCAL), 0.0)  # one more for the first output token
    assert s.can_add(prompt(3, 15, Mode.LOCAL))
    assert s.add(prompt(3, 15, Mode.LOCAL), 0.0)
    assert not s.can_add(prompt(4, 1))
    assert s.reserve(5, [], 1) is None
    assert s.sequence(1) is None
    s.check_integrity()


def test_what_is_no_prompt_is_refused() -> None:
    s = scheduler()
    with pytest.raises(ValueError, match="not a prompt"):
        s.add(prompt(1, 8, Mode.DECODE), 0.0)
    with pytest.raises(ValueError, match="not a prompt"):
        s.add(Sequence(1, 8, [1], Mode.LOCAL, 1.0), 0.0)
    with pytest.raises(ValueError, match="is empty"):
        s.add(prompt(1, 0), 0.0)
    s.add(prompt(1, 8), 0.0)
    with pytest.raises(ValueError, match="runs already"):
        s.add(prompt(1, 8), 0.0)
    with pytest.raises(ValueError, match="here already"):
        s.reserve(1, [], 1)


def test_local_goes_on_decoding_and_its_output_is_cached() -> None:
    s = scheduler(chunk_tokens=64)
    sequence = prompt(1, 6, Mode.LOCAL, text=7)
    s.add(sequence, 0.0)
    run(s)
    assert s.load() == Load(running=1, waiting=0, context=7, free=30, cached=1)
    sequence.hashes.append(7001)  # of the worker, as soon as it knows the eighth token
    for length, sealed in ((8, 1), (9, 2)):  # known is not yet computed
        step = s.plan(0.0)
        assert step is not None
        assert s.done(step, 0.0).sampled == [sequence]
        assert (sequence.length, sequence.sealed) == (length, sealed)
    assert s.finish(1)
    assert everything_is_free(s)
    assert s.pool.match([7000, 7001]) == 2


def test_finish_seals_what_the_worker_hashed_late() -> None:
    s = scheduler()
    sequence = decoding(s, 1, length=5)
    run(s)
    sequence.hashes.append(42)
    assert s.finish(1, keep=True)
    assert s.finish(1, keep=True)  # nothing more to do
    assert s.pool.cached_blocks == 1
    assert s.release(1)
    assert not s.finish(1)
    assert everything_is_free(s)


def test_finish_of_a_held_prompt_releases_it() -> None:
    s = scheduler()
    s.add(prompt(1, 5), 0.0)
    run(s)
    assert s.finish(1)
    assert everything_is_free(s)


def test_blocks_are_announced_as_soon_as_they_are_half_of_what_is_left() -> None:
    s = scheduler(chunk_tokens=8)
    s.add(prompt(9, 8, text=7), 0.0)
    run(s)
    sequence = prompt(1, 42, text=7, transfer=True)
    s.add(sequence, 0.0)
    assert s.announce(sequence) is None, "8 tokens are there, 34 are to come"
    seen = []
    while (step := s.plan(0.0)) is not None:
        seen += [(sequence.computed, r.first, r.blocks) for r in s.done(step, 0.0).ready]
        if sequence.computed == 24:
            assert s.announce(sequence) is None, "announced already"
    table = sequence.table  # the last block is half filled
    assert seen == [(24, 0, table[:6]), (40, 6, table[6:10]), (42, 10, table[10:11])]


def test_a_cached_prefix_is_announced_at_once_where_it_is_most_of_the_prompt() -> None:
    s = scheduler(chunk_tokens=8)
    s.add(prompt(9, 8, text=7), 0.0)
    run(s)
    sequence = prompt(1, 14, text=7, transfer=True)
    s.add(sequence, 0.0)
    ready = s.announce(sequence)
    assert ready is not None
    assert (ready.first, ready.blocks) == (0, sequence.table[:2])


def test_nothing_is_announced_where_nothing_moves() -> None:
    s = scheduler(chunk_tokens=8)
    sequence = prompt(1, 8)
    s.add(sequence, 0.0)
    step = s.plan(0.0)
    assert step is not None
    assert s.done(step, 0.0).ready == []


def test_step_seconds_are_summed_by_sequence() -> None:
    s = scheduler(chunk_tokens=8)
    sequence = prompt(1, 16)
    s.add(sequence, 0.0)
    for started, ended in ((1.0, 1.5), (2.0, 2.25)):
        step = s.plan(started)
        assert step is not None
        assert s.done(step, ended).step_s == ended - started
    assert sequence.step_s == 0.75


def test_a_reservation_becomes_a_decoding_sequence() -> None:
    s = scheduler()
    s.add(prompt(9, 8, text=7), 0.0)
    run(s)
    assert s.reserve(1, [7000, 7001, 7002], 5) == 2
    assert s.holding(1) is not None
    assert len(s.targets(1, 2, 2)) == 2
    sequence = Sequence(1, 15, [7000, 7001, 7002], Mode.DECODE, 1.0)
    with pytest.raises(ValueError, match="needs 4 blocks to decode, 2 are here"):
        s.start_decode(sequence, 0.0)
    assert s.seal_received(1, 3, 1) == 2  # out of order: nothing is cached behind a gap
    assert s.pool.cached_blocks == 2
    assert s.seal_received(1, 2, 1) == 4
    assert s.pool.cached_blocks == 3
    s.start_decode(sequence, 0.0)
    step = s.plan(0.0)
    assert step is not None
    assert step.decodes == [sequence]
    s.done(step, 0.0)
    assert (sequence.length, sequence.computed, len(sequence.table)) == (16, 15, 5)
    for _ in range(5):
        run(s)
    assert (sequence.length, len(sequence.table)) == (21, 5)  # its own spare block first
    run(s)
    assert (sequence.length, len(sequence.table)) == (22, 6)


def test_received_blocks_are_never_targets_again() -> None:
    s = scheduler()
    s.reserve(1, [], 4)
    s.seal_received(1, 0, 1)
    s.seal_received(1, 2, 1)
    assert len(s.targets(1, 1, 1)) == 1
    for first, count in ((0, 1), (1, 2), (2, 1), (3, 2), (3, -1), (-1, 1)):
        with pytest.raises(ValueError, match="blocks"):
            s.targets(1, first, count)
    with pytest.raises(ValueError, match="outside"):
        s.seal_received(1, 3, 2)
    for call in (s.targets, s.seal_received):
        with pytest.raises(KeyError):
            call(2, 0, 1)


def test_a_reservation_is_used_up_by_a_prompt_of_its_attempt() -> None:
    s = scheduler(blocks=6)
    s.reserve(1, [7000, 7001], 6)
    s.seal_received(1, 0, 1)
    sequence = prompt(1, 9, Mode.LOCAL, text=7)
    assert s.add(sequence, 0.0)
    assert sequence.cached == 4
    assert len(sequence.table) == 6
    assert s.holding(1) is None
    s.cancel(1)
    assert everything_is_free(s)


def test_a_held_prompt_can_decode_where_it_is() -> None:
    s = scheduler(chunk_tokens=64)
    s.add(prompt(1, 8), 0.0)
    run(s)
    sequence = Sequence(1, 9, [1000, 1001], Mode.DECODE, 1.0)
    s.start_decode(sequence, 0.0)
    run(s)
    assert (sequence.length, sequence.sealed, len(sequence.table)) == (10, 2, 3)


def test_only_decode_sequences_start_decoding() -> None:
    s = scheduler()
    with pytest.raises(KeyError):
        s.start_decode(Sequence(1, 2, [], Mode.DECODE, 1.0), 0.0)
    s.reserve(1, [], 1)
    with pytest.raises(ValueError, match="attempt 1"):
        s.start_decode(Sequence(1, 1, [], Mode.LOCAL, 1.0), 0.0)


def test_a_batch_above_the_limit_takes_turns() -> None:
    s = scheduler(max_batch=2)
    sequences = [decoding(s, attempt) for attempt in (1, 2, 3)]
    for _ in range(3):
        run(s)
    assert [sequence.length for sequence in sequences] == [5, 5, 5]


def test_out_of_blocks_the_youngest_of_the_lowest_class_goes() -> None:
    s = scheduler(blocks=4)
    for attempt, rank in ((1, 0), (2, 1), (3, 1), (4, 0)):
        decoding(s, attempt, length=5, rank=rank)
    step = s.plan(0.0)
    assert step is not None
    assert [sequence.attempt for sequence in step.preempted] == [3, 2]
    assert [sequence.attempt for sequence in step.decodes] == [1, 4]
    s.done(step, 0.0)
    s.check_integrity()


def test_prompts_go_before_older_decodes_of_their_class() -> None:
    s = scheduler(blocks=4)
    decoding(s, 1, length=5)
    s.add(prompt(2, 12), 0.0)
    step = s.plan(0.0)
    assert step is not None
    assert [sequence.attempt for sequence in step.preempted] == [2]
    assert step.chunks == []
    assert s.sequence(2) is None


def test_a_step_may_only_tell_of_a_preemption() -> None:
    s = scheduler(blocks=1)
    decoding(s, 1, length=5)
    step = s.plan(0.0)
    assert step is not None
    assert (len(step.preempted), step.decodes, step.chunks, step.predicted_s) == (1, [], [], 0.0)
    assert s.done(step, 0.0).sampled == []
    assert everything_is_free(s)


def test_one_step_at_a_time() -> None:
    s = scheduler()
    s.add(prompt(1, 5), 0.0)
    step = s.plan(0.0)
    assert step is not None
    with pytest.raises(RuntimeError, match="not done"):
        s.plan(0.0)
    s.done(step, 0.0)
    with pytest.raises(RuntimeError, match="not the step"):
        s.done(step, 0.0)


def test_cancel_in_a_running_step_keeps_the_blocks_until_it_is_done() -> None:
    s = scheduler(blocks=4)
    s.add(prompt(1, 8), 0.0)
    decoding(s, 2)
    step = s.plan(0.0)
    assert step is not None
    assert s.cancel(1)
    assert s.finish(2)
    assert s.pool.free_blocks == 1
    assert not s.cancel(1)
    s.check_integrity()
    outcome = s.done(step, 0.0)
    assert (outcome.progressed, outcome.sampled) == ([], [])
    assert everything_is_free(s)


def test_a_sequence_in_a_running_step_cannot_be_kept() -> None:
    s = scheduler()
    decoding(s, 1)
    s.plan(0.0)
    with pytest.raises(ValueError, match="in the step that runs"):
        s.finish(1, keep=True)


def test_check_integrity_finds_lost_blocks_and_impossible_sequences() -> None:
    s = scheduler()
    sequence = decoding(s, 1)
    s.reserve(2, [], 1)
    sequence.computed = 9
    holding = s.holding(2)
    assert holding is not None
    holding.sealed = 1
    with pytest.raises(IntegrityError, match=r"attempt 1: 9 of 3.*attempt 2: 1 blocks sealed, 0 received"):
        s.check_integrity()
    sequence.table.pop()
    with pytest.raises(IntegrityError, match="1 references, 0 owners"):
        s.check_integrity()
