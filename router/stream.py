"""One request's output on its way to the client.

The first token leaves at once (or when the core says so); while the reader is busy with a write, later tokens join the
next one. What waits for a slow reader is token ids and text, bounded by max_tokens.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable

from twinpool.errors import TwinpoolError
from twinpool.router.cell import FinishedOut, TokensOut
from twinpool.router.fanout import Fanout
from twinpool.sampling import TokenLogprob


class OutStream:
    """Implements ``cell.Stream``: filled by the dispatcher, drained by one reader.

    It passes every token, so it is its own iterator and its reader waits for a bare future.
    """

    __slots__ = (
        "_cancel", "_end", "_fanout", "_ids", "_logprobs", "_over", "_position", "_shown", "_text", "_waiter",
    )  # fmt: skip

    def __init__(self, first_position: int, cancel: Callable[[], None], fanout: Fanout) -> None:
        self._position = first_position
        self._ids = array("I")
        self._text = ""
        self._logprobs: tuple[TokenLogprob, ...] = ()
        self._shown = False
        self._end: FinishedOut | TwinpoolError | None = None
        self._over = False  # the reader has the end
        self._waiter: asyncio.Future[None] | None = None
        self._cancel = cancel
        self._fanout = fanout

    def push(self, ids: array[int], text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Add tokens; they are kept until :meth:`show` was called once. ``ids`` is the stream's from now on."""
        if self._ids:
            self._ids.extend(ids)
            self._text += text
            self._logprobs += logprobs
        else:
            self._ids, self._text, self._logprobs = ids, text, logprobs
        if self._shown:
            self._wake(first=False)

    def show(self) -> None:
        """Tokens may leave."""
        self._shown = True
        self._wake(first=True)

    def finish(self, end: FinishedOut | TwinpoolError) -> None:
        """Nothing comes after this."""
        self._end = end
        self.show()

    @property
    def error(self) -> TwinpoolError | None:
        """What the stream ends with, if it is known and not a good end."""
        return self._end if isinstance(self._end, TwinpoolError) else None

    def cancel(self) -> None:
        """See ``cell.Stream``."""
        if self._end is None:
            self._cancel()

    def _wake(self, *, first: bool) -> None:
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            self._fanout.wake(waiter, first)

    def __aiter__(self) -> OutStream:
        return self

    async def __anext__(self) -> TokensOut | FinishedOut:
        while not (self._shown and (self._ids or self._end is not None)):
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._ids:
            return self._take()
        if self._over:
            raise StopAsyncIteration
        self._over = True
        if isinstance(self._end, TwinpoolError):
            raise self._end
        assert self._end is not None
        return self._end

    def _take(self) -> TokensOut:
        out = TokensOut(self._position, self._ids, self._text, self._logprobs)
        self._position += len(self._ids)
        self._ids, self._text, self._logprobs = array("I"), "", ()
        return out
