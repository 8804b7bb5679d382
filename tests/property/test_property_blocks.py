"""The block pool under arbitrary use: books are right, content under a hash never changes, events tell the truth."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from twinpool.workers.blocks import BlockPool
from twinpool.workers.kv_events import KvEventLog

BLOCKS = 8
PATHS = st.lists(st.integers(0, 1), max_size=5).map(tuple)  # few and short, so that prefixes are shared

Path = tuple[int, ...]


def hashes_of(path: Path) -> list[int]:
    """A chained hash for each block of a path: the binary number of all choices up to it."""
    return [int("1" + "".join(map(str, path[: end + 1])), 2) for end in range(len(path))]


class PoolMachine(RuleBasedStateMachine):
    """Owners book paths, seal them block by block and go; every block remembers what was written to it."""

    owners = Bundle("owners")
    eviction = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, 16, self.eviction)
        self.log = KvEventLog(limit=3)
        self.tables: dict[int, list[int]] = {}
        self.paths: dict[int, Path] = {}
        self.sealed: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.index: set[int] = set()
        self.next_sequence = 0
        self.owner = 0

    @rule(target=owners, path=PATHS, extra=st.integers(0, 2))
    def book(self, path: Path, extra: int) -> int:
        hashes = hashes_of(path)
        total = len(path) + extra
        before = self.pool.free_blocks, self.pool.match(hashes)
        self.owner += 1
        self.tables[self.owner], self.paths[self.owner], self.sealed[self.owner] = [], path, 0
        if not self.pool.can_book(hashes, total):
            assert total > before[0]
            assert (self.pool.free_blocks, self.pool.match(hashes)) == before
            return self.owner
        table, held = self.pool.book(hashes, total)
        assert held == before[1]
        assert len(table) == total
        assert [self.written[block] for block in table[:held]] == hashes[:held]
        for index in range(held, len(path)):
            self.written[table[index]] = hashes[index]
        self.tables[self.owner], self.sealed[self.owner] = table, held
        return self.owner

    @rule(owner=owners)
    def seal_next(self, owner: int) -> None:
        table, index = self.tables[owner], self.sealed[owner]
        if index >= min(len(table), len(self.paths[owner])):
            return
        value = hashes_of(self.paths[owner])[index]
        table[index] = self.pool.seal(table[index], value)
        self.sealed[owner] += 1
        assert self.written[table[index]] == value

    @rule(owner=consumes(owners), returns=st.booleans())
    def release(self, owner: int, returns: bool) -> None:
        self.pool.release(self.tables.pop(owner), len(self.paths[owner]) if returns else 0)

    @rule(reset=st.booleans())
    def tell(self, reset: bool) -> None:
        self.log.record(*self.pool.drain_events())
        for frame in self.log.snapshot(self.pool.cached_hashes()) if reset else self.log.frames():
            assert frame.sequence == self.next_sequence
            self.next_sequence += 1
            stored, removed = ({int(v) for v in memoryview(c).cast("Q")} for c in (frame.stored, frame.removed))
            self.index = set() if frame.reset else self.index
            assert not stored & self.index
            assert removed <= self.index
            self.index = (self.index | stored) - removed
        assert self.index == set(self.pool.cached_hashes())

    @invariant()
    def books_are_right(self) -> None:
        self.pool.check_integrity(self.tables.values())

    @invariant()
    def cached_is_closed_under_prefixes(self) -> None:
        cached = set(self.pool.cached_hashes())
        assert all(value >> 1 in cached for value in cached if value >> 1 > 1)

    def teardown(self) -> None:
        for table in self.tables.values():
            self.pool.release(table)
        self.pool.check_integrity([])
        assert self.pool.free_blocks == BLOCKS


class SegmentedMachine(PoolMachine):
    """The same with two segments."""

    eviction = "segmented"


class FrequencyMachine(PoolMachine):
    """The same with counts."""

    eviction = "frequency"


TestBlockPool = PoolMachine.TestCase
TestSegmentedBlockPool = SegmentedMachine.TestCase
TestFrequencyBlockPool = FrequencyMachine.TestCase
for case in (TestBlockPool, TestSegmentedBlockPool, TestFrequencyBlockPool):
    case.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
