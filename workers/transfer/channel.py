"""The KV channel: one authenticated connection from a receiver to the worker that holds the blocks.

    receiver -> holder   hello: magic, backend, epoch, nonce
    holder -> receiver   status, nonce
    receiver -> holder   proof of the secret
    holder -> receiver   status, proof of the secret, shape of the pool  (with the pool's descriptor for ``shm``)

A proof is BLAKE2b keyed by the holder's secret over both nonces and all that was said, so the secret never travels, an
old conversation cannot be replayed, and each end knows that the other has the secret. What follows is neither encrypted
nor signed: checksums from the router catch what changes it, but only a private network keeps it from being read.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import WHOLE

STALL_S = 5.0  # no byte for so long: the peer hangs
MEET_S = 10.0  # for an accepted peer to make ready to move blocks; NCCL loads kernels and finds its ways first

_MAGIC = b"tpkv\x00\x00\x00\x03"
_HELLO = struct.Struct("<8s8sQHH32s")
_ANSWER = struct.Struct("<B32s")
_WELCOME = struct.Struct("<B32sQQ8sHH")
_PROOF = 33  # bytes of status and proof, before the shape
_NONCE = 32

OK, BAD_HELLO, BAD_SECRET, BAD_EPOCH, BAD_BACKEND = range(5)
_WHY = {
    BAD_HELLO: "speaks another protocol version",
    BAD_SECRET: "does not accept our secret",
    BAD_EPOCH: "has been restarted since",
    BAD_BACKEND: "does not offer this backend",
}


class Halt:
    """Ends waits on sockets from another thread: ``stop()`` shuts down all that it watches, now and later."""

    def __init__(self) -> None:
        self.stopped = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()

    def watch(self, sock: socket.socket) -> None:
        """Shut ``sock`` down on :meth:`stop`; at once if that has been called."""
        with self._lock:
            self._sockets.add(sock)
            if self.stopped:
                _shutdown(sock)

    def forget(self, sock: socket.socket) -> None:
        """``sock`` is about to be closed."""
        with self._lock:
            self._sockets.discard(sock)

    def stop(self) -> None:
        """Idempotent."""
        with self._lock:
            self.stopped = True
            for sock in self._sockets:
                _shutdown(sock)


class Geometry(NamedTuple):
    """Shape of a pool; pools that differ in block size or checksum cannot exchange blocks."""

    blocks: int
    block_bytes: int
    sum_kind: str
    held: tuple[int, int] = WHOLE  # first and end of the KV heads in it; WHOLE: it is not split by heads


class Hello(NamedTuple):
    """What a receiver asks for."""

    backend: str
    epoch: int
    heads: tuple[int, int] = WHOLE  # the only ones it wants of each block


class Channel:
    """A connected socket with a deadline on everything. All errors come out as ``TransferError``. Owns the socket."""

    def __init__(self, sock: socket.socket, halt: Halt, deadline: float) -> None:
        self.sock = sock
        self.deadline = deadline  # time.monotonic(); moved forward by whoever starts the next exchange
        self.session = b""  # differs for each connection, known to both ends once authenticated
        self._halt = halt
        halt.watch(sock)

    def send(self, *views: bytes | bytearray | memoryview) -> None:
        """Send all bytes of all views, with few system calls and without joining them."""
        try:
            self.arm()
            sent = self.sock.sendmsg(views)
            for view in views:
                if sent >= len(view):
                    sent -= len(view)
                    continue
                self.arm()
                self.sock.sendall(memoryview(view)[sent:])
                sent = 0
        except OSError as error:
            raise self.failed(error) from error

    def recv_into(self, view: memoryview) -> None:
        """Fill ``view``."""
        got = 0
        try:
            while got < len(view):
                self.arm()
                count = self.sock.recv_into(view[got:])
                if not count:
                    raise TransferError("the KV peer closed the connection", reason="PEER_GONE")
                got += count
        except OSError as error:
            raise self.failed(error) from error

    def recv(self, count: int) -> bytes:
        """Exactly ``count`` bytes; the caller has checked that this is not too much memory."""
        data = bytearray(count)
        self.recv_into(memoryview(data))
        return bytes(data)

    def lost(self) -> bool:
        """Whether the peer is gone, or has said something unasked. Does not wait."""
        try:
            self.sock.settimeout(0.0)  # with a timeout set, Python itself would wait, whatever the flags
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._halt.stopped
        except OSError:
            return True
        return True

    def gone(self) -> bool:
        """Whether the peer is gone; it may have said something. Does not wait."""
        try:
            self.sock.settimeout(0.0)
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._halt.stopped
        except OSError:
            return True

    def wait_for_request(self) -> bool:
        """Wait, however long, until the peer says something. False when it has closed the channel."""
        try:
            self.sock.settimeout(None)
            return bool(self.sock.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def arm(self) -> None:
        """Give the next operation on the socket its share of the time. Raises ``TransferError`` when there is none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TransferError("the time for this KV transfer ran out", reason="TIMEOUT")
        self.sock.settimeout(min(left, STALL_S))

    def failed(self, error: OSError) -> TransferError:
        """The error to raise for a socket's error."""
        if self._halt.stopped:
            return TransferError("the KV peer was dropped", reason="PEER_GONE")
        if isinstance(error, TimeoutError):
            return TransferError("the KV peer did not answer in time", reason="TIMEOUT")
        return TransferError(f"the connection to the KV peer broke: {error.strerror}", reason="PEER_GONE")

    def cut(self) -> None:
        """End whatever waits on it, at both ends; from any thread. It still has to be closed."""
        _shutdown(self.sock)

    def close(self) -> None:
        """Idempotent."""
        self._halt.forget(self.sock)
        self.sock.close()


def greet(channel: Channel, hello: Hello, secret: bytes) -> tuple[Geometry, list[int]]:
    """Receiver's side of the handshake: the peer's pool and the descriptors that came with it (the caller's to close).

    Raises ``TransferError``, also when the peer does not prove that it knows the secret.
    """
    nonce = secrets.token_bytes(_NONCE)
    opening = _HELLO.pack(_MAGIC, hello.backend.encode(), hello.epoch, *hello.heads, nonce)
    channel.send(opening)
    status, nonce = _ANSWER.unpack(channel.recv(_ANSWER.size))
    _accept_status(status)
    channel.send(_prove(secret, b"receiver", opening, nonce))
    data, fds = _recv_with_fds(channel, _WELCOME.size)
    try:
        status, proof, blocks, block_bytes, kind, *held = _WELCOME.unpack(data)
        _accept_status(status)
        if not hmac.compare_digest(proof, _prove(secret, b"holder", opening, nonce, data[_PROOF:])):
            raise TransferError("the KV peer does not know its own secret: somebody else answers there")
    except TransferError:
        close_fds(fds)
        raise
    channel.session = _prove(secret, b"session", opening, nonce)
    return Geometry(blocks, block_bytes, kind.rstrip(b"\x00").decode("ascii", "replace"), (held[0], held[1])), fds


class Welcomer:
    """Holder's side of the handshake."""

    def __init__(self, secret: bytes, epoch: int, geometry: Geometry, backends: Sequence[str]) -> None:
        self._secret = secret
        self._epoch = epoch
        self._shape = _WELCOME.pack(0, b"", *geometry[:2], geometry.sum_kind.encode(), *geometry.held)[_PROOF:]
        self._backends = frozenset(backends)

    def welcome(self, channel: Channel, fd: int | None) -> Hello:
        """Authenticate a new connection and say what the pool looks like; ``fd`` goes with it if asked for ``shm``.

        Raises ``TransferError`` for whoever is not to be served; the connection is then to be closed.
        """
        opening = channel.recv(_HELLO.size)
        magic, name, epoch, first, end, _ = _HELLO.unpack(opening)
        hello = Hello(name.rstrip(b"\x00").decode("ascii", "replace"), epoch, (first, end))
        nonce = secrets.token_bytes(_NONCE)
        status = self._judge(magic, hello)
        channel.send(_ANSWER.pack(status, nonce))
        _accept_status(status)
        proof = channel.recv(_NONCE)
        if not hmac.compare_digest(proof, _prove(self._secret, b"receiver", opening, nonce)):
            channel.send(_WELCOME.pack(BAD_SECRET, b"", 0, 0, b"", *WHOLE))
            raise TransferError("a KV peer came with a wrong secret")
        reply = _prove(self._secret, b"holder", opening, nonce, self._shape)
        _send_with_fd(channel, bytes([OK]) + reply + self._shape, fd if hello.backend == "shm" else None)
        channel.session = _prove(self._secret, b"session", opening, nonce)
        return hello

    def _judge(self, magic: bytes, hello: Hello) -> int:
        if magic != _MAGIC:
            return BAD_HELLO
        if hello.epoch != self._epoch:
            return BAD_EPOCH
        return OK if hello.backend in self._backends else BAD_BACKEND


def close_fds(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        os.close(fd)


def tune(sock: socket.socket) -> None:
    """Options of a KV connection: no delay, and notice when the other host vanishes; the kernel sizes the buffers."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _prove(secret: bytes, who: bytes, *said: bytes) -> bytes:
    return hashlib.blake2b(b"".join(said), digest_size=32, key=secret, person=who).digest()


def _accept_status(status: int) -> None:
    if status != OK:
        raise TransferError(f"the KV peer {_WHY.get(status, 'refuses us')}", reason="REFUSED")


def _recv_with_fds(channel: Channel, count: int) -> tuple[bytes, list[int]]:
    """``count`` bytes; descriptors arrive with the first of them."""
    if channel.sock.family != socket.AF_UNIX:
        return channel.recv(count), []
    try:
        channel.arm()
        data, fds, _, _ = socket.recv_fds(channel.sock, count, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise channel.failed(error) from error
    if not data:
        raise TransferError("the KV peer closed the connection", reason="PEER_GONE")
    try:
        return data + channel.recv(count - len(data)), fds
    except TransferError:
        close_fds(fds)
        raise


def _send_with_fd(channel: Channel, data: bytes, fd: int | None) -> None:
    if fd is None:
        channel.send(data)
        return
    try:
        channel.arm()
        sent = socket.send_fds(channel.sock, [data], [fd])
    except OSError as error:
        raise channel.failed(error) from error
    if sent < len(data):
        channel.send(data[sent:])


def _shutdown(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # not connected, or closed already: nothing waits on it
