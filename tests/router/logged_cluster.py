"""A cluster of fake workers whose core is recorded, traffic with every kind of event, and logs made by hand."""

from __future__ import annotations

from pathlib import Path

from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.decision_log import MAGIC, DecisionLog, Header, Record, Turn, pack
from twinpool.router.decision_replay import read_decisions
from twinpool.router.policy import make_policy
from twinpool.router.policy.base import Policy
from twinpool.router.state import Limits

FIRST = 1 << 30  # attempts of a live router begin anywhere
REQUESTS = 59  # of ``trouble``


class LoggedCore(Core):
    """Whatever enters goes through the log."""

    def __init__(self, policy: Policy, limits: Limits) -> None:
        super().__init__(policy, limits)
        self.state.next_attempt = FIRST
        self.log: DecisionLog | None = None

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        log, self.log = self.log, None
        try:
            return log.decide(event, now) if log is not None else super().on(event, now)
        finally:
            self.log = log


def cluster_of(path: Path, policy: str = "least_seconds") -> FakeCluster:
    """A cluster whose core is recorded."""
    limits = Limits(max_queue=20, lease_s=2.0)
    core = LoggedCore(make_policy(policy), limits)
    core.log = DecisionLog(path, core, policy, {})
    cluster = FakeCluster()
    cluster.core = core
    return cluster


def log_of(cluster: FakeCluster) -> DecisionLog:
    assert isinstance(cluster.core, LoggedCore)
    assert cluster.core.log is not None
    return cluster.core.log


def trouble(cluster: FakeCluster) -> None:
    """Traffic in which every kind of event is."""
    for worker, role in enumerate(("prefill", "prefill", "decode", "decode")):
        cluster.join(worker_up(worker, role, blocks=40))
        cluster.deliver(
            ev.KvChanged(worker, [(1 << 64) - 1 - worker, 7, *(range(8, 20) if worker == 3 else ())], [], True)
        )
    for rid in range(1, REQUESTS + 1):
        if rid == 20:
            cluster.faults["bad_pull"] = cluster.faults["no_room"] = 4
        elif rid == 30:
            cluster.kill(2)
        elif rid == 35:
            cluster.join(worker_up(2, "decode"))
        prompt = 5 + 3 * (rid % 15)
        hashes = list(range(7, 7 + prompt // 4)) if rid % 4 == 0 else [7, rid]
        cluster.submit(request_of(rid, prompt, 1 + rid % 9, hashes=hashes, give_up=cluster.now + 9.0))
        cluster.run(0.007 * (rid % 5))
        cluster.deliver(ev.Reported(2 + rid % 2, 30, 2, 0, 60, 0.009))
        if rid % 9 == 0:
            cluster.deliver(ev.Cancel(rid - 1))
        if rid % 8 == 0:
            for worker, attempt in [(w.id, a) for w in cluster.core.state.pool.decode for a in list(w.decodes)[:1]]:
                cluster.deliver(ev.Short(worker, attempt))
        for attempt, request in list(cluster.core.state.by_attempt.items())[: rid % 11 == 0]:
            cluster.workers[request.prefill].jobs.pop(attempt, None)
            cluster.deliver(ev.AttemptLost(request.prefill, attempt, "engine", True))
    cluster.deliver(ev.RolesSet(0, ("prefill", "decode")))
    cluster.deliver(ev.WorkerDraining(1))
    cluster.deliver(ev.WorkerDraining(3))
    cluster.run_until_ended(60.0)


def short_log(path: Path) -> bytes:
    """A whole log of one request, from start to end."""
    cluster = cluster_of(path)
    cluster.join(worker_up(0, "prefill"))
    cluster.join(worker_up(1, "decode"))
    cluster.submit(request_of(1, 6, 2, hashes=[3]))
    cluster.run_until_ended(5.0)
    log_of(cluster).close()
    return path.read_bytes()


def write(path: Path, records: list[Record]) -> Path:
    path.write_bytes(MAGIC + b"".join(map(pack, records)))
    return path


def turns_of(path: Path) -> tuple[Header, list[Turn]]:
    header, *turns = read_decisions(path)
    assert isinstance(header, Header)
    return header, [turn for turn in turns if isinstance(turn, Turn)]


def name_of(turn: Turn) -> str:
    return type(turn.event).__name__
