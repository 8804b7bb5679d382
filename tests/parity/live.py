"""The live code in one process on a virtual clock: what a trace does to it, event by event and request by request.

Dispatcher, roster, links, worker links, workers and schedulers are the product's own, frames are encoded and decoded.
Only these are stand-ins: the event loop and its connections (``virtual.py``), the engine's clock, and the way of KV
bytes, which takes as long as the simulator's links say (``sim/links.py``).
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from typing import Any

from tests.parity.live_worker import ADDRESS, Fabric, LiveWorker, Prompts, Requests, Settings
from tests.parity.virtual import VirtualLoop, virtual_loop

from twinpool.errors import TwinpoolError
from twinpool.router import events as ev
from twinpool.router.cell import Slo, Stream, Submission, TokensOut
from twinpool.router.core import Core
from twinpool.router.dispatch import Dispatcher
from twinpool.router.links import LinkSettings, listen
from twinpool.router.policy import Policy
from twinpool.router.request import Request
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.state import Limits
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import Tokenizer, load_tokenizer

__all__ = ["LiveRequest", "LiveRun", "Plain", "Requests", "Settings", "Turn", "plain", "run_live"]

START = -1.0  # workers join before the trace begins
TRANSFER_TIMEOUT_S = 60.0

Plain = tuple[Any, ...]  # a record's name and its fields
Turn = tuple[float, Plain, tuple[Plain, ...]]  # (now, event, actions): one call of the core


@dataclass(slots=True)
class LiveRequest:
    """What a client saw, and what the core knew of it at the end; times on the trace's clock, -1: did not happen."""

    arrival: float = -1.0
    shown: float = -1.0  # when the first token was sent on: the end of TTFT
    tokens: list[float] = field(default_factory=list)  # when each token reached the client; an end lets go held ones
    ended: float = -1.0
    outcome: str = ""  # ok, or the reason of the error
    path: str = ""
    prefill: str = ""
    decode: str = ""
    attempts: int = 0
    cached: int = 0
    kv_bytes: int = 0


@dataclass(slots=True)
class LiveRun:
    """What came out. ``log`` has every call of the core in order: (now, event, actions), each as plain tuples."""

    requests: list[LiveRequest]
    rids: list[int]  # the core's number of each request
    log: list[Turn]

    def digest(self) -> str:
        """Of all calls, times to the last bit, and of all that clients saw."""
        text = hashlib.sha256()
        for turn in self.log:
            text.update(repr(turn).encode())
        for request in self.requests:
            text.update(repr(request).encode())
        return text.hexdigest()


def plain(record: ev.Event | ev.Action) -> Plain:
    """Name and fields: a request as its rid, hashes and block columns as their lengths."""
    values = (getattr(record, name) for name in ev.fields(type(record)))
    return (type(record).__name__, *map(_plain_value, values))


def _plain_value(value: object) -> object:
    if isinstance(value, Request):
        return value.rid
    if isinstance(value, list | bytes):
        return len(value)
    return value if isinstance(value, int | float | str | bool | tuple | None) else type(value).__name__


class RecordingCore(Core):
    """The core, and every call of it."""

    def __init__(self, policy: Policy, limits: Limits) -> None:
        super().__init__(policy, limits)
        self.log: list[Turn] = []
        self.submitted: Request | None = None  # the latest one
        self.shown: dict[int, float] = {}  # rid -> when

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """See Core."""
        if isinstance(event, ev.Submit):
            self.submitted = event.request
        said = plain(event)
        actions = super().on(event, now)
        self.log.append((now, said, tuple([plain(action) for action in actions])))
        self.shown |= {action.rid: now for action in actions if isinstance(action, ev.Show)}
        return actions


def _must_end_well(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()


def _must_not_end(task: asyncio.Task[None]) -> None:
    _must_end_well(task)
    assert task.cancelled(), f"{task.get_name()} stopped"


class Cluster:
    """One run."""

    def __init__(self, loop: VirtualLoop, trace: Requests, settings: Settings, tokenizer: Tokenizer) -> None:
        self._loop = loop
        self._trace = trace
        self._settings = settings
        self._prompts = Prompts(trace, tokenizer.vocab_size)
        self.core = RecordingCore(settings.policy(), settings.limits)
        fabric = Fabric(loop, settings)
        factors = {self._prompts.tokens(i).tobytes(): factor for i, factor in enumerate(settings.work)}
        self.workers = [
            LiveWorker(loop, fabric, settings, number, tokenizer, factors) for number in range(len(settings.roles))
        ]
        self.cell = Dispatcher(self.core, Roster({}), RequestLog(None), ranks={}, clock=loop.time,
                               transfer_timeout_s=TRANSFER_TIMEOUT_S)  # fmt: skip
        self.requests = [LiveRequest() for _ in trace.arrival]
        self.rids = [0] * len(trace.arrival)
        self._followers: dict[int, list[int]] = {}
        for i, first in enumerate(trace.after or ()):
            if first >= 0:
                self._followers.setdefault(first, []).append(i)
        self._left = len(trace.arrival)
        self._over = asyncio.Event()

    async def run(self) -> LiveRun:
        """Let the workers join, play the trace and the faults, wait for the last client, check that nothing is left."""
        loop, settings = self._loop, self._settings
        links = LinkSettings("", settings.heartbeat_s, 6 * settings.heartbeat_s, settings.limits.lease_s)
        await listen(self.cell, links, ADDRESS, loop.time)
        for worker in self.workers:
            asyncio.create_task(worker.live(), name=worker.name).add_done_callback(_must_not_end)
        for number, when in settings.deaths:
            loop.call_at(when, self._cut, number)
        for number, when in settings.drains:
            loop.call_at(when, self.cell.drain_worker, self.workers[number].name)
        waiting = {i for followers in self._followers.values() for i in followers}
        for i, when in enumerate(self._trace.arrival):
            if i not in waiting:
                loop.call_at(when, self._arrive, i)
        for i, when in settings.cancels:
            loop.call_at(when, self.cell.cancel, str(i))
        await self._over.wait()
        await asyncio.sleep(settings.limits.lease_s)  # whatever was forgotten has run out by then
        self._check()
        return LiveRun(self.requests, self.rids, self.core.log)

    def _cut(self, worker: int) -> None:
        self._loop.connections[worker].close()

    def _arrive(self, i: int) -> None:
        seen, settings = self.requests[i], self._settings
        seen.arrival = self._loop.time()
        submission = Submission(
            request_id=str(i),
            prompt=self._prompts.tokens(i),
            sampling=SamplingParams(max_tokens=self._trace.output[i], ignore_eos=True),
            slo=Slo(settings.ttft_s, settings.ttft_factor, settings.itl_s),
            returns=self._trace.returns is not None and self._trace.returns[i],
        )
        try:
            stream: Stream | None = self.cell.submit(submission)
        except TwinpoolError as error:
            stream, seen.outcome = None, error.reason
        request = self.core.submitted
        assert request is not None
        self.rids[i] = request.rid
        asyncio.Task(self._read(i, request, stream), loop=self._loop).add_done_callback(_must_end_well)

    async def _read(self, i: int, request: Request, stream: Stream | None) -> None:
        """The client of request ``i``."""
        seen = self.requests[i]
        try:
            if stream is not None:
                async for out in stream:
                    if isinstance(out, TokensOut):
                        seen.tokens += [self._loop.time()] * len(out.ids)
                seen.outcome = "ok"
        except TwinpoolError as error:
            seen.outcome = error.reason
        seen.ended = self._loop.time()
        seen.shown = self.core.shown.pop(request.rid, -1.0)
        seen.path, seen.prefill, seen.decode = request.path, request.prefill_name, request.decode_name
        seen.attempts, seen.cached, seen.kv_bytes = request.attempts, request.cached, request.kv_bytes
        for follower in self._followers.get(i, ()):
            assert self._trace.think is not None
            when = max(seen.ended + self._trace.think[follower], self._trace.arrival[follower])
            self._loop.call_at(when, self._arrive, follower)
        self._left -= 1
        if not self._left:
            self._over.set()

    def _check(self) -> None:
        self.core.state.check_integrity()
        assert not self.core.state.requests
        for worker in self.workers:
            worker.check_idle()


def run_live(trace: Requests, settings: Settings) -> LiveRun:
    """Play ``trace`` on the live code. Raises what anything in it raises, AssertionError where something leaked."""
    loop = virtual_loop(START, settings.latency_s, settings.limit_s)
    tokenizer = load_tokenizer()

    async def play() -> LiveRun:
        cluster = Cluster(loop, trace, settings, tokenizer)
        try:
            return await cluster.run()
        finally:
            for worker in cluster.workers:
                worker.pool.close()

    return loop.run(play())
