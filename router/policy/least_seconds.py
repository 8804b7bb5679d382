"""The default policy: commit late, to whoever is predicted to give the first token earliest.

For the next in order every worker with room is scored by ``finish = free_at + T_p(u, c)``: decode workers too, whose
chunks must fit beside their decodes. Local wins only if it is earlier than the best split and, with 5 % in hand, still
in time. Where all prefill workers are busy it may be later than the earliest of them, by less than the others gain by
that (price.py). The decode worker is the one with the least max(ITL ratio, memory ratio).

A request is passed over while a worker that is busy will give its first token earlier, for what it has cached, or where
all with room are too late. One that can be in time nowhere any more stands behind all that can. In time is what still
is where the prompt takes longer than predicted by as much as prompts usually are off (``Pace.spread``).
"""

from __future__ import annotations

import math
from typing import Final

from mypy_extensions import mypyc_attr

from twinpool.classes import BATCH_RANK
from twinpool.cost import ITL_SHARE
from twinpool.router.kv_index import Stair
from twinpool.router.policy import large_pool
from twinpool.router.policy.base import NOBODY, Passed, Placement, Refusal, View, cached_tokens
from twinpool.router.policy.candidates import NO_OUTLOOK, Candidate, Outlook, with_fetch
from twinpool.router.policy.decode_wait import decode_wait_s
from twinpool.router.policy.fetch import MIN_GAIN_S, best_offer
from twinpool.router.policy.price import local_price_s, prefill_price_s
from twinpool.router.request import Request
from twinpool.router.worker import Worker

MIN_LOCAL_CHUNK: Final = 64  # tokens beside decodes: below that a local prompt starves
LOCAL_MARGIN: Final = 1.05  # other sequences may join the decodes beside which the prompt is computed
UNHOMED_SHARE: Final = 0.5  # of the prefill pool's KV that may wait for a decode worker
MIN_COMMIT_S: Final = 0.020
MAX_COMMIT_S: Final = 0.150
CLOCK_ERROR: Final = 1e-6  # seconds: more than sums of clock readings round off
EVER_S: Final = 1e6
WITHOUT: Final = (
    "nothing", "late binding", "feasible first", "passing over", "waiting", "affinity", "decode ITL", "home", "price",
    "slack",
)  # fmt: skip
PASSED = Passed()


@mypyc_attr(allow_interpreted_subclasses=True)  # the built-in policy is what others start from
class LeastSeconds:
    """See the module's docstring. ``paths``: "auto", or only "split" or "local".

    ``late``: what becomes of a request that cannot be in time any more: "serve" it when nobody else can be, or "refuse"
    it. One that no worker could serve in time even if idle is always served: an SLO must not stop service.

    ``without``: a part of the rule that is left out, to see what it is worth (``WITHOUT``).
    """

    name = "least_seconds"
    early = False

    def __init__(
        self,
        paths: str = "auto",
        late: str = "serve",
        fetch: str = "on",
        rebalance: str = "on",
        without: str = "nothing",
    ) -> None:
        self.paths = paths
        self.rebalances = rebalance == "on"
        self.late = late
        self.fetches = fetch == "on"
        self._bind_late = without != "late binding"
        self._feasible_first = without != "feasible first"
        self._pass_over = without != "passing over"
        self._wait = without != "waiting"
        self._affinity = without != "affinity"
        self._mind_itl = without != "decode ITL"
        self._home = without != "home"
        self._price = without != "price"
        self.by_deadline = without == "slack"

    def on_room(self, request: Request, view: View, now: float) -> Placement | Refusal | Passed | None:
        """Earliest predicted first token over all candidates with room."""
        hashes = request.hashes if self._affinity else []
        anyway = request.late or request.first_at >= 0.0  # placed as soon as may be: no deadline to meet
        if view.orders is None:
            stairs = view.index.stairs(hashes) if hashes else []
        else:
            view.orders.refresh()
            known = view.orders.about(request, hashes, view.index)
            stairs = known.stairs
            if self.paths == "auto" and not anyway and request.rank < BATCH_RANK:
                limit = now + self._horizon(view) + CLOCK_ERROR
                finish = large_pool.passed_by(request, known.depths, view, self._price, limit, now)
                if finish >= 0.0:
                    return self._passed(request, stairs, finish, view, now)
        outlook = NO_OUTLOOK if self.paths == "local" else self._outlook(request, stairs, view, now)
        split, somebody = outlook.split, outlook.somebody
        if split is not None and not anyway and self._better_wait(request, split, outlook.soonest):
            split = None  # a busy worker will be earlier, for what it has cached; or the one with room is too late
        local: Candidate | None = None
        if self.paths != "split":
            local, free = self._best_local(request, stairs, outlook, view, now)
            somebody = somebody or free
        if local is not None and self._prefer_local(request, local, outlook, view, now):
            return self._local(local, self._instead_of(local, outlook, now), now)
        placement = None if split is None else self._split(request, split, view, now)
        if placement is not None or not somebody:
            return placement
        return self._passed(request, stairs, outlook.surest, view, now)

    def _better_wait(self, request: Request, split: Candidate, soonest: float) -> bool:
        if self._wait and soonest < split.finish:
            return True
        return self._feasible_first and request.deadline < split.finish + split.error_s

    def _passed(
        self, request: Request, stairs: list[Stair], finish: float, view: View, now: float
    ) -> Refusal | Passed | None:
        if self._feasible_first and not (request.late or request.first_at >= 0.0):
            return self._judged(request, stairs, finish, view, now)
        return PASSED if self._pass_over else None

    def _judged(
        self, request: Request, stairs: list[Stair], finish: float, view: View, now: float
    ) -> Refusal | Passed | None:
        """Not placed: whether it can still be in time, and what becomes of it if not."""
        if self.paths != "split" and finish > request.deadline:
            for worker in self._could_serve(request, view.pool.decode, view):
                seconds = self._prompt_s(worker, request, stairs)
                finish = min(finish, worker.free_at(now) + seconds + worker.pace.spread * seconds)
        late_s = finish - request.deadline
        if late_s <= 0.0:
            return PASSED if self._pass_over else None
        if self.late == "serve" or request.arrival + self._alone_s(request, stairs, view) > request.deadline:
            return Passed(late_s)
        return Refusal(f"the first token would come {late_s:.1f} s too late: the cell is overloaded", late_s, "LATE")

    def _alone_s(self, request: Request, stairs: list[Stair], view: View) -> float:
        """Least seconds to the first token anywhere if nobody else's prompt was there."""
        workers: list[Worker] = []
        if self.paths != "local":
            workers += [worker for worker in view.pool.prefill if worker.could_fit(request.length)]
        if self.paths != "split":
            workers += self._could_serve(request, view.pool.decode, view)
        return min([self._prompt_s(worker, request, stairs) for worker in workers], default=math.inf)

    @staticmethod
    def _could_serve(request: Request, workers: list[Worker], view: View) -> list[Worker]:
        need = request.length + request.output_to_come
        return [worker for worker in workers if worker.could_fit(need)]

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """Least max(ITL ratio, memory ratio) among workers where both stay in bounds; ties to the lower id."""
        best, best_score = NOBODY, math.inf
        need = request.length + request.output_to_come
        if view.orders is not None:
            view.orders.refresh()
            return large_pool.least_loaded(request, view.pool, view.orders, need, self._decode_score)
        for worker in view.pool.decode:
            score = self._decode_score(worker, request, need)
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
        if view.orders is not None:
            view.orders.refresh()
            return large_pool.next_free(view.pool, view.orders, horizon, now)
        soonest = math.inf
        for worker in view.pool.workers.values():
            if worker.prefills:
                moment = worker.free_within(horizon)
                if now < moment < soonest:
                    soonest = moment
        return soonest

    # --- prefill ----------

    def _outlook(self, request: Request, stairs: list[Stair], view: View, now: float) -> Outlook:
        """What the prefill workers promise."""
        if request.left > 1 and not view.pool.decode:
            return NO_OUTLOOK
        limit = now + self._horizon(view) + CLOCK_ERROR
        length, itl_s = request.length, request.itl_s
        fills = request.rank >= BATCH_RANK  # takes only what nobody else does
        if view.orders is not None and not fills:
            found = view.orders.known[request.rid].depths
            outlook = large_pool.outlook(request, found, view.pool, view.orders, limit, now)
            return large_pool.fetching(outlook, request, stairs, view, now) if stairs and self.fetches else outlook
        best: Candidate | None = None
        somebody = False
        soonest = least = surest = math.inf
        least_s = 0.0
        offer = best_offer(request, stairs, view, now) if stairs and self.fetches else None
        alike, seconds, known = -1, 0.0, None  # most workers are of one kind and have none of it cached
        for worker in view.pool.prefill:
            if length > worker.limit:
                continue
            cached = cached_tokens(worker, length, stairs) if stairs else 0
            if worker.decodes:
                seconds, known = worker.prompt_s(length - cached, cached, itl_s), None
            elif cached != alike or worker.pace is not known:
                seconds = worker.prefill_s(length - cached, cached)
                alike, known = cached, worker.pace
            free_at = worker.free_at(now)
            finish, took_s = free_at + seconds, seconds
            fetches = False
            if offer is not None and cached < offer.tokens:
                fetched = offer.finish(worker, request, cached, free_at)
                if fetched + MIN_GAIN_S < finish:
                    finish, took_s, fetches = fetched, fetched - free_at, True
            error_s = worker.pace.spread * took_s
            if finish < least or (finish == least and took_s < least_s):
                least, least_s = finish, took_s
            if finish + error_s < surest:
                surest = finish + error_s
            others = fills and (worker.prefills or worker.fills)
            begins = not others and worker.begins_by(limit, now, length - cached, itl_s)
            if not begins and finish < soonest:
                soonest = finish
            if worker.full or others or not (begins or worker.begins_by(limit, now, 1, itl_s)):
                continue
            somebody = True
            if begins and worker.booked + length <= worker.limit and (best is None or finish < best.finish):
                best = Candidate(finish, worker.id, cached, seconds, error_s=error_s)
                if fetches and offer is not None:
                    best = with_fetch(best, worker, offer, free_at, now)
        return Outlook(best, soonest, least, surest, least_s, somebody)

    def _best_local(
        self, request: Request, stairs: list[Stair], outlook: Outlook, view: View, now: float
    ) -> tuple[Candidate | None, bool]:
        """The earliest of the decode workers where it may begin within the commit horizon; whether any prompt may."""
        best: Candidate | None = None
        somebody = False
        length = request.length
        need = length + request.output_to_come
        split = outlook.split
        bound = outlook.least + self._spared_s(request, outlook, view, now) if split is None else split.finish
        limit = now + self._horizon(view) + CLOCK_ERROR
        orders = view.orders
        if orders is not None:
            if not large_pool.may_take_prompts(view.pool, orders, request.itl_s, limit, now):
                return None, False
            found = orders.known[request.rid].depths
            if split is None and not large_pool.may_be_earlier(request, found, orders, bound, limit, now):
                return None, True
            search = large_pool.LocalSearch(request, view.pool, orders, need, bound, now, self._local_candidate)
            also = NOBODY if split is None else split.worker
            return large_pool.best_local(search, found, orders, bound, limit, also), True
        alike, seconds, known = -1, 0.0, None
        for worker in view.pool.decode:
            if worker.fills or worker.booked > worker.limit:
                continue
            if not worker.begins_by(limit, now, 1, request.itl_s):
                continue
            somebody = True
            if not worker.fits(need) or worker.batch >= worker.max_batch:
                continue
            cached = cached_tokens(worker, length, stairs) if stairs else 0
            if not worker.begins_by(limit, now, length - cached, request.itl_s):
                continue
            if cached != alike or worker.pace is not known:
                seconds = worker.prefill_s(length - cached, cached)
                alike, known = cached, worker.pace
            # Even with the worker for itself the prompt must be earlier there than elsewhere.
            if worker.free_at(now) + seconds >= bound and (split is None or worker.id != split.worker):
                continue
            candidate = self._local_candidate(worker, request, cached, seconds, now)
            if candidate is not None and (best is None or candidate.finish < best.finish):
                best = candidate
        return best, somebody

    @staticmethod
    def _local_candidate(worker: Worker, request: Request, cached: int, alone_s: float, now: float) -> Candidate | None:
        """``alone_s``: seconds without decodes beside the prompt. None where they leave no useful chunk."""
        spread = worker.pace.spread
        if not worker.decodes:
            return Candidate(worker.free_at(now) + alone_s, worker.id, cached, alone_s, error_s=spread * alone_s)
        beside = worker.beside(request.itl_s)
        if beside.tokens < MIN_LOCAL_CHUNK:
            return None
        seconds = worker.prompt_s(request.length - cached, cached, request.itl_s)
        begin = worker.free_at(now) if worker.prefills else now + beside.load_s / 2
        return Candidate(begin + seconds, worker.id, cached, seconds, error_s=spread * seconds)

    @staticmethod
    def _prompt_s(worker: Worker, request: Request, stairs: list[Stair]) -> float:
        cached = cached_tokens(worker, request.length, stairs)
        return worker.prompt_s(request.length - cached, cached, request.itl_s)

    def _prefer_local(self, request: Request, local: Candidate, outlook: Outlook, view: View, now: float) -> bool:
        split = outlook.split
        if split is not None and split.worker == local.worker:
            return local.finish <= split.finish
        if split is None and outlook.least == math.inf:
            return True
        if not self._in_time(request, local, now):
            return False
        if split is not None:
            return local.finish < split.finish
        later_s = local.finish - outlook.least
        if later_s < 0.0:
            return True
        price_s = local_price_s(view.pool.workers[local.worker], local.seconds, view, now)
        return later_s + price_s < self._spared_s(request, outlook, view, now)

    def _spared_s(self, request: Request, outlook: Outlook, view: View, now: float) -> float:
        """What the others gain if no prefill worker computes the prompt; the batch class takes nothing from them."""
        if not self._price or request.rank >= BATCH_RANK or outlook.least == math.inf:
            return 0.0
        return prefill_price_s(outlook.least_s, view, now)

    @staticmethod
    def _instead_of(local: Candidate, outlook: Outlook, now: float) -> str:
        if outlook.split is not None:
            return f"split {1000 * (outlook.split.finish - now):.0f} ms"
        later_s = local.finish - outlook.least
        if 0.0 <= later_s < math.inf:
            return f"{1000 * later_s:.0f} ms later than at a busy prefill worker that others need"
        return "no other worker has room"

    @staticmethod
    def _in_time(request: Request, local: Candidate, now: float) -> bool:
        return now + LOCAL_MARGIN * (local.finish - now) + local.error_s <= request.deadline

    @staticmethod
    def _local(local: Candidate, other: str, now: float) -> Placement:
        reason = f"local: first token in {1000 * (local.finish - now):.0f} ms, {other}"
        return Placement(local.worker, local.worker, "local", reason, *local[2:7])

    def _split(self, request: Request, split: Candidate, view: View, now: float) -> Placement | None:
        decode = NOBODY
        if request.left > 1 and not view.unhomed:  # nobody passes KV that waits: long prompts would starve
            decode = self.decode_for(request, view, now)
        if decode == split.worker:
            return self._local(split, "the least loaded to decode, too", now)
        reason = f"split: first token in {1000 * (split.finish - now):.0f} ms"
        if split.fetched:
            source = view.pool.workers[split.source].name
            reason += f", {split.fetched} tokens from {source} in {1000 * split.fetch_s:.0f} ms"
        if request.left > 1 and decode == NOBODY:
            if self.paths == "auto" and self._decodes_at_home(request, view.pool.workers[split.worker]):
                return self._local(split, "no decode worker has room", now)
            if not self._may_wait(request, view, now):
                return None
            reason += ", no decode worker has room yet: KV waits"
        return Placement(split.worker, decode, "split", reason, *split[2:7])

    def _decodes_at_home(self, request: Request, worker: Worker) -> bool:
        """Whether the worker that computes the prompt can go on with it: its next prompts take longer, but none waits.

        So a pool that is too large for its work takes over some of the other's, whatever the split was set to.
        """
        need = request.length + request.output_to_come
        return self._home and self._decode_score(worker, request, need) <= 1.0

    @staticmethod
    def _may_wait(request: Request, view: View, now: float) -> bool:
        """Soft reservation: KV without a decode worker stays under half of the prefill pool's memory.

        Nor is a prompt computed whose second token would be long in coming: the first is held until its deadline.
        """
        booked = sum([worker.booked for worker in view.pool.prefill])
        capacity = sum([worker.capacity for worker in view.pool.prefill])
        if booked + request.length > UNHOMED_SHARE * capacity:
            return False
        return request.late or request.first_at >= 0.0 or now + decode_wait_s(request, view) <= request.deadline

    # --- shared ----------

    def _decode_score(self, worker: Worker, request: Request, need: int) -> float:
        booked = worker.booked + need
        if request.attempt in worker.held:  # it has the KV already
            booked -= worker.held[request.attempt]
        batch = len(worker.decodes)
        if worker.full or booked > worker.limit or batch >= worker.max_batch:
            return math.inf
        memory = booked / worker.limit
        if not self._mind_itl:
            return memory
        step = worker.decode_s(batch + 1, worker.context + request.length)
        itl = step / (ITL_SHARE * worker.tightest_itl(request.itl_s))
        if itl > memory:
            return math.inf if batch > 0 and itl > 1.0 else itl
        return memory

    def _horizon(self, view: View) -> float:
        """J of the commit rule: late enough that the queue stays central, early enough that nobody idles."""
        if not self._bind_late:
            return EVER_S
        return min(MAX_COMMIT_S, max(MIN_COMMIT_S, 2.0 * view.commit_round_trip_s))
