"""Fetch or recompute: when a prompt would begin, and end, with the longest prefix that any worker has cached. Pure.

ready  = max(now, busy link of the source, busy link of the worker) + setup + bytes / (bytes/s)
finish = max(free_at, ready) + T_p(n - c, c)                        c: tokens cached at the source
"""

from __future__ import annotations

import math
from typing import Final

from twinpool.router.kv_index import Stair
from twinpool.router.pace import Pace
from twinpool.router.policy.base import View
from twinpool.router.request import Request
from twinpool.router.worker import Worker

ROUND_TRIPS: Final = 2.0  # that a fetch takes besides its bytes
MIN_GAIN_S: Final = 0.005  # by which the first token must be earlier: links are there for other transfers, too


class Offer:
    """The longest cached prefix of a prompt, and who would send it."""

    __slots__ = ("_alike", "_alone_s", "_setup_s", "_token_s", "link_free", "source", "tokens")

    def __init__(self, tokens: int, source: Worker, view: View, now: float) -> None:
        self.tokens = tokens
        self.source = source.id
        self.link_free = source.link_busy if source.link_busy > now else now
        self._setup_s = ROUND_TRIPS * view.commit_round_trip_s
        self._token_s = source.block_bytes / source.block_size / view.bytes_per_s
        self._alike: Pace | None = None
        self._alone_s = 0.0

    def finish(self, worker: Worker, request: Request, cached: int, free_at: float) -> float:
        """When the first token would come, with the fetch; infinity where there is nothing to fetch."""
        if cached >= self.tokens:
            return math.inf
        ready = self.ready(worker, cached)
        return (ready if ready > free_at else free_at) + self.prompt_s(worker, request)

    def ready(self, worker: Worker, cached: int) -> float:
        """When the worker, which has ``cached`` tokens itself, would have all of it."""
        begin = worker.link_busy if worker.link_busy > self.link_free else self.link_free
        return begin + self._setup_s + (self.tokens - cached) * self._token_s

    def prompt_s(self, worker: Worker, request: Request) -> float:
        """Seconds of the rest of the prompt, then."""
        uncached = request.length - self.tokens
        if worker.decodes:
            return worker.prompt_s(uncached, self.tokens, request.itl_s)
        if worker.pace is not self._alike:  # most workers are of one kind
            self._alone_s = worker.prefill_s(uncached, self.tokens)
            self._alike = worker.pace
        return self._alone_s


def best_offer(request: Request, stairs: list[Stair], view: View, now: float) -> Offer | None:
    """Of the workers that hold the longest prefix, and may keep it so long, the one whose link is free first.

    None where every prefill worker holds it. In a large cell thousands may: the first whose link is free now will do.
    """
    if not stairs:
        return None
    depth, mask = stairs[0]
    if not view.pool.prefill_mask & ~mask:
        return None
    best: Worker | None = None
    while mask:
        low = mask & -mask
        mask ^= low
        worker = view.pool.workers.get(low.bit_length() - 1)
        if worker is None or worker.booked + held_tokens(depth, request, worker) > worker.limit:
            continue
        if best is None or worker.link_busy < best.link_busy:
            best = worker
            if worker.link_busy <= now:
                break
    tokens = held_tokens(depth, request, best) if best is not None else 0
    return Offer(tokens, best, view, now) if best is not None and tokens > 0 else None


def held_tokens(depth: int, request: Request, worker: Worker) -> int:
    """Of a prompt, in so many blocks of hashes; the last token is always computed."""
    size = worker.index_tokens
    return min(depth * size, (request.length - 1) // size * size)
