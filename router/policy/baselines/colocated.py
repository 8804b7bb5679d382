"""No two pools: every worker prefills and decodes."""

from __future__ import annotations

import math

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import View, cached_tokens
from twinpool.router.policy.baselines.at_arrival import AtArrival, first_least, queue_seconds
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.request import Request
from twinpool.router.worker import Worker


class Colocated(AtArrival):
    """Every worker of the decode pool does both; least predicted TTFT. Workers that only prefill stay idle.

    Where nothing decodes: queue + prefill. Else steps of the largest chunk that keeps them within ``itl_share`` of the
    tightest ITL SLO (or of ``chunk`` tokens, if that is not 0), for all prompt tokens there, and half a running step.
    """

    __slots__ = ("chunk", "itl_share")

    name = "colocated"

    def __init__(self, itl_share: float = 0.9, chunk: int = 0) -> None:
        self.itl_share = itl_share
        self.chunk = chunk

    def candidates(self, request: Request, view: View) -> list[Worker]:
        """Workers that decode, and could hold prompt and answer."""
        most = request.length + request.left
        return [worker for worker in view.pool.decode if worker.could_fit(most)]

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """See the class."""
        seconds: list[float] = []
        for worker in workers:
            seconds.append(self.ttft(request, worker, cached_tokens(worker, request.length, stairs), now))
        return first_least(workers, seconds)

    def ttft(self, request: Request, worker: Worker, cached: int, now: float) -> float:
        """Predicted seconds to the first token there."""
        uncached = request.length - cached
        if worker.batch == 0:
            return queue_seconds(worker, now) + worker.prefill_s(uncached, cached)
        middle = cached + uncached // 2  # attention of the prompt's middle stands for all of it
        tokens = worker.pending + uncached
        size = min(tokens, self._chunk(request, worker, middle))
        step = worker.cost.step([(size, middle)], worker.batch, worker.context)
        pace = max(worker.pace.prefill, worker.pace.decode)
        return worker.decode_s(worker.batch, worker.context) / 2 + math.ceil(tokens / size) * pace * step

    def _chunk(self, request: Request, worker: Worker, cached: int) -> int:
        if self.chunk:
            return self.chunk
        budget = self.itl_share * worker.tightest_itl(request.itl_s)
        return max(worker.block_size, worker.chunk_within(budget, cached))

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """Only workers that decode."""
        return (("decode",),)


INFOS = (
    PolicyInfo(
        "colocated",
        "every worker prefills and decodes; argmin of predicted TTFT",
        "the strongest form without two pools known to us; nobody ships it",
        "nothing",
        Colocated,
        {
            "itl_share": Parameter(0.9, 0.1, 1.0, "of the tightest ITL SLO that a step is predicted to fill"),
            "chunk": Parameter(0, 0, 1 << 16, "predict with chunks of so many tokens; 0: as large as itl_share allows"),
        },
    ),
)
