"""Everything that enters the core (events) and leaves it (actions): plain slotted records, no behaviour.

Workers are dense ints given by whoever drives the core; a request is an int ``rid``; an attempt is an int that the core
gives out, never used twice. Block columns and checksums pass through the core untouched.
"""

from __future__ import annotations

from twinpool.cost import Cost
from twinpool.router.record import Record as Record
from twinpool.router.record import fields as fields
from twinpool.router.request import Request

# --- events ----------


class Submit(Record):
    """A request arrives, already checked by the edge."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


class Cancel(Record):
    """The client is gone, or asked to stop."""

    __slots__ = ("rid",)

    def __init__(self, rid: int) -> None:
        self.rid = rid


class WorkerUp(Record):
    """A worker was let in. ``kv_tokens`` = blocks * block_size."""

    __slots__ = (
        "block_bytes", "block_size", "blocks", "chunk_tokens", "cost", "device", "index_tokens", "max_batch", "name",
        "roles", "worker",
    )  # fmt: skip

    def __init__(
        self, worker: int, name: str, roles: tuple[str, ...], blocks: int, block_size: int, block_bytes: int,
        device: str, cost: Cost, chunk_tokens: int, max_batch: int, index_tokens: int = 0,
    ) -> None:  # fmt: skip
        self.worker = worker
        self.name = name
        self.roles = roles
        self.blocks = blocks
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.device = device
        self.cost = cost
        self.chunk_tokens = chunk_tokens
        self.max_batch = max_batch
        self.index_tokens = index_tokens  # prompt tokens that one hash of a request stands for; 0: block_size


class WorkerLost(Record):
    """Its link closed, fell silent, or it was fenced. Its int may be given to another one afterwards."""

    __slots__ = ("worker",)

    def __init__(self, worker: int) -> None:
        self.worker = worker


class WorkerDraining(Record):
    """No new work there; what runs goes on."""

    __slots__ = ("worker",)

    def __init__(self, worker: int) -> None:
        self.worker = worker


class RolesSet(Record):
    """The worker moved to other pools."""

    __slots__ = ("roles", "worker")

    def __init__(self, worker: int, roles: tuple[str, ...]) -> None:
        self.worker = worker
        self.roles = roles


class Reported(Record):
    """A worker's own numbers; the last four are of its latest step that had decodes only, 0 where none was since."""

    __slots__ = ("context", "free", "running", "step_s", "waiting", "worker")

    def __init__(self, worker: int, free: int, running: int, waiting: int, context: int, step_s: float) -> None:
        self.worker = worker
        self.free = free  # blocks
        self.running = running  # sequences that decoded
        self.waiting = waiting  # sequences with prompt tokens in that step
        self.context = context  # tokens of the decoding ones
        self.step_s = step_s


class KvChanged(Record):
    """Prefix cache changes of a worker; ``reset``: ``stored`` is everything."""

    __slots__ = ("removed", "reset", "stored", "worker")

    def __init__(self, worker: int, stored: list[int], removed: list[int], reset: bool) -> None:
        self.worker = worker
        self.stored = stored
        self.removed = removed
        self.reset = reset


class Reserved(Record):
    """Decode room is booked; the first ``held`` blocks are there already."""

    __slots__ = ("attempt", "held", "worker")

    def __init__(self, worker: int, attempt: int, held: int) -> None:
        self.worker = worker
        self.attempt = attempt
        self.held = held


class NoRoom(Record):
    """A reservation or a prefill did not fit."""

    __slots__ = ("attempt", "worker")

    def __init__(self, worker: int, attempt: int) -> None:
        self.worker = worker
        self.attempt = attempt


class Progressed(Record):
    """Prompt tokens computed so far; the chunks take ``pace`` times as long as predicted."""

    __slots__ = ("attempt", "cached", "done", "pace", "step_s", "worker")

    def __init__(self, worker: int, attempt: int, done: int, cached: int, step_s: float, pace: float) -> None:
        self.worker = worker
        self.attempt = attempt
        self.done = done
        self.cached = cached
        self.step_s = step_s
        self.pace = pace


class BlocksReady(Record):
    """Blocks ``first``.. are final at the prefill worker."""

    __slots__ = ("attempt", "blocks", "count", "first", "sums", "worker")

    def __init__(self, worker: int, attempt: int, first: int, count: int, blocks: bytes, sums: bytes) -> None:
        self.worker = worker
        self.attempt = attempt
        self.first = first
        self.count = count
        self.blocks = blocks
        self.sums = sums


class BlocksVerified(Record):
    """One Pull is done."""

    __slots__ = ("attempt", "backend", "bytes", "count", "first", "seconds", "worker")

    def __init__(
        self, worker: int, attempt: int, first: int, count: int, bytes: int, seconds: float, backend: str
    ) -> None:
        self.worker = worker
        self.attempt = attempt
        self.first = first
        self.count = count
        self.bytes = bytes
        self.seconds = seconds
        self.backend = backend


class BlocksBad(Record):
    """One Pull failed."""

    __slots__ = ("attempt", "reason", "worker")

    def __init__(self, worker: int, attempt: int, reason: str) -> None:
        self.worker = worker
        self.attempt = attempt
        self.reason = reason


class Emitted(Record):
    """``count`` tokens of an attempt were sent by a worker."""

    __slots__ = ("attempt", "count", "worker")

    def __init__(self, worker: int, attempt: int, count: int) -> None:
        self.worker = worker
        self.attempt = attempt
        self.count = count


class Ended(Record):
    """The sequence is complete."""

    __slots__ = ("attempt", "reason", "worker")

    def __init__(self, worker: int, attempt: int, reason: str) -> None:
        self.worker = worker
        self.attempt = attempt
        self.reason = reason


class AttemptLost(Record):
    """Preempted or failed at the worker; ``counts`` is False for a preemption, which is nobody's fault."""

    __slots__ = ("attempt", "counts", "reason", "worker")

    def __init__(self, worker: int, attempt: int, reason: str, counts: bool) -> None:
        self.worker = worker
        self.attempt = attempt
        self.reason = reason
        self.counts = counts


class Short(Record):
    """KV memory of the worker will soon be full: unless others end before, this attempt is preempted."""

    __slots__ = ("attempt", "worker")

    def __init__(self, worker: int, attempt: int) -> None:
        self.worker = worker
        self.attempt = attempt


class Tick(Record):
    """Time passed; see ``Core.next_tick``."""

    __slots__ = ()


Event = (
    Submit | Cancel | WorkerUp | WorkerLost | WorkerDraining | RolesSet | Reported | KvChanged | Reserved | NoRoom
    | Progressed | BlocksReady | BlocksVerified | BlocksBad | Emitted | Ended | AttemptLost | Short
    | Tick
)  # fmt: skip

# --- actions ----------


class Send(Record):
    """Something that one worker is told about one attempt."""

    __slots__ = ("attempt", "worker")

    def __init__(self, worker: int, attempt: int) -> None:
        self.worker = worker
        self.attempt = attempt


class SendReserve(Send):
    """Book room for the request on a decode worker."""

    __slots__ = ("blocks", "request")

    def __init__(self, worker: int, request: Request, attempt: int, blocks: int) -> None:
        self.worker = worker
        self.request = request
        self.attempt = attempt
        self.blocks = blocks


class SendLend(Send):
    """Hold and announce what is cached of the first ``hashes`` of the request: another worker will pull it.

    The number is that of the loan.
    """

    __slots__ = ("hashes", "request")

    def __init__(self, worker: int, request: Request, attempt: int, hashes: int) -> None:
        self.worker = worker
        self.request = request
        self.attempt = attempt
        self.hashes = hashes


class SendPrefill(Send):
    """Compute the prompt, of which ``cached`` tokens should be there; ``decode``: and go on; ``transfer``: announce."""

    __slots__ = ("cached", "decode", "request", "transfer")

    def __init__(
        self, worker: int, request: Request, attempt: int, decode: bool, transfer: bool, cached: int = 0
    ) -> None:
        self.worker = worker
        self.request = request
        self.attempt = attempt
        self.decode = decode
        self.transfer = transfer
        self.cached = cached


class SendPull(Send):
    """Copy blocks from ``peer``, in ``timeout_s`` seconds; 0: as long as the config allows."""

    __slots__ = ("blocks", "first", "peer", "sums", "timeout_s")

    def __init__(
        self, worker: int, attempt: int, peer: int, first: int, blocks: bytes, sums: bytes, timeout_s: float = 0.0
    ) -> None:
        self.worker = worker
        self.attempt = attempt
        self.peer = peer
        self.first = first
        self.blocks = blocks
        self.sums = sums
        self.timeout_s = timeout_s


class SendDecode(Send):
    """Go on as soon as all blocks are verified."""

    __slots__ = ("request",)

    def __init__(self, worker: int, request: Request, attempt: int) -> None:
        self.worker = worker
        self.request = request
        self.attempt = attempt


class SendRelease(Send):
    """What the worker holds for the attempt is not needed any more."""

    __slots__ = ()


class SendYield(Send):
    """Stop a running attempt and say so, as if it were preempted: it goes on elsewhere."""

    __slots__ = ()


class SendCancel(Send):
    """Stop the attempt; ``suspect``: its KV did not match its checksums."""

    __slots__ = ("suspect",)

    def __init__(self, worker: int, attempt: int, suspect: bool = False) -> None:
        self.worker = worker
        self.attempt = attempt
        self.suspect = suspect


class SendRenew(Record):
    """Prolong the leases of these attempts."""

    __slots__ = ("attempts", "worker")

    def __init__(self, worker: int, attempts: list[int]) -> None:
        self.worker = worker
        self.attempts = attempts


class Show(Record):
    """Tokens of the request may go to the client (the first one was held)."""

    __slots__ = ("rid",)

    def __init__(self, rid: int) -> None:
        self.rid = rid


class Finish(Record):
    """The request ended well."""

    __slots__ = ("request",)

    def __init__(self, request: Request) -> None:
        self.request = request


class Refuse(Record):
    """The request ends with an error; ``code`` is a gRPC status name (errors.py)."""

    __slots__ = ("code", "message", "reason", "request", "retry_s")

    def __init__(self, request: Request, code: str, reason: str, message: str, retry_s: float | None) -> None:
        self.request = request
        self.code = code
        self.reason = reason
        self.message = message
        self.retry_s = retry_s


Action = (
    SendReserve | SendLend | SendPrefill | SendPull | SendDecode | SendRelease | SendYield | SendCancel | SendRenew
    | Show | Finish | Refuse
)  # fmt: skip
