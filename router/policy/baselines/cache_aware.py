"""Rules that weigh cached prefixes against load, made for one pool of equal workers.

They choose the prefill worker; the decode worker is the one with the fewest requests, as in their versions for two
pools (``llm_d`` scores decode workers too, as its own configuration does).
"""

from __future__ import annotations

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import View, cached_tokens
from twinpool.router.policy.baselines.at_arrival import AtArrival, first_least, least_active
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.policy.baselines.match import Memory
from twinpool.router.request import Request
from twinpool.router.worker import Worker


class SglangCacheAware(AtArrival):
    """Shortest queue while the load is uneven, else the longest match if it is long enough.

    Uneven: ``max Q - min Q > balance_abs`` and ``max Q > balance_rel * min Q``. Long enough: matched share of the
    prompt above ``cache_threshold``; if not, least Q. ``matches`` = "events": workers say what they cache; "routed":
    what was sent to a worker counts as cached there, ``routed_tokens`` a worker, as in the original.
    """

    __slots__ = ("_memory", "balance_abs", "balance_rel", "cache_threshold")

    name = "sglang_cache_aware"

    def __init__(
        self,
        cache_threshold: float = 0.5,
        balance_abs: int = 32,
        balance_rel: float = 1.1,
        matches: str = "events",
        routed_tokens: int = 1 << 24,
    ) -> None:
        self.cache_threshold = cache_threshold
        self.balance_abs = balance_abs
        self.balance_rel = balance_rel
        self._memory = Memory(routed_tokens) if matches == "routed" else None

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """See the class."""
        if self._memory is not None:
            stairs = self._memory.stairs(request.hashes, workers)
        worker = self._choose(request, workers, stairs)
        if self._memory is not None:
            self._memory.sent(worker, request.hashes)
        return worker

    def _choose(self, request: Request, workers: list[Worker], stairs: list[Stair]) -> Worker:
        least = least_active(workers)
        most = 0
        for worker in workers:
            most = max(most, worker.active)
        if most - least.active > self.balance_abs and most > self.balance_rel * least.active:
            return least
        matched = [cached_tokens(worker, request.length, stairs) for worker in workers]
        best = first_least(workers, [-tokens for tokens in matched])
        return best if max(matched) > self.cache_threshold * request.length else least


class LMetric(AtArrival):
    """Least ``u * (Q + 1)``: tokens to compute times requests there. ``queued`` = 1 counts waiting tokens in u too."""

    __slots__ = ("queued",)

    name = "lmetric"

    def __init__(self, queued: int = 0) -> None:
        self.queued = queued

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """See the class."""
        scores: list[float] = []
        for worker in workers:
            tokens = request.length - cached_tokens(worker, request.length, stairs) + self.queued * worker.pending
            scores.append(float(tokens * (worker.active + 1)))
        return first_least(workers, scores)


class LlmD(AtArrival):
    """Most ``prefix_weight * matched/total + queue_weight * (max Q - Q)/(max Q - min Q)``, the last 1 if all are equal.

    Matched and total in blocks. ``matches`` as in ``SglangCacheAware``; decode workers are always scored by events.
    """

    __slots__ = ("_memory", "prefix_weight", "queue_weight")

    name = "llm_d"

    def __init__(
        self,
        prefix_weight: float = 2.0,
        queue_weight: float = 1.0,
        matches: str = "events",
        routed_tokens: int = 500_000,
    ) -> None:
        self.prefix_weight = prefix_weight
        self.queue_weight = queue_weight
        self._memory = Memory(routed_tokens) if matches == "routed" else None

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """The prefill profile."""
        if self._memory is not None:
            stairs = self._memory.stairs(request.hashes, workers)
        worker = self._best(request, workers, stairs)
        if self._memory is not None:
            self._memory.sent(worker, request.hashes)
        return worker

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """The decode profile: the same scorers."""
        return self._best(request, workers, view.index.stairs(request.hashes))

    def _best(self, request: Request, workers: list[Worker], stairs: list[Stair]) -> Worker:
        most, least = workers[0].active, workers[0].active
        for worker in workers:
            most, least = max(most, worker.active), min(least, worker.active)
        total = max(1, len(request.hashes))
        scores: list[float] = []
        for worker in workers:
            queue = (most - worker.active) / (most - least) if most > least else 1.0
            score = self.prefix_weight * depth(worker, stairs) / total + self.queue_weight * queue
            scores.append(-score)
        return first_least(workers, scores)


def depth(worker: Worker, stairs: list[Stair]) -> int:
    """Leading blocks that a worker holds."""
    bit = 1 << worker.id
    for stair in stairs:
        if stair.mask & bit:
            return stair.depth
    return 0


_MATCHES = Parameter(
    "events", help="events: workers say what they cache; routed: what was sent counts", choices=("events", "routed")
)

INFOS = (
    PolicyInfo(
        "sglang_cache_aware",
        "least Q while loads are uneven, else the longest match if long enough, else least Q",
        "SGLang at 026f853b, sgl-router/src/policies/cache_aware.rs, defaults of its library",
        "where nothing matches the original takes the worker with the smallest tree, here least Q; text trees, here "
        "token blocks; matches=routed drops at once what goes beyond routed_tokens, the original every 30 s",
        SglangCacheAware,
        {
            "cache_threshold": Parameter(0.5, 0.0, 1.0, "matched share of the prompt above which the match decides"),
            "balance_abs": Parameter(32, 0, 1024, "difference of requests above which load may be uneven"),
            "balance_rel": Parameter(1.1, 1.0, 10.0, "ratio of requests above which load may be uneven"),
            "matches": _MATCHES,
            "routed_tokens": Parameter(1 << 24, 1, 1 << 40, "matches=routed: tokens remembered a worker"),
        },
    ),
    PolicyInfo(
        "lmetric",
        "argmin of uncached tokens x (requests + 1)",
        "LMetric, arXiv 2603.15202v1",
        "its detector for prompts that all workers have cached",
        LMetric,
        {"queued": Parameter(0, 0, 1, "1: prompt tokens that wait at the worker count too")},
    ),
    PolicyInfo(
        "llm_d",
        "max of 2 x matched share + queue score, both pools",
        "llm-d inference scheduler at 0bb9fa83, deploy/config/pd-epp-config.yaml; Gateway API Inference Extension at "
        "02308be3, scorer/queue.go",
        "the decider that sends short uncached prompts to a decode worker alone; Q counts running requests too, "
        "the original only waiting ones",
        LlmD,
        {
            "prefix_weight": Parameter(2.0, 0.0, 10.0, "of the matched share of blocks"),
            "queue_weight": Parameter(1.0, 0.0, 10.0, "of the queue score"),
            "matches": _MATCHES,
            "routed_tokens": Parameter(500_000, 1, 1 << 40, "matches=routed: tokens remembered a worker"),
        },
    ),
)
