"""The worker's side of its link: dial, Hello, frames both ways, and again after a loss."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

import msgspec

from twinpool.errors import ConfigError
from twinpool.proto import frames
from twinpool.proto.splitter import Splitter

log = logging.getLogger("twinpool.worker.link")

WELCOME_S = 10.0
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.05, 2.0


class RouterLink(asyncio.Protocol):
    """One connection to the router. ``closed`` is done when it is over."""

    def __init__(self, take: Callable[[frames.Frame], None]) -> None:
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self.closed: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        """Frames from the router; anything else closes the link."""
        try:
            for body in self._splitter.feed(data):
                self._take(frames.to_worker.decode(body))
        except (ValueError, msgspec.DecodeError) as error:
            log.error("the router sent something that is no frame (%s): link closed", error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Over."""
        self._transport = None
        if not self.closed.done():
            self.closed.set_result(None)

    def send(self, frame: frames.Frame) -> None:
        """Queue a frame; what one loop turn queues leaves in one write. Silently dropped on a closed link."""
        if self._transport is None:
            return
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out.append(frames.encode(frame))

    def flush(self) -> None:
        """Write what is queued now."""
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self.flush()
        if self._transport is not None:
            self._transport.close()


Take = Callable[[frames.Frame], None]
Joined = Callable[[RouterLink], None]


async def connect(address: str, hello: frames.Hello, take: Take, joined: Joined) -> RouterLink:
    """Dial "host:port" until a router lets us in.

    ``joined`` gets the link, then ``take`` gets Welcome and everything after it. Raises ConfigError when the router
    refuses this worker for good.
    """
    host, _, port = address.rpartition(":")
    backoff = MIN_BACKOFF_S
    while True:
        link = await _try_once(host, int(port), hello, take, joined)
        if link is not None:
            return link
        await asyncio.sleep(backoff)
        backoff *= 2
        if backoff > MAX_BACKOFF_S:
            backoff = MAX_BACKOFF_S
            log.warning("no router lets us in at %s: still trying", address)


async def _try_once(host: str, port: int, hello: frames.Hello, take: Take, joined: Joined) -> RouterLink | None:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[frames.Frame] = loop.create_future()

    def first_then_all(frame: frames.Frame) -> None:
        if not answer.done():
            answer.set_result(frame)
            if isinstance(frame, frames.Welcome):
                joined(link)
        if isinstance(answer.result(), frames.Welcome):
            take(frame)

    try:
        _, link = await loop.create_connection(lambda: RouterLink(first_then_all), host, port)
    except OSError as error:
        log.debug("router %s:%d does not answer (%s): trying again", host, port, error)
        return None
    link.send(hello)
    try:
        await asyncio.wait((answer, link.closed), timeout=WELCOME_S, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        link.close()
        raise
    frame = answer.result() if answer.done() else None
    if isinstance(frame, frames.Welcome):
        return link
    link.close()
    if isinstance(frame, frames.Refused):
        if frame.reason != "NAME":
            raise ConfigError(f"the router refused this worker: {frame.message}", reason=frame.reason)
        log.warning("the router refused this worker for now: %s", frame.message)
    else:
        log.warning("router %s:%d did not answer Hello: trying again", host, port)
    return None
