"""The decision log: all that enters a core, with its time, and what comes out, so that a fresh core can do it again.

The file is ``MAGIC``, then records: one ``Header``, a ``Turn`` for each call of ``Core.on``, and an ``End`` where the
router closed it. A record is its length, its CRC-32 (both little-endian uint32) and that many bytes of MessagePack. Of
requests there are counts, block hashes and the names of request, tenant and session; never text nor token ids.

Records are made on the loop, some microseconds each, and written by a thread. When the disk fails, or falls behind by
``MAX_BACKLOG``, the rest of the log is given up with one warning: requests never wait for it. ``decision_replay.py``
reads what is here.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import struct
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, TypeAlias, get_args

import msgspec
import xxhash

from twinpool import __version__
from twinpool.cost import StepCost
from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy.baselines.info import Value
from twinpool.router.request import Request
from twinpool.router.state import Limits

log = logging.getLogger("twinpool.router")

MAGIC = b"twinpool decisions 3\n"  # the number is the format's version
MAX_RECORD = 16 << 20  # bytes
MAX_BACKLOG = 32 << 20  # bytes that wait for the disk
MAX_WRITE = 1 << 20  # bytes at once, or one record
EVERY_S = 0.05  # between two writes
CLOSE_S = 5.0  # that a slow disk gets at the end

PREFIX = struct.Struct("<II")  # of a record: length, CRC-32

Row = list[Any]  # a name, and fields as plain values


# --- events ----------


class Arrival(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What ``Request`` is constructed from."""

    rid: int
    prompt_len: int
    max_tokens: int
    hashes: list[int]
    ttft_s: float
    ttft_factor: float
    itl_s: float
    rank: int
    klass: str
    tenant: str
    session: str
    returns: bool
    give_up: float
    queue_until: float
    resumed: int


STORED_TYPES: dict[str, Any] = {  # of fields of events that are no plain int; compiled classes do not tell
    "request": Arrival,
    "cost": StepCost,
    "worker": Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)],  # a bit of the index's masks: not any number
    **dict.fromkeys(("name", "device", "backend", "reason"), str),
    **dict.fromkeys(("pace", "step_s", "seconds"), float),
    **dict.fromkeys(("reset", "counts"), bool),
    **dict.fromkeys(("stored", "removed"), list[int]),
    "roles": tuple[str, ...],
    "sums": bytes,
    "BlocksReady.blocks": bytes,
}


def _stored(kind: Any) -> Any:
    """The stored form of an event: its name and its fields in order, with their types."""
    types = STORED_TYPES
    row = [(name, types.get(f"{kind.__name__}.{name}", types.get(name, int))) for name in ev.fields(kind)]
    return msgspec.defstruct(kind.__name__, row, tag=True, array_like=True, frozen=True, forbid_unknown_fields=True)


_KINDS: dict[Any, Any] = {_stored(kind): kind for kind in get_args(ev.Event)}

if TYPE_CHECKING:
    StoredEvent: TypeAlias = Any
else:
    StoredEvent = functools.reduce(operator.or_, _KINDS)


def event_row(event: ev.Event) -> Row:
    """An event as it is stored; to be made before the core has it, as the core changes requests."""
    if isinstance(event, ev.Submit):
        return ["Submit", _arrival(event.request)]
    return [type(event).__name__, *[getattr(event, name) for name in ev.fields(type(event))]]


def _arrival(request: Request) -> Arrival:
    return Arrival(
        request.rid, request.prompt_len, request.max_tokens, request.hashes, request.ttft_s, request.ttft_factor,
        request.itl_s, request.rank, request.klass, request.tenant, request.session, request.returns,
        request.give_up, request.queue_until, request.emitted,
    )  # fmt: skip


def event_of(stored: StoredEvent) -> ev.Event:
    """The event again; a new request each time."""
    kind, values = _KINDS[type(stored)], msgspec.structs.astuple(stored)
    if kind is ev.Submit:
        values = (Request(**msgspec.structs.asdict(stored.request)),)
    event: ev.Event = kind(*values)
    return event


# --- what comes out ----------


def said(core: Core, actions: list[ev.Action]) -> list[Row]:
    """What a call of the core led to: its actions, then when it wants a Tick."""
    return [*map(_action_row, actions), ["next tick", core.next_tick()]]


def raised(error: Exception) -> list[Row]:
    """The same of a call that failed; a live router cuts the connection that brought the event, and goes on."""
    return [["raised", type(error).__name__]]


def _action_row(action: ev.Action) -> Row:
    """A request is its rid, and what became of it where it ends; a column is its length and hash."""
    row = [type(action).__name__, *[_plain(getattr(action, name)) for name in ev.fields(type(action))]]
    if isinstance(action, ev.Finish | ev.Refuse):
        request = action.request
        row += [request.ended, request.emitted, request.attempts, request.losses, request.path, request.reason,
                request.prefill_name, request.decode_name, request.cached, request.kv_bytes]  # fmt: skip
    return row


def _plain(value: object) -> object:
    if isinstance(value, Request):
        return value.rid
    if isinstance(value, bytes):
        return f"{len(value)} bytes {xxhash.xxh3_64_hexdigest(value)}"
    return value


# --- records ----------


class Header(msgspec.Struct, frozen=True, tag=1, array_like=True, forbid_unknown_fields=True):
    """What a fresh core is made from."""

    twinpool: str  # version of the program
    policy: str  # this and the parameters as ``make_policy`` takes them
    parameters: dict[str, float | int | str]
    limits: Limits
    first_attempt: int  # the number that the first attempt gets


class Turn(msgspec.Struct, frozen=True, tag=2, array_like=True, forbid_unknown_fields=True):
    """One call of the core."""

    now: float  # seconds of the driver's clock
    event: StoredEvent
    said: list[Row]
    id: str = ""  # of a Submit: what its user calls the request


class End(msgspec.Struct, frozen=True, tag=3, array_like=True, forbid_unknown_fields=True):
    """The log is whole."""

    turns: int


Record = Header | Turn | End
encode = msgspec.msgpack.Encoder().encode


def pack(record: Record) -> bytes:
    """A record as the file has it; raises what msgspec raises for values it does not know, ValueError for too many."""
    body = encode(record)
    if len(body) > MAX_RECORD:
        raise ValueError(f"{len(body)} bytes, the most is {MAX_RECORD}")
    return PREFIX.pack(len(body), zlib.crc32(body)) + body


# --- writing ----------


class DecisionLog:
    """Records a core that has heard nothing yet. Use ``decide`` in place of ``core.on``; ``close`` at the end."""

    def __init__(self, path: Path, core: Core, policy: str, parameters: Mapping[str, Value]) -> None:
        """``policy`` and ``parameters``: what the core's policy was made from.

        The log of an earlier start is kept as ``path`` + ".old". Raises ConfigError when the file cannot be opened.
        """
        self._core = core
        self._file = _opened(path)
        head = Header(__version__, policy, dict(parameters), core.state.limits, core.state.next_attempt)
        first = MAGIC + pack(head)
        self._records = deque([first])  # the loop adds at one end, the thread takes from the other
        self._added = len(first)  # bytes; the loop's
        self._written = 0  # bytes; the thread's
        self._turns = 0
        self._id = ""  # of the next Submit
        self._over = False
        self._giving_up = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="decision-log", daemon=True)
        self._thread.start()

    def name(self, request_id: str) -> None:
        """What the user calls the request of the next Submit."""
        self._id = request_id

    def decide(self, event: ev.Event, now: float) -> list[ev.Action]:
        """What ``core.on`` answers, or raises; either is recorded."""
        if self._over:
            return self._core.on(event, now)
        row, request_id = event_row(event), ""
        if isinstance(event, ev.Submit):
            request_id, self._id = self._id, ""
        try:
            actions = self._core.on(event, now)
        except Exception as error:
            self._keep(Turn(now, row, raised(error), request_id))
            raise
        self._keep(Turn(now, row, said(self._core, actions), request_id))
        return actions

    def _keep(self, turn: Turn) -> None:
        try:
            record = pack(turn)
        except (
            TypeError,
            ValueError,
            OverflowError,
            msgspec.MsgspecError,
        ) as error:  # a user's policy may say anything
            self._give_up(f"{turn.event[0]} cannot be recorded ({error})")
            return
        self._turns += 1
        self._added += len(record)
        self._records.append(record)
        if self._added - self._written > MAX_BACKLOG:
            self._give_up(f"the disk is {MAX_BACKLOG >> 20} MiB behind")

    def _give_up(self, problem: str) -> None:
        with self._giving_up:
            if not self._over:
                self._over = True
                log.warning("scheduling.decision_log: %s; later decisions are not recorded", problem)

    def close(self) -> None:
        """All that was recorded is in the file when this returns, if the disk takes it in ``CLOSE_S``. Idempotent."""
        if not self._over:
            self._records.append(pack(End(self._turns)))
        self._closing.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._give_up(f"the disk took nothing for {CLOSE_S:g} s")
        self._over = True

    def _run(self) -> None:
        closing = False
        with contextlib.suppress(OSError), self._file:  # what a full disk did not take, closing cannot write either
            while not closing:
                closing = self._closing.wait(EVERY_S)  # and then once more, for what came before
                try:
                    self._drain()
                except OSError as error:
                    self._give_up(error.strerror or "the disk failed")
                    self._records.clear()

    def _drain(self) -> None:
        while self._records:
            batch, size = [], 0
            while self._records and size < MAX_WRITE:
                batch.append(self._records.popleft())
                size += len(batch[-1])
            rest = memoryview(b"".join(batch))
            while rest:
                rest = rest[self._file.write(rest) :]
            self._written += size


def _opened(path: Path) -> BinaryIO:
    try:
        if path.is_file():
            path.replace(f"{path}.old")
        return path.open("wb", buffering=0)
    except OSError as error:
        raise ConfigError(f"scheduling.decision_log: cannot write {path} ({error.strerror})") from None
