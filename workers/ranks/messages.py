"""What the first rank of a worker and each other one say to each other, over a socket pair that nobody else can open.

A message on the socket is a 4-byte little-endian length and that many bytes of MessagePack. Columns of numbers are
bytes in the host's own order: "I" for tokens and blocks, "Q" for checksums. ``id`` pairs a question with its answer; a
``Step`` has none, its answer is the all-reduce.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from array import array
from collections.abc import Iterable

import msgspec

MAX_MESSAGE = 1 << 30  # both ends are one program: this only keeps a damaged length from being allocated

_LENGTH = struct.Struct("<I")


class Message(msgspec.Struct, tag=True, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of all messages; the tag is the class name."""


# --- first rank -> other rank ----------


class Load(Message, frozen=True):
    """Load your share of the model; the answer is ``Loaded``."""

    config: bytes  # JSON of the cluster's configuration
    rank: int
    ranks: int


class Open(Message, frozen=True):
    """Allocate so many blocks and serve them; the answer is ``Opened``, then the group of ``file`` is joined."""

    blocks: int
    worker: str
    epoch: int
    secret: bytes
    file: str


class Step(Message, frozen=True):
    """Compute these rows, one entry of each column a row."""

    tokens: list[bytes]
    starts: list[int]
    tables: list[bytes]


class Sum(Message, frozen=True):
    """Checksums of blocks; the answer is ``Sums``."""

    id: int
    blocks: bytes


class Fetch(Message, frozen=True):
    """Pull our heads of blocks from the ranks of another worker; the answer is ``Fetched`` or ``NotFetched``."""

    id: int
    worker: str
    epoch: int
    secret: bytes
    addresses: dict[str, str]
    source: bytes
    target: bytes
    timeout_s: float


class Stop(Message, frozen=True):
    """Nobody wants the answer to this ``Fetch``: end it, and answer when nothing is written any more."""

    id: int


class Forget(Message, frozen=True):
    """Another worker is gone."""

    worker: str


# --- other rank -> first rank ----------


class Loaded(Message, frozen=True):
    """The share is in memory; there is room for so many blocks beside it."""

    blocks: int


class Opened(Message, frozen=True):
    """Blocks are served at these addresses."""

    addresses: dict[str, str]


class Ready(Message, frozen=True):
    """The group is joined and the weights are arranged."""


class Sums(Message, frozen=True):
    """Answer to ``Sum``."""

    id: int
    sums: bytes


class Fetched(Message, frozen=True):
    """Answer to ``Fetch``: checksums of our heads of each block."""

    id: int
    backend: str
    moved: int  # bytes
    seconds: float
    sums: bytes


class NotFetched(Message, frozen=True):
    """Answer to ``Fetch``: nothing may be assumed of the target."""

    id: int
    reason: str
    message: str


class Broken(Message, frozen=True):
    """This rank ends; ``config``: the operator has to mend something."""

    message: str
    config: bool


ToRank = Load | Open | Step | Sum | Fetch | Stop | Forget
FromRank = Loaded | Opened | Ready | Sums | Fetched | NotFetched | Broken
_to_rank: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_from_rank: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def column(code: str, numbers: Iterable[int]) -> bytes:
    """Bytes of a column; ``code`` is the array module's."""
    return array(code, numbers).tobytes()


def values(code: str, data: bytes) -> list[int]:
    """Inverse of :func:`column`."""
    found: list[int] = array(code, data).tolist()
    return found


def encode(message: Message) -> bytes:
    """A message as it goes onto the socket."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


def receive(sock: socket.socket) -> FromRank | None:
    """The next message of another rank, waited for; None when it is gone. Raises ValueError for nonsense."""
    try:
        head = sock.recv(_LENGTH.size, socket.MSG_WAITALL)
        if len(head) < _LENGTH.size:
            return None
        size = _checked(head)
        body = sock.recv(size, socket.MSG_WAITALL)
    except OSError:
        return None
    return _from_rank.decode(body) if len(body) == size else None


async def read(reader: asyncio.StreamReader) -> ToRank | None:
    """The next message of the first rank; None when it is gone. Raises ValueError for nonsense."""
    try:
        size = _checked(await reader.readexactly(_LENGTH.size))
        return _to_rank.decode(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None


def _checked(head: bytes) -> int:
    size: int = _LENGTH.unpack(head)[0]
    if size > MAX_MESSAGE:
        raise ValueError(f"a message of {size} bytes between ranks")
    return size
