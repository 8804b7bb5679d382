"""The load generator: what arrives when, and what came of it. Used by ``twinpool bench`` and the benchmarks.

With a rate, requests arrive by a Poisson process whatever the answers do (open loop), and every time counts from when a
request was *due*: a slow server can not hide its queue. With a concurrency, so many callers wait for their answers.
Prompts are random token ids from a seed, so two runs ask for the same work.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from twinpool.client import AsyncClient, request
from twinpool.errors import ConfigError, TwinpoolError
from twinpool.proto.twinpool.v1.inference_pb2 import Finished, GenerateRequest, Tokens


class Lengths(NamedTuple):
    """Token counts, drawn evenly from ``low`` to ``high``."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """``128`` or ``64:256``. Raises ConfigError."""
        low, colon, high = text.partition(":")
        if not low.isdecimal() or (colon and not high.isdecimal()):
            raise ConfigError(f"{text!r} is no length: give tokens, such as 128 or 64:256")
        made = cls(int(low), int(high) if colon else int(low))
        if not 1 <= made.low <= made.high:
            raise ConfigError(f"{text!r}: lengths are at least 1, and the first is the smaller")
        return made

    def draw(self, rng: random.Random) -> int:
        """One length."""
        return rng.randint(self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    """What to ask for. Exactly one of ``rate`` and ``concurrency``; at least one of ``duration_s`` and ``requests``."""

    input_tokens: Lengths
    output_tokens: Lengths
    rate: float | None = None  # requests a second
    concurrency: int | None = None
    duration_s: float | None = None  # no request starts later
    requests: int | None = None
    shared_prefix: int = 0  # first tokens that all prompts have in common; part of their length
    timeout_s: float | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError where the numbers make no load."""
        if (self.rate is None) == (self.concurrency is None):
            raise ConfigError("give either a rate or a concurrency")
        if self.duration_s is None and self.requests is None:
            raise ConfigError("give a duration, a number of requests, or both")
        for name in ("rate", "concurrency", "duration_s", "requests"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be above 0, not {value}")


@dataclass(slots=True)
class Sample:
    """What came of one request. Times in seconds from when it was due."""

    late_s: float  # how late it was sent; that is the load generator's own fault
    error: str = ""  # "" | STATUS REASON
    ttft_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)  # one a token after the first
    longest_gap_s: float = 0.0  # between messages
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    path: str = ""
    attempts: int = 0


@dataclass(slots=True)
class Load:
    """A run so far: ``samples`` of requests that ended, and what is on its way."""

    samples: list[Sample] = field(default_factory=list)
    sent: int = 0
    tokens: int = 0  # received
    seconds: float = 0.0  # from the first request to the last end


OnChange = Callable[[Load], None]


async def run_load(client: AsyncClient, spec: LoadSpec, on_change: OnChange | None = None) -> Load:
    """Send the load and wait for all answers; failed requests are samples with an error. Raises TwinpoolError at once
    where the cell can not be reached, and ConfigError where the spec makes no load."""
    spec.check()
    generator = _Generator(client, spec, (await client.model()).vocab_size, on_change or (lambda load: None))
    began = time.perf_counter()
    await (generator.open_loop() if spec.rate is not None else generator.closed_loop())
    generator.load.seconds = time.perf_counter() - began
    return generator.load


class _Generator:
    def __init__(self, client: AsyncClient, spec: LoadSpec, vocab_size: int, on_change: OnChange) -> None:
        self.load = Load()
        self._client = client
        self._spec = spec
        self._vocab_size = vocab_size
        self._on_change = on_change
        self._rng = random.Random(spec.seed)
        self._prefix = self._ids(spec.shared_prefix)

    async def open_loop(self) -> None:
        assert self._spec.rate is not None
        due = began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            while self._more(due - began):
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.create_task(self._one(self._request(), due))
                due += self._rng.expovariate(self._spec.rate)

    async def closed_loop(self) -> None:
        assert self._spec.concurrency is not None
        began = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._spec.concurrency):
                tasks.create_task(self._caller(began))

    async def _caller(self, began: float) -> None:
        while self._more(time.perf_counter() - began):
            await self._one(self._request(), time.perf_counter())

    def _more(self, elapsed: float) -> bool:
        spec = self._spec
        in_time = spec.duration_s is None or elapsed < spec.duration_s
        return in_time and (spec.requests is None or self.load.sent < spec.requests)

    def _ids(self, count: int) -> list[int]:
        return self._rng.choices(range(self._vocab_size), k=count)

    def _request(self) -> GenerateRequest:
        self.load.sent += 1
        length = self._spec.input_tokens.draw(self._rng)
        prompt = (self._prefix + self._ids(max(1, length - len(self._prefix))))[-length:]
        wanted = self._spec.output_tokens.draw(self._rng)
        return request(token_ids=prompt, max_tokens=wanted, temperature=0.0, ignore_eos=True)

    async def _one(self, asked: GenerateRequest, due: float) -> None:
        sample = Sample(late_s=time.perf_counter() - due)
        try:
            await self._read(asked, due, sample)
        except TwinpoolError as error:
            sample.error = f"{error.code} {error.reason}"
        sample.total_s = time.perf_counter() - due
        self.load.samples.append(sample)
        self._on_change(self.load)

    async def _read(self, asked: GenerateRequest, due: float, sample: Sample) -> None:
        received, last = 0, due
        events: AsyncIterator[object] = self._client.generate(asked, timeout_s=self._spec.timeout_s)
        async for event in events:
            now = time.perf_counter()
            if isinstance(event, Tokens) and event.token_ids:
                _note(sample, len(event.token_ids), now - last, first=received == 0)
                received, last = received + len(event.token_ids), now
                self.load.tokens += len(event.token_ids)
                self._on_change(self.load)
            elif isinstance(event, Finished):
                _finish(sample, event)
        if received != asked.sampling.max_tokens:
            sample.error = "CLIENT TOKENS_MISSING"


def _note(sample: Sample, count: int, gap_s: float, *, first: bool) -> None:
    """A message of ``count`` tokens came; the gap before it is spread over them."""
    if first:
        sample.ttft_s = gap_s
        sample.gaps_s.extend([0.0] * (count - 1))
        return
    sample.gaps_s.extend([gap_s / count] * count)
    sample.longest_gap_s = max(sample.longest_gap_s, gap_s)


def _finish(sample: Sample, end: Finished) -> None:
    sample.prompt_tokens = end.usage.prompt_tokens
    sample.completion_tokens = end.usage.completion_tokens
    sample.cached_tokens = end.usage.cached_tokens
    sample.path, sample.attempts = end.route.path, end.route.attempts
