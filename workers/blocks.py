"""The blocks of one worker's KV pool: who refers to which, what is cached under which hash, what may be evicted.

A block is in exactly one of three states::

    free --allocate--> referenced --release, sealed-----> idle (cached, unreferenced) --evict--> free
                           ^   `-----release, not sealed--> free                |
                           `-------------------- acquire -----------------------'

A *full* block whose KV is final is *sealed* under its hash and can be found by later prompts. Hashes are chained, so a
block is of use only while all blocks before it are cached too. Whoever holds a block holds all before it, seals first
to last, and no idle block goes before one that is chained to it: so what is cached is closed under prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from twinpool.workers.eviction import EvictionOrder

NO_HASH = -1


class IntegrityError(AssertionError):
    """The books are wrong; ``faults`` lists what was found, one line each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class Booking(NamedTuple):
    """Blocks of one sequence, first to last; the first ``held`` were cached. The receiver owns a reference on each."""

    table: list[int]
    held: int


class KvChanges(NamedTuple):
    """Hashes that entered and left the cache. A hash may be in both lists: its net change is stored minus removed."""

    stored: list[int]
    removed: list[int]


class BlockPool:
    """Books of ``num_blocks`` blocks of ``block_size`` tokens; holds no KV bytes itself.

    ``sums[block]`` is the checksum of a block's bytes, None until the worker sets it (the content must be final then).
    ``eviction`` names a rule of ``eviction.py``.
    """

    __slots__ = (
        "_by_hash", "_free", "_hashes", "_idle", "_refs", "_removed", "_stored", "block_size", "num_blocks", "sums",
    )  # fmt: skip

    def __init__(self, num_blocks: int, block_size: int, eviction: str = "lru") -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks with tokens, not {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.sums: list[int | None] = [None] * num_blocks
        self._refs = [0] * num_blocks
        self._hashes = [NO_HASH] * num_blocks
        self._by_hash: dict[int, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle = EvictionOrder(eviction)
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody refers to: free ones and idle ones, which are evicted when needed."""
        return len(self._free) + len(self._idle)

    @property
    def cached_blocks(self) -> int:
        """Sealed blocks, referenced or not."""
        return len(self._by_hash)

    def sealed(self, block: int) -> bool:
        """Whether the block is cached: what it holds is final."""
        return self._hashes[block] != NO_HASH

    def cached_hashes(self) -> list[int]:
        """Hashes of all sealed blocks, each after those it is chained to."""
        return list(self._by_hash)

    def match(self, hashes: Sequence[int]) -> int:
        """How many leading blocks of a prompt with these block hashes are cached. Changes nothing."""
        by_hash = self._by_hash
        count = 0
        for value in hashes:
            if value not in by_hash:
                break
            count += 1
        return count

    def can_allocate(self, count: int) -> bool:
        """Whether ``allocate(count)`` will succeed."""
        return count <= self.free_blocks

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` blocks of undefined content, one reference each, evicting idle ones when out of free ones.

        Raises ValueError, changing nothing, where ``can_allocate`` says no.
        """
        if not self.can_allocate(count):
            raise ValueError(f"{count} blocks wanted, {self.free_blocks} free")
        blocks: list[int] = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._refs[block] = 1
            self.sums[block] = None
            blocks.append(block)
        return blocks

    def acquire(self, hashes: Sequence[int]) -> list[int]:
        """Takes a reference on each cached leading block of these hashes; returns them, first to last."""
        blocks: list[int] = []
        for value in hashes:
            block = self._by_hash.get(value)
            if block is None:
                break
            self._refer(block)
            blocks.append(block)
        self._idle.found(blocks, len(blocks))
        return blocks

    def can_book(self, hashes: Sequence[int], total: int) -> bool:
        """Whether ``book(hashes, total)`` will succeed. Changes nothing."""
        needed = total
        for value in hashes[:total]:
            block = self._by_hash.get(value)
            if block is None:
                break
            if self._refs[block] > 0:
                needed -= 1
        return needed <= self.free_blocks

    def book(self, hashes: Sequence[int], total: int) -> Booking:
        """Blocks for a sequence of ``total`` blocks: the cached prefix of ``hashes``, then fresh ones.

        Raises ValueError, changing nothing, where ``can_book`` says no.
        """
        if not self.can_book(hashes, total):
            raise ValueError(f"{total} blocks wanted, {self.match(hashes[:total])} cached, {self.free_blocks} free")
        table = self.acquire(hashes[:total])
        held = len(table)
        table += self.allocate(total - held)
        return Booking(table, held)

    def seal(self, block: int, value: int) -> int:
        """Registers a referenced, full and final block under its hash; returns the block to use from now on.

        That is ``block`` itself, or the one already registered under this hash: then the caller's reference has moved
        to that one, so that one hash never has two blocks.
        """
        if self._refs[block] < 1:
            raise ValueError(f"block {block} is not referenced, so it cannot be sealed")
        known = self._by_hash.get(value)
        if known == block:
            return block
        if self._hashes[block] != NO_HASH:
            raise ValueError(f"block {block} is sealed under another hash")
        if known is not None:
            self._refer(known)
            self.release((block,))
            return known
        self._by_hash[value] = block
        self._hashes[block] = value
        self._stored.append(value)
        return block

    def unseal(self, blocks: Sequence[int]) -> None:
        """Takes blocks out of the cache, whoever refers to them: what they hold is not what their hash says.

        Give the tail of a sequence, so that what stays cached is closed under prefixes for it.
        """
        for block in reversed(blocks):
            value = self._hashes[block]
            if value == NO_HASH:
                continue
            self._forget_hash(block)
            self.sums[block] = None
            if self._refs[block] == 0:
                self._idle.remove(block)
                self._free.append(block)
        self._idle.reset()

    def release(self, blocks: Sequence[int], keep: int = 0) -> None:
        """Gives back one reference on each block of a sequence, first to last. Raises ValueError on one too many.

        Of the first ``keep`` those that are sealed will be asked for again: the conversation is to come back.
        """
        refs = self._refs
        if keep:
            self._idle.promise([block for block in blocks[:keep] if self._hashes[block] != NO_HASH])
        for block in reversed(blocks):
            if refs[block] < 1:
                raise ValueError(f"block {block} is released more often than it was taken")
            refs[block] -= 1
            if refs[block] == 0:
                if self._hashes[block] == NO_HASH:
                    self._free.append(block)
                else:
                    self._idle.add(block)

    def drain_events(self) -> KvChanges:
        """Changes of the cache since the last call, in order; the caller owns the lists."""
        changes = KvChanges(self._stored, self._removed)
        self._stored = []
        self._removed = []
        return changes

    def check_integrity(self, owners: Iterable[Sequence[int]] | None = None) -> None:
        """Raises IntegrityError unless every block is in one state only, and ``owners``' tables are all references."""
        faults: list[str] = []
        free, idle = set(self._free), set(self._idle.blocks())
        if len(free) != len(self._free):
            faults.append("a block is twice in the free list")
        for block in range(self.num_blocks):
            faults += self._faults_of(block, block in free, block in idle)
        faults += [
            f"hash {value} leads to block {block}, which is sealed under {self._hashes[block]}"
            for value, block in self._by_hash.items()
            if self._hashes[block] != value
        ]
        if owners is not None:
            faults += self._owner_faults(owners)
        if faults:
            raise IntegrityError(faults)

    def _faults_of(self, block: int, free: bool, idle: bool) -> list[str]:
        faults: list[str] = []
        refs, value = self._refs[block], self._hashes[block]
        if (refs > 0) + free + idle != 1 or refs < 0:
            faults.append(f"block {block}: {refs} references, free {free}, idle {idle}")
        if value == NO_HASH and idle:
            faults.append(f"block {block} is idle but not sealed")
        if value != NO_HASH and (free or self._by_hash.get(value) != block):
            faults.append(f"block {block} carries hash {value} but cannot be found by it, or is free")
        return faults

    def _owner_faults(self, owners: Iterable[Sequence[int]]) -> list[str]:
        counts = [0] * self.num_blocks
        for table in owners:
            for block in table:
                counts[block] += 1
        return [
            f"block {block}: {self._refs[block]} references, {count} owners"
            for block, count in enumerate(counts)
            if self._refs[block] != count
        ]

    def _refer(self, block: int) -> None:
        if self._refs[block] == 0:
            self._idle.remove(block)
        self._refs[block] += 1

    def _evict(self) -> int:
        block = self._idle.pop()
        self._forget_hash(block)
        return block

    def _forget_hash(self, block: int) -> None:
        value = self._hashes[block]
        self._hashes[block] = NO_HASH
        del self._by_hash[value]
        self._removed.append(value)
