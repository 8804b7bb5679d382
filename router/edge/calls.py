"""Running calls of this edge: n sequences read as one output, cancelled as one, counted once.

Sequence 0 is submitted first; the others when it has its first token, so that they find the prompt's blocks cached.
Whoever leaves the ``with`` block of a call, for whatever reason, frees everything that the call holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

from twinpool.errors import AlreadyExists, Overloaded, TwinpoolError, Unavailable
from twinpool.router.cell import Cell, FinishedOut, Stream, TokensOut
from twinpool.router.edge.convert import Order
from twinpool.router.metrics import Metrics

Out = TokensOut | FinishedOut


class Output(NamedTuple):
    """One piece of one sequence."""

    sequence: int
    out: Out


class _Only:
    """The output of a call of one sequence. No generator: every token passes here."""

    __slots__ = ("_reads",)

    def __init__(self, stream: Stream) -> None:
        self._reads = aiter(stream)

    def __aiter__(self) -> _Only:
        return self

    async def __anext__(self) -> Output:
        return Output(0, await anext(self._reads))


class Call:
    """One running request; ``Calls.start`` makes it. Use it as a context manager and iterate ``outputs()`` once."""

    def __init__(self, calls: Calls, cell: Cell, order: Order) -> None:
        self.order = order
        self._calls = calls
        self._cell = cell
        self._streams: list[Stream] = [cell.submit(order.submissions[0])]
        self._reads: dict[asyncio.Task[Out], int] = {}

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for read in self._reads:
            read.cancel()
        for stream in self._streams:
            stream.cancel()
        self._calls.ended(self, error)

    def outputs(self) -> AsyncIterator[Output]:
        """What the sequences put out, each in order, until all have finished. Raises the first error of any."""
        return _Only(self._streams[0]) if len(self.order.submissions) == 1 else self._merged()

    def cancel(self) -> bool:
        """Stop all sequences; the reader gets Cancelled. False when nothing runs any more."""
        stopped = [self._cell.cancel(submission.request_id) for submission in self.order.submissions]
        return any(stopped)

    async def _merged(self) -> AsyncIterator[Output]:
        iterators = [aiter(self._streams[0])]
        self._read(0, iterators[0])
        while self._reads:
            done, _ = await asyncio.wait(self._reads, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=self._reads.__getitem__):
                index = self._reads.pop(task)
                out = task.result()
                if len(iterators) == 1:
                    iterators += self._submit_others()
                yield Output(index, out)
                if isinstance(out, TokensOut):  # only now: what comes during a slow write is joined by the stream
                    self._read(index, iterators[index])

    def _submit_others(self) -> list[AsyncIterator[Out]]:
        for submission in self.order.submissions[1:]:
            self._streams.append(self._cell.submit(submission))
        others = [aiter(stream) for stream in self._streams[1:]]
        for index, iterator in enumerate(others, start=1):
            self._read(index, iterator)
        return others

    def _read(self, index: int, iterator: AsyncIterator[Out]) -> None:
        task = asyncio.create_task(_next(iterator))
        task.add_done_callback(_seen)
        self._reads[task] = index


async def _next(iterator: AsyncIterator[Out]) -> Out:
    return await anext(iterator)


def _seen(task: asyncio.Task[Out]) -> None:
    """Where several sequences fail at once only one error is raised; the others count as looked at."""
    if not task.cancelled():
        task.exception()


class Calls:
    """All running calls of an edge, by request id. ``draining``: running ones go on, new ones are refused."""

    def __init__(self, cell: Cell, metrics: Metrics, max_calls: int) -> None:
        self.draining = False
        self._cell = cell
        self._metrics = metrics
        self._max_calls = max_calls
        self._running: dict[str, Call] = {}
        self._count = 0  # a resumed request has two for a moment, under one id
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Counts the request as refused when the block raises."""
        try:
            yield
        except TwinpoolError as error:
            self._metrics.observe_refused(error.reason)
            raise

    def start(self, order: Order) -> Call:
        """Submit the first sequence. Raises Unavailable, Overloaded, AlreadyExists or what the cell raises."""
        if self.draining:
            raise Unavailable("this router is draining; go to another", reason="DRAINING", retry_s=1.0)
        if self._count >= self._max_calls:
            raise Overloaded(f"{self._count} calls are open here", reason="TOO_MANY_STREAMS", retry_s=1.0)
        older = self._running.get(order.request_id)
        resumes = bool(order.submissions[0].resumed)
        if older is not None and not (resumes and older.order.caller.tenant == order.caller.tenant):
            raise AlreadyExists(f"request {order.request_id!r} is running")
        call = self._running[order.request_id] = Call(self, self._cell, order)
        self._count += 1
        self._idle.clear()
        return call

    def cancel(self, request_id: str, tenant: str) -> bool:
        """Stop a call of this tenant; False when none runs by that id."""
        call = self._running.get(request_id)
        return call is not None and call.order.caller.tenant == tenant and call.cancel()

    def ended(self, call: Call, error: BaseException | None) -> None:
        """Called once by each call when its block is left."""
        if self._running.get(call.order.request_id) is call:
            del self._running[call.order.request_id]
        self._count -= 1
        if self._count == 0:
            self._idle.set()
        if error is not None:
            self._metrics.observe_failed(_outcome(call.order, error), call.order.submissions[0].klass)

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no call runs; False when some still do after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


def _outcome(order: Order, error: BaseException) -> str:
    if isinstance(error, TwinpoolError):
        return error.code.lower()
    if isinstance(error, asyncio.CancelledError | GeneratorExit):  # gRPC cancels the handler in both cases
        at = order.caller.deadline_at
        return "deadline_exceeded" if at is not None and time.monotonic() >= at else "cancelled"
    return "internal"
