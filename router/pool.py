"""The core's picture of its workers: roles, capacity, what is booked there, and when each will be free. Pure.

Bookings are made at decision time, not when load is reported: otherwise a burst herds onto one worker between two
reports. Reports only correct what cannot be booked (free blocks, running batch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from twinpool.router.events import WorkerUp

PROBE_TOKENS = 512  # by which two measurements of one device are compared
PACE_WEIGHT = 0.1  # of a new observation
OUTLIER = 4.0
MEMORY_LIMIT = 0.97  # share of a worker's KV tokens that may be booked


class Commitment:
    """Prefill work committed to a worker and not finished: predicted seconds left, and of which tokens."""

    __slots__ = ("cached", "seconds", "tokens")

    def __init__(self, seconds: float, tokens: int, cached: int) -> None:
        self.seconds = seconds
        self.tokens = tokens  # uncached, left to compute
        self.cached = cached


class Pace:
    """How much slower than its cost model a kind of device really is: running geometric means of actual/predicted."""

    __slots__ = ("decode", "prefill")

    def __init__(self) -> None:
        self.prefill = 1.0
        self.decode = 1.0

    @staticmethod
    def blend(pace: float, actual: float, predicted: float) -> float:
        """``pace`` with one more step counted in; a single outlier moves it by at most a factor."""
        if actual <= 0.0 or predicted <= 0.0:
            return pace
        ratio = min(OUTLIER, max(1.0 / OUTLIER, actual / predicted))
        return float(min(OUTLIER, max(1.0 / OUTLIER, pace * (ratio / pace) ** PACE_WEIGHT)))


class Worker:
    """One worker. ``booked`` counts KV tokens promised to attempts, whatever the worker has allocated so far."""

    __slots__ = (
        "attempts", "block_bytes", "block_size", "blocks", "booked", "chunk_tokens", "context", "cost",
        "decodes", "device", "draining", "full", "held", "id", "itl_s", "max_batch", "name", "pace", "prefills",
        "roles", "since",
    )  # fmt: skip

    def __init__(self, up: WorkerUp) -> None:
        self.id = up.worker
        self.name = up.name
        self.roles = up.roles
        self.blocks = up.blocks
        self.block_size = up.block_size
        self.block_bytes = up.block_bytes
        self.device = up.device
        self.cost = up.cost
        self.pace = Pace()
        self.chunk_tokens = up.chunk_tokens
        self.max_batch = up.max_batch
        self.draining = False
        self.full = False  # it said NoRoom: nothing new until it reports
        self.prefills: dict[int, Commitment] = {}  # attempt -> work, in commit order
        self.decodes: dict[int, int] = {}  # attempt -> context tokens when it joined
        self.held: dict[int, int] = {}  # attempt -> booked KV tokens
        self.attempts: dict[int, int] = {}  # attempt -> rid, everything this worker has to do with
        self.booked = 0
        self.context = 0
        self.since = 0.0  # when the first of ``prefills`` was last known to have ``seconds`` left
        self.itl_s: dict[int, float] = {}  # attempt -> SLO of a decoding sequence

    @property
    def capacity(self) -> int:
        """KV tokens."""
        return self.blocks * self.block_size

    @property
    def batch(self) -> int:
        """Sequences that decode here or are booked to."""
        return len(self.decodes)

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Predicted seconds of a prompt alone, corrected by what was seen."""
        return self.pace.prefill * self.cost.prefill(uncached, cached, self.chunk_tokens)

    def decode_s(self, batch: int, context: int) -> float:
        """Predicted seconds of a decode step, corrected by what was seen."""
        return self.pace.decode * self.cost.decode(batch, context)

    def chunk_within(self, seconds: float, cached: int) -> int:
        """Prompt tokens that a step beside the present decodes can take within ``seconds``."""
        seconds /= max(self.pace.prefill, self.pace.decode)
        return min(self.chunk_tokens, self.cost.largest_chunk(seconds, cached, self.batch, self.context))

    def saw_prefill(self, uncached: int, cached: int, seconds: float) -> None:
        """A prompt that had the worker for itself took so long."""
        predicted = self.cost.prefill(uncached, cached, self.chunk_tokens)
        self.pace.prefill = Pace.blend(self.pace.prefill, seconds, predicted)

    def saw_decode(self, batch: int, context: int, seconds: float) -> None:
        """A step of decodes alone took so long."""
        self.pace.decode = Pace.blend(self.pace.decode, seconds, self.cost.decode(batch, context))

    def free_at(self, now: float) -> float:
        """When the committed prefill work is predicted to end; ``now`` if there is none."""
        if not self.prefills:
            return now
        total = sum(work.seconds for work in self.prefills.values())
        head = next(iter(self.prefills.values()))
        return now + max(0.0, total - min(max(0.0, now - self.since), head.seconds))

    def free_within(self, horizon: float) -> float:
        """When, without news, ``free_at`` comes within ``horizon`` seconds; infinity if only news can bring that.

        Unlike ``free_at`` this does not move while work takes longer than predicted.
        """
        first, *others = [work.seconds for work in self.prefills.values()] or [math.inf]
        rest = sum(others)
        return self.since + first + rest - horizon if rest <= horizon else math.inf

    def commit_prefill(self, attempt: int, seconds: float, tokens: int, cached: int, now: float) -> None:
        """Predicted work of one prompt joins the end of the line."""
        if not self.prefills:
            self.since = now
        self.prefills[attempt] = Commitment(seconds, tokens, cached)

    def progress(self, attempt: int, left: int, cached: int, now: float) -> None:
        """The worker reports ``left`` uncached tokens of a prompt."""
        work = self.prefills.get(attempt)
        if work is not None:
            work.tokens = left
            work.cached = cached
            work.seconds = self.prefill_s(left, cached)
            if attempt == next(iter(self.prefills)):
                self.since = now

    def end_prefill(self, attempt: int, now: float) -> None:
        """The prompt is computed, or nobody wants it any more. Idempotent."""
        if attempt not in self.prefills:
            return
        if attempt == next(iter(self.prefills)):
            self.since = now
        del self.prefills[attempt]

    def book(self, attempt: int, rid: int, tokens: int) -> None:
        """Promise KV room for an attempt; replaces an earlier promise to the same one."""
        self.booked += tokens - self.held.get(attempt, 0)
        self.held[attempt] = tokens
        self.attempts[attempt] = rid

    def join_decode(self, attempt: int, context: int, itl_s: float) -> None:
        """A sequence decodes here, or will."""
        self.decodes[attempt] = context
        self.context += context
        self.itl_s[attempt] = itl_s

    def forget(self, attempt: int, now: float) -> bool:
        """Drop everything of an attempt; whether there was anything. Idempotent."""
        if self.attempts.pop(attempt, None) is None:
            return False
        self.booked -= self.held.pop(attempt, 0)
        context = self.decodes.pop(attempt, None)
        if context is not None:
            self.context -= context
        self.itl_s.pop(attempt, None)
        self.end_prefill(attempt, now)
        self.full = False
        return True

    def could_fit(self, tokens: int) -> bool:
        """Whether that many KV tokens could be booked if nothing else was."""
        return tokens <= MEMORY_LIMIT * self.capacity

    def fits(self, tokens: int) -> bool:
        """Whether that many more KV tokens may be booked."""
        return not self.full and self.booked + tokens <= MEMORY_LIMIT * self.capacity

    def tightest_itl(self, itl_s: float) -> float:
        """The smallest ITL SLO among the sequences here and ``itl_s``."""
        return min(itl_s, min(self.itl_s.values(), default=itl_s))

    def check_integrity(self) -> None:
        """Sums match their parts, or AssertionError."""
        assert self.booked == sum(self.held.values()), f"{self.name}: booked {self.booked} != {sum(self.held.values())}"
        assert self.context == sum(self.decodes.values()), f"{self.name}: context {self.context}"
        keys = set(self.attempts)
        for table in (self.held, self.decodes, self.prefills, self.itl_s):
            assert set(table) <= keys, f"{self.name}: {set(table) - keys} without an attempt"


class Pool:
    """All workers of a cell, by id."""

    __slots__ = ("workers",)

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}

    def of(self, role: str) -> Iterator[Worker]:
        """Workers of one pool that may take new work, in order of id."""
        for _, worker in sorted(self.workers.items()):
            if role in worker.roles and not worker.draining:
                yield worker

    def add(self, worker: Worker) -> None:
        """A worker comes. Equal devices share one pace and the fastest measurement: noise only makes a step slower."""
        self.workers[worker.id] = worker
        alike = [other for other in self.workers.values() if other.device == worker.device]
        best = min((other.cost for other in alike), key=lambda cost: cost.prefill(PROBE_TOKENS, 0, PROBE_TOKENS))
        for other in alike:
            other.cost, other.pace = best, alike[0].pace

    def has(self, role: str) -> bool:
        """Whether any worker of that pool may take new work."""
        return any(True for _ in self.of(role))

    def largest(self, role: str) -> int:
        """KV tokens of the largest worker of a pool; 0 without one."""
        return max((worker.capacity for worker in self.of(role)), default=0)
