"""The eviction order by itself: what each rule takes first, what a promise keeps, all of it against a model."""

from __future__ import annotations

import random

import pytest

from twinpool.workers.eviction import RULES, EvictionOrder


def visit(order: EvictionOrder, path: list[int], held: int = 0, returns: bool = False) -> None:
    """A sequence that found ``held`` idle blocks of its path, and gives back all of it."""
    if held:
        order.remove_all(path[:held])
        order.found(path, held)
    if returns:
        order.promise(path[:])
    order.add_all(path[::-1])


def drained(order: EvictionOrder) -> list[int]:
    expected = order.blocks()
    victims: list[int] = []
    while len(order):
        assert order.next() == expected[len(victims)]
        victims.append(order.pop())
    assert victims == expected
    return victims


def test_lru_takes_the_tail_of_the_oldest_visit() -> None:
    order = EvictionOrder()
    visit(order, [1, 2])
    visit(order, [11, 12])
    visit(order, [1, 3], held=1)
    assert drained(order) == [2, 12, 11, 3, 1]


def test_what_was_found_outlives_what_was_not() -> None:
    for rule in ("segmented", "frequency"):
        order = EvictionOrder(rule)
        visit(order, [1, 2])
        visit(order, [1, 2], held=2)
        visit(order, [11, 12])
        assert drained(order) == [12, 11, 2, 1]


@pytest.mark.parametrize(("rule", "victims"), [("segmented", [3, 2, 1]), ("frequency", [3, 1, 2])])
def test_only_frequency_counts_further(rule: str, victims: list[int]) -> None:
    order = EvictionOrder(rule)
    for block in (2, 1, 3):
        visit(order, [block])
    for block in (2, 2, 2, 1):
        visit(order, [block], held=1)
    assert drained(order) == victims


def test_counts_age() -> None:
    order = EvictionOrder("frequency")
    visit(order, [1])
    for _ in range(3):
        visit(order, [1], held=1)
    for block in range(10, 20):  # each is found as often before 1 is asked for again
        visit(order, [block])
        visit(order, [block], held=1)
        visit(order, [block], held=1)
        if block % 2:
            order.pop()
            order.pop()
    assert 1 not in order.blocks()


def test_a_promise_keeps_a_conversation_until_it_is_back() -> None:
    order = EvictionOrder()
    visit(order, [1, 2, 3], returns=True)
    visit(order, [11, 12])
    assert order.blocks() == [12, 11, 3, 2, 1]
    visit(order, [1, 2, 3, 4], held=3)  # it is back, and says nothing of coming again
    assert order.blocks() == [12, 11, 4, 3, 2, 1]
    visit(order, [11, 12], held=2)
    assert drained(order) == [4, 3, 2, 1, 12, 11]


def test_what_only_began_alike_does_not_end_a_promise() -> None:
    order = EvictionOrder()
    visit(order, [1, 2, 3], returns=True)
    visit(order, [1, 9], held=1)
    visit(order, [11])
    assert drained(order) == [9, 11, 3, 2, 1]


def test_two_promises_end_one_by_one() -> None:
    order = EvictionOrder()
    visit(order, [1, 2], returns=True)
    visit(order, [1, 3], held=1, returns=True)
    visit(order, [1, 2], held=2)
    visit(order, [11])
    assert order.blocks() == [2, 11, 3, 1]
    visit(order, [1, 3], held=2)
    assert drained(order) == [2, 11, 3, 1]


def test_a_promise_nobody_keeps_is_evicted_at_last() -> None:
    order = EvictionOrder()
    visit(order, [1, 2], returns=True)
    visit(order, [1, 3], held=1, returns=True)
    assert [order.pop(), order.pop()] == [2, 3]
    visit(order, [21])  # as young, at the level that the promises were lifted to
    assert drained(order) == [1, 21]
    assert (order._promised, order._paths, order._above) == ({}, {}, {})


def test_reset_keeps_the_order_and_nothing_else() -> None:
    order = EvictionOrder("frequency")
    visit(order, [1, 2], returns=True)
    visit(order, [1, 2], held=2)
    visit(order, [11])
    order.reset()
    visit(order, [21])
    assert len(order) == 4
    assert drained(order) == [11, 2, 1, 21]


def test_empty_and_unknown() -> None:
    order = EvictionOrder()
    with pytest.raises(KeyError):
        order.pop()
    with pytest.raises(StopIteration):
        order.next()
    with pytest.raises(KeyError):
        order.remove(1)
    with pytest.raises(KeyError):
        EvictionOrder("random")


class Model:
    """The docstring's formula, nothing cached: promises are listed, the victim is looked for."""

    def __init__(self, rule: str) -> None:
        self.most = RULES[rule]
        self.age = self.clock = 0
        self.idle: dict[int, tuple[int, int]] = {}  # block -> level, time
        self.uses: dict[int, int] = {}
        self.promises: list[list[int]] = []

    def found(self, path: list[int]) -> None:
        for block in path:
            self.uses[block] = self.uses.get(block, 0) + 1
            self.idle.pop(block, None)
        self.promises = [promise for promise in self.promises if promise[-1] not in path]

    def release(self, path: list[int], returns: bool) -> None:
        if returns and all(promise[-1] != path[-1] for promise in self.promises):
            self.promises.append(path[:])
        for block in reversed(path):
            self.clock += 1
            promised = any(block in promise for promise in self.promises)
            self.idle[block] = (self.age + min(self.uses.get(block, 0), self.most) + promised, self.clock)

    def pop(self) -> int:
        victim = min(self.idle, key=self.idle.__getitem__)
        self.age = self.idle.pop(victim)[0]
        self.uses.pop(victim, None)
        kept: dict[int, list[int]] = {}
        for promise in self.promises:
            left = [block for block in promise if block != victim]
            if left:
                kept.setdefault(left[-1], left)
        self.promises = list(kept.values())
        return victim


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(20))
def test_against_the_formula(rule: str, seed: int) -> None:
    """Paths of a random tree, one sequence at a time; and no block goes before one below it."""
    rng = random.Random(seed)
    order, model = EvictionOrder(rule), Model(rule)
    cached: set[int] = set()
    for _ in range(400):
        node, path = 1, []
        for _ in range(rng.randint(1, 6)):
            node = 2 * node + rng.randint(0, 1)
            path.append(node)
        held = next((i for i, block in enumerate(path) if block not in cached), len(path))
        returns = rng.random() < 0.3
        visit(order, path, held, returns)
        model.found(path[:held])
        model.release(path, returns)
        cached.update(path)
        while len(cached) > 25:
            victim = order.pop()
            assert victim == model.pop()
            cached.remove(victim)
            assert cached.isdisjoint((2 * victim, 2 * victim + 1)), "a block went before what is chained to it"
        assert len(order) == len(cached)
        assert order.blocks() == sorted(model.idle, key=model.idle.__getitem__)
