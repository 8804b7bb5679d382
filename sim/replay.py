"""One run: a trace through the router's own core and policy, on emulated workers, on a virtual clock."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from time import perf_counter

from twinpool.classes import RANKS
from twinpool.cost import Cost
from twinpool.errors import ConfigError
from twinpool.router import core
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy.base import Policy
from twinpool.router.policy.registry import make_policy
from twinpool.router.request import Request
from twinpool.router.state import Limits
from twinpool.sim.disturbance import most_tokens, outputs_of, work_of
from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gaps import request_gaps
from twinpool.sim.kv_feed import KvFeed
from twinpool.sim.links import Links
from twinpool.sim.loop import Arrivals, Loop
from twinpool.sim.memory import GOLDEN
from twinpool.sim.planned_cost import PlannedCost
from twinpool.sim.profiles import Profile, load_profile
from twinpool.sim.result import Columns, Result, Wall, WorkerTotals
from twinpool.sim.settings import Failure, Settings
from twinpool.sim.trace import Trace
from twinpool.sim.worker import SimWorker

Watch = Callable[[int, float], None]
FORM = "compiled" if core.__file__.endswith((".so", ".pyd")) else "interpreted"


class Cluster:
    """The workers of a run, and how to make them again."""

    def __init__(self, settings: Settings, trace: Trace) -> None:
        self.settings = settings
        self.profile: Profile = load_profile(settings.profile)
        self.cost: Cost = self.profile.fit if settings.closed_form else self.profile.cost
        self.planned: Cost = self.cost
        if self.profile.planned is not None:
            self.planned = self.profile.planned
            self.cost = PlannedCost(self.cost, self.planned)
        self.unit_tokens = trace.block_tokens
        self.block_size = _block_size(settings, trace)
        tokens = settings.kv_tokens or self.profile.kv_tokens
        self.blocks = tokens // self.block_size
        if self.blocks < 1:
            raise ConfigError(f"kv_tokens is {tokens}: a worker needs room for a block of {self.block_size} tokens")
        self.block_bytes = self.block_size * self.profile.kv_bytes_per_token
        rate = settings.link_bytes_per_s or self.profile.link_bytes_per_s
        self.links = Links([rate] * settings.workers)

    def worker_up(self, number: int, roles: tuple[str, ...]) -> ev.WorkerUp:
        """What a worker says of itself when it joins."""
        return ev.WorkerUp(
            number, self.settings.names()[number], roles, self.blocks, self.block_size, self.block_bytes,
            self.settings.profile, self.planned, self.settings.chunk_tokens, self.settings.max_batch,
            self.unit_tokens or self.block_size,
        )  # fmt: skip

    def worker(self, number: int, loop: Loop) -> SimWorker:
        """An empty emulated worker."""
        return SimWorker(
            number, loop, self.cost, blocks=self.blocks, block_size=self.block_size, unit_tokens=self.unit_tokens,
            block_bytes=self.block_bytes, chunk_tokens=self.settings.chunk_tokens, max_batch=self.settings.max_batch,
            eviction=self.settings.eviction,
        )  # fmt: skip


MakeWorker = Callable[[Cluster, int, Loop], SimWorker]
MakeCore = Callable[[Policy, Limits], Core]


def _block_size(settings: Settings, trace: Trace) -> int:
    """The settings', unless the trace's hashes stand for less or do not divide."""
    size, unit = settings.block_size, trace.block_tokens
    return size if not unit or unit % size == 0 else math.gcd(size, unit)


def limits_of(settings: Settings) -> Limits:
    """The cell's bounds."""
    return Limits(max_queue=settings.max_queue)


def requests_of(trace: Trace, settings: Settings) -> Callable[[int], Request]:
    """How to make the request of a row."""
    cap = most_tokens(trace, settings)
    slos = {name: settings.slo_of(name) for name in set(trace.klass or ()) | {"realtime"}}
    output, prompt, hashes, offsets = trace.output, trace.prompt, trace.hashes, trace.offsets
    tenants, classes, sessions = trace.tenant, trace.klass, trace.session
    returns = trace.returns
    hashed = bool(trace.block_tokens)

    def make(i: int) -> Request:
        klass = classes[i] if classes is not None else "realtime"
        ttft_s, itl_s = slos[klass]
        return Request(
            i,
            prompt[i],
            max(cap, output[i]),
            hashes[offsets[i] : offsets[i + 1]].tolist() if hashed else [],
            ttft_s=ttft_s,
            ttft_factor=settings.ttft_factor,
            itl_s=itl_s,
            rank=RANKS.get(klass, 0),
            klass=klass,
            tenant=tenants[i] if tenants is not None else "",
            session=sessions[i] if sessions is not None else "",
            returns=returns is not None and returns[i],
        )

    return make


def arrivals_of(trace: Trace, settings: Settings) -> Arrivals:
    """Open arrivals, and who follows whom."""
    arrivals = Arrivals(trace.arrival, requests_of(trace, settings))
    if trace.after is not None and trace.think is not None:
        arrivals.order = [i for i, before in enumerate(trace.after) if before < 0]
        arrivals.think = trace.think
        for i, before in enumerate(trace.after):
            if before >= 0:
                arrivals.followers.setdefault(before, []).append(i)
    return arrivals


def build(
    trace: Trace, settings: Settings, policy: Policy | None = None, watch: Watch | None = None,
    make_worker: MakeWorker = Cluster.worker, make_core: MakeCore | None = None,
) -> Loop:  # fmt: skip
    """A cluster that is up, and its trace, before the first arrival."""
    cluster = Cluster(settings, trace)
    core = (make_core or Core)(policy or make_policy(settings.policy, settings.parameters), limits_of(settings))
    feed = KvFeed(settings.kv_loss, settings.error_seed) if settings.kv_loss else None
    loop = Loop(core, arrivals_of(trace, settings), outputs_of(trace, settings), cluster.links,
                latency_s=settings.latency_s, setup_s=settings.setup_s, max_queue_s=settings.max_queue_s, watch=watch,
                work=work_of(trace, settings), kv_delay_s=settings.kv_delay_s, feed=feed)  # fmt: skip
    for number, roles in enumerate(settings.roles()):
        loop.add_worker(make_worker(cluster, number, loop), cluster.worker_up(number, roles))
    for failure in settings.failures:
        _plan(failure, cluster, loop, make_worker)
    return loop


def _plan(failure: Failure, cluster: Cluster, loop: Loop, make_worker: MakeWorker) -> None:
    names, roles = cluster.settings.names(), cluster.settings.roles()
    if failure.worker not in names:
        raise ConfigError(f"the scenario names worker {failure.worker!r}: there are {', '.join(names)}")
    number = names.index(failure.worker)

    def happen(now: float) -> None:
        if failure.what == "die":
            loop.lose_worker(number, now)
        elif failure.what == "return":
            if number not in loop.workers:
                loop.add_worker(make_worker(cluster, number, loop), cluster.worker_up(number, roles[number]))
        elif number in loop.workers:
            _change(failure, number, loop, now)

    loop.call_at(failure.at, happen)


def _change(failure: Failure, number: int, loop: Loop, now: float) -> None:
    if failure.what == "stall":
        loop.workers[number].stall(now, failure.seconds)
    elif failure.what == "drain":
        loop.decide(ev.WorkerDraining(number), now)
    else:
        both = failure.what == "both"
        loop.decide(ev.RolesSet(number, ("prefill", "decode") if both else (failure.what,)), now)


def run(loop: Loop) -> None:
    """Everything, without the collector: a run makes millions of objects and no cycles."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        loop.run()
    finally:
        gc.enable()
        gc.unfreeze()


def replay(trace: Trace, settings: Settings, watch: Watch | None = None, policy: Policy | None = None) -> Result:
    """The whole trace, and everything that came of it."""
    started = perf_counter()
    loop = build(trace, settings, policy, watch)
    run(loop)
    ran = perf_counter()
    result = result_of(loop, trace, settings)
    result.wall = Wall(run_s=ran - started, stats_s=perf_counter() - ran)
    return result


def result_of(loop: Loop, trace: Trace, settings: Settings) -> Result:
    """The columns and totals of a run that is over."""
    record = loop.record
    gaps = request_gaps(loop.runs, record.gaps, len(trace))
    edge_s = settings.edge_s

    def at_edge(times: Sequence[float]) -> Sequence[float]:
        """Of tokens that come through the router's edge."""
        return [when + edge_s if when >= 0.0 else when for when in times] if edge_s else times

    shown = spread(at_edge(record.shown), settings.edge_spread_s)
    columns = Columns(
        arrival=record.arrival, shown=shown, ended=at_edge(record.ended), prompt=trace.prompt,
        output=loop.outputs, cached=record.cached, prefill=record.prefill,
        decode=record.decode, path=record.path, outcome=record.outcome, itl=gaps.worst, max_gap=gaps.longest,
        unloaded=record.unloaded, kv_bytes=record.kv_bytes, transfer_s=record.transferred,
        ttft_limit=record.ttft_limit, itl_limit=record.itl_limit, tenant=trace.tenant, klass=trace.klass,
    )  # fmt: skip
    profile = load_profile(settings.profile)
    totals = [_totals(loop, i, name, roles, profile) for i, (name, roles) in enumerate(_all(settings))]
    return Result(
        columns, totals, GapPool(loop.runs, record.gaps), settings.policy, settings.profile,
        {"ttft_ms": 1000 * settings.ttft_s, "ttft_factor": settings.ttft_factor, "itl_ms": 1000 * settings.itl_s},
        record.digest, settings=asdict(settings), gap_spread_s=settings.gap_spread_s,
        refusals=record.reasons, compiled=FORM,
    )  # fmt: skip


def spread(times: Sequence[float], quantiles: Sequence[float]) -> Sequence[float]:
    """First tokens (-1: none), each later or earlier by one of the quantiles, all of which come as often.

    By the golden ratio's multiples, which are spread as evenly as can be however many there are.
    """
    if not quantiles:
        return times
    count = len(quantiles)
    return [when + quantiles[int((rid * GOLDEN) % 1.0 * count)] if when >= 0.0 else when
            for rid, when in enumerate(times)]  # fmt: skip


def _all(settings: Settings) -> list[tuple[str, tuple[str, ...]]]:
    return list(zip(settings.names(), settings.roles(), strict=True))


def _totals(loop: Loop, number: int, name: str, roles: tuple[str, ...], profile: Profile) -> WorkerTotals:
    totals = WorkerTotals(
        name, "+".join(roles), profile.gpus, price_per_gpu_hour=profile.price_per_gpu_hour,
        idle_watts=profile.idle_watts_per_gpu, busy_watts=profile.busy_watts_per_gpu,
    )  # fmt: skip
    for worker in loop.lives[number]:
        worker.total(totals)
    totals.sent_bytes = loop.links.sent[number]
    return totals
