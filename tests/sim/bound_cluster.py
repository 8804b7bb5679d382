"""Made-up traffic and a small cluster to hold the bound against: steps by the cost model, one cache, free transfer.

Its policy draws lots: who prefills what and in which order, who decodes where, how much a step takes, what leaves the
cache. It obeys only what the bound's proof relies on: causality, one step after another on a worker, one unfinished
chunk a step, and no more in KV than the memory of all workers together.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass, field

from twinpool.cost import Cost
from twinpool.sim.bound_work import Fleet, Slo
from twinpool.sim.trace import Trace, no_hashes


def trace_of(
    arrival: list[float], prompt: list[int], output: list[int], blocks: list[list[int]] | None = None, size: int = 16
) -> Trace:
    n = len(arrival)
    hashes, offsets = array("q"), no_hashes(n)
    for i, ids in enumerate(blocks or []):
        hashes.extend(ids)
        offsets[i + 1] = len(hashes)
    return Trace(
        "made", size if blocks else 0, array("d", arrival), array("q", prompt), array("q", output), hashes, offsets
    )


def random_trace(rng: random.Random, n: int, gap_s: float, size: int = 16) -> Trace:
    """Prompts that branch off each other: a tree of blocks."""
    arrival, prompt, output, now = [], [], [], 0.0
    chains: list[list[int]] = []
    for i in range(n):
        arrival.append(now)
        now += rng.expovariate(1.0 / gap_s) * (rng.random() < 0.7)
        parent = rng.choice(chains)[: rng.randint(0, 6)] if chains and rng.random() < 0.6 else []
        chains.append(parent + [1000 * i + k for k in range(rng.randint(0, 8))])
        prompt.append(max(1, len(chains[-1]) * size + rng.randint(0, size - 1)))
        output.append(rng.choice((1, 2, 3, rng.randint(1, 30))))
    return trace_of(arrival, prompt, output, chains, size)


@dataclass
class Life:
    """One request here."""

    number: int
    prompt: int
    output: int
    hashes: list[int]
    start: int = -1  # tokens found in the cache; -1: not begun
    done: int = 0  # prompt tokens in KV
    busy: bool = False
    shown: list[float] = field(default_factory=list)


@dataclass
class Step:
    """What a worker is at."""

    end: float
    chunks: list[tuple[Life, int]]
    decodes: list[Life]


class SmallCluster:
    """``run`` gives the requests that met both limits."""

    def __init__(self, trace: Trace, cost: Cost, fleet: Fleet, rng: random.Random) -> None:
        self.trace, self.cost, self.engine, self.rng = trace, cost, fleet.engine, rng
        self.roles = ["p"] * fleet.prefill + ["d"] * fleet.decode + ["pd"] * fleet.both
        self.steps: list[Step | None] = [None] * len(self.roles)
        self.memory = self.engine.kv_tokens * len(self.roles) or math.inf
        self.cache: dict[int, None] = {}
        self.foresees = rng.random() < 0.5  # what is wanted last leaves the cache first
        self.lives = [
            Life(i, trace.prompt[i], trace.output[i], trace.block_hashes(i)) for i in range(len(trace.arrival))
        ]
        self.order = rng.choice(("due", "due", "short", "lots"))
        self.due = list(trace.arrival)
        self.keep = rng.choice((1.0, 0.8))  # share of the work that is not put off for no reason

    def run(self, slo: Slo, unloaded: list[float]) -> set[int]:
        """Requests that met TTFT and ITL."""
        now = 0.0
        self.due = [
            at + slo.ttft_s + slo.ttft_factor * alone for at, alone in zip(self.trace.arrival, unloaded, strict=True)
        ]
        while any(len(life.shown) < life.output for life in self.lives):
            ends = [step.end for step in self.steps if step is not None]
            later = [when for when in self.trace.arrival if when > now]
            if not self._start(now) and not ends and not later:
                continue  # everybody was put off: once more
            ends = [step.end for step in self.steps if step is not None]
            now = min([*ends, *later])
            for worker, step in enumerate(self.steps):
                if step is not None and step.end <= now:
                    self._finish(step)
                    self.steps[worker] = None
            self._evict(now)
        return {life.number for life in self.lives if self._met(life, slo)}

    def _met(self, life: Life, slo: Slo) -> bool:
        gaps = sorted((b - a for a, b in zip(life.shown, life.shown[1:], strict=False)), reverse=True)
        worst = gaps[: math.ceil(0.1 * len(gaps))]
        return life.shown[0] <= self.due[life.number] and (not worst or sum(worst) / len(worst) <= slo.itl_s)

    def _start(self, now: float) -> bool:
        """Gives idle workers steps; whether any got one."""
        before = list(self.steps)
        for worker, role in enumerate(self.roles):
            if self.steps[worker] is None:
                decodes = self._decodes() if "d" in role else []
                chunks = self._chunks(now) if "p" in role else []
                if decodes or chunks:
                    seconds = self.cost.step(
                        [(count, life.done) for life, count in chunks],
                        len(decodes),
                        sum(life.prompt + len(life.shown) for life in decodes),
                    )
                    for life in [*decodes, *[life for life, _ in chunks]]:
                        life.busy = True
                    self._evict(now)
                    self.steps[worker] = Step(now + seconds, chunks, decodes)
        return self.steps != before

    def _decodes(self) -> list[Life]:
        ready = [life for life in self.lives if not life.busy and 0 < len(life.shown) < life.output]
        chosen: list[Life] = []
        memory = 0
        for life in self.rng.sample(ready, len(ready)):
            memory += life.prompt + len(life.shown)
            if len(chosen) < self.engine.max_batch and memory <= (self.engine.kv_tokens or math.inf):
                chosen.append(life)
        return [life for life in chosen if self.rng.random() <= self.keep]

    def _chunks(self, now: float) -> list[tuple[Life, int]]:
        waiting = [
            life for life in self.lives
            if not life.busy and not life.shown and self.trace.arrival[life.number] <= now
        ]  # fmt: skip
        if self.order == "short":
            waiting.sort(key=lambda life: life.prompt)
        elif self.order == "lots":
            self.rng.shuffle(waiting)
        else:  # those that cannot make it any more last
            waiting.sort(key=lambda life: (self.due[life.number] < now + self._rest(life), self.due[life.number]))
        room = self.engine.chunk_tokens if self.rng.random() <= self.keep else 1 + self.engine.chunk_tokens // 3
        chunks: list[tuple[Life, int]] = []
        for life in waiting:
            if not life.done and self._held() + life.prompt + life.output > self.memory:
                continue
            self._reuse(life)
            count = min(room, life.prompt - life.done)
            chunks.append((life, count))
            room -= count
            if not room or count < life.prompt - life.done:
                break
        return chunks

    def _held(self) -> int:
        """Tokens of those that have begun and not ended."""
        begun = (life for life in self.lives if (life.busy or life.done) and len(life.shown) < life.output)
        return sum(life.prompt + life.output for life in begun)

    def _evict(self, now: float) -> None:
        """Down to what memory leaves beside them."""
        while self.cache and len(self.cache) * self.trace.block_tokens + self._held() > self.memory:
            blocks = list(self.cache)
            block = max(blocks, key=lambda b: self._wanted_at(b, now)) if self.foresees else self.rng.choice(blocks)
            del self.cache[block]

    def _wanted_at(self, block: int, now: float) -> float:
        later = [self.trace.arrival[life.number] for life in self.lives if not life.done and block in life.hashes]
        return min((when for when in later if when >= now), default=math.inf)

    def _rest(self, life: Life) -> float:
        return self.cost.prefill(life.prompt - life.done, life.done, self.engine.chunk_tokens)

    def _reuse(self, life: Life) -> None:
        """Takes what the cache has by now, but for the last token."""
        blocks = 0
        while blocks < len(life.hashes) and life.hashes[blocks] in self.cache:
            blocks += 1
        life.done = max(life.done, min(blocks * self.trace.block_tokens, life.prompt - 1))

    def _finish(self, step: Step) -> None:
        for life, count in step.chunks:
            life.busy = False
            life.done += count
            self.cache.update(dict.fromkeys(life.hashes[: life.done // max(1, self.trace.block_tokens)]))
            if life.done == life.prompt:
                life.shown.append(step.end)
        for life in step.decodes:
            life.busy = False
            life.shown.append(step.end)
            if len(life.shown) == 2 and self.rng.random() < 0.3:
                life.shown[0] = step.end  # the first token was held back
