"""Preble's E2: exploit a long match, else explore where load, eviction and prefill cost least, all in seconds.

Load L: predicted seconds of prompt and answer of what was sent to a worker within the window. Eviction M: to make room
for u new tokens as many old ones go, and the share of prompt tokens that this worker found cached within the window
says how likely each is missed: ``M = share * T_p(u, c)`` (memory is taken to be full, as in the original code).
Prefill P: ``T_p(u, c)``.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import View, cached_tokens
from twinpool.router.policy.baselines.at_arrival import AtArrival, first_least
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.request import Request
from twinpool.router.worker import Worker


class Sent(NamedTuple):
    """One request that was sent to a worker."""

    when: float
    worker: str  # its name: an id may be given again
    seconds: float
    prompt: int  # tokens
    cached: int


class Window:
    """What was sent to each worker lately, as sums."""

    __slots__ = ("_sent", "cached", "prompt", "seconds", "window_s")

    def __init__(self, window_s: float) -> None:
        self.window_s = window_s
        self._sent: deque[Sent] = deque()
        self.seconds: dict[str, float] = {}
        self.prompt: dict[str, int] = {}
        self.cached: dict[str, int] = {}

    def add(self, sent: Sent) -> None:
        """One more."""
        self._sent.append(sent)
        name = sent.worker
        self.seconds[name] = self.seconds.get(name, 0.0) + sent.seconds
        self.prompt[name] = self.prompt.get(name, 0) + sent.prompt
        self.cached[name] = self.cached.get(name, 0) + sent.cached

    def forget(self, now: float) -> None:
        """Drop what is older than the window."""
        while self._sent and self._sent[0].when < now - self.window_s:
            old = self._sent.popleft()
            name = old.worker
            self.prompt[name] -= old.prompt
            if self.prompt[name] == 0:  # the last one: no rounding error outlives it, nor a worker that is gone
                del self.prompt[name], self.cached[name], self.seconds[name]
            else:
                self.seconds[name] -= old.seconds
                self.cached[name] -= old.cached

    def hit_share(self, name: str) -> float:
        """Share of the prompt tokens sent there that were cached."""
        prompt = self.prompt.get(name, 0)
        return self.cached[name] / prompt if prompt else 0.0


class Preble(AtArrival):
    """See the module's docstring. ``window_s``: H of the paper."""

    __slots__ = ("_window",)

    name = "preble"

    def __init__(self, window_s: float = 180.0) -> None:
        self._window = Window(window_s)

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """Exploit if more is matched than not."""
        self._window.forget(now)
        matched = [cached_tokens(worker, request.length, stairs) for worker in workers]
        best = max(matched)
        if best > request.length - best:
            holders = [worker for worker, tokens in zip(workers, matched, strict=True) if tokens == best]
            chosen = first_least(holders, [self._window.seconds.get(worker.name, 0.0) for worker in holders])
        else:
            costs: list[float] = []
            for worker, tokens in zip(workers, matched, strict=True):
                costs.append(self._explore(request, worker, tokens))
            chosen = first_least(workers, costs)
        self._note(request, chosen, matched[workers.index(chosen)], view, now)
        return chosen

    def _explore(self, request: Request, worker: Worker, cached: int) -> float:
        prefill = worker.prefill_s(request.length - cached, cached)
        load = self._window.seconds.get(worker.name, 0.0)
        return load + self._window.hit_share(worker.name) * prefill + prefill

    def _note(self, request: Request, worker: Worker, cached: int, view: View, now: float) -> None:
        seconds = worker.prefill_s(request.length - cached, cached)
        if self.goes_on(request, worker):  # the answer is this worker's load too
            seconds += request.output_to_come * worker.decode_s(worker.batch + 1, worker.context + request.length)
        self._window.add(Sent(now, worker.name, seconds, request.length, cached))


INFOS = (
    PolicyInfo(
        "preble",
        "the longest match if it is more than half, else least load + eviction + prefill seconds",
        "Preble (E2), arXiv 2407.00023; WukLab/preble at 0c962c4c, multi_node/global_scheduler_with_time.py",
        "hit rates by tree node (one share a worker); moving and replicating hot prefixes, off in the code; "
        "priority groups in the local scheduler. Decode: fewest requests",
        Preble,
        {"window_s": Parameter(180.0, 1.0, 3600.0, "seconds over which load is summed")},
    ),
)
