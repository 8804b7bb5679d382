"""What policies share that bind a request to a worker when it arrives.

The core keeps a first-come line at each worker and sends from it as memory allows. A worker of both pools does both
halves of what it gets (path local), so every policy also runs a cell without separate pools. Ties go to the lower id.
"""

from __future__ import annotations

import math

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import NOBODY, Placement, Refusal, View, cached_tokens
from twinpool.router.request import Request
from twinpool.router.worker import Worker


def first_least(workers: list[Worker], scores: list[float]) -> Worker:
    """The worker with the least score, the first of equals; not of an empty list."""
    best = 0
    for index in range(1, len(scores)):
        if scores[index] < scores[best]:
            best = index
    return workers[best]


def least_active(workers: list[Worker]) -> Worker:
    """The worker with the fewest requests, those in its line counted; the first of equals."""
    best = workers[0]
    for worker in workers:
        if worker.active < best.active:
            best = worker
    return best


def queue_seconds(worker: Worker, now: float) -> float:
    """Predicted seconds of prompt work at a worker: what was sent and not done, and what waits in its line."""
    return worker.free_at(now) - now + worker.bound_s


class AtArrival:
    """Base: ``choose`` says which prefill worker, ``choose_decode`` which decode worker of those with room."""

    __slots__ = ()

    name = "at_arrival"
    early = True
    by_deadline = True
    rebalances = False

    def choose(
        self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float
    ) -> Worker | Refusal:
        """One of ``workers`` (not empty, in order of id), or why not."""
        raise NotImplementedError

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """One of ``workers`` (not empty, in order of id), all with room; least requests unless overridden."""
        return least_active(workers)

    def decode_at_once(self, request: Request, view: View, now: float) -> int:
        """A decode worker together with the prefill worker, or NOBODY: ``decode_for`` when the prompt is sent."""
        return NOBODY

    def on_room(self, request: Request, view: View, now: float) -> Placement | Refusal | None:
        """Bind; None only while a pool that is needed has no worker."""
        if request.left > 1 and not view.pool.decode:
            return None
        workers = self.candidates(request, view)
        if not workers:
            return None
        stairs = view.index.stairs(request.hashes) if request.hashes else []
        chosen = self.choose(request, workers, stairs, view, now)
        if isinstance(chosen, Refusal):
            return chosen
        return self.place(request, chosen, stairs, view, now)

    def candidates(self, request: Request, view: View) -> list[Worker]:
        """Workers that could ever hold the prompt: a smaller one would block its line for good."""
        return [worker for worker in view.pool.prefill if worker.could_fit(request.length)]

    def goes_on(self, request: Request, worker: Worker) -> bool:
        """Whether the worker that computes the prompt also decodes."""
        return "decode" in worker.roles and worker.could_fit(request.length + request.left)

    def place(self, request: Request, worker: Worker, stairs: list[Stair], view: View, now: float) -> Placement:
        """The placement, with what the core books."""
        cached = cached_tokens(worker, request.length, stairs)
        seconds = worker.prefill_s(request.length - cached, cached)
        reason = (
            f"{self.name}: {worker.active} requests and {worker.pending} prompt tokens before it, "
            f"{cached} of {request.length} tokens cached"
        )
        if self.goes_on(request, worker):
            return Placement(worker.id, worker.id, "local", reason, cached, seconds)
        decode = self.decode_at_once(request, view, now) if request.left > 1 else NOBODY
        return Placement(worker.id, decode, "split", reason, cached, seconds)

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """The original's choice among decode workers with room now; NOBODY if there is none."""
        workers = self.with_room(request, view)
        return self.choose_decode(request, workers, view, now).id if workers else NOBODY

    def with_room(self, request: Request, view: View) -> list[Worker]:
        """Decode workers with memory for the expected output, and a place in the batch."""
        expected = request.length + request.output_to_come
        most = request.length + request.left
        workers: list[Worker] = []
        for worker in view.pool.decode:
            need = expected - worker.held.get(request.attempt, 0)
            if worker.fits(need) and worker.batch < worker.max_batch and worker.could_fit(most):
                workers.append(worker)
        return workers

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """Both pools, but for a single token."""
        return (("prefill", "decode"),) if request.left > 1 else (("prefill",),)

    def next_room(self, view: View, now: float) -> float:
        """Nothing waits for a predicted moment: everything is bound at arrival."""
        return math.inf
