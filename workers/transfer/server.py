"""The holder's side: listens, authenticates whoever comes, and serves each receiver in a thread of its own."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import WHOLE
from twinpool.workers.transfer.channel import MEET_S, Channel, Halt, Hello, Welcomer, tune
from twinpool.workers.transfer.collective import serve_collective
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.ipc import serve_ipc
from twinpool.workers.transfer.pool import KvPool
from twinpool.workers.transfer.shm import serve_shm
from twinpool.workers.transfer.tcp import serve_tcp

MAX_CONNECTIONS = 256
HANDSHAKE_S = 2.0

_log = logging.getLogger(__name__)
_UCRED = struct.Struct("3i")  # pid, uid, gid

SERVE: dict[str, Callable[[Channel, KvPool], None]] = {
    "shm": serve_shm,
    "cuda_ipc": serve_ipc,
    "tcp": serve_tcp,
    "gloo": partial(serve_collective, backend="gloo"),
    "nccl": partial(serve_collective, backend="nccl"),
}


class KvServer:
    """Serves a pool's blocks on listening sockets it owns. A connection that misbehaves is closed, and only that."""

    def __init__(self, pool: KvPool, welcomer: Welcomer, fd: int | None) -> None:
        self._pool, self._welcomer, self._fd = pool, welcomer, fd
        self._halt = Halt()
        self._room = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._threads: set[threading.Thread] = set()  # started and not ended

    def listen(self, sock: socket.socket) -> None:
        """Serve a bound socket from now on."""
        sock.listen(64)
        self._halt.watch(sock)
        self._spawn(self._accept, sock)

    def close(self) -> None:
        """Hang up on everybody and wait for the threads to end. Idempotent."""
        self._halt.stop()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(HANDSHAKE_S)

    def _spawn(self, work: Callable[[socket.socket], None], sock: socket.socket) -> None:
        def run() -> None:
            try:
                work(sock)
            finally:
                self._halt.forget(sock)
                sock.close()
                with self._lock:
                    self._threads.discard(threading.current_thread())

        with self._lock:
            thread = threading.Thread(target=run, name="kv-serve", daemon=True)
            thread.start()
            self._threads.add(thread)

    def _accept(self, listener: socket.socket) -> None:
        while not self._halt.stopped:
            try:
                sock, _ = listener.accept()
            except OSError as error:
                if not self._halt.stopped:
                    _log.warning("cannot accept a KV connection: %s", error)
                    time.sleep(0.1)  # out of descriptors: the connection stays in the queue
                continue
            if self._room.acquire(blocking=False):
                self._spawn(self._attend, sock)
            else:
                _log.warning("more than %d KV connections: one refused", MAX_CONNECTIONS)
                sock.close()

    def _attend(self, sock: socket.socket) -> None:
        try:
            if not same_user(sock):
                raise TransferError("a KV peer of another user")
            tune(sock)
            channel = Channel(sock, self._halt, time.monotonic() + HANDSHAKE_S)
            hello = self._welcomer.welcome(channel, self._fd)
            channel.deadline = time.monotonic() + MEET_S
            SERVE[hello.backend](channel, _part(self._pool, hello))
        except TransferError as error:
            if not self._halt.stopped:
                _log.info("KV connection closed: %s", error)
        except Exception:
            _log.exception("KV connection closed")
        finally:
            self._room.release()


def _part(pool: KvPool, hello: Hello) -> KvPool:
    """What of the pool the receiver wants. Raises ``TransferError`` for heads that are not here."""
    if hello.heads == WHOLE:
        return pool
    if not isinstance(pool, HeadPool) or not pool.has(range(*hello.heads)):
        raise TransferError(f"a KV peer wants heads {hello.heads}, which are not here", reason="REFUSED")
    return pool.part(range(*hello.heads))


def same_user(sock: socket.socket) -> bool:
    """Whether a Unix socket's other end is this user; True for other sockets."""
    if sock.family != socket.AF_UNIX:
        return True
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(uid == os.geteuid())
