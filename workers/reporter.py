"""What a worker says of itself: heartbeats, load, and changes of its prefix cache, at most every 20 ms.

Changes leave at multiples of 20 ms of the worker's clock: how the steps before fell does not move them, so whoever
simulates a worker need not know every step to know when its router learns of its cache.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

from twinpool.proto import frames
from twinpool.workers.blocks import IntegrityError
from twinpool.workers.kv_events import KvEventLog
from twinpool.workers.scheduler import Scheduler

log = logging.getLogger("twinpool.worker")

EVERY_S = 0.020
CHECK_EVERY_S = 5.0


class Decoded(NamedTuple):
    """A step that had decodes only: its sequences, the sum of their context tokens, and how long it took."""

    batch: int
    context: int
    seconds: float


class Reporter:
    """Sends Report, Heartbeat and KvEvents; ``idle`` says whether the worker holds nothing for anybody."""

    def __init__(
        self,
        scheduler: Scheduler,
        send: Callable[[frames.Frame], None],
        idle: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self._scheduler = scheduler
        self._send = send
        self._idle = idle
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._events = KvEventLog()
        self._timer: asyncio.TimerHandle | None = None
        self._slot = -(1 << 62)  # the latest multiple of EVERY_S that a report was set to
        self._heartbeat: asyncio.TimerHandle | None = None
        self._heartbeat_s = 1.0
        self._step_s = 0.0
        self._decoded = Decoded(0, 0, 0.0)
        self._steps = 0
        self._busy = False
        self._leaked = 0
        self._checked_at = 0.0

    def start(self, heartbeat_s: float) -> None:
        """A router let us in: tell it everything."""
        self.stop()
        self._heartbeat_s = heartbeat_s
        self.snapshot()
        self._beat()

    def stop(self) -> None:
        """The link is gone."""
        for timer in (self._timer, self._heartbeat):
            if timer is not None:
                timer.cancel()
        self._timer = self._heartbeat = None

    def snapshot(self) -> None:
        """Send the whole prefix cache."""
        self._scheduler.pool.drain_events()
        for frame in self._events.snapshot(self._scheduler.pool.cached_hashes()):
            self._send(frame)

    def step(self, steps: int, *, busy: bool) -> None:
        """The engine begins (``busy``) or has done a step."""
        self._steps, self._busy = steps, busy

    def changed(self, step_s: float, decoded: Decoded | None) -> None:
        """A step was done; ``decoded`` says of what, where it had decodes only."""
        self._step_s = step_s
        self._decoded = decoded or self._decoded
        self.soon()

    def soon(self) -> None:
        """Something changed: report at the next multiple of 20 ms, never at once."""
        if self._timer is None and self._heartbeat is not None:
            now = self._clock()
            self._slot = max(self._slot, math.floor(now / EVERY_S)) + 1  # a timer that was early is no second chance
            self._timer = self._loop.call_later(max(0.0, self._slot * EVERY_S - now), self._report)

    def _report(self) -> None:
        self._timer = None
        changes = self._scheduler.pool.drain_events()
        self._events.record(changes.stored, changes.removed)
        for frame in self._events.frames():
            self._send(frame)
        load = self._scheduler.load()
        report = frames.Report(free=load.free, cached=load.cached, running=load.running, waiting=load.waiting,
                               context=load.context, step_s=self._step_s, leaked=self._leaked,
                               decode_batch=self._decoded.batch, decode_context=self._decoded.context,
                               decode_s=self._decoded.seconds)  # fmt: skip
        self._decoded = Decoded(0, 0, 0.0)
        self._send(report)

    def _beat(self) -> None:
        self._heartbeat = self._loop.call_later(self._heartbeat_s, self._beat)
        self._send(frames.Heartbeat(step=self._steps, busy=self._busy))
        now = self._clock()
        if now - self._checked_at >= CHECK_EVERY_S and self._idle():
            self._checked_at = now
            self._check()
        self.soon()

    def _check(self) -> None:
        """Idle: every block must be free or cached."""
        self._leaked = self._scheduler.pool.num_blocks - self._scheduler.pool.free_blocks
        try:
            self._scheduler.check_integrity()
        except IntegrityError as error:
            log.error("block accounting is broken: %s", error)
            self._leaked = max(1, self._leaked)
        if self._leaked:
            log.error("%d blocks are leaked", self._leaked)
