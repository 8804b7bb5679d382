"""The counted memory: with units of one block just what BlockPool does, with larger ones what the module says."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest
from tests.router.fake_worker import request_of

from twinpool.sim.memory import Memory, next_news
from twinpool.sim.sequence import HELD, Sequence
from twinpool.workers.blocks import BlockPool
from twinpool.workers.eviction import RULES

Told = list[tuple[list[int], list[int], float]]


def memory_of(blocks: int, unit_blocks: int, rule: str = "lru") -> tuple[Memory, Told]:
    told: Told = []
    memory = Memory(0, blocks, unit_blocks, lambda _, stored, removed, due: told.append((stored, removed, due)), rule)
    return memory, told


def sequence_of(hashes: list[int], blocks: int = 0) -> Sequence:
    sequence = Sequence(0, request_of(0, hashes=hashes), 1, HELD)
    sequence.blocks = blocks
    return sequence


def chain(rng: random.Random) -> list[int]:
    """Hashes of a prompt: one of three beginnings, then its own."""
    family, shared = rng.randrange(3), rng.randint(0, 5)
    own = rng.randrange(1 << 40)
    return [family << 50 | i if i < shared else 1 << 60 | own << 8 | i for i in range(rng.randint(0, 8))]


class Pooled:
    """BlockPool, used as the scheduler uses it."""

    def __init__(self, blocks: int, rule: str) -> None:
        self.pool = BlockPool(blocks, 16, rule)
        self.tables: dict[int, list[int]] = {}
        self.anonymous = 1 << 61

    def book(self, key: int, hashes: list[int], total: int) -> int:
        if not self.pool.can_book(hashes, total):
            return -1
        self.tables[key], held = self.pool.book(hashes, total)
        return held

    def seal(self, key: int, hashes: list[int], first: int, end: int) -> None:
        table = self.tables[key]
        for i in range(first, end):
            self.anonymous += 1
            table[i] = self.pool.seal(table[i], hashes[i] if i < len(hashes) else self.anonymous)

    def release(self, key: int, keep: int) -> None:
        self.pool.release(self.tables.pop(key), keep)

    def cached(self) -> set[int]:
        return {value for value in self.pool.cached_hashes() if not value >> 61 & 1}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(30))
def test_units_of_one_block_are_what_the_pool_does(seed: int, rule: str) -> None:
    rng = random.Random(seed)
    blocks = rng.choice([10, 30, 80])
    memory, told = memory_of(blocks, 1, rule)
    pooled = Pooled(blocks, rule)
    here: dict[int, Sequence] = {}
    index: set[int] = set()
    for key in range(300):
        memory.now += rng.choice([0.0, 0.001, 0.03])
        act = rng.random()
        if act < 0.4:
            hashes = chain(rng)
            limit = rng.randint(0, len(hashes))
            total = len(hashes) + rng.randint(1, 6)
            sequence = sequence_of(hashes, total)
            held = memory.book(hashes, limit, total)
            assert held == pooled.book(key, hashes[:limit], total)
            if held >= 0:
                sequence.sealed = sequence.full = held
                here[key] = sequence
        elif here:
            key = rng.choice(list(here))
            sequence = here[key]
            if act < 0.8:
                end = rng.randint(sequence.full, sequence.blocks)
                pooled.seal(key, sequence.hashes, sequence.full, end)
                sequence.full = end
                if min(end, len(sequence.hashes)) > sequence.sealed:
                    memory.seal(sequence, min(end, len(sequence.hashes)))
            else:
                del here[key]
                sequence.request.returns = rng.random() < 0.4
                pooled.release(key, sequence.request.keep)
                memory.release(sequence)
        assert memory.available == pooled.pool.free_blocks
        assert memory.cached_units == len(pooled.cached())
        assert memory.quiet() <= memory.available
    for stored, removed, _ in told:
        assert index.isdisjoint(stored)
        assert index.issuperset(removed)
        index = index.union(stored).difference(removed)
    assert index == pooled.cached()


class Listed:
    """Units of several blocks, written down one by one: what the module's first paragraph says and nothing else."""

    def __init__(self, blocks: int, unit: int) -> None:
        self.free, self.unit = blocks, unit
        self.users: dict[int, set[int]] = {}  # unit -> sequences
        self.idle: OrderedDict[object, int] = OrderedDict()  # unit or a tail -> its blocks that are left

    def book(self, key: int, hashes: list[int], total: int) -> int:
        held = 0
        while held < len(hashes) and hashes[held] in self.users:
            held += 1
        used = sum(bool(self.users[value]) for value in hashes[:held])
        if total - used * self.unit > self.free + sum(self.idle.values()):
            return -1
        for value in hashes[:held]:
            self.users[value].add(key)
            self.idle.pop(value, None)
        for _ in range(total - held * self.unit):
            self.take_one()
        return held

    def take_one(self) -> None:
        if self.free:
            self.free -= 1
            return
        victim = next(iter(self.idle))
        self.users.pop(victim, None)  # type: ignore[call-overload]  # a tail is in no dict of units
        left = self.idle.pop(victim) - 1
        if left:
            rest = object()
            self.idle[rest] = left
            self.idle.move_to_end(rest, last=False)

    def seal(self, key: int, value: int) -> None:
        if value in self.users:
            self.free += self.unit
            self.idle.pop(value, None)
        self.users.setdefault(value, set()).add(key)

    def release(self, key: int, sequence: Sequence) -> None:
        tail = sequence.full - sequence.sealed * self.unit
        self.free += sequence.blocks - sequence.full
        if tail:
            self.idle[object()] = tail
        for value in reversed(sequence.hashes[: sequence.sealed]):
            self.users[value].discard(key)
            if not self.users[value]:
                self.idle[value] = self.unit


@pytest.mark.parametrize("seed", range(40))
def test_units_of_several_blocks(seed: int) -> None:
    rng = random.Random(seed)
    unit, blocks = rng.choice([2, 4, 32]), rng.choice([60, 200])
    memory, _ = memory_of(blocks, unit)
    listed = Listed(blocks, unit)
    here: dict[int, Sequence] = {}
    for key in range(300):
        memory.now += 0.001
        act = rng.random()
        if act < 0.4:
            hashes = chain(rng)
            sequence = sequence_of(hashes, len(hashes) * unit + rng.randint(1, 6))
            held = memory.book(hashes, len(hashes), sequence.blocks)
            assert held == listed.book(key, hashes, sequence.blocks)
            if held >= 0:
                sequence.sealed, sequence.full = held, held * unit
                here[key] = sequence
        elif here:
            key = rng.choice(list(here))
            sequence = here[key]
            if act < 0.8:
                sequence.full = rng.randint(sequence.full, sequence.blocks)
                units = min(sequence.full // unit, len(sequence.hashes))
                for i in range(sequence.sealed, units):
                    listed.seal(key, sequence.hashes[i])
                if units > sequence.sealed:
                    memory.seal(sequence, units)
            else:
                del here[key]
                listed.release(key, sequence)
                memory.release(sequence)
        assert memory.available == listed.free + sum(listed.idle.values())
        assert memory.cached_units == len(listed.users)


def test_quiet_blocks_change_no_cache() -> None:
    memory, told = memory_of(20, 4)
    anonymous, cached = sequence_of([], 5), sequence_of([7, 8], 10)
    for sequence, full in ((anonymous, 3), (cached, 8)):
        assert memory.book(sequence.hashes, 0, sequence.blocks) == 0
        sequence.full = full
    memory.seal(cached, 2)
    memory.release(anonymous)
    memory.release(cached)
    assert (memory.free, memory.quiet(), memory.available) == (9, 12, 20)
    memory.now = 1.0
    memory.allocate(12)
    assert len(told) == 1  # stored
    memory.allocate(1)
    assert [(stored, removed) for stored, removed, _ in told] == [([7, 8], []), ([], [8])]
    assert (memory.quiet(), memory.available) == (3, 7)  # what is left of the unit goes next


def test_without_hashes_only_numbers_change() -> None:
    memory, told = memory_of(20, 0)
    sequence = sequence_of([], 12)
    assert memory.book([], 0, 12) == 0
    assert memory.book([], 0, 9) == -1
    sequence.full = 11
    memory.release(sequence)
    assert (memory.free, memory.available, memory.peak) == (20, 20, 12)
    assert told == []


def test_changes_are_net_and_told_at_multiples_of_20_ms() -> None:
    memory, told = memory_of(2, 1)
    memory.now = 0.013
    first, second = sequence_of([1], 1), sequence_of([2, 3], 2)
    memory.book([1], 1, 1)
    first.full = 1
    memory.seal(first, 1)
    memory.release(first)
    memory.now = 0.0199
    memory.book([2, 3], 2, 2)  # evicts what was stored in the same 20 ms
    second.full = 2
    memory.seal(second, 2)
    assert told == [([2, 3], [], 0.02)]
    memory.now = 0.02
    memory.release(second)
    memory.book([1], 1, 1)
    assert told == [([2, 3], [], 0.02), ([], [3], 0.04)]


def test_the_dead_tell_nothing_more() -> None:
    memory, told = memory_of(2, 1)
    sequence = sequence_of([1], 1)
    memory.book([1], 1, 1)
    memory.seal(sequence, 1)
    memory.now = 0.019
    memory.forget()
    assert told == [([], [], 0.02)]


@pytest.mark.parametrize("slot", [1, 57, 116, 123_457])
def test_news_never_leave_at_once(slot: int) -> None:
    assert next_news(slot * 0.02, 0.0) == pytest.approx((slot + 1) * 0.02)
    assert next_news(slot * 0.02 - 1e-6, 0.0) == pytest.approx(slot * 0.02)
