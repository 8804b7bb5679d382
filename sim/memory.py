"""KV memory and prefix cache of one emulated worker: the rules of ``workers/blocks.py``, counted instead of listed.

Blocks come in *units* of ``unit_blocks`` blocks, the tokens that one hash of the trace stands for. A unit is private to
its sequence until it is sealed; then it is found under its hash and counts who refers to it. Blocks that are full but
belong to no unit (the end of a prompt, output) are anonymous: once released nobody can find them, yet they take room
until they are evicted. What a sequence leaves of them is one key of its own. With units of one block all of this is
what ``BlockPool`` does; in larger ones a unit leaves the cache with its first evicted block.

Who refers to a unit refers to all before it, and leaves are evicted first. So along a prompt units are cached up to
some point, and the counts of who refers to them never rise: both ends are found by halving.

Without hashes (``unit_blocks`` 0) nothing can ever be found again, so that what is idle is as good as free: all that is
left is one counter, and no work is done per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from twinpool.sim.sequence import Sequence
from twinpool.workers.eviction import EvictionOrder

GOLDEN: Final = 0.6180339887498949  # its multiples are spread as evenly as can be, however many there are
NEWS_EVERY_S: Final = 0.020  # changes of the cache are told at multiples of this (workers/reporter.py)
KvSink = Callable[[int, list[int], list[int], float], None]


def news_phase(worker: int) -> float:
    """When, within 20 ms, a worker's clock passes a multiple of 20 ms: clocks are not set by each other."""
    return NEWS_EVERY_S * (worker * GOLDEN % 1.0)


def next_news(now: float, phase: float) -> float:
    """When a worker sends what changed at ``now``: at the next multiple of 20 ms of its clock, never at once."""
    slot = math.floor((now - phase) / NEWS_EVERY_S) + 1
    when = slot * NEWS_EVERY_S + phase
    return when if when > now else (slot + 1) * NEWS_EVERY_S + phase  # the quotient was rounded down


class Memory:
    """See the module's docstring. ``now`` is to be set before anything that may change the cache.

    ``tell(worker, stored, removed, due)`` is called at the first change that is due then. Both lists are *net* and go
    on growing until ``due``, which is always later than now: read them when that has come.
    """

    __slots__ = (
        "_anonymous", "_due", "_idle", "_idle_blocks", "_refs", "_remnant", "_removed", "_stored",
        "_tails", "_tell", "_worker", "blocks", "free", "now", "peak", "phase", "unit_blocks",
    )  # fmt: skip

    def __init__(self, worker: int, blocks: int, unit_blocks: int, tell: KvSink, eviction: str = "lru") -> None:
        self.blocks = blocks
        self.unit_blocks = unit_blocks
        self.free = blocks
        self.peak = 0  # most blocks that were taken at once
        self.now = 0.0
        self._worker = worker
        self.phase = news_phase(worker)
        self._tell = tell
        self._refs: dict[int, int] = {}  # hash of each cached unit -> sequences that refer to it
        self._idle = EvictionOrder(eviction)  # hashes, and negative keys of anonymous blocks
        self._idle_blocks = 0  # of those in ``_idle``, and the remnant
        self._remnant = 0  # blocks left of the key that was evicted last: they go before all others
        self._tails: dict[int, int] = {}  # negative key -> anonymous idle blocks
        self._anonymous = 0  # the last of these keys
        self._due = -1.0  # the changes in hand are told then
        self._stored: list[int] = []
        self._removed: list[int] = []

    @property
    def available(self) -> int:
        """Blocks that nobody refers to."""
        return self.free + self._idle_blocks

    @property
    def cached_units(self) -> int:
        """Units that can be found."""
        return len(self._refs)

    def holds(self, key: int) -> bool:
        """Whether the unit is in the cache."""
        return key in self._refs

    def quiet(self) -> int:
        """So many blocks can be allocated, and perhaps more, without the prefix cache changing."""
        count = self.free + self._remnant
        if self._idle_blocks > self._remnant:
            key = self._idle.next()
            if key < 0:
                count += self._tails[key]
        return count

    def book(self, hashes: list[int], limit: int, total: int) -> int:
        """Takes ``total`` blocks, the first of them cached units of ``hashes``, of which ``limit`` may be used.

        Returns how many units are, or -1 without room: then nothing has changed.
        """
        held = shared = 0
        refs = self._refs
        if limit and hashes[0] in refs:
            held, shared = self._match(hashes, limit)
        size = self.unit_blocks
        if total - shared * size > self.free + self._idle_blocks:
            return -1
        if held:
            for i in range(shared):
                refs[hashes[i]] += 1
            if held > shared:
                again = hashes[shared:held]
                self._idle.remove_all(again)
                self._idle_blocks -= (held - shared) * size
                refs.update(dict.fromkeys(again, 1))
            self._idle.found(hashes, held)
        self.allocate(total - held * size)
        return held

    def match(self, hashes: list[int], limit: int) -> int:
        """Leading units that are cached, of the first ``limit``."""
        return self._match(hashes, min(limit, len(hashes)))[0] if hashes and hashes[0] in self._refs else 0

    def _match(self, hashes: list[int], limit: int) -> tuple[int, int]:
        """Leading units that are cached, the first is, and of those the ones in use. Both by halving: see above."""
        refs = self._refs
        held, high = 1, limit + 1
        while high - held > 1:
            middle = (held + high) // 2
            if hashes[middle - 1] in refs:
                held = middle
            else:
                high = middle
        shared, high = 0, held + 1
        while high - shared > 1:
            middle = (shared + high) // 2
            if refs[hashes[middle - 1]]:
                shared = middle
            else:
                high = middle
        return held, shared

    def allocate(self, count: int) -> None:
        """Takes blocks, evicting idle ones when out of free ones. There must be so many."""
        if count <= self.free:
            self.free -= count
        else:
            self._evict(count - self.free)
            self.free = 0
        taken = self.blocks - self.free - self._idle_blocks
        if taken > self.peak:
            self.peak = taken

    def _evict(self, count: int) -> None:
        assert count <= self._idle_blocks, f"{count} blocks wanted, {self._idle_blocks} idle"
        self._idle_blocks -= count
        count -= self._remnant
        idle, refs, size = self._idle, self._refs, self.unit_blocks
        gone: list[int] = []
        while count > 0:
            key = idle.pop()
            if key < 0:
                count -= self._tails.pop(key)
            else:
                del refs[key]
                gone.append(key)
                count -= size
        self._remnant = -count
        if gone:
            self._note_removed(gone)

    def seal(self, sequence: Sequence, units: int) -> None:
        """The leading units of a sequence are final: they enter the cache, or are dropped for those there before."""
        hashes, first = sequence.hashes, sequence.sealed
        sequence.sealed = units
        refs = self._refs
        if hashes[first] not in refs:  # then none after it is
            new = hashes[first:units]
            refs.update(dict.fromkeys(new, 1))
            self._note_stored(new)
            return
        new = []
        for i in range(first, units):
            key = hashes[i]
            count = refs.get(key, -1)
            if count < 0:
                refs[key] = 1
                new.append(key)
                continue
            if not count:
                self._idle.remove(key)
                self._idle_blocks -= self.unit_blocks
            refs[key] = count + 1
            self.free += self.unit_blocks
        if new:
            self._note_stored(new)

    def release(self, sequence: Sequence) -> None:
        """Gives back all of a sequence: its sealed units, anonymous blocks up to ``full``, and the rest."""
        size = self.unit_blocks
        if not size:
            self.free += sequence.blocks
            return
        self.free += sequence.blocks - sequence.full
        sealed = sequence.sealed
        tail = sequence.full - sealed * size
        idle = self._idle
        if tail > 0:
            self._anonymous -= 1
            self._tails[self._anonymous] = tail
            self._idle_blocks += tail
            idle.add(self._anonymous)
        if not sealed:
            return
        refs, mine = self._refs, sequence.hashes[:sealed]
        if sequence.request.returns and not sequence.lent:
            idle.promise(mine[:])
        mine.reverse()
        if refs[mine[-1]] > 1:  # others use the first of them, and perhaps more
            alone = 0
            while refs[mine[alone]] == 1:
                alone += 1
            for key in mine[alone:]:
                refs[key] -= 1
            del mine[alone:]
        refs.update(dict.fromkeys(mine, 0))
        idle.add_all(mine)
        self._idle_blocks += len(mine) * size

    def snapshot(self) -> list[int]:
        """Hashes of all that is cached; changes not told yet are dropped (``KvEventLog.snapshot``)."""
        self.forget()
        return list(self._refs)

    def forget(self) -> None:
        """What has not been told yet nobody hears: the worker is dead, or tells everything."""
        if self.now < self._due:
            self._stored.clear()
            self._removed.clear()

    # --- news ----------

    def _open(self) -> None:
        """The changes in hand are told already: begin the next ones."""
        # A worker never reports at once, so lists that were read are not written to any more.
        self._due = next_news(self.now, self.phase)
        self._stored, self._removed = [], []
        self._tell(self._worker, self._stored, self._removed, self._due)

    def _note_stored(self, keys: list[int]) -> None:
        if self.now >= self._due:
            self._open()
        if self._removed:
            keys = _take_back(keys, self._removed)
        self._stored += keys

    def _note_removed(self, keys: list[int]) -> None:
        if self.now >= self._due:
            self._open()
        if self._stored:
            keys = _take_back(keys, self._stored)
        self._removed += keys


def _take_back(keys: list[int], undone: list[int]) -> list[int]:
    """Takes out of ``undone`` what ``keys`` do again; returns the others."""
    again = set(undone).intersection(keys)
    if not again:
        return keys
    undone[:] = [key for key in undone if key not in again]
    return [key for key in keys if key not in again]
