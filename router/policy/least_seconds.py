"""The default policy: commit late, to whoever is predicted to give the first token earliest.

For the head of the queue every worker with room is scored by ``finish = free_at + T_p(u, c)``: decode workers too,
whose chunks must fit beside their decodes. Local wins only if it is earlier than the best split and, with 25 % in hand,
still in time. The decode worker is the one with the least max(ITL ratio, memory ratio).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import NOBODY, Placement, View
from twinpool.router.pool import Worker
from twinpool.router.request import Request

ITL_SHARE = 0.9  # of the ITL SLO that a step may take
MIN_LOCAL_CHUNK = 64  # tokens beside decodes: below that a local prompt starves
LOCAL_MEMORY = 0.7  # booked share of a decode worker above which it takes no prompts
LOCAL_MARGIN = 1.25
UNHOMED_SHARE = 0.5  # of the prefill pool's KV that may wait for a decode worker
MIN_COMMIT_S, MAX_COMMIT_S = 0.020, 0.150
CLOCK_ERROR = 1e-6  # seconds: more than sums of clock readings round off


class Candidate(NamedTuple):
    """A worker that could compute the prompt."""

    finish: float  # predicted time of the first token
    worker: int
    cached: int
    seconds: float


class LeastSeconds:
    """See the module's docstring. ``paths``: "auto", or only "split" or "local"."""

    name = "least_seconds"
    early = False

    def __init__(self, paths: str = "auto") -> None:
        self.paths = paths

    def on_room(self, request: Request, view: View, now: float) -> Placement | None:
        """Earliest predicted first token over all candidates with room."""
        stairs = view.index.stairs(request.hashes) if request.hashes else []
        split = self._best_split(request, stairs, view, now) if self.paths != "local" else None
        local = self._best_local(request, stairs, view, now) if self.paths != "split" else None
        if local is not None and self._prefer_local(request, stairs, split, local, view, now):
            return self._local(local, split, now)
        return None if split is None else self._split(request, split, view, now)

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """Least max(ITL ratio, memory ratio) among workers where both stay in bounds; ties to the lower id."""
        best, best_score = NOBODY, math.inf
        for worker in view.pool.decode:
            score = self._decode_score(worker, request, view)
            if score < best_score:
                best, best_score = worker.id, score
        return best

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """Decode workers can do both, unless the config says ``split``; prefill workers only the first token."""
        if self.paths == "split":
            return (("prefill", "decode"),) if request.left > 1 else (("prefill",),)
        return (("decode",),) if request.left > 1 or self.paths == "local" else (("prefill",), ("decode",))

    def next_room(self, view: View, now: float) -> float:
        """The first moment at which a busy worker comes within the commit horizon."""
        horizon = self._horizon(view)
        soonest = math.inf
        for worker in view.pool.workers.values():
            if worker.prefills:
                moment = worker.free_within(horizon)
                if now < moment < soonest:
                    soonest = moment
        return soonest

    # --- prefill ----------

    def _best_split(self, request: Request, stairs: list[Stair], view: View, now: float) -> Candidate | None:
        if request.left > 1 and not view.pool.decode:
            return None
        limit = now + self._horizon(view) + CLOCK_ERROR
        length = request.length
        best: Candidate | None = None
        for worker in view.pool.prefill:
            free_at = worker.free_at(now)
            if free_at > limit or not worker.fits(length):
                continue
            cached = self._cached(worker, length, stairs)
            seconds = worker.prefill_s(length - cached, cached)
            if best is None or free_at + seconds < best.finish:
                best = Candidate(free_at + seconds, worker.id, cached, seconds)
        return best

    def _best_local(self, request: Request, stairs: list[Stair], view: View, now: float) -> Candidate | None:
        best: Candidate | None = None
        for worker in view.pool.decode:
            if worker.prefills:
                continue
            candidate = self._local_candidate(worker, request, stairs, view, now)
            if candidate is not None and (best is None or candidate < best):
                best = candidate
        return best

    def _local_candidate(
        self, worker: Worker, request: Request, stairs: list[Stair], view: View, now: float
    ) -> Candidate | None:
        """A decode worker without prompt work whose ITL budget leaves a useful chunk."""
        need = request.length + min(request.left, view.expected_output)
        if not worker.fits(need) or worker.booked > LOCAL_MEMORY * worker.capacity:
            return None
        if worker.batch >= worker.max_batch:
            return None
        cached = self._cached(worker, request.length, stairs)
        left = request.length - cached
        if worker.batch == 0:
            seconds = worker.prefill_s(left, cached)
            return Candidate(now + seconds, worker.id, cached, seconds)
        budget = ITL_SHARE * worker.tightest_itl(request.itl_s)
        chunk = worker.chunk_within(budget, cached)
        if chunk < MIN_LOCAL_CHUNK:
            return None
        seconds = math.ceil(left / chunk) * budget + worker.cost.b * left * (cached + left / 2)
        running = worker.decode_s(worker.batch, worker.context)
        return Candidate(now + running / 2 + seconds, worker.id, cached, seconds)

    def _prefer_local(
        self, request: Request, stairs: list[Stair], split: Candidate | None, local: Candidate, view: View, now: float
    ) -> bool:
        if split is None:
            # No prefill worker has room now. One that will have room soon may still be earlier than going local.
            busy = [worker for worker in view.pool.prefill if worker.could_fit(request.length)]
            if self.paths == "local" or not busy:
                return True
            later = min([self._finish_later(worker, request, stairs, now) for worker in busy])
            return local.finish < later and self._in_time(request, local, now)
        if split.worker == local.worker:
            return local.finish <= split.finish
        return local.finish < split.finish and self._in_time(request, local, now)

    def _finish_later(self, worker: Worker, request: Request, stairs: list[Stair], now: float) -> float:
        cached = self._cached(worker, request.length, stairs)
        return worker.free_at(now) + worker.prefill_s(request.length - cached, cached)

    @staticmethod
    def _in_time(request: Request, local: Candidate, now: float) -> bool:
        return now + LOCAL_MARGIN * (local.finish - now) <= request.deadline

    @staticmethod
    def _local(local: Candidate, split: Candidate | None, now: float) -> Placement:
        other = "no other worker has room" if split is None else f"split {1000 * (split.finish - now):.0f} ms"
        reason = f"local: first token in {1000 * (local.finish - now):.0f} ms, {other}"
        return Placement(local.worker, local.worker, "local", reason, local.cached, local.seconds)

    def _split(self, request: Request, split: Candidate, view: View, now: float) -> Placement | None:
        decode = self.decode_for(request, view, now) if request.left > 1 else NOBODY
        if decode == split.worker:
            return self._local(split, None, now)
        reason = f"split: first token in {1000 * (split.finish - now):.0f} ms"
        if request.left > 1 and decode == NOBODY:
            if not self._may_wait(request, view):
                return None
            reason += ", no decode worker has room yet: KV waits"
        return Placement(split.worker, decode, "split", reason, split.cached, split.seconds)

    @staticmethod
    def _may_wait(request: Request, view: View) -> bool:
        """Soft reservation: KV without a decode worker stays under half of the prefill pool's memory."""
        booked = sum([worker.booked for worker in view.pool.prefill])
        capacity = sum([worker.capacity for worker in view.pool.prefill])
        return booked + request.length <= UNHOMED_SHARE * capacity

    # --- shared ----------

    def _decode_score(self, worker: Worker, request: Request, view: View) -> float:
        need = request.length + min(request.left, view.expected_output) - worker.held.get(request.attempt, 0)
        if not worker.fits(need) or worker.batch >= worker.max_batch:
            return math.inf
        memory = (worker.booked + need) / worker.limit
        step = worker.decode_s(worker.batch + 1, worker.context + request.length)
        itl = step / (ITL_SHARE * worker.tightest_itl(request.itl_s))
        if worker.batch > 0 and itl > 1.0:
            return math.inf
        return max(memory, itl)

    @staticmethod
    def _cached(worker: Worker, length: int, stairs: list[Stair]) -> int:
        """Tokens predicted to be cached there; the last one is always computed."""
        bit = 1 << worker.id
        for stair in stairs:
            if stair.mask & bit:
                size = worker.index_tokens
                return min(stair.depth * size, (length - 1) // size * size)
        return 0

    @staticmethod
    def _horizon(view: View) -> float:
        """J of the commit rule: late enough that the queue stays central, early enough that nobody idles."""
        return min(MAX_COMMIT_S, max(MIN_COMMIT_S, 2.0 * view.commit_round_trip_s))
