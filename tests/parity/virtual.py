"""An event loop without sockets or threads, whose clock jumps when nothing is left to do at its moment.

What is due at one moment runs together, in the order it was asked for, then whatever that made ready, then timers that
were set for this very moment meanwhile. So a run is a function of the program: no clock, selector or thread takes part.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import math
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, TypeVarTuple, cast

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

HAIR = 1.0 + 2.0**-51  # timers fire late by a hair, never early: now + (when - now) may round to less than when
MIN_DEAD = 1024


class Stuck(RuntimeError):
    """Nothing is ready and no timer is set, or the clock has passed the limit of the run."""


class VirtualLoop(asyncio.AbstractEventLoop):
    """What asyncio's tasks, futures, events and timers need, and connections in memory; nothing else.

    An exception in a callback ends the run: it is raised by :meth:`run`.
    """

    def __init__(self, start: float = 0.0, latency_s: float = 0.0, limit: float = math.inf) -> None:
        """The clock stands at ``start``; what one end of a connection writes arrives ``latency_s`` later."""
        self.latency_s = latency_s
        self.limit = limit
        self._now = start
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._dead = 0  # cancelled timers among them
        self._order = 0
        self._broken: dict[str, Any] | None = None
        self._listeners: dict[tuple[str, int], Callable[[], asyncio.BaseProtocol]] = {}
        self.connections: list[Pipe] = []  # the dialling ends, in order

    # --- time ----------

    def time(self) -> float:
        """Seconds of the virtual clock."""
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """See asyncio."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_later(
        self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio; never early, see ``HAIR``."""
        when = self._now + max(0.0, delay)
        return self.call_at(when * HAIR if when > 0.0 else when / HAIR, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio; at ``when`` to the last bit, in order of the calls where that is the same."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._order += 1
        heapq.heappush(self._timers, (when, self._order, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._dead += 1
        if self._dead > max(MIN_DEAD, len(self._timers) // 2):
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._dead = 0

    async def sleep_until(self, when: float) -> None:
        """Return at ``when`` of this clock, to the last bit."""
        waker = self.create_future()
        self.call_at(when, _wake, waker)
        await waker

    # --- running ----------

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """Run until ``main`` is done; tasks that it leaves behind are cancelled. Raises Stuck."""
        asyncio._set_running_loop(self)
        try:
            task: asyncio.Task[T] = self.create_task(main)
            self._run_until(task)
            return task.result()
        finally:
            self._cancel_all()
            asyncio._set_running_loop(None)

    def _run_until(self, future: asyncio.Future[Any]) -> None:
        while not future.done():
            if not self._ready:
                self._advance()
            for _ in range(len(self._ready)):
                handle = self._ready.popleft()
                if not handle.cancelled():
                    handle._run()
            if self._broken is not None:
                broken, self._broken = self._broken, None
                raise broken.get("exception") or RuntimeError(broken["message"])

    def _advance(self) -> None:
        """On to the next moment at which something is due; all of it becomes ready."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._dead -= 1
        if not timers:
            raise Stuck("nothing is ready and no timer is set: whoever is awaited will never come")
        when = timers[0][0]
        if when > self.limit:
            raise Stuck(f"the run is not over at {self.limit} s")
        self._now = max(self._now, when)
        while timers and timers[0][0] <= self._now:
            handle = heapq.heappop(timers)[2]
            if handle.cancelled():
                self._dead -= 1
            else:
                self._ready.append(handle)

    def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks(self) if not task.done()]
        for task in sorted(tasks, key=lambda task: task.get_name()):
            task.cancel()
        ended = asyncio.gather(*tasks, return_exceptions=True) if tasks else None
        if ended is not None:
            self._run_until(ended)

    # --- what tasks and futures ask of their loop ----------

    def create_future(self) -> asyncio.Future[Any]:
        """See asyncio."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **kwargs: Any) -> asyncio.Task[Any]:
        """See asyncio."""
        return asyncio.Task(coro, loop=self, **kwargs)

    def get_debug(self) -> bool:
        """Never."""
        return False

    def is_running(self) -> bool:
        """Whoever can ask runs on it."""
        return True

    def is_closed(self) -> bool:
        """It has nothing to close."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Somebody's callback or task failed: the run ends with the first one."""
        self._broken = self._broken or context

    # --- connections ----------

    async def create_server(self, *args: Any, **kwargs: Any) -> Any:
        """``(protocol_factory, host, port)``: connections to that address from now on lead there."""
        factory, host, port = args
        self._listeners[(host, port)] = factory
        return Listener((host, port))

    async def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        """``(protocol_factory, host, port)``: both ends are connected one round trip later."""
        factory, host, port = args
        listener = self._listeners.get((host, port))
        if listener is None:
            raise ConnectionRefusedError(f"nobody listens on {host}:{port}")
        await self.sleep_until(self._now + 2 * self.latency_s)
        here, there = Pipe(self, factory()), Pipe(self, listener())
        here.peer, there.peer = there, here
        self.connections.append(here)
        there.protocol.connection_made(there)
        here.protocol.connection_made(here)
        return here, here.protocol


def virtual_loop(start: float = 0.0, latency_s: float = 0.0, limit: float = math.inf) -> VirtualLoop:
    """A loop; arguments as for the class."""
    make: Any = (
        VirtualLoop  # abstract to mypy only: sockets, signals and processes are refused where they are asked for
    )
    loop: VirtualLoop = make(start, latency_s, limit)
    return loop


def _wake(waker: asyncio.Future[None]) -> None:
    if not waker.done():
        waker.set_result(None)


class Listener:
    """What ``create_server`` returns, as far as it is looked at."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sockets = [self]
        self._address = address

    def getsockname(self) -> tuple[str, int]:
        """(host, port)."""
        return self._address


class Pipe(asyncio.Transport):
    """One end of a connection: bytes arrive at the other end after the loop's latency, in order."""

    def __init__(self, loop: VirtualLoop, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self.protocol = cast("asyncio.Protocol", protocol)
        self.peer: Pipe | None = None
        self._loop = loop
        self._open = self._writing = True

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send; dropped once this end is closed."""
        if self._writing and self.peer is not None:
            self._loop.call_at(self._loop.time() + self._loop.latency_s, self.peer._deliver, bytes(data))

    def close(self) -> None:
        """Close this end now and the other when it hears of it; what was sent before arrives before. Idempotent."""
        if self._writing and self.peer is not None:
            self._loop.call_at(self._loop.time() + self._loop.latency_s, self.peer._lose)
        self._loop.call_soon(self._lose)
        self._writing = False

    def abort(self) -> None:
        """Like ``close``: nothing is buffered here."""
        self.close()

    def is_closing(self) -> bool:
        """Whether this end is closed."""
        return not self._writing

    def _deliver(self, data: bytes) -> None:
        if self._open:
            self.protocol.data_received(data)

    def _lose(self) -> None:
        if self._open:
            self._open = self._writing = False
            self.protocol.connection_lost(None)
