"""The prefix index against plain sets."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from twinpool.router.kv_index import KvIndex, Stair

WORKERS = st.integers(0, 4)
TEXTS = st.integers(0, 3)
LENGTH = 40


def prompt(text: int, length: int = LENGTH) -> list[int]:
    """Hashes of one of a few texts; they share their first blocks, as chained hashes do."""
    return [(min(text, block // 4) << 8) | block for block in range(length)]


def depth(held: set[int], hashes: list[int]) -> int:
    return next((i for i, key in enumerate(hashes) if key not in held), len(hashes))


def naive_stairs(sets: dict[int, set[int]], hashes: list[int]) -> list[Stair]:
    depths = {worker: depth(held, hashes) for worker, held in sets.items()}
    return [
        Stair(step, sum(1 << worker for worker, reached in depths.items() if reached >= step))
        for step in sorted({reached for reached in depths.values() if reached}, reverse=True)
    ]


def closed(sets: set[int]) -> list[list[int]]:
    """The prefixes of which a prefix-closed set consists."""
    return [prompt(text, depth(sets, prompt(text))) for text in range(4)]


class IndexMachine(RuleBasedStateMachine):
    """Workers cache prompts and evict them from the end."""

    def __init__(self) -> None:
        super().__init__()
        self.index = KvIndex()
        self.sets: dict[int, set[int]] = {}

    @rule(worker=WORKERS, text=TEXTS, length=st.integers(0, LENGTH), reset=st.booleans())
    def store(self, worker: int, text: int, length: int, reset: bool) -> None:
        stored = prompt(text, length)
        self.index.change(worker, stored, [], reset)
        self.sets[worker] = set(stored) | (set() if reset else self.sets.get(worker, set()))

    @rule(worker=WORKERS, keep=st.integers(0, LENGTH))
    def evict(self, worker: int, keep: int) -> None:
        held = self.sets.setdefault(worker, set())
        removed = [key for prefix in closed(held) for key in prefix[keep:]]
        self.index.change(worker, [], removed, False)
        held.difference_update(removed)

    @rule(worker=WORKERS)
    def forget(self, worker: int) -> None:
        self.index.forget(worker)
        self.sets.pop(worker, None)

    @invariant()
    def agrees(self) -> None:
        self.index.check_integrity()
        assert len(self.index) == len(set().union(*self.sets.values()))
        for text in range(4):
            for length in (0, 1, 7, LENGTH):
                hashes = prompt(text, length)
                assert self.index.stairs(hashes) == naive_stairs(self.sets, hashes)
                for worker in range(5):
                    assert self.index.depth(worker, hashes) == depth(self.sets.get(worker, set()), hashes)


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=50, stateful_step_count=20, deadline=None)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(1, 300))
def test_stairs_of_one_prompt(depths: list[int], length: int) -> None:
    index = KvIndex()
    hashes = list(range(length))
    sets = {}
    for worker, count in enumerate(depths):
        index.change(worker, hashes[:count], [], False)
        sets[worker] = set(hashes[:count])
    stairs = index.stairs(hashes)
    assert stairs == naive_stairs(sets, hashes)
    for deeper, shallower in pairwise(stairs):
        assert deeper.depth > shallower.depth
        assert deeper.mask & shallower.mask == deeper.mask


def test_a_long_prompt_takes_few_look_ups() -> None:
    class Counting(dict[int, int]):
        looks = 0

        def get(self, key: int, default: int = 0) -> int:  # type: ignore[override]
            Counting.looks += 1
            return super().get(key, default)

    index = KvIndex()
    hashes = list(range(8000))
    index.change(0, hashes, [], False)
    index.change(1, hashes[:3000], [], False)
    index._masks = Counting(index._masks)
    assert index.stairs(hashes) == [Stair(8000, 1), Stair(3000, 3)]
    assert Counting.looks < 100


def test_a_disagreement_is_seen() -> None:
    index = KvIndex()
    index.change(0, [1, 2], [], False)
    index._masks[2] = 2
    with pytest.raises(AssertionError, match="disagree"):
        index.check_integrity()
