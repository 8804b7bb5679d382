"""KV memory and prefix cache of one emulated worker: the rules of ``workers/blocks.py``, counted instead of listed.

Blocks come in *units* of ``unit_blocks`` blocks, the tokens that one hash of the trace stands for. A unit is private to
its sequence until it is sealed; then it is found under its hash and counts who refers to it. Blocks that are full but
belong to no unit (the end of a prompt, output) are anonymous: once released nobody can find them, yet they take room
until they are evicted. What a sequence leaves of them is one key of its own. With units of one block all of this is
what ``BlockPool`` does; in larger ones a unit leaves the cache with its first evicted block.

Who refers to a unit refers to all before it, so along a prompt the counts never rise: the idle part of a match is its
tail.

Without hashes (``unit_blocks`` 0) nothing can ever be found again, so that what is idle is as good as free: all that is
left is one counter, and no work is done per block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from twinpool.workers.eviction import EvictionOrder

NEWS_EVERY_S = 0.020  # changes of the cache are told at multiples of this (workers/reporter.py)
KvSink = Callable[[int, list[int], list[int], float], None]


def next_news(now: float) -> float:
    """When a worker sends what changed at ``now``: at the next multiple of 20 ms, never at once (reporter.py)."""
    slot = math.floor(now / NEWS_EVERY_S) + 1
    when = slot * NEWS_EVERY_S
    return when if when > now else (slot + 1) * NEWS_EVERY_S  # the quotient was rounded down


class Memory:
    """See the module's docstring. ``now`` is to be set before anything that may change the cache.

    ``tell(worker, stored, removed, due)`` is called at the first change that is due then. Both lists are *net* and go
    on growing until ``due``, which is always later than now: read them when that has come.
    """

    __slots__ = (
        "_anonymous", "_due", "_fresh", "_gone", "_idle", "_idle_blocks", "_refs", "_remnant", "_removed", "_stored",
        "_tails", "_tell", "_worker", "blocks", "free", "now", "unit_blocks",
    )  # fmt: skip

    def __init__(self, worker: int, blocks: int, unit_blocks: int, tell: KvSink) -> None:
        self.blocks = blocks
        self.unit_blocks = unit_blocks
        self.free = blocks
        self.now = 0.0
        self._worker = worker
        self._tell = tell
        self._refs: dict[int, int] = {}  # hash of each cached unit -> sequences that refer to it
        self._idle = EvictionOrder()  # hashes, and negative keys of anonymous blocks
        self._idle_blocks = 0  # of those in ``_idle``, and the remnant
        self._remnant = 0  # blocks left of the key that was evicted last: they go before all others
        self._tails: dict[int, int] = {}  # negative key -> anonymous idle blocks
        self._anonymous = 0  # the last of these keys
        self._due = -1.0  # the changes in hand are told then
        self._stored: list[int] = []
        self._removed: list[int] = []
        self._fresh: set[int] = set()  # the same as the two lists
        self._gone: set[int] = set()

    @property
    def available(self) -> int:
        """Blocks that nobody refers to."""
        return self.free + self._idle_blocks

    @property
    def cached_units(self) -> int:
        """Units that can be found."""
        return len(self._refs)

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
        refs = self._refs
        held = shared = 0
        for key in hashes:
            if held == limit:
                break
            count = refs.get(key, -1)
            if count < 0:
                break
            held += 1
            if count:
                shared += 1
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
                for key in again:
                    refs[key] = 1
        self.allocate(total - held * size)
        return held

    def allocate(self, count: int) -> None:
        """Takes blocks, evicting idle ones when out of free ones. There must be so many."""
        if count <= self.free:
            self.free -= count
            return
        count -= self.free
        self.free = 0
        assert count <= self._idle_blocks, f"{count} blocks wanted, {self._idle_blocks} idle"
        self._idle_blocks -= count
        count -= self._remnant
        while count > 0:
            key = self._idle.pop()
            if key < 0:
                count -= self._tails.pop(key)
            else:
                del self._refs[key]
                self._note_removed(key)
                count -= self.unit_blocks
        self._remnant = -count

    def seal(self, hashes: list[int], first: int, end: int) -> int:
        """Units ``first`` to ``end - 1`` of a sequence are final: they enter the cache.

        Returns how many blocks that makes needless, because others had the same units there before: the caller gives
        them back with ``give``.
        """
        refs = self._refs
        new: list[int] = []
        double = 0
        for i in range(first, end):
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
            double += self.unit_blocks
        if new:
            self._note_stored(new)
        return double

    def give(self, blocks: int) -> None:
        """These hold nothing that anybody could want."""
        self.free += blocks

    def release(self, hashes: list[int], sealed: int, full: int, blocks: int) -> None:
        """Gives back all of a sequence: its first ``sealed`` units, anonymous blocks up to ``full``, and the rest."""
        size = self.unit_blocks
        if not size:
            self.free += blocks
            return
        tail = full - sealed * size
        self.free += blocks - full
        idle = self._idle
        if tail > 0:
            self._anonymous -= 1
            self._tails[self._anonymous] = tail
            self._idle_blocks += tail
            idle.add(self._anonymous)
        refs = self._refs
        i = sealed - 1
        while i >= 0:
            key = hashes[i]
            count = refs[key] - 1
            refs[key] = count
            if count:
                break
            idle.add(key)
            i -= 1
        self._idle_blocks += (sealed - 1 - i) * size
        for j in range(i):
            refs[hashes[j]] -= 1

    def forget(self) -> None:
        """The worker is dead: what it has not told yet nobody hears."""
        if self.now < self._due:
            self._stored.clear()
            self._removed.clear()

    # --- news ----------

    def _open(self) -> None:
        """Where the changes in hand are told already, begin the next ones."""
        if self.now < self._due:
            return
        # A worker never reports at once (workers/reporter.py), so lists that were read are not written to any more.
        self._due = next_news(self.now)
        self._stored, self._removed = [], []
        self._fresh, self._gone = set(), set()
        self._tell(self._worker, self._stored, self._removed, self._due)

    def _note_stored(self, keys: list[int]) -> None:
        self._open()
        gone = self._gone
        if gone:
            again = [key for key in keys if key in gone]
            for key in again:
                gone.discard(key)
                self._removed.remove(key)
            if again:
                keys = [key for key in keys if key not in again]
        self._stored += keys
        self._fresh.update(keys)

    def _note_removed(self, key: int) -> None:
        self._open()
        if key in self._fresh:
            self._fresh.discard(key)
            self._stored.remove(key)
        else:
            self._gone.add(key)
            self._removed.append(key)
