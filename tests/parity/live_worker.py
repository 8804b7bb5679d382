"""A worker of the live code on a virtual clock, the way of its KV bytes, and the prompts it is asked for."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from tests.parity.virtual import VirtualLoop

from twinpool.cost import LLAMA_70B_H100_TP4, StepCost
from twinpool.errors import TransferError
from twinpool.proto import frames
from twinpool.router.policy import LeastSeconds, Policy
from twinpool.router.state import Limits
from twinpool.sim.links import Links
from twinpool.sim.memory import news_phase
from twinpool.tokenizer import Tokenizer
from twinpool.workers.blocks import BlockPool
from twinpool.workers.engine.base import ModelInfo, Row, Sampled
from twinpool.workers.engine.emulated import FIRST_ORDINARY, SLOT, EmulatedEngine
from twinpool.workers.link import RouterLink, connect
from twinpool.workers.output import Output
from twinpool.workers.scheduler import Scheduler, Step
from twinpool.workers.scheduler import Sequence as WorkerSequence
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.worker import Parts, Worker

ADDRESS = "router:1"
Tokens64 = np.ndarray[Any, np.dtype[np.uint64]]


class Requests(Protocol):
    """What is used of a trace (``twinpool.sim.trace.Trace``)."""

    @property
    def block_tokens(self) -> int:
        """Prompt tokens that one hash id stands for; 0: no hashes."""
        ...

    @property
    def arrival(self) -> array[float]:
        """Seconds, sorted."""
        ...

    @property
    def prompt(self) -> array[int]:
        """Tokens."""
        ...

    @property
    def output(self) -> array[int]:
        """Tokens."""
        ...

    @property
    def after(self) -> array[int] | None:
        """The request that each one follows, -1: none."""
        ...

    @property
    def think(self) -> array[float] | None:
        """Seconds from the end of that one, if that is not before its own arrival."""
        ...

    @property
    def returns(self) -> list[bool] | None:
        """Whose conversations are said to come back."""
        ...

    def block_hashes(self, i: int) -> list[int]:
        """Ids of the full blocks of a prompt."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A cluster and what happens to it; seconds, bytes, tokens."""

    roles: tuple[tuple[str, ...], ...]  # of each worker
    blocks: int = 26_000  # KV blocks of a worker
    block_size: int = 16
    token_bytes: int = 327_680  # of KV
    cost: StepCost = LLAMA_70B_H100_TP4
    chunk_tokens: int = 2048
    max_batch: int = 256
    eviction: str = "lru"
    latency_s: float = 0.0005
    link_bytes_per_s: float = 25e9
    setup_s: float = 0.0  # of each transfer, after its bytes
    ttft_s: float = 1.0
    ttft_factor: float = 2.0
    itl_s: float = 0.05
    policy: Callable[[], Policy] = LeastSeconds
    limits: Limits = field(default_factory=lambda: Limits(max_queue=1 << 20))
    heartbeat_s: float = 0.5
    cancels: tuple[tuple[int, float], ...] = ()  # (request, when its client goes)
    deaths: tuple[tuple[int, float], ...] = ()  # (worker, when its link is cut)
    drains: tuple[tuple[int, float], ...] = ()  # (worker, when it is drained)
    limit_s: float = 100_000.0  # of the virtual clock
    work: tuple[float, ...] = ()  # by request, how many times as long as predicted its prompt takes; empty: once


class Fabric:
    """KV bytes between the pools of all workers, as fast as the simulator's links."""

    def __init__(self, loop: VirtualLoop, settings: Settings) -> None:
        self.loop = loop
        self.block_bytes = settings.block_size * settings.token_bytes
        self.setup_s = settings.setup_s
        self.links = Links([settings.link_bytes_per_s] * len(settings.roles))
        self.ends: dict[str, End] = {}


class End:
    """One worker's end of the fabric. Implements ``KVTransfer``."""

    def __init__(self, fabric: Fabric, number: int, name: str, pool: HostPool) -> None:
        self.addresses = {"virtual": name}
        self.secret = b""
        self._fabric = fabric
        self._number = number
        self._pool = pool
        self._alive = True
        self._leaving: dict[asyncio.Future[None], None] = {}  # who waits for blocks of ours
        fabric.ends[name] = self

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int], timeout_s: float
    ) -> Pulled:
        """See ``KVTransfer``: the bytes are copied, and compared, at the moment the last one is there."""
        sender, loop = self._fabric.ends[peer.worker], self._fabric.loop
        nbytes = len(source) * self._fabric.block_bytes
        started = loop.time()
        done = self._fabric.links.book(sender._number, self._number, nbytes, started) + self._fabric.setup_s
        await sender._give(min(done, started + timeout_s))
        if done > started + timeout_s:
            raise TransferError(f"{nbytes} bytes take longer than {timeout_s} s", reason="TIMEOUT")
        self._pool.rows[list(target)] = sender._pool.rows[list(source)]
        found = self._pool.checksums(target)
        bad = tuple(i for i, (is_, said) in enumerate(zip(found, sums, strict=True)) if is_ != said)
        return Pulled("virtual", nbytes, done - started, bad)

    async def _give(self, when: float) -> None:
        """Return when the link is through, raise TransferError when this end dies before."""
        waiter: asyncio.Future[None] = self._fabric.loop.create_future()
        timer = self._fabric.loop.call_at(when, _give_way, waiter)
        self._leaving[waiter] = None
        if not self._alive:
            self.die()
        try:
            await waiter
        finally:
            timer.cancel()
            del self._leaving[waiter]

    def die(self) -> None:
        """Nothing comes from here any more."""
        self._alive = False
        for waiter in self._leaving:
            if not waiter.done():
                waiter.set_exception(TransferError("the peer is gone", reason="PEER"))

    def drop(self, worker: str) -> None:
        """No channels here."""

    async def close(self) -> None:
        """Nothing to close."""


def _give_way(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class UnevenEngine(EmulatedEngine):
    """What prompts add to a step takes as many times as long as ``factors`` says, by prompt, weighted by tokens."""

    scheduler: Scheduler
    factors: dict[bytes, float]

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """See ``Engine``."""
        step = self.scheduler._step
        assert step is not None
        self._speed = step.predicted_s / self._true_s(step)
        return await super().run(rows)

    def _true_s(self, step: Step) -> float:
        if not step.chunks:
            return step.predicted_s
        work = sum(chunk.count * self._factor(chunk.sequence) for chunk in step.chunks)
        stretch = work / sum(chunk.count for chunk in step.chunks)
        return step.alone_s + (step.predicted_s - step.alone_s) * stretch

    def _factor(self, sequence: WorkerSequence) -> float:
        output = sequence.payload
        assert isinstance(output, Output)
        return self.factors[output.tokens[: output.sample.prompt_len].tobytes()]


class LiveWorker:
    """A worker as ``workers/main.py`` puts it together, with an emulated engine on the virtual clock."""

    def __init__(
        self, loop: VirtualLoop, fabric: Fabric, settings: Settings, number: int, tokenizer: Tokenizer,
        factors: dict[bytes, float],
    ) -> None:  # fmt: skip
        size = settings.block_size
        self.name = f"w{number}"
        self.pool = HostPool(settings.blocks, size * SLOT.itemsize)
        info = ModelInfo("parity", "parity", "bfloat16", "stand-in", size, self.pool.block_bytes, tokenizer.vocab_size,
                         frames.MAX_CONTEXT, tuple(tokenizer.eos_ids))  # fmt: skip
        make = UnevenEngine if factors else EmulatedEngine
        engine = make(info, self.pool.data, settings.cost, 1.0, loop.time, loop.sleep_until)
        books = BlockPool(settings.blocks, size, settings.eviction)
        self.scheduler = Scheduler(books, settings.cost, settings.chunk_tokens, settings.max_batch)
        if isinstance(engine, UnevenEngine):
            engine.scheduler, engine.factors = self.scheduler, factors
        self.end = End(fabric, number, self.name, self.pool)
        parts = Parts(engine, self.scheduler, self.pool, self.end, tokenizer)
        phase = news_phase(number)
        self.worker = Worker(parts, self._send, self._flush, lambda: loop.time() - phase)
        self.hello = _hello(settings, info, number, self.name, self.end.addresses)
        self._link: RouterLink | None = None

    def _send(self, frame: frames.Frame) -> None:
        if self._link is not None:
            self._link.send(frame)

    def _flush(self) -> None:
        if self._link is not None:
            self._link.flush()

    def _joined(self, link: RouterLink) -> None:
        self._link = link

    async def live(self) -> None:
        """Serve one router until the link is gone, then free everything and stay away."""
        steps = asyncio.create_task(self.worker.run())
        link = await connect(ADDRESS, self.hello, self.worker.take, self._joined)
        await asyncio.wait((link.closed, steps), return_when=asyncio.FIRST_COMPLETED)
        if steps.done():
            steps.result()  # whatever ended it
        self.end.die()
        self.worker.reset()
        await steps  # for ever: until the run is over

    def check_idle(self) -> None:
        """Nothing is held for anybody and every block is accounted for, or AssertionError."""
        assert self.worker.idle(), f"{self.name} is not idle"
        self.scheduler.check_integrity()
        free = self.scheduler.pool.free_blocks
        assert free == self.scheduler.pool.num_blocks, f"{self.name}: {free} blocks are free"


def _hello(settings: Settings, info: ModelInfo, number: int, name: str, addresses: dict[str, str]) -> frames.Hello:
    return frames.Hello(
        version=frames.VERSION,
        worker=name,
        epoch=number,
        token="",
        roles=settings.roles[number],
        model=frames.Model(
            name=info.name,
            fingerprint=info.fingerprint,
            dtype=info.dtype,
            layout=info.layout,
            block_size=info.block_size,
            block_bytes=settings.block_size * settings.token_bytes,
            vocab_size=info.vocab_size,
            max_context=info.max_context,
            eos_ids=info.eos_ids,
        ),
        blocks=settings.blocks,
        device="emulated",
        cost=settings.cost,
        chunk_tokens=settings.chunk_tokens,
        max_batch=settings.max_batch,
        kv_addresses=addresses,
        kv_secret=b"",
    )


class Prompts:
    """Token ids of a trace's prompts: equal hash ids are equal tokens, everything else differs."""

    def __init__(self, trace: Requests, vocab_size: int) -> None:
        self._trace = trace
        self._span = np.uint64(vocab_size - FIRST_ORDINARY)

    def tokens(self, i: int) -> array[int]:
        """Of request ``i``."""
        length = self._trace.prompt[i]
        size = self._trace.block_tokens
        known = [self._block(key, size) for key in self._trace.block_hashes(i)]
        tail = self._block((1 << 63) + i, length - size * len(known))
        return array("I", np.concatenate([*known, tail]).astype(np.uint32).tobytes())

    def _block(self, key: int, count: int) -> Tokens64:
        """splitmix64 (Steele, Lea, Flood 2014) of the key, then of each position."""
        with np.errstate(over="ignore"):
            seed = _splitmix(np.array([key], dtype=np.uint64))
            mixed = _splitmix(np.add(seed, np.arange(count, dtype=np.uint64), dtype=np.uint64))
        return np.uint64(FIRST_ORDINARY) + mixed % self._span


def _splitmix(x: Tokens64) -> Tokens64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
