"""Worker links at the router: who may register, frames in, frames out, and when a worker counts as dead.

Writes of one loop turn are joined. Any received frame is a sign of life, except that a worker whose engine is busy
without finishing a step for ``hang_s`` is as dead as a silent one.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import msgspec

from twinpool.errors import ConfigError
from twinpool.proto import frames
from twinpool.proto.splitter import Splitter

log = logging.getLogger("twinpool.router.links")

ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Times in seconds."""

    token: str
    heartbeat_s: float
    dead_after_s: float
    lease_s: float
    hang_s: float = 60.0
    hello_s: float = 5.0


class LinkOwner(Protocol):
    """Who the links belong to: the dispatcher."""

    @property
    def router(self) -> str:
        """Name of this start of the router."""
        ...

    def admit(self, hello: frames.Hello) -> tuple[str, str] | None:
        """Why this worker may not come in: a reason and a sentence; None if it may."""
        ...

    def joined(self, link: WorkerLink) -> None:
        """The worker is in; ``link.hello`` is set."""
        ...

    def received(self, link: WorkerLink, frame: frames.Frame) -> None:
        """A frame other than Hello and Heartbeat."""
        ...

    def left(self, link: WorkerLink) -> None:
        """A joined worker is gone."""
        ...


class WorkerLink(asyncio.Protocol):
    """One worker's connection."""

    def __init__(self, owner: LinkOwner, settings: LinkSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.owner = owner
        self._clock = clock
        self.settings = settings
        self.hello: frames.Hello | None = None
        self.id = -1  # given by the owner in ``joined``
        self.last_seen = 0.0
        self.goodbye = ""
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._step = (0, 0.0)  # engine step, and since when it stands there
        self._check: asyncio.TimerHandle | None = None
        self._check_at = 0.0

    @property
    def name(self) -> str:
        """The worker's own name, or "?" before Hello."""
        return self.hello.worker if self.hello else "?"

    # --- asyncio.Protocol ----------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A worker dialled."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.last_seen = self._clock()
        self._check_in(self.settings.hello_s)

    def data_received(self, data: bytes) -> None:
        """Bytes: decode strictly, drop the link on anything that is not a frame of ours."""
        self.last_seen = self._clock()
        try:
            for body in self._splitter.feed(data):
                self._take(frames.from_worker.decode(body))
        except (ValueError, msgspec.DecodeError) as error:
            log.warning("worker %s sent something that is no frame (%s): link closed", self.name, error)
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        """The worker is gone, or we closed."""
        self._transport = None
        if self._check is not None:
            self._check.cancel()
        if self.hello is not None:
            log.info("worker %s left (%s)", self.name, self.goodbye or error or "link closed")
            self.owner.left(self)

    # --- ours ----------

    def send(self, frame: frames.Frame) -> None:
        """Queue a frame; what one loop turn queues leaves in one write. Silently dropped on a closed link."""
        if self._transport is None:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(frames.encode(frame))

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self, why: str) -> None:
        """Fence a worker: nothing it says later counts."""
        log.warning("worker %s is fenced: %s", self.name, why)
        if self._transport is not None:
            self._transport.abort()

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _take(self, frame: frames.Frame) -> None:
        if self.hello is None:
            self._register(frame)
        elif isinstance(frame, frames.Heartbeat):
            if frame.step != self._step[0] or not frame.busy:
                self._step = (frame.step, self.last_seen)
        elif isinstance(frame, frames.Goodbye):
            self.goodbye = frame.reason
        else:
            self.owner.received(self, frame)

    def _register(self, frame: frames.Frame) -> None:
        if not isinstance(frame, frames.Hello):
            raise ValueError(f"the first frame must be Hello, not {type(frame).__name__}")
        reason, message = self._refusal(frame)
        if message:
            log.warning("worker %r refused: %s", frame.worker, message)
            self.send(frames.Refused(reason=reason, message=message))
            self.close()
            return
        self.hello = frame
        self._step = (0, self.last_seen)
        self.send(frames.Welcome(router=self.owner.router, heartbeat_s=self.settings.heartbeat_s,
                                 lease_s=self.settings.lease_s))  # fmt: skip
        self.owner.joined(self)

    def _refusal(self, hello: frames.Hello) -> tuple[str, str]:
        if hello.version != frames.VERSION:
            return "VERSION", f"the router speaks link version {frames.VERSION}, the worker {hello.version}"
        if not hmac.compare_digest(hello.token.encode(), self.settings.token.encode()):
            return "TOKEN", "the registration token differs from the router's: set link.token to the same value on both"
        if not hello.roles or any(role not in ROLES for role in hello.roles):
            return "ROLES", f"roles {list(hello.roles)}: must be one or both of {list(ROLES)}"
        return self.owner.admit(hello) or ("", "")

    def _check_in(self, delay_s: float) -> None:
        self._check_at = self._clock() + delay_s
        self._check = self._loop.call_later(delay_s, self._check_alive)

    def _check_alive(self) -> None:
        now = self._clock()
        every_s = self.settings.dead_after_s / 4
        silent = now - self.last_seen
        if now - self._check_at > every_s:
            self._check_in(every_s)  # it was us who stood still: what came meanwhile is not read yet
        elif self.hello is None:
            self.abort("no Hello in time")
        elif silent > self.settings.dead_after_s:
            self.abort(f"silent for {silent:.1f} s")
        elif now - self._step[1] > self.settings.hang_s:
            self.abort(f"its engine has been in step {self._step[0]} for {now - self._step[1]:.0f} s")
        else:
            self._check_in(every_s)


async def listen(
    owner: LinkOwner, settings: LinkSettings, address: str, clock: Callable[[], float] = time.monotonic
) -> tuple[asyncio.Server, str]:
    """Serve worker links at "host:port" (port 0: any); returns the server and the real address.

    Raises ConfigError when the address cannot be bound.
    """
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    make: Callable[[], asyncio.Protocol] = lambda: WorkerLink(owner, settings, clock)  # noqa: E731
    try:
        server = await loop.create_server(make, host, int(port))
    except (OSError, ValueError) as error:
        message = f"link.listen: cannot listen on {address} ({error}): choose another port, or 0 for any"
        raise ConfigError(message) from None
    bound = server.sockets[0].getsockname()
    return server, f"{host}:{bound[1]}"
