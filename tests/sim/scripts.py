"""A small random cluster of emulated workers: a router that only does what a script says, and everything they tell.

The same script runs with any kind of worker. What it decides depends on its seed, on the attempt and on what was told,
never on times, so that two kinds of workers that do the same are asked the same.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.router.request import Request
from twinpool.sim.gaps import Runs


class AnyWorker(Protocol):
    """SimWorker or SteppedWorker."""

    runs: Runs

    @property
    def free_blocks(self) -> int: ...
    @property
    def cached_units(self) -> int: ...
    def take(self, action: ev.Action, now: float) -> None: ...
    def wake(self, now: float) -> None: ...
    def pulled(self, attempt: int, first: int, count: int, nbytes: int, seconds: float, now: float) -> None: ...
    def stop(self, now: float) -> None: ...
    def stall(self, now: float, seconds: float) -> None: ...


@dataclass(frozen=True)
class Shape:
    """What a script is made of."""

    seed: int
    cost: Cost
    workers: int = 2
    requests: int = 30
    seconds: float = 4.0  # in which they arrive
    blocks: int = 40
    block_size: int = 4
    unit_tokens: int = 4
    chunk_tokens: int = 16
    max_batch: int = 8
    prompts: tuple[int, int] = (1, 60)
    outputs: tuple[int, int] = (1, 60)
    itls: tuple[float, ...] = (0.02, 0.05, math.inf)
    slack: tuple[int, int] = (1, 30)  # output tokens reserved for
    families: int = 4  # prompts of one share their beginning
    faults: float = 0.3  # of requests that are cancelled, and of workers that stall
    deaths: int = 1
    latency_s: float = 0.0005
    error: float = 0.0  # of prompt work: sigma of its logarithm
    give_up_after: int = 6  # attempts
    eviction: str = "lru"
    returning: int = 0  # every so many-th request says that its conversation comes back; 0: none


@dataclass
class Part:
    """One attempt, as the script sees it."""

    request: Request
    kind: str
    prefill: int
    decode: int
    held: int = -1  # blocks found by the reservation; -1: none
    verified: int = 0
    first: bool = False
    asked: bool = False  # SendDecode was sent
    ready: list[ev.BlocksReady] = field(default_factory=list)


class Script:
    """See the module's docstring; a ``Net``. ``log`` has (time, what was told), ``kv`` the cache changes."""

    def __init__(self, shape: Shape, make: Callable[..., AnyWorker]) -> None:
        self.shape = shape
        self.log: list[tuple[float, ev.Event]] = []
        self.kv_log: list[tuple[int, float, list[int], list[int]]] = []
        self.spans: dict[int, list[tuple[int, int, int]]] = {}
        work = random.Random(shape.seed)
        self.work = [math.exp(work.gauss(0.0, shape.error)) for _ in range(shape.requests)] if shape.error else []
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.wakes: dict[int, float] = {}
        self.seq = 0
        self.now = 0.0
        self.woken = 0
        self.parts: dict[int, Part] = {}
        self.attempt = 0
        rng = random.Random(shape.seed)
        self.requests = [self._request(rid, rng) for rid in range(shape.requests)]
        self.outputs = [rng.randint(*shape.outputs) for _ in self.requests]
        for request, output in zip(self.requests, self.outputs, strict=True):
            request.max_tokens = output + rng.choice([0, 0, 5])
        self.workers: dict[int, AnyWorker] = {
            i: make(
                i, self, shape.cost, blocks=shape.blocks, block_size=shape.block_size, unit_tokens=shape.unit_tokens,
                block_bytes=1000, chunk_tokens=shape.chunk_tokens, max_batch=shape.max_batch,
                eviction=shape.eviction,
            )
            for i in range(shape.workers)
        }  # fmt: skip
        self.all_workers = dict(self.workers)
        self._plan_faults(rng)

    def _request(self, rid: int, rng: random.Random) -> Request:
        shape = self.shape
        prompt = rng.randint(*shape.prompts)
        family, common = rng.randrange(shape.families), rng.randint(0, prompt)
        unit = shape.unit_tokens
        hashes = []
        for i in range(prompt // unit if unit else 0):
            shared = (i + 1) * unit <= common
            hashes.append(family << 20 | i if shared else 1 << 40 | rid << 20 | i)
        itl_s, rank = rng.choice(shape.itls), rng.choice([0, 0, 1, 2])
        self.push(rng.uniform(0.0, shape.seconds), self._begin, rid)
        returns = shape.returning > 0 and rid % shape.returning == 0
        return Request(
            rid, prompt, 1, hashes, ttft_s=1.0, ttft_factor=0.0, itl_s=itl_s, rank=rank, returns=returns
        )  # fmt: skip

    def _plan_faults(self, rng: random.Random) -> None:
        shape = self.shape
        for rid in range(shape.requests):
            if rng.random() < shape.faults:
                self.push(rng.uniform(0.0, 1.5 * shape.seconds), self._cancel, rid)
        for worker in range(shape.workers):
            if rng.random() < shape.faults:
                for _ in range(rng.randint(1, 3)):
                    seconds = rng.choice([0.0001, 0.01, 0.3])
                    self.push(rng.uniform(0.0, shape.seconds), self._stall, worker, seconds)
        for worker in rng.sample(range(shape.workers), min(shape.deaths, shape.workers - 1)):
            self.push(rng.uniform(0.5, 1.5) * shape.seconds, self._die, worker)

    # --- Net ----------

    def push(self, when: float, call: Callable[..., None], *args: Any) -> None:
        self.seq += 1
        heapq.heappush(self.heap, (when, self.seq, call, args))

    def tell(self, event: ev.Event, now: float) -> None:
        assert now == self.now
        self.log.append((now, event))
        self.push(now + self.shape.latency_s, self._hear, event)

    def wake_at(self, worker: int, when: float) -> None:
        assert when >= self.now
        self.wakes[worker] = when
        if when < math.inf:
            self.push(when, self._wake, worker, when)

    def link(self, sender: int, receiver: int, nbytes: int, now: float) -> float:
        return now + nbytes / 1e6 + random.Random(nbytes * 7 + round(now * 1e4)).choice([0.0, 0.0, 0.02])

    def transferred(
        self, worker: int, attempt: int, first: int, count: int, nbytes: int, started: float, when: float
    ) -> None:
        self.push(when, self._pulled, worker, attempt, first, count, nbytes, when - started)

    def span(self, request: Request, worker: int, lo: int, hi: int) -> None:
        assert 0 <= lo < hi <= len(self.all_workers[worker].runs)
        self.spans.setdefault(request.rid, []).append((worker, lo, hi))

    def kv(self, worker: int, stored: list[int], removed: list[int], due: float) -> None:
        assert due > self.now
        self.push(due, self._kv_due, worker, stored, removed, due)

    # --- running ----------

    def run(self) -> Script:
        while self.heap:
            self.now, _, call, args = heapq.heappop(self.heap)
            call(*args)
        return self

    def said_by(self, worker: int) -> list[tuple[float, ev.Event]]:
        """What one worker told, in order."""
        return [(when, event) for when, event in self.log if getattr(event, "worker", -1) == worker]

    def gaps(self, rid: int) -> list[float]:
        """All gaps of a request that are in spans, in order of time within each worker."""
        return [
            gap for worker, lo, hi in self.spans.get(rid, []) for gap in self.all_workers[worker].runs.expand(lo, hi)
        ]

    def _wake(self, worker: int, when: float) -> None:
        if self.wakes.get(worker) == when and worker in self.workers:
            self.wakes[worker] = math.inf
            self.woken += 1
            self.workers[worker].wake(when)

    def _pulled(self, worker: int, attempt: int, first: int, count: int, nbytes: int, seconds: float) -> None:
        if worker in self.workers:
            self.workers[worker].pulled(attempt, first, count, nbytes, seconds, self.now)

    def _kv_due(self, worker: int, stored: list[int], removed: list[int], due: float) -> None:
        if stored or removed:
            self.kv_log.append((worker, due, sorted(stored), sorted(removed)))

    def _deliver(self, action: Any) -> None:
        if action.worker in self.workers:
            self.workers[action.worker].take(action, self.now)

    def _send(self, action: ev.Action) -> None:
        self.push(self.now + self.shape.latency_s, self._deliver, action)

    # --- the router ----------

    def _begin(self, rid: int) -> None:
        request = self.requests[rid]
        if request.ended or request.attempts >= self.shape.give_up_after or not self.workers:
            return
        request.attempts += 1
        self.attempt += 1
        attempt = rid * 100 + request.attempts  # the same in every run
        request.begin_attempt(attempt)
        rng = random.Random(attempt * 31 + self.shape.seed)
        here = sorted(self.workers)
        prefill = rng.choice(here)
        others = [worker for worker in here if worker != prefill]
        kind = rng.choice(["split", "split", "local", "same", "used"] if others else ["local", "same", "used"])
        part = Part(request, kind, prefill, rng.choice(others) if kind == "split" else prefill)
        self.parts[attempt] = part
        if kind in ("split", "used"):
            self._reserve(attempt)
        else:
            self._prefill(attempt)

    def _reserve(self, attempt: int) -> None:
        part = self.parts.get(attempt)
        if part is not None:
            rng = random.Random(attempt)
            tokens = part.request.length + rng.randint(*self.shape.slack)
            blocks = -(-tokens // self.shape.block_size)
            self._send(ev.SendReserve(part.decode, part.request, attempt, blocks))

    def _prefill(self, attempt: int) -> None:
        part = self.parts.get(attempt)
        if part is not None:
            local = part.kind in ("local", "used")
            guess = random.Random(attempt).choice([0, 0, self.shape.block_size])
            transfer = part.kind == "split"
            self._send(ev.SendPrefill(part.prefill, part.request, attempt, local, transfer, guess))

    def _hear(self, event: Any) -> None:
        if isinstance(event, ev.Reported) or event.worker not in self.workers:
            return
        part = self.parts.get(event.attempt)
        if part is None or event.worker not in (part.prefill, part.decode):
            return
        request = part.request
        match event:
            case ev.Reserved():
                part.held = min(event.held, (request.length - 1) // self.shape.block_size)
                if part.kind == "used" or not part.first:
                    self._prefill(event.attempt)
                self._pull(event.attempt, part)
            case ev.NoRoom():
                self._lose(event.attempt, part)
            case ev.BlocksReady():
                part.ready.append(event)
                self._pull(event.attempt, part)
            case ev.BlocksVerified():
                part.verified += event.count
                self._check(event.attempt, part)
            case ev.Emitted():
                request.emitted += event.count
                if not part.first:
                    part.first = True
                    self._go_on(event.attempt, part)
            case ev.Ended():
                request.ended = event.reason
                assert request.emitted == self.outputs[request.rid]
                self._over(event.attempt, part, event.worker)
            case ev.AttemptLost():
                self._lose(event.attempt, part)

    def _pull(self, attempt: int, part: Part) -> None:
        for ready in part.ready:
            skip = min(ready.count, max(0, part.held - ready.first))
            if skip < ready.count:
                blocks = ready.blocks[4 * skip :]
                self._send(ev.SendPull(part.decode, attempt, part.prefill, ready.first + skip, blocks, b""))
        part.ready.clear()

    def _go_on(self, attempt: int, part: Part) -> None:
        if part.kind in ("split", "same"):
            self._send(ev.SendDecode(part.decode, part.request, attempt))
            self._check(attempt, part)

    def _check(self, attempt: int, part: Part) -> None:
        missing = part.request.blocks(self.shape.block_size) - part.held - part.verified
        if part.kind == "split" and missing <= 0 and part.first and not part.asked:
            part.asked = True
            self._send(ev.SendRelease(part.prefill, attempt))

    def _lose(self, attempt: int, part: Part) -> None:
        del self.parts[attempt]
        for worker in sorted({part.prefill, part.decode}):
            self._send(ev.SendCancel(worker, attempt))
        part.request.begin_attempt(0)
        if self.outputs[part.request.rid] > part.request.emitted:
            self.push(self.now + random.Random(attempt).uniform(0.0, 0.5), self._begin, part.request.rid)

    def _over(self, attempt: int, part: Part, worker: int) -> None:
        del self.parts[attempt]
        for other in {part.prefill, part.decode} - {worker}:
            self._send(ev.SendCancel(other, attempt))

    def _cancel(self, rid: int) -> None:
        request = self.requests[rid]
        attempt = request.attempt
        part = self.parts.pop(attempt, None)
        if not request.ended:
            request.ended = "cancelled"
        if part is not None:
            for worker in sorted({part.prefill, part.decode}):
                self._send(ev.SendCancel(worker, attempt))

    def _stall(self, worker: int, seconds: float) -> None:
        if worker in self.workers:
            self.workers[worker].stall(self.now, seconds)

    def _die(self, worker: int) -> None:
        gone = self.workers.pop(worker)
        gone.stop(self.now)
        for attempt, part in list(self.parts.items()):
            if worker in (part.prefill, part.decode):
                self._lose(attempt, part)
