"""Gaps of made-up workers that batch continuously: sequences join, leave and wait beside chunks of prompts."""

from __future__ import annotations

import heapq
import math
import random
from array import array

from twinpool.cost import LLAMA_70B_H100_TP4 as COST
from twinpool.sim.gaps import GapLog, Runs


def traffic(requests: int, workers: int, seed: int, rate: float = 1.0) -> tuple[list[Runs], GapLog]:
    """Runs of each worker and the gaps of each request; ``rate`` in requests a second and worker."""
    rng = random.Random(seed)
    log = GapLog()
    rooms = [_decode_worker(list(range(w, requests, workers)), w, log, rate, rng) for w in range(workers)]
    return rooms, log


def _decode_worker(requests: list[int], worker: int, log: GapLog, rate: float, rng: random.Random) -> Runs:
    """Decodes the requests in order, joining at random times; some steps carry a chunk of a prompt."""
    runs = Runs()
    arrivals = [0.0]
    for _ in requests:
        arrivals.append(arrivals[-1] + rng.expovariate(rate))
    now, step, context, came = 0.0, 0, 0, 0
    leaving: list[tuple[int, int, int, int]] = []  # step of the end, request, first run, tokens to read then
    while came < len(requests) or leaving:
        if not leaving:
            now = max(now, arrivals[came])
        while came < len(requests) and arrivals[came] <= now:
            request, prompt = requests[came], 1 + int(rng.lognormvariate(7.0, 1.0))
            gaps = min(2000, int(rng.lognormvariate(5.4, 0.9)))
            came += 1
            log.add_single(request, 0.005 + rng.random() * 0.03)
            if gaps:
                heapq.heappush(leaving, (step + gaps, request, len(runs), prompt + gaps))
                context += prompt
        if not leaving:
            continue
        batch, left = len(leaving), leaving[0][0] - step
        chunk = rng.randrange(64, 512) if rng.random() < 0.05 else 0
        first = COST.step([(chunk, 0)] if chunk else [], batch, context)
        more = COST.decode(batch, context + batch) - COST.decode(batch, context)
        until = arrivals[came] - now if came < len(requests) else math.inf
        count = 1 if chunk else min(left, max(1, math.ceil(min(until / first, 1e9))))
        runs.add(first, more if count > 1 else 0.0, count, batch)
        now += count * first + more * count * (count - 1) / 2
        step += count
        context += count * batch
        while leaving and leaving[0][0] == step:
            _, request, begin, tokens = heapq.heappop(leaving)
            log.add_span(request, worker, begin, len(runs))
            context -= tokens
    return runs


def expand(workers: list[Runs], log: GapLog, requests: int) -> list[list[float]]:
    """Every gap of each request, written out one by one."""
    gaps: list[list[float]] = [[] for _ in range(requests)]
    for request, worker, lo, hi in zip(log.request, log.worker, log.lo, log.hi, strict=True):
        gaps[request] += workers[worker].expand(lo, hi)
    for request, gap in zip(log.single, log.gap, strict=True):
        gaps[request].append(gap)
    return gaps


def expand_all(workers: list[Runs], log: GapLog) -> list[float]:
    """Every gap of the pool, each as often as it was felt, sorted."""
    gaps = array("d", log.gap)
    for runs in workers:
        for r in range(len(runs)):
            for gap in runs.expand(r, r + 1):
                gaps.extend([gap] * runs.batch[r])
    return sorted(gaps)
