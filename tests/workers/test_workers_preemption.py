"""Of whom the router hears before KV memory runs out, and who goes when it has."""

from __future__ import annotations

import pytest

from twinpool.cost import StepCost
from twinpool.workers.blocks import BlockPool
from twinpool.workers.preemption import first_to_go, to_warn
from twinpool.workers.scheduler import Mode, Scheduler, Sequence

COST = StepCost(c0=0.001, a=0.001, b=0.0, d0=0.001, d1=0.001, d2=0.0)
SIZE = 4


def running(*places: tuple[int, int]) -> list[Sequence]:
    """Sequences by (class, order)."""
    found = []
    for rank, order in places:
        sequence = Sequence(10 * rank + order, 8, [], Mode.LOCAL, 1.0, rank)
        sequence.order = order
        found.append(sequence)
    return found


def test_the_youngest_of_the_lowest_class_goes_first() -> None:
    sequences = running((0, 1), (2, 2), (2, 3), (1, 9))
    assert first_to_go(sequences) is sequences[2]
    with pytest.raises(ValueError, match="empty"):
        first_to_go([])


def test_as_many_are_warned_as_leave_a_block_each_and_each_once() -> None:
    sequences = running((0, 1), (0, 2), (1, 3), (0, 4))
    blocks = [5, 2, 1, 2]
    assert to_warn(sequences, blocks, 4) == []
    assert to_warn(sequences, blocks, 3) == [sequences[2]]
    assert to_warn(sequences, blocks, 3) == [], "its block is counted"
    assert to_warn(sequences, blocks, 0) == [sequences[3], sequences[1]]
    assert to_warn(sequences, [0, 0, 0, 0], 0) == [sequences[0]]
    assert to_warn(sequences, [0, 0, 0, 0], 0) == [], "there is nobody else"


def test_a_plan_warns_before_it_preempts() -> None:
    scheduler = Scheduler(BlockPool(12, SIZE), COST, 64, 8)
    for attempt in range(3):
        scheduler.add(Sequence(attempt, 7, [100 * attempt], Mode.LOCAL, 1.0), 0.0)
    warned: dict[int, int] = {}  # attempt -> step
    preempted: dict[int, int] = {}
    for number in range(40):
        step = scheduler.plan(float(number))
        assert step is not None
        free = scheduler.pool.free_blocks
        assert not step.warned or free < scheduler.load().running
        for sequence in step.decodes:
            if len(sequence.hashes) < sequence.length // SIZE:
                sequence.hashes.append(1000 * sequence.attempt + sequence.length)
        warned |= {sequence.attempt: number for sequence in step.warned}
        preempted |= {sequence.attempt: number for sequence in step.preempted}
        scheduler.done(step, number + 0.5)
        scheduler.check_integrity()
        if len(preempted) == 2:
            break
    assert list(preempted) == [2, 1]
    assert all(preempted[attempt] - warned[attempt] >= SIZE for attempt in preempted)
