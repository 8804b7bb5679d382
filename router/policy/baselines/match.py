"""How much of a prompt a worker has cached: by its own events (``KvIndex``), or by what was sent to it (``Memory``)."""

from __future__ import annotations

from twinpool.router.kv_index import KvIndex, Stair
from twinpool.router.worker import Worker


class Memory:
    """A router's own guess of what workers have cached: every prompt sent there, least recently used out first.

    For originals that hear nothing from their workers. A prompt counts from the moment it is sent, which events cannot
    do; what the worker has dropped meanwhile counts too. ``tokens`` is the size of the guess, per worker.
    """

    __slots__ = ("_index", "_recent", "_seen", "tokens")

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._index = KvIndex()
        self._recent: dict[int, dict[int, None]] = {}  # worker -> its hashes, least recently used first
        self._seen: dict[int, Worker] = {}  # by id, to notice that an id was given to another worker

    def stairs(self, hashes: list[int], workers: list[Worker]) -> list[Stair]:
        """As ``KvIndex.stairs``; what is known of workers that were replaced is forgotten."""
        for worker in workers:
            if self._seen.get(worker.id, worker) is not worker:
                self._index.forget(worker.id)
                self._recent.pop(worker.id, None)
            self._seen[worker.id] = worker
        return self._index.stairs(hashes)

    def sent(self, worker: Worker, hashes: list[int]) -> None:
        """A prompt goes to a worker. Deepest block first, so that a prefix never goes before what follows it."""
        recent = self._recent.setdefault(worker.id, {})
        stored: list[int] = []
        for key in reversed(hashes):
            if key in recent:
                del recent[key]
            else:
                stored.append(key)
            recent[key] = None
        removed: list[int] = []
        room = self.tokens // worker.index_tokens
        while len(recent) > room:
            oldest = next(iter(recent))
            del recent[oldest]
            removed.append(oldest)
        # The index clears first: what was stored and dropped at once must not stay.
        gone = set(removed)
        kept = [key for key in stored if key not in gone]
        self._index.change(worker.id, kept, removed, False)

    def check_integrity(self) -> None:
        """Index and lists agree, or AssertionError."""
        self._index.check_integrity()
        for worker, recent in self._recent.items():
            for key in recent:
                assert self._index.depth(worker, [key]) == 1, f"worker {worker}: {key} is not in the index"
        assert len(self._index) == len({key for recent in self._recent.values() for key in recent})
