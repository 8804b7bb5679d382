"""What the edge may say to a cell and what it hears back: submit, cancel, tokens, ended. It never touches the core.

A *cell* is one core and the workers that dial it. One Protocol, so that edge processes beside the cell's own can speak
the same words over a socket.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from twinpool.router.request import Expected
from twinpool.sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of one request; they steer scheduling and admission and never cancel anything.

    The deadline of the first token is ``ttft_s + ttft_factor * (unloaded uncached prefill)`` after arrival.
    """

    ttft_s: float
    ttft_factor: float
    itl_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One sequence to generate, checked by the edge (ids in range, prompt + max_tokens within the context)."""

    request_id: str  # unique among running requests of this cell
    prompt: array[int]  # token ids
    sampling: SamplingParams
    slo: Slo
    tenant: str = ""
    klass: str = "realtime"  # name of the SLO class
    salt: str = ""
    deadline_s: float | None = None  # seconds from now until the caller gives up
    max_queue_s: float | None = None  # refused when not started by then
    resumed: array[int] = field(default_factory=lambda: array("I"))  # output tokens the client has already
    session: str = ""
    returns: bool = False  # its conversation will come back: what it leaves in the cache is kept longer
    trace: str = ""  # W3C traceparent


class TokensOut(NamedTuple):
    """Tokens of the output from ``position`` on; joined from several steps when the reader was slow."""

    position: int
    ids: array[int]
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class FinishedOut:
    """The end of a stream that went well. Times in seconds of the router's clock; see proto ``Timing``, ``Route``."""

    reason: str  # stop | length
    stop: str | int | None
    text: str  # last text, held back for a stop string that did not come
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    prefill_worker: str
    decode_worker: str
    path: str
    path_reason: str
    kv_bytes: int
    backend: str
    attempts: int  # 1 and those that followed a loss
    queue_s: float
    reserve_s: float
    prefill_s: float
    compute_s: float
    transfer_s: float
    ttft_s: float
    itl_s: float
    total_s: float
    fetch_outcome: str = ""  # of the last attempt: OK, or why its prefill began without; "": it fetched nothing
    fetched_blocks: int = 0
    fetch_predicted_s: float = 0.0
    fetch_s: float = 0.0
    moves: int = 0  # times that it went on at another decode worker without a loss
    expected: Expected | None = None  # where nothing was lost: what to compare with


class Stream(Protocol):
    """One request's output: iterating yields TokensOut, then exactly one FinishedOut, or raises a TwinpoolError."""

    def __aiter__(self) -> AsyncIterator[TokensOut | FinishedOut]: ...

    def cancel(self) -> None:
        """The reader is gone: stop the request and free what it holds. Idempotent; nothing after the end."""
        ...


@dataclass(frozen=True, slots=True)
class CellModel:
    """The model of a cell, known once the first worker is in."""

    name: str
    fingerprint: str
    dtype: str
    vocab_size: int
    max_context: int
    eos_ids: tuple[int, ...]
    block_size: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as operators see it."""

    worker: str
    roles: tuple[str, ...]
    state: str  # ready | draining
    blocks: int
    free_blocks: int
    cached_blocks: int
    running: int
    waiting: int
    step_s: float
    leaked_blocks: int
    pid: int
    last_seen_s: float
    prefill_pace: float = 1.0  # actual over predicted seconds of its kind of device, of late
    decode_pace: float = 1.0


@dataclass(frozen=True, slots=True)
class CellStatus:
    """A cell as operators see it; counters since the router's start."""

    router: str
    model: CellModel | None
    queued: int
    active: int
    completed: int
    refused: int
    cancelled: int
    resumed: int
    workers: tuple[WorkerView, ...]


class Cell(Protocol):
    """The edge's view of a cell."""

    @property
    def model(self) -> CellModel | None:
        """None until a worker has registered."""
        ...

    def submit(self, submission: Submission) -> Stream:
        """Queue a request. Raises AlreadyExists, Overloaded, Unavailable or InvalidRequest at once."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Stop a running request (its stream raises Cancelled); False when nothing runs by that id."""
        ...

    def status(self) -> CellStatus:
        """A snapshot."""
        ...

    def drain_worker(self, worker: str) -> None:
        """Take no new work there. Raises NotFound."""
        ...

    def set_roles(self, worker: str, roles: tuple[str, ...]) -> None:
        """Move a worker to other pools. Raises NotFound or InvalidRequest."""
        ...

    def watch(self) -> AsyncIterator[str]:
        """Request log lines as they are written; a slow reader loses the oldest."""
        ...
