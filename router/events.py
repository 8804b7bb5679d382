"""Everything that enters the core (events) and leaves it (actions): plain slotted records, no behaviour.

Workers are dense ints given by whoever drives the core; a request is an int ``rid``; an attempt is an int that the core
gives out, never used twice. Block columns and checksums pass through the core untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

from twinpool.cost import Cost
from twinpool.router.request import Request

# --- events ----------


@dataclass(slots=True)
class Submit:
    """A request arrives, already checked by the edge."""

    request: Request


@dataclass(slots=True)
class Cancel:
    """The client is gone, or asked to stop."""

    rid: int


@dataclass(slots=True)
class WorkerUp:
    """A worker was let in. ``kv_tokens`` = blocks * block_size."""

    worker: int
    name: str
    roles: tuple[str, ...]
    blocks: int
    block_size: int
    block_bytes: int
    device: str
    cost: Cost
    chunk_tokens: int
    max_batch: int
    index_tokens: int = 0  # prompt tokens that one hash of a request stands for; 0: block_size


@dataclass(slots=True)
class WorkerLost:
    """Its link closed, fell silent, or it was fenced. Its int may be given to another one afterwards."""

    worker: int


@dataclass(slots=True)
class WorkerDraining:
    """No new work there; what runs goes on."""

    worker: int


@dataclass(slots=True)
class RolesSet:
    """The worker moved to other pools."""

    worker: int
    roles: tuple[str, ...]


@dataclass(slots=True)
class Reported:
    """A worker's own numbers; the last four are of its latest step that had decodes only, 0 where none was since."""

    worker: int
    free: int  # blocks
    running: int  # sequences that decoded
    waiting: int  # sequences with prompt tokens in that step
    context: int  # tokens of the decoding ones
    step_s: float


@dataclass(slots=True)
class KvChanged:
    """Prefix cache changes of a worker; ``reset``: ``stored`` is everything."""

    worker: int
    stored: list[int]
    removed: list[int]
    reset: bool


@dataclass(slots=True)
class Reserved:
    """Decode room is booked; the first ``held`` blocks are there already."""

    worker: int
    attempt: int
    held: int


@dataclass(slots=True)
class NoRoom:
    """A reservation or a prefill did not fit."""

    worker: int
    attempt: int


@dataclass(slots=True)
class Progressed:
    """Prompt tokens computed so far."""

    worker: int
    attempt: int
    done: int
    cached: int
    step_s: float


@dataclass(slots=True)
class BlocksReady:
    """Blocks ``first``.. are final at the prefill worker."""

    worker: int
    attempt: int
    first: int
    count: int
    blocks: bytes
    sums: bytes


@dataclass(slots=True)
class BlocksVerified:
    """One Pull is done."""

    worker: int
    attempt: int
    first: int
    count: int
    bytes: int
    seconds: float
    backend: str


@dataclass(slots=True)
class BlocksBad:
    """One Pull failed."""

    worker: int
    attempt: int
    reason: str


@dataclass(slots=True)
class Emitted:
    """``count`` tokens of an attempt were sent by a worker."""

    worker: int
    attempt: int
    count: int


@dataclass(slots=True)
class Ended:
    """The sequence is complete."""

    worker: int
    attempt: int
    reason: str


@dataclass(slots=True)
class AttemptLost:
    """Preempted or failed at the worker; ``counts`` is False for a preemption, which is nobody's fault."""

    worker: int
    attempt: int
    reason: str
    counts: bool


@dataclass(slots=True)
class Tick:
    """Time passed; see ``Core.next_tick``."""


Event = (
    Submit | Cancel | WorkerUp | WorkerLost | WorkerDraining | RolesSet | Reported | KvChanged | Reserved | NoRoom
    | Progressed | BlocksReady | BlocksVerified | BlocksBad | Emitted | Ended | AttemptLost | Tick
)  # fmt: skip

# --- actions ----------


@dataclass(slots=True)
class SendReserve:
    """Book room for the request on a decode worker."""

    worker: int
    request: Request
    attempt: int
    blocks: int


@dataclass(slots=True)
class SendPrefill:
    """Compute the prompt, of which ``cached`` tokens should be there; ``decode``: and go on; ``transfer``: announce."""

    worker: int
    request: Request
    attempt: int
    decode: bool
    transfer: bool
    cached: int = 0


@dataclass(slots=True)
class SendPull:
    """Copy blocks from ``peer``."""

    worker: int
    attempt: int
    peer: int
    first: int
    blocks: bytes
    sums: bytes


@dataclass(slots=True)
class SendDecode:
    """Go on as soon as all blocks are verified."""

    worker: int
    request: Request
    attempt: int


@dataclass(slots=True)
class SendRelease:
    """What the worker holds for the attempt is not needed any more."""

    worker: int
    attempt: int


@dataclass(slots=True)
class SendCancel:
    """Stop the attempt; ``suspect``: its KV did not match its checksums."""

    worker: int
    attempt: int
    suspect: bool = False


@dataclass(slots=True)
class SendRenew:
    """Prolong the leases of these attempts."""

    worker: int
    attempts: list[int]


@dataclass(slots=True)
class Show:
    """Tokens of the request may go to the client (the first one was held)."""

    rid: int


@dataclass(slots=True)
class Finish:
    """The request ended well."""

    request: Request


@dataclass(slots=True)
class Refuse:
    """The request ends with an error; ``code`` is a gRPC status name (errors.py)."""

    request: Request
    code: str
    reason: str
    message: str
    retry_s: float | None


Action = (
    SendReserve | SendPrefill | SendPull | SendDecode | SendRelease | SendCancel | SendRenew | Show | Finish | Refuse
)
