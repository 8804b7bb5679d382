"""A lane: the thread and the channel through which all pulls from one peer go, one after the other."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.channel import MEET_S, Channel, Geometry, Halt, Hello, close_fds, greet, tune
from twinpool.workers.transfer.collective import CollectiveSource
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.ipc import IpcSource
from twinpool.workers.transfer.order import Order, Source
from twinpool.workers.transfer.pool import KvPool
from twinpool.workers.transfer.server import same_user
from twinpool.workers.transfer.shm import ShmSource
from twinpool.workers.transfer.tcp import TcpSource

CONNECT_S = 2.0  # for one backend to connect and authenticate; then the next is tried
IDLE_S = 60.0  # a channel that is not used for so long is closed
LOCAL = ("shm", "cuda_ipc")  # over a Unix socket: whatever answers there is on this host, and of this user

_log = logging.getLogger(__name__)

SOURCES: dict[str, Callable[[Channel, Geometry, list[int], KvPool], Source]] = {
    "shm": ShmSource,
    "cuda_ipc": IpcSource,
    "tcp": TcpSource,
    "gloo": partial(CollectiveSource, backend="gloo"),
    "nccl": partial(CollectiveSource, backend="nccl"),
}


class Job(NamedTuple):
    """A pull that waits for its turn; ``future`` gets its outcome once the thread no longer touches the target."""

    peer: Peer
    order: Order
    future: Future[Pulled]


class Lane:
    """Performs jobs of one peer in order, in its own thread, which ends by itself when idle."""

    def __init__(self, pool: KvPool, backends: Sequence[str]) -> None:
        self._pool, self._backends = pool, backends
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open = True  # takes jobs
        self._halt = Halt()
        self._peer: Peer | None = None
        self._backend = ""
        self._source: Source | None = None
        self._thread = threading.Thread(target=self._run, name="kv-pull", daemon=True)
        self._thread.start()

    def offer(self, job: Job) -> bool:
        """Queue a job. False when the lane has ended: make another."""
        with self._lock:
            if self._open:
                self._jobs.put(job)
            return self._open

    def stop(self) -> None:
        """Fail the running and all waiting jobs; returns at once. Idempotent."""
        with self._lock:
            self._open = False
            self._jobs.put(None)
        self._halt.stop()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to end after :meth:`stop`."""
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.future.set_running_or_notify_cancel():
                self._perform(job)
        self._disconnect()

    def _next(self) -> Job | None:
        try:
            return self._jobs.get(timeout=IDLE_S)
        except queue.Empty:
            with self._lock:
                if self._jobs.empty():
                    self._open = False
            return self._next() if self._open else None

    def _perform(self, job: Job) -> None:
        try:
            job.future.set_result(self._pull(job.peer, job.order))
        except TransferError as error:
            self._disconnect()
            job.future.set_exception(error)
        except Exception as error:
            self._disconnect()
            _log.exception("a KV pull failed")
            job.future.set_exception(TransferError(f"KV transfer failed: {error}"))

    def _pull(self, peer: Peer, order: Order) -> Pulled:
        source = self._connected(peer, order.deadline)
        source.channel.deadline = order.deadline
        start = time.monotonic()
        source.fetch(order)
        size = len(order.source) * self._pool.block_bytes
        return Pulled(self._backend, size, time.monotonic() - start, order.bad, tuple(order.found))

    def _connected(self, peer: Peer, deadline: float) -> Source:
        """The channel if it still leads to this incarnation of the peer, else a new one by the first that works."""
        if self._source is not None and self._peer == peer and not self._source.channel.lost():
            return self._source
        self._disconnect()
        failures = []
        for backend in [name for name in self._backends if name in peer.addresses]:
            if self._halt.stopped:
                break
            try:
                self._source = self._connect(peer, backend, deadline)
            except TransferError as error:
                _log.warning("no KV channel to %s by %s: %s", peer.worker, backend, error)
                failures.append(f"{backend}: {error}")
            else:
                self._peer, self._backend = peer, backend
                return self._source
        why = "; ".join(failures) or "no common backend"
        raise TransferError(f"no KV channel to {peer.worker} ({why})", reason="NO_CHANNEL")

    def _connect(self, peer: Peer, backend: str, deadline: float) -> Source:
        soon = min(deadline, time.monotonic() + CONNECT_S)
        channel = dial(backend, peer.addresses[backend], self._halt, soon)
        try:
            geometry, fds = greet(channel, Hello(backend, peer.epoch, peer.heads), peer.secret)
            own = _expected(self._pool, geometry)
            if geometry != own:
                close_fds(fds)
                raise TransferError(f"the peer's KV blocks are {geometry[1:]}, ours {own[1:]}", reason="REFUSED")
            channel.deadline = min(deadline, time.monotonic() + MEET_S)
            return SOURCES[backend](channel, geometry, fds, self._pool)
        except TransferError:
            channel.close()
            raise

    def _disconnect(self) -> None:
        if self._source is not None:
            self._source.close()
            self._source = self._peer = None


def _expected(pool: KvPool, theirs: Geometry) -> Geometry:
    """What ``theirs`` must be for their blocks, or our heads of them, to fit into ours."""
    if not isinstance(pool, HeadPool):
        return Geometry(theirs.blocks, pool.block_bytes, pool.sum_kind)
    held = range(*theirs.held)
    if not (held and held.start <= pool.heads.start and pool.heads.stop <= held.stop):
        held = pool.heads
    return Geometry(theirs.blocks, pool.layout.block_bytes(len(held)), pool.sum_kind, (held.start, held.stop))


def dial(backend: str, address: str, halt: Halt, deadline: float) -> Channel:
    """Connect to a KV server; ``address`` is a path for ``LOCAL`` ones, else host:port. Raises ``TransferError``."""
    family = socket.AF_UNIX if backend in LOCAL else socket.AF_INET6 if address.startswith("[") else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    channel = Channel(sock, halt, deadline)
    try:
        channel.arm()
        tune(sock)
        sock.connect(address if backend in LOCAL else split_address(address))
        if not same_user(sock):
            raise TransferError("the KV socket belongs to another user", reason="REFUSED")
        return channel
    except OSError as error:
        channel.close()
        raise TransferError(f"cannot connect: {error.strerror or 'timed out'}", reason="PEER_GONE") from error
    except TransferError:
        channel.close()
        raise


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` or ``[v6]:port``. Raises ``TransferError``."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise TransferError("a KV address is not host:port", reason="REFUSED")
    return host.strip("[]"), int(port)
