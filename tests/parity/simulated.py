"""The simulator's side of a comparison: the same trace, the same cluster, and both sides' calls in one form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

from tests.parity.live import LiveRun, Plain, RecordingCore, Settings, Turn

from twinpool.cost import StepCost
from twinpool.router import events as ev
from twinpool.router.policy.registry import make_policy
from twinpool.sim import replay
from twinpool.sim.disturbance import work_of
from twinpool.sim.loop import Loop
from twinpool.sim.settings import Failure
from twinpool.sim.settings import Settings as SimSettings
from twinpool.sim.trace import Trace

EXACT_S = 1e-9


@dataclass(slots=True)
class SimRun:
    """What the simulator said: its columns, and every call of its core."""

    loop: Loop
    log: list[Turn]


def simulate(trace: Trace, settings: SimSettings, cancels: tuple[tuple[int, float], ...] = ()) -> SimRun:
    """Replay the trace; the clients of ``cancels`` (request, time) go."""
    with patch.object(replay, "Core", RecordingCore):
        loop = replay.build(trace, settings)
    core = loop.core
    assert isinstance(core, RecordingCore)
    for i, when in cancels:
        loop.call_at(when, lambda now, i=i: loop.decide(ev.Cancel(i), now))  # type: ignore[misc]
    replay.run(loop)
    return SimRun(loop, core.log)


def one_at_a_time(settings: SimSettings) -> SimSettings:
    """Settings under which both sides are told the same: each request may write what it will write, the fitted cost."""
    return replace(settings, max_tokens=1, closed_form=True, max_queue=1 << 20, max_queue_s=1e9)


def live_settings(trace: Trace, settings: SimSettings, cancels: tuple[tuple[int, float], ...] = ()) -> Settings:
    """The same cluster for the live code."""
    cluster = replay.Cluster(settings, trace)
    profile, cost = cluster.profile, cluster.cost
    assert isinstance(cost, StepCost)
    names = settings.names()
    when: dict[str, list[tuple[int, float]]] = {"die": [], "drain": []}
    for failure in settings.failures:
        when[failure.what].append((names.index(failure.worker), failure.at))
    return Settings(
        roles=tuple(settings.roles()),
        blocks=cluster.blocks,
        block_size=cluster.block_size,
        token_bytes=profile.kv_bytes_per_token,
        cost=cost,
        chunk_tokens=settings.chunk_tokens,
        max_batch=settings.max_batch,
        eviction=settings.eviction,
        latency_s=settings.latency_s,
        setup_s=settings.setup_s,
        link_bytes_per_s=settings.link_bytes_per_s or profile.link_bytes_per_s,
        ttft_s=settings.ttft_s,
        ttft_factor=settings.ttft_factor,
        itl_s=settings.itl_s,
        policy=lambda: make_policy(settings.policy, settings.parameters),
        limits=replay.limits_of(settings),
        cancels=cancels,
        deaths=tuple(when["die"]),
        drains=tuple(when["drain"]),
        work=tuple(work_of(trace, settings)),
    )


def drains(*when: tuple[str, float]) -> tuple[Failure, ...]:
    """(worker, time) of each."""
    return tuple(Failure(at, "drain", worker) for worker, at in when)


def deaths(*when: tuple[str, float]) -> tuple[Failure, ...]:
    """(worker, time) of each."""
    return tuple(Failure(at, "die", worker) for worker, at in when)


def decisions(log: list[Turn], index_of: dict[int, int]) -> list[tuple[float, Plain]]:
    """(time, action) of all that the core had done; rids become the trace's indices, checksums are left out."""
    found: list[tuple[float, Plain]] = []
    for now, _, actions in log:
        for action in actions:
            if action[0] == "SendRenew":
                continue  # the simulator's leases do not run out
            fields = list(action)
            where = {
                "SendReserve": 2,
                "SendLend": 2,
                "SendPrefill": 2,
                "SendDecode": 2,
                "Show": 1,
                "Finish": 1,
                "Refuse": 1,
            }
            if action[0] in where:
                fields[where[action[0]]] = index_of[fields[where[action[0]]]]
            elif action[0] == "SendPull":
                del fields[-2:]  # sums, and a time-out that differs in the last bit
            found.append((now, tuple(fields)))
    return found


def differences(live: LiveRun, sim: SimRun) -> list[str]:
    """Sentences about the first places where the two runs part; empty: every decision, and every time to 1e-9 s."""
    found: list[str] = []
    ours = decisions(live.log, {rid: i for i, rid in enumerate(live.rids)})
    theirs = decisions(sim.log, {i: i for i in range(len(live.rids))})
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} decisions live, {len(theirs)} simulated")
    for k, ((now, action), (at, other)) in enumerate(zip(ours, theirs, strict=False)):
        if action != other or abs(now - at) > EXACT_S:
            found.append(f"decision {k}: live {now!r} {action}, simulated {at!r} {other}")
            break
    for i in range(len(live.requests)):
        found += _request_differences(live, sim, i)
    return found[:5]


def _request_differences(live: LiveRun, sim: SimRun, i: int) -> list[str]:
    seen, record = live.requests[i], sim.loop.record
    pairs = [
        ("arrival", seen.arrival, record.arrival[i]),
        ("shown", seen.shown, record.shown[i]),
        ("ended", seen.ended, record.ended[i]),
        ("cached", seen.cached, record.cached[i]),
        ("kv_bytes", seen.kv_bytes, record.kv_bytes[i]),
        ("prefill", seen.prefill, _name(record.prefill[i])),
        ("decode", seen.decode, _name(record.decode[i])),
    ]
    return [
        f"request {i}: {name} live {ours}, simulated {theirs}"
        for name, ours, theirs in pairs
        if ours != theirs and not (isinstance(ours, float) and abs(ours - theirs) <= EXACT_S)  # type: ignore[operator]
    ]


def _name(worker: int) -> str:
    return f"w{worker}" if worker >= 0 else ""
