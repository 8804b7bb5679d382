"""Closed form against adding step times one after another, exactly, in fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from tests.router.fake_worker import request_of
from tests.sim.test_sim_worker import GRID, SMALL

from twinpool.cost import LLAMA_70B_H100_TP4, Cost
from twinpool.sim.decode import Batch
from twinpool.sim.gaps import Runs
from twinpool.sim.sequence import HELD, NEVER, Sequence

SIZE = 4
EXACT_S = 1e-9
COSTS: list[Cost] = [SMALL, LLAMA_70B_H100_TP4, GRID]


def sequence_of(number: int, length: int, left: int, blocks: int = 0) -> Sequence:
    sequence = Sequence(number, request_of(number), length, HELD)
    sequence.left = left
    sequence.turn = number
    sequence.blocks = blocks or -(-length // SIZE)
    return sequence


class Slow:
    """What the batch must be: boundaries as fractions, a step at a time."""

    def __init__(self, cost: Cost, start: float) -> None:
        self.cost = cost
        self.time = Fraction(start)
        self.lengths: dict[int, int] = {}

    def step_s(self) -> float:
        return self.cost.decode(len(self.lengths), sum(self.lengths.values()))

    def step(self) -> None:
        self.time += Fraction(self.step_s())
        for number in self.lengths:
            self.lengths[number] += 1


@pytest.mark.parametrize("cost", COSTS)
def test_boundaries_over_thousands_of_steps(cost: Cost) -> None:
    rng = random.Random(3)
    batch, slow = Batch(cost, Runs(), SIZE), Slow(cost, 3000.123)
    batch.begin(3000.123)
    members: list[Sequence] = []
    for number in range(150):
        if members and rng.random() < 0.4:
            gone = members.pop(rng.randrange(len(members)))
            batch.leave(gone, HELD)
            del slow.lengths[gone.attempt]
        member = sequence_of(number, rng.randint(1, 300), NEVER // 2)
        members.append(member)
        batch.join(member)
        slow.lengths[number] = member.length
        steps = rng.choice([1, 2, 7, 60])
        end = batch.end_of(steps)
        batch.advance(steps)
        for _ in range(steps):
            slow.step()
        assert batch.start == end
        assert abs(Fraction(batch.start) - slow.time) < 1e-11
        assert batch.context == sum(slow.lengths.values())
        assert all(batch.length(member) == slow.lengths[member.attempt] for member in members)
    assert batch.step > 2000


@pytest.mark.parametrize("cost", COSTS)
def test_the_first_boundary_at_or_after_a_moment(cost: Cost) -> None:
    rng = random.Random(5)
    for number in range(60):
        batch, slow = Batch(cost, Runs(), SIZE), Slow(cost, 7.5)
        batch.begin(7.5)
        for i in range(rng.choice([1, 3, 20])):
            batch.join(sequence_of(i, rng.randint(1, 200), NEVER // 2))
            slow.lengths[i] = 0
        slow.lengths[0] = batch.context  # only the sum counts
        moment = 7.5 + rng.choice([0.0, 1e-6, 0.02, 0.5, 3.0]) * rng.random()
        if number % 5 == 0:
            moment = batch.end_of(rng.randint(1, 40))  # just a boundary
        expected = 1
        slow.step()
        while float(slow.time) < moment:
            slow.step()
            expected += 1
        assert abs(batch.first_at(moment) - expected) <= (number % 5 == 0)  # on a boundary rounding may say either
        assert batch.end_of(batch.first_at(moment)) >= moment


@pytest.mark.parametrize("cost", COSTS)
def test_runs_are_the_steps_and_stay_on_one_piece(cost: Cost) -> None:
    runs = Runs()
    batch, slow = Batch(cost, runs, SIZE), Slow(cost, 0.0)
    batch.begin(0.0)
    for i in range(5):
        batch.join(sequence_of(i, 3 + i, NEVER // 2))
        slow.lengths[i] = 3 + i
    for steps in (1, 90, 400):
        batch.advance(steps)
    expected = []
    for _ in range(491):
        expected.append(slow.step_s())
        slow.step()
    gaps = runs.expand(0, len(runs))
    assert len(gaps) == 491
    assert max(abs(a - b) for a, b in zip(gaps, expected, strict=True)) < 1e-15
    assert set(runs.batch) == {5}


def test_ends_come_in_the_order_of_joining() -> None:
    batch = Batch(SMALL, Runs(), SIZE)
    batch.begin(0.0)
    members = [sequence_of(i, 5, left) for i, left in enumerate([4, 2, 4, 9])]
    for member in members:
        batch.join(member)
    assert batch.ends_at == 2
    batch.advance(2)
    assert batch.ended() == [members[1]]
    batch.leave(members[1], HELD)
    assert batch.ends_at == 4
    batch.advance(2)
    assert batch.ended() == [members[0], members[2]]
    assert batch.ends_at == 9


@pytest.mark.parametrize("seed", range(40))
def test_growth_is_what_each_plan_takes(seed: int) -> None:
    """Counted rarely, never or at every plan: who leaves has the blocks that were counted for it, and they add up."""
    rng = random.Random(seed)
    batch = Batch(SMALL, Runs(), SIZE)
    batch.begin(0.0)
    members: dict[int, tuple[Sequence, int]] = {}  # and blocks it has, by the rule of the scheduler
    given = counted = 0
    for number in range(60):
        if rng.random() < 0.5:
            length = rng.randint(1, 30)
            member = sequence_of(number, length, rng.randint(1, 80), -(-length // SIZE) + rng.randint(0, 5))
            batch.join(member)
            members[number] = (member, member.blocks)
            given += member.blocks
        if not batch.count:
            continue
        for key, (member, blocks) in members.items():
            members[key] = (member, max(blocks, -(-batch.length(member) // SIZE)))
        if rng.random() < 0.5:
            counted += batch.grow_to(batch.step)
            assert given + counted == sum(blocks for _, blocks in members.values())
        batch.advance(1)
        for member in batch.ended():
            counted += batch.grow_to(batch.step - 1)
            batch.leave(member, HELD)
            assert member.blocks == members.pop(member.attempt)[1]
            counted -= member.blocks
    assert batch.step > 20


@pytest.mark.parametrize("seed", range(40))
def test_quiet_ends_before_the_plan_that_takes_too_much(seed: int) -> None:
    rng = random.Random(seed)
    batch, twin = Batch(SMALL, Runs(), SIZE), Batch(SMALL, Runs(), SIZE)
    for one in (batch, twin):
        one.begin(0.0)
    for number in range(rng.randint(1, 12)):
        length, left = rng.randint(1, 30), rng.randint(1, 200)
        for one in (batch, twin):
            one.join(sequence_of(number, length, left))
    batch.grow_to(0)
    twin.grow_to(0)
    free, stop = rng.randint(0, 20), batch.ends_at
    quiet = batch.quiet_until(free, stop)
    assert 0 < quiet <= stop
    assert twin.grow_to(quiet - 1) <= free
