"""Rules made for a prefill and a decode pool."""

from __future__ import annotations

import math

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import NOBODY, Refusal, View, cached_tokens
from twinpool.router.policy.baselines.at_arrival import AtArrival, first_least, least_active, queue_seconds
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.policy.baselines.simple import RoundRobin
from twinpool.router.request import Request
from twinpool.router.worker import Worker


class VllmPd(RoundRobin):
    """In turn over both pools."""

    __slots__ = ()

    name = "vllm_pd"


class Dynamo(AtArrival):
    """Least ``overlap_weight * (A + u)/block + active decode blocks``; decode: least active blocks.

    A worker that only prefills has no decode blocks.
    """

    __slots__ = ("overlap_weight",)

    name = "dynamo"

    def __init__(self, overlap_weight: float = 1.0) -> None:
        self.overlap_weight = overlap_weight

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """See the class."""
        scores: list[float] = []
        for worker in workers:
            uncached = request.length - cached_tokens(worker, request.length, stairs)
            prefill = (worker.pending + uncached) / worker.block_size
            scores.append(self.overlap_weight * prefill + blocks(worker))
        return first_least(workers, scores)

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """Load only."""
        return first_least(workers, [float(blocks(worker)) for worker in workers])


def blocks(worker: Worker) -> int:
    """Active decode blocks of a worker."""
    return -(-worker.context // worker.block_size)


class AibrixPd(AtArrival):
    """Workers with many more requests than the others are left out, then matches and requests are weighed.

    Prefill: if ``max Q - min Q > prefill_gap``, least Q. Else, without those above mean + ``deviations`` standard
    deviations, least ``(100 - matched %) * match_weight + Q / max Q``. Decode: least Q if somebody is idle or
    ``max Q - min Q >= decode_gap``; least tokens/s if these differ by more than ``throughput_gap``; else least
    ``(Q/max Q + 1 - rate/max rate) / (free/max free)``. Every maximum is at least 1; free is a rounded percentage.
    """

    __slots__ = ("decode_gap", "deviations", "match_weight", "prefill_gap", "throughput_gap")

    name = "aibrix_pd"

    def __init__(
        self,
        match_weight: float = 0.1,
        deviations: float = 1.0,
        prefill_gap: int = 32,
        decode_gap: int = 32,
        throughput_gap: float = 2048.0,
    ) -> None:
        self.match_weight = match_weight
        self.deviations = deviations
        self.prefill_gap = prefill_gap
        self.decode_gap = decode_gap
        self.throughput_gap = throughput_gap

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """The prefill rule."""
        counts = [worker.active for worker in workers]
        most = max(counts)
        if most - min(counts) > self.prefill_gap:
            return least_active(workers)
        mean = sum(counts) / len(counts)
        spread = math.sqrt(sum([(count - mean) ** 2 for count in counts]) / len(counts))
        kept = [worker for worker in workers if worker.active <= mean + self.deviations * spread]
        scores: list[float] = []
        for worker in kept:
            percent = 100.0 * cached_tokens(worker, request.length, stairs) / request.length
            scores.append((100.0 - percent) * self.match_weight + worker.active / max(1, most))
        return first_least(kept, scores)

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """The decode rule."""
        counts = [worker.active for worker in workers]
        if min(counts) == 0 or max(counts) - min(counts) >= self.decode_gap:
            return least_active(workers)
        rates = [tokens_per_s(worker) for worker in workers]
        if max(rates) - min(rates) > self.throughput_gap:
            return first_least(workers, rates)
        free = [free_percent(worker) for worker in workers]
        most, fastest, emptiest = max(1, *counts), max(1.0, *rates), max(1.0, *free)
        scores: list[float] = []
        for index in range(len(workers)):
            load = counts[index] / most + 1.0 - rates[index] / fastest
            scores.append(load / (free[index] / emptiest))
        return first_least(workers, scores)

    def decode_at_once(self, request: Request, view: View, now: float) -> int:
        """Both are chosen when the request arrives."""
        return self.decode_for(request, view, now)


def tokens_per_s(worker: Worker) -> float:
    """Output tokens a second of a worker, as predicted for its present batch."""
    return worker.batch / worker.decode_s(worker.batch, worker.context) if worker.batch else 0.0


def free_percent(worker: Worker) -> float:
    """Share of KV memory that is not booked, in whole per cent, at least 0.1."""
    return max(0.1, float(math.floor(100.0 * (1.0 - worker.booked / worker.capacity) + 0.5)))


class MooncakeConductor(AtArrival):
    """Least predicted TTFT: queue + prefill. The decode worker with the shortest predicted step is chosen with it.

    Refused if the predicted TTFT or the predicted step misses its SLO, unless ``refuse`` is 0. Never refused: a request
    that was started before and lost its worker.
    """

    __slots__ = ("refuse",)

    name = "mooncake_conductor"

    def __init__(self, refuse: int = 1) -> None:
        self.refuse = refuse

    def choose(
        self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float
    ) -> Worker | Refusal:
        """See the class."""
        seconds: list[float] = []
        for worker in workers:
            cached = cached_tokens(worker, request.length, stairs)
            seconds.append(queue_seconds(worker, now) + worker.prefill_s(request.length - cached, cached))
        chosen = first_least(workers, seconds)
        refusal = self._refusal(request, chosen, min(seconds), view, now)
        return chosen if refusal is None else refusal

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """Shortest predicted step with the request in it."""
        return first_least(workers, [step_with(request, worker) for worker in workers])

    def decode_at_once(self, request: Request, view: View, now: float) -> int:
        """Both are chosen when the request arrives, whether there is room yet or not."""
        workers = self._decoders(request, view)
        return self.choose_decode(request, workers, view, now).id if workers else NOBODY

    @staticmethod
    def _decoders(request: Request, view: View) -> list[Worker]:
        most = request.length + request.left
        return [worker for worker in view.pool.decode if worker.could_fit(most)]

    def _refusal(self, request: Request, chosen: Worker, ttft: float, view: View, now: float) -> Refusal | None:
        if not self.refuse or request.attempts > 0:
            return None
        allowed = request.deadline - now
        if ttft > allowed:
            message = f"the first token is predicted after {ttft:.2f} s and wanted within {allowed:.2f} s: retry later"
            return Refusal(message, ttft - allowed)
        if request.left <= 1:
            return None
        decoders = [chosen] if self.goes_on(request, chosen) else self._decoders(request, view)
        step = min([step_with(request, worker) for worker in decoders], default=0.0)
        if step > request.itl_s:
            wanted = f"{1000 * request.itl_s:.0f} ms wanted"
            return Refusal(f"{1000 * step:.0f} ms between tokens are predicted and {wanted}: retry later", 1.0)
        return None


def step_with(request: Request, worker: Worker) -> float:
    """Predicted seconds of a decode step that has the request in it."""
    return worker.decode_s(worker.batch + 1, worker.context + request.length)


INFOS = (
    PolicyInfo(
        "vllm_pd",
        "in turn over prefill workers, in turn over decode workers",
        "vLLM at 715dbadc, examples/online_serving/disaggregated_serving/disagg_proxy_demo.py",
        "the decode worker's turn is taken at arrival, in the original when the prompt is done",
        VllmPd,
    ),
    PolicyInfo(
        "dynamo",
        "argmin of prompt blocks to compute + active decode blocks; decode: active blocks",
        "NVIDIA Dynamo at ccd1706e, lib/kv-router/src/scheduling/selector.rs; pools: documentation of 1.2",
        "sampling with a temperature (0 by default), its queue before busy workers, blocks shared by running requests, "
        "ties by tree size",
        Dynamo,
        {"overlap_weight": Parameter(1.0, 0.0, 10.0, "of the prompt blocks against the decode blocks")},
    ),
    PolicyInfo(
        "aibrix_pd",
        "busy workers left out, then (100 - match %)/10 + Q/max Q; decode: requests, tokens/s and free memory",
        "AIBrix at 01692761, pkg/plugins/gateway/algorithms/pd_disaggregation.go",
        "role sets (all workers are in one); measured tokens/s are predicted ones; ties at random",
        AibrixPd,
        {
            "match_weight": Parameter(0.1, 0.0, 1.0, "of a per cent matched against Q / max Q"),
            "deviations": Parameter(1.0, 0.0, 10.0, "standard deviations above the mean at which a worker is left out"),
            "prefill_gap": Parameter(32, 0, 1024, "difference of requests above which the least busy is taken"),
            "decode_gap": Parameter(32, 1, 1024, "the same for decode, from this difference on"),
            "throughput_gap": Parameter(2048.0, 0.0, 1e6, "tokens/s of difference above which the slowest is taken"),
        },
    ),
    PolicyInfo(
        "mooncake_conductor",
        "argmin of predicted TTFT; refused if TTFT or ITL is predicted to miss its SLO",
        "Mooncake, arXiv 2407.00079, algorithm 1",
        "fetching a longer prefix from another worker, so no balancing threshold; "
        "replication of hot blocks; rejection by predicted decode load",
        MooncakeConductor,
        {"refuse": Parameter(1, 0, 1, "0: serve late what would be refused")},
    ),
)
