"""A worker on a virtual clock that answers the core's actions as a real one does, and checks what it is asked."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from twinpool.cost import StepCost
from twinpool.router import events as ev
from twinpool.router.request import Request

if TYPE_CHECKING:
    from tests.router.fake_cluster import FakeCluster

COST = StepCost(c0=5e-3, a=1e-4, b=1e-8, d0=8e-3, d1=1e-4, d2=1e-7)
BLOCK = 4  # tokens
BLOCK_BYTES = 1024
LATENCY_S = 0.001
TOKEN_S = 0.010
PULL_S = 0.002
REPORT_S = 0.020  # after a refusal: a worker never reports at once


def worker_up(
    worker: int,
    *roles: str,
    blocks: int = 64,
    device: str = "cpu",
    cost: StepCost = COST,
    chunk_tokens: int = 16,
    max_batch: int = 8,
) -> ev.WorkerUp:
    """A worker of ``blocks`` blocks of 4 tokens; both roles by default."""
    both = roles or ("prefill", "decode")
    return ev.WorkerUp(worker, f"w{worker}", both, blocks, BLOCK, BLOCK_BYTES, device, cost, chunk_tokens, max_batch)


def request_of(
    rid: int,
    prompt_len: int = 10,
    max_tokens: int = 4,
    *,
    hashes: list[int] | None = None,
    ttft_s: float = 1.0,
    itl_s: float = 0.1,
    give_up: float = math.inf,
    queue_until: float = math.inf,
    resumed: int = 0,
) -> Request:
    """A request with mild SLOs."""
    return Request(
        rid,
        prompt_len,
        max_tokens,
        hashes or [],
        ttft_s=ttft_s,
        ttft_factor=0.0,
        itl_s=itl_s,
        give_up=give_up,
        queue_until=queue_until,
        resumed=resumed,
    )


@dataclass(eq=False)
class Job:
    """What one worker has of one attempt."""

    attempt: int
    request: Request
    blocks: int
    length: int  # tokens that need KV before the next one can be drawn
    position: int  # output tokens known
    goal: int = 0  # tokens of a prompt to compute
    transfer: bool = False
    decode: bool = False
    computed: int = 0
    announced: int = 0
    received: set[int] = field(default_factory=set)
    lease_until: float = math.inf
    warned: bool = False


class FakeWorker:
    """One worker: prompts one after another in chunks, decoding sequences side by side, pulls at a fixed speed."""

    def __init__(self, cluster: FakeCluster, up: ev.WorkerUp) -> None:
        self.cluster = cluster
        self.up = up
        self.jobs: dict[int, Job] = {}
        self.latency_s = LATENCY_S
        self.last_heard = self.last_sent = 0.0
        self._prompts: deque[Job] = deque()
        self._computing = False

    @property
    def free(self) -> int:
        """Blocks."""
        return self.up.blocks - sum(job.blocks for job in self.jobs.values())

    def alive(self) -> bool:
        """Whether its link is up."""
        return self.cluster.workers.get(self.up.worker) is self

    # --- both ways, in order ----------

    def hear(self, action: ev.Action) -> None:
        """An action of the router, on its way."""
        self.last_heard = max(self.last_heard, self.cluster.now + self.latency_s)
        self.cluster.at(self.last_heard, lambda: self._take(action) if self.alive() else None)

    def say(self, event: ev.Event, position: int = 0) -> None:
        """An event for the router, on its way."""
        self.last_sent = max(self.last_sent, self.cluster.now + self.latency_s)
        self.cluster.at(self.last_sent, lambda: self.cluster.receive(event, position) if self.alive() else None)

    def report(self) -> None:
        """Its own numbers."""
        context = sum(job.length for job in self.jobs.values())
        self.say(ev.Reported(self.up.worker, self.free, len(self.jobs), 0, context, TOKEN_S))

    # --- what the router asks for ----------

    def _take(self, action: ev.Action) -> None:
        match action:
            case ev.SendReserve():
                self._reserve(action)
            case ev.SendLend():
                self._lend(action)
            case ev.SendPrefill():
                self._prefill(action)
            case ev.SendPull():
                self._pull(action)
            case ev.SendDecode():
                self._decode(action)
            case ev.SendRelease() | ev.SendCancel():
                self.drop(action.attempt)
            case ev.SendYield():
                if action.attempt in self.jobs:
                    self.lose(action.attempt, "preempted", counts=False)
            case ev.SendRenew():
                for attempt in action.attempts:
                    if attempt in self.jobs:
                        self._grant(self.jobs[attempt])

    def _admit(self, job: Job) -> bool:
        assert job.attempt not in self.jobs, f"{self.up.name} has attempt {job.attempt} already"
        if self.cluster.use("no_room") or job.blocks > self.free:
            self.say(ev.NoRoom(self.up.worker, job.attempt))
            self.cluster.at(self.cluster.now + REPORT_S, lambda: self.report() if self.alive() else None)
            return False
        self.jobs[job.attempt] = job
        self._grant(job)
        return True

    def _grant(self, job: Job) -> None:
        job.lease_until = self.cluster.now + self.cluster.core.state.limits.lease_s
        self.cluster.at(job.lease_until, lambda: self._reap(job) if self.alive() else None)

    def _reap(self, job: Job) -> None:
        if self.jobs.get(job.attempt) is job and self.cluster.now >= job.lease_until:
            self.cluster.expired.append(job.attempt)
            self.lose(job.attempt, "LEASE", counts=True)

    def _reserve(self, action: ev.SendReserve) -> None:
        request = action.request
        job = Job(action.attempt, request, action.blocks, request.length, request.emitted)
        if self._admit(job) and not self.cluster.use("mute"):
            held = min(self.cluster.held, request.blocks(BLOCK))
            job.received.update(range(min(held, (request.length - 1) // BLOCK)))
            self.say(ev.Reserved(self.up.worker, action.attempt, held))

    def _lend(self, action: ev.SendLend) -> None:
        count = min(self.cluster.lent, action.hashes)
        self.cluster.loans += 1
        if self.cluster.use("mute"):
            return
        if count:
            assert action.attempt not in self.jobs, f"{self.up.name} has loan {action.attempt} already"
            job = self.jobs[action.attempt] = Job(action.attempt, action.request, 0, BLOCK * count, 0)
            job.announced = count
            self._grant(job)
        self.say(self._ready(action.attempt, 0, count))

    def _ready(self, attempt: int, first: int, count: int) -> ev.BlocksReady:
        """Blocks whose places say whose they are."""
        return ev.BlocksReady(
            self.up.worker, attempt, first, count, count * attempt.to_bytes(4, "little"), bytes(8 * count)
        )

    def _prefill(self, action: ev.SendPrefill) -> None:
        request = action.request
        reserved = self.jobs.pop(action.attempt, None)  # for a fetch, which is over, or late
        length = request.prompt_len + request.emitted
        blocks = -(-(length + action.decode) // BLOCK)
        job = Job(action.attempt, request, blocks, length, request.emitted, length, action.transfer, action.decode)
        if reserved is not None:
            assert not request.loan, f"the prompt of request {request.rid} begins before its fetch is over"
            job.computed = BLOCK * min(len(reserved.received), (length - 1) // BLOCK)
        if self._admit(job):
            self._prompts.append(job)
            self._next_chunk()

    def _next_chunk(self) -> None:
        while self._prompts and self.jobs.get(self._prompts[0].attempt) is not self._prompts[0]:
            self._prompts.popleft()
        if self._computing or not self._prompts:
            return
        self._computing = True
        job = self._prompts[0]
        tokens = min(self.up.chunk_tokens, job.length - job.computed)
        seconds = self.up.cost.step([(tokens, job.computed)], 0, 0)
        self.cluster.at(self.cluster.now + seconds, lambda: self._chunk_done(job, tokens) if self.alive() else None)

    def _chunk_done(self, job: Job, tokens: int) -> None:
        self._computing = False
        if self.jobs.get(job.attempt) is job:
            job.computed += tokens
            self.say(ev.Progressed(self.up.worker, job.attempt, job.computed, 0, TOKEN_S, 1.0))
            if job.computed == job.length:
                self._prompts.remove(job)
                self._speak(job)
            if job.attempt in self.jobs and job.transfer:
                self._announce(job)
        self._next_chunk()

    def _announce(self, job: Job) -> None:
        end = -(-job.computed // BLOCK) if job.computed == job.goal else job.computed // BLOCK
        first, count = job.announced, end - job.announced
        if count > 0:
            job.announced = end
            self.say(self._ready(job.attempt, first, count))

    def _pull(self, action: ev.SendPull) -> None:
        job = self.jobs.get(action.attempt)
        if job is None:
            return
        blocks = set(range(action.first, action.first + len(action.blocks) // 4))
        assert len(action.sums) == 2 * len(action.blocks)
        assert blocks.isdisjoint(job.received), f"{self.up.name} has some of blocks {blocks} already"
        assert max(blocks) < job.blocks
        self.cluster.at(self.cluster.now + PULL_S, lambda: self._pulled(job, action, blocks) if self.alive() else None)

    def _pulled(self, job: Job, action: ev.SendPull, blocks: set[int]) -> None:
        if self.jobs.get(job.attempt) is not job:
            return
        peer = self.cluster.workers.get(action.peer)
        source = peer.jobs.get(int.from_bytes(action.blocks[:4], "little")) if peer else None
        if source is None or source.announced <= max(blocks) or self.cluster.use("bad_pull"):
            self.say(ev.BlocksBad(self.up.worker, job.attempt, "CHECKSUM"))
            return
        job.received |= blocks
        count = len(blocks)
        size = count * BLOCK_BYTES
        self.say(ev.BlocksVerified(self.up.worker, job.attempt, action.first, count, size, PULL_S, "fake"))
        self._start(job)

    def _decode(self, action: ev.SendDecode) -> None:
        job = self.jobs.get(action.attempt)
        if job is not None:
            job.decode, job.position = True, action.request.emitted
            job.length = action.request.prompt_len + job.position
            self._start(job)

    def _start(self, job: Job) -> None:
        here = job.computed if job.computed else BLOCK * len(job.received)
        if job.decode and here >= job.length - 1:
            self._wait_token(job)

    # --- decoding ----------

    def _wait_token(self, job: Job) -> None:
        self.cluster.at(self.cluster.now + TOKEN_S, lambda: self._next_token(job) if self.alive() else None)

    def _next_token(self, job: Job) -> None:
        if self.jobs.get(job.attempt) is not job:
            return
        missing = -(-job.length // BLOCK) - job.blocks
        if missing > self.free:
            self.lose(job.attempt, "preempted", counts=False)
            return
        job.blocks += max(0, missing)
        self._speak(job)
        self._warn()

    def _warn(self) -> None:
        """The latest to come that decodes would be the first to go."""
        decoding = [job for job in self.jobs.values() if job.decode and job.computed + len(job.received)]
        if self.free < len(decoding) and not decoding[-1].warned:
            decoding[-1].warned = True
            self.say(ev.Short(self.up.worker, decoding[-1].attempt))

    def _speak(self, job: Job) -> None:
        self.say(ev.Emitted(self.up.worker, job.attempt, 1), job.position)
        job.position += 1
        job.length += 1
        request = job.request
        if job.position >= min(request.max_tokens, self.cluster.stops.get(request.rid, request.max_tokens)):
            self.say(ev.Ended(self.up.worker, job.attempt, "stop"))
            self.drop(job.attempt)
        elif job.decode:
            self._wait_token(job)

    def drop(self, attempt: int) -> None:
        """Free what is here of an attempt. Idempotent."""
        if self.jobs.pop(attempt, None) is not None:
            self.report()

    def lose(self, attempt: int, reason: str, *, counts: bool) -> None:
        """Give the attempt up and say so."""
        self.drop(attempt)
        self.say(ev.AttemptLost(self.up.worker, attempt, reason, counts))
