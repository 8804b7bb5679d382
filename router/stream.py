"""One request's output on its way to the client.

The first token leaves at once (or when the core says so); while the reader is busy with a write, later tokens join the
next one. What waits for a slow reader is token ids and text, bounded by max_tokens.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable

from twinpool.errors import TwinpoolError
from twinpool.router.cell import FinishedOut, TokensOut
from twinpool.sampling import TokenLogprob


class OutStream:
    """Implements ``cell.Stream``: filled by the dispatcher, drained by one reader."""

    def __init__(self, first_position: int, cancel: Callable[[], None]) -> None:
        self._position = first_position
        self._ids = array("I")
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._shown = False
        self._end: FinishedOut | TwinpoolError | None = None
        self._wake = asyncio.Event()
        self._cancel = cancel

    def push(self, ids: array[int], text: str, logprobs: tuple[TokenLogprob, ...]) -> None:
        """Add tokens; they are kept until :meth:`show` was called once."""
        self._ids.extend(ids)
        self._texts.append(text)
        self._logprobs.extend(logprobs)
        if self._shown:
            self._wake.set()

    def show(self) -> None:
        """Tokens may leave."""
        self._shown = True
        self._wake.set()

    def finish(self, end: FinishedOut | TwinpoolError) -> None:
        """Nothing comes after this."""
        self._end = end
        self._shown = True
        self._wake.set()

    @property
    def error(self) -> TwinpoolError | None:
        """What the stream ends with, if it is known and not a good end."""
        return self._end if isinstance(self._end, TwinpoolError) else None

    def cancel(self) -> None:
        """See ``cell.Stream``."""
        if self._end is None:
            self._cancel()

    async def __aiter__(self) -> AsyncIterator[TokensOut | FinishedOut]:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._ids:
                yield self._take()
            if self._end is not None and not self._ids:
                if isinstance(self._end, TwinpoolError):
                    raise self._end
                yield self._end
                return

    def _take(self) -> TokensOut:
        out = TokensOut(self._position, self._ids, "".join(self._texts), tuple(self._logprobs))
        self._position += len(self._ids)
        self._ids, self._texts, self._logprobs = array("I"), [], []
        if self._end is not None:
            self._wake.set()
        return out
