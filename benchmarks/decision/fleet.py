"""A fleet on the live router in one process: what a worker says comes as bytes of a link, decoded and dispatched.

Dispatcher, roster, worker links, frames, core and policy are the product's own. The workers are the simulator's
emulated ones on its virtual clock (exact against live workers: tests/parity), so that a thousand of them need no
processes: what one says is encoded as the frame that a worker would send and given to its ``WorkerLink``; frames to
workers are encoded and their bytes counted, and the emulated worker is handed the action itself. Requests are submitted
with token ids.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from twinpool.cost import StepCost
from twinpool.errors import Overloaded
from twinpool.proto import frames
from twinpool.router import events as ev
from twinpool.router.cell import Slo, Submission
from twinpool.router.core import Core
from twinpool.router.dispatch import Dispatcher
from twinpool.router.links import LinkSettings, WorkerLink
from twinpool.router.policy.base import Policy
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.state import Limits
from twinpool.sampling import SamplingParams
from twinpool.sim.generate import generate
from twinpool.sim.loop import Loop
from twinpool.sim.replay import build
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

VOCAB = 128_256
FIRST_ORDINARY = 256  # token ids below may be special
NEVER_S = 1e9
HAIR_S = 1e-9  # timers are wished for as a delay, which rounds
START_S = 1.0  # within which the queue is filled
SUMS = bytes(8 << 12)


class OverError(Exception):
    """The span of the virtual clock that was asked for is over."""


class Turns(asyncio.AbstractEventLoop):
    """The loop that dispatcher and links believe they run on: what they wish for is kept until ``due``."""

    def __init__(self) -> None:
        self.now = 0.0
        self._soon: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = 0

    def time(self) -> float:
        """Seconds of the virtual clock."""
        return self.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        """See asyncio."""
        handle = asyncio.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        handle = asyncio.TimerHandle(self.now + delay, callback, args, self, context)
        self._order += 1
        heapq.heappush(self._timers, (handle.when(), self._order, handle))
        return handle

    def due(self) -> None:
        """Timers whose time has come."""
        while self._timers and self._timers[0][0] <= self.now + HAIR_S:
            handle = heapq.heappop(self._timers)[2]
            if not handle.cancelled():
                handle._run()

    def turn(self) -> None:
        """What was wished for soon: links write."""
        soon, self._soon = self._soon, []
        for handle in soon:
            handle._run()

    def get_debug(self) -> bool:
        """Never."""
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It stays in the heap, and does nothing there."""


class Wire(asyncio.Transport):
    """Where a link writes to: counts."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """So many bytes leave."""
        self.bytes += len(data)


@dataclass(slots=True)
class Times:
    """What the calls of the core of one kind of event took."""

    wall: array[float] = field(default_factory=lambda: array("d"))  # seconds of each ``Core.on``
    cpu: array[float] = field(default_factory=lambda: array("d"))
    whole: array[float] = field(default_factory=lambda: array("d"))  # from bytes to bytes, seconds of CPU


class FleetCore(Core):
    """The core under the dispatcher, and for the simulator's loop the whole live router."""

    router: LiveRouter

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """What the simulator's loop calls: the event goes the way of the live router."""
        return self.router.hear(event, now)

    def decide(self, event: ev.Event, now: float) -> list[ev.Action]:
        """What the dispatcher calls."""
        return super().on(event, now)


class LiveRouter:
    """Dispatcher and links of a ``FleetCore``, and what their work takes."""

    def __init__(self, core: FleetCore, turns: Turns, trace: Trace, settings: Settings) -> None:
        self.core = core
        self.turns = turns
        self.trace = trace
        self.settings = settings
        self.dispatcher = Dispatcher(
            core, Roster({}), RequestLog(None), ranks={"realtime": 0}, transfer_timeout_s=10.0, clock=turns.time,
            decide=self.decided,
        )  # fmt: skip
        self.links: dict[int, WorkerLink] = {}
        self.wires: dict[int, Wire] = {}
        self.times: dict[str, Times] = {}
        self.span = (NEVER_S, NEVER_S)  # of the virtual clock that is measured
        self.measuring = False
        self.kv_frames = self.kv_blocks = 0
        self.kv_cpu_s = 0.0
        self.depths: list[int] = []  # of the queue
        self._kv_sequence: dict[int, int] = {}
        self._actions: list[ev.Action] = []

    # --- the dispatcher's side ----------

    def decided(self, event: ev.Event, now: float) -> list[ev.Action]:
        """``Core.on``, and how long it took."""
        cpu, wall = time.thread_time(), time.perf_counter()
        actions = self.core.decide(event, now)
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
        self._actions += actions
        if self.measuring:
            full = isinstance(event, ev.Submit) and event.request.over
            times = self.times.setdefault("Submit, queue full" if full else type(event).__name__, Times())
            times.wall.append(wall)
            times.cpu.append(cpu)
        return actions

    # --- the simulator's side ----------

    def hear(self, event: ev.Event, now: float) -> list[ev.Action]:
        """One event as it comes to a live router. Raises OverError when the time is over."""
        if now > self.span[1]:
            raise OverError
        self.measuring = now >= self.span[0]
        self.turns.now = now
        self._actions = []
        if isinstance(event, ev.Submit):
            self._whole(event, self._submit, self._submission(event.request.rid))
        elif isinstance(event, ev.Tick):
            self._whole(event, self.turns.due)
        elif isinstance(event, ev.WorkerUp):
            self._join(event)
        else:
            link = self.links[event.worker]  # type: ignore[union-attr]
            self._whole(event, link.data_received, frames.encode(self._frame(event)))
        if self.measuring:
            self.depths.append(len(self.core.state.queue))
        return self._actions

    def _whole(self, event: ev.Event, what: Callable[..., object], *args: object) -> None:
        start = time.thread_time()
        what(*args)
        self.turns.turn()
        took = time.thread_time() - start
        if self.measuring:
            self.times.setdefault(type(event).__name__, Times()).whole.append(took)
            if isinstance(event, ev.KvChanged):
                self.kv_cpu_s += took

    def _submit(self, submission: Submission) -> None:
        try:
            self.dispatcher.submit(submission)
        except Overloaded:
            return

    def _submission(self, rid: int) -> Submission:
        settings = self.settings
        return Submission(
            request_id=f"request-{rid}",
            prompt=prompt_of(self.trace, rid),
            sampling=SamplingParams(max_tokens=settings.max_tokens, temperature=0.0),
            slo=Slo(settings.ttft_s, settings.ttft_factor, settings.itl_s),
        )

    def _join(self, up: ev.WorkerUp) -> None:
        assert isinstance(up.cost, StepCost)
        model = frames.Model(name="llama-3.1-70b", fingerprint="fleet", dtype="bfloat16", layout="fleet",
                             block_size=up.block_size, block_bytes=up.block_bytes, vocab_size=VOCAB,
                             max_context=1 << 17, eos_ids=(2,))  # fmt: skip
        hello = frames.Hello(version=frames.VERSION, worker=up.name, epoch=1, token="token", roles=up.roles,
                             model=model, blocks=up.blocks, device=up.device, cost=up.cost,
                             chunk_tokens=up.chunk_tokens, max_batch=up.max_batch,
                             kv_addresses={"tcp": "127.0.0.1:1"}, kv_secret=b"secret")  # fmt: skip
        link = WorkerLink(self.dispatcher, LinkSettings("token", 1.0, NEVER_S, 10.0, NEVER_S, NEVER_S), self.turns.time)
        self.wires[up.worker] = Wire()
        link.connection_made(self.wires[up.worker])
        link.data_received(frames.encode(hello))
        assert link.id == up.worker, "the roster counts like the simulator"
        self.links[up.worker] = link
        self.turns.turn()

    def _frame(self, event: ev.Event) -> frames.Frame:
        """What a worker sends to say this."""
        match event:
            case ev.KvChanged():
                return self._kv(event)
            case ev.Emitted():
                return self._tokens(event)
            case ev.Ended():
                end = frames.End(attempt=event.attempt, reason=event.reason)
                return frames.Tokens(attempts=b"", positions=b"", counts=b"", ids=b"", texts=(), ends=(end,))
            case ev.Progressed():
                return frames.Progress(attempt=event.attempt, done=event.done, cached=event.cached,
                                       step_s=event.step_s, pace=event.pace)  # fmt: skip
            case ev.Reserved():
                return frames.Reserved(attempt=event.attempt, held=event.held)
            case ev.NoRoom():
                return frames.NoRoom(attempt=event.attempt)
            case ev.BlocksReady():
                sums = SUMS[: 8 * event.count]
                return frames.BlocksReady(attempt=event.attempt, first=event.first, blocks=event.blocks, sums=sums)
            case ev.BlocksVerified():
                return frames.BlocksVerified(attempt=event.attempt, first=event.first, count=event.count, backend="sim",
                                             bytes=event.bytes, seconds=event.seconds)  # fmt: skip
            case ev.BlocksBad():
                return frames.BlocksBad(attempt=event.attempt, reason=event.reason, message="as simulated")
            case ev.Reported():
                return frames.Report(free=event.free, cached=0, running=event.running, waiting=0, context=0, step_s=0.0)
            case ev.AttemptLost():
                return frames.Preempted(attempt=event.attempt)
        raise AssertionError(f"no worker of this fleet says {event}")

    def _kv(self, event: ev.KvChanged) -> frames.KvEvents:
        sequence = self._kv_sequence.get(event.worker, -1) + 1
        self._kv_sequence[event.worker] = sequence
        if self.measuring:
            self.kv_frames += 1
            self.kv_blocks += len(event.stored) + len(event.removed)
        return frames.KvEvents(sequence=sequence, stored=array("Q", event.stored).tobytes(),
                               removed=array("Q", event.removed).tobytes(), reset=event.reset)  # fmt: skip

    def _tokens(self, event: ev.Emitted) -> frames.Tokens:
        request = self.core.state.by_attempt.get(event.attempt)
        position = request.emitted if request is not None else 0
        return frames.Tokens(attempts=_column(event.attempt), positions=_column(position), counts=_column(event.count),
                             ids=bytes(4 * event.count), texts=("",))  # fmt: skip

    def kv_dropped(self) -> int:
        """Frames with KV events that were sent and are not the ones last taken: of all workers."""
        members = dict(self.dispatcher.roster)
        return sum(sent - members[worker].kv_sequence for worker, sent in self._kv_sequence.items())


def _column(value: int) -> bytes:
    return value.to_bytes(4, "little")


def prompt_of(trace: Trace, rid: int) -> array[int]:
    """Token ids of a request: equal hash ids are equal tokens, all others differ."""
    size = trace.block_tokens
    known = np.array(trace.block_hashes(rid), dtype=np.uint64)
    keys = np.append(known, np.uint64((1 << 40) + rid))
    spread = (keys[:, None] * np.uint64(0x9E3779B97F4A7C15) + np.arange(size, dtype=np.uint64)[None, :]) >> np.uint64(
        20
    )
    ids = (spread % np.uint64(VOCAB - FIRST_ORDINARY)).astype(np.uint32) + np.uint32(FIRST_ORDINARY)
    whole = array("I", ids.tobytes())
    while len(whole) < trace.prompt[rid]:
        whole += whole[-size:]
    return whole[: trace.prompt[rid]]


def traffic(requests: int, rate: float, queued: int, block_tokens: int, seed: int) -> Trace:
    """Long chats, of which the first ``queued`` come at once; row 0 never arrives: live requests count from 1."""
    trace = generate("long", requests=requests + 1, rate=rate, seed=seed, block_tokens=block_tokens)
    arrival = array("d", [START_S * i / queued for i in range(queued)])
    arrival += array("d", [START_S + i / rate for i in range(len(trace) - queued)])
    return replace(trace, arrival=arrival, after=None, think=None)


def fleet(trace: Trace, settings: Settings) -> tuple[Loop, LiveRouter]:
    """The fleet, joined, before the first arrival. Sets the running loop of this thread: see ``Turns``."""
    make: Any = Turns  # abstract to mypy only
    turns: Turns = make()
    asyncio._set_running_loop(turns)

    def core(policy: Policy, limits: Limits) -> Core:
        made = FleetCore(policy, limits)
        made.router = LiveRouter(made, turns, trace, settings)
        return made

    loop = build(trace, settings, make_core=core)
    loop.arrivals.order = range(1, len(trace))
    assert isinstance(loop.core, FleetCore)
    return loop, loop.core.router
