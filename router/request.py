"""One request, one drawn life. Metrics, the log and the answer's timing all come from the stamps of its edges.

    RECEIVED -> QUEUED -> PLACED -> RESERVED -> PREFILLING -> FIRST -> TRANSFERRED -> DECODING -> FINISHED
                  ^        |          |             |           |           |            |
                  |        '--(no decode worker has room: KV waits on p)--->|            |
                  '--------+----------+-------------+-----------+-----------+------------'   attempt lost, preempted
    any -> CANCELLED | REJECTED          PREFILLING -> FINISHED: one token wanted, or the first token stops
    path local: PLACED -> PREFILLING -> FIRST -> DECODING -> FINISHED (one worker, nothing moves)

PLACED: the policy chose workers. RESERVED: the decode worker booked room under a lease. FIRST: the first token of the
attempt is here. TRANSFERRED: the decode worker verified every block. DECODING: its first token is here.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple


class Phase(IntEnum):
    """Where a request is in its life."""

    QUEUED = 0
    PLACED = 1
    RESERVED = 2
    PREFILLING = 3
    FIRST = 4
    TRANSFERRED = 5
    DECODING = 6
    FINISHED = 7
    CANCELLED = 8
    REJECTED = 9


class Ready:
    """Blocks announced by the prefill worker, not yet pulled."""

    __slots__ = ("blocks", "count", "first", "sums")

    def __init__(self, first: int, count: int, blocks: bytes, sums: bytes) -> None:
        self.first = first
        self.count = count
        self.blocks = blocks
        self.sums = sums


NOBODY: Final = -1


class Fetch:
    """KV blocks that an attempt's prefill worker gets from another worker before it computes; see fetch.py."""

    __slots__ = (
        "began_at", "blocks", "cached", "ended_at", "held", "outcome", "predicted_s", "pulled", "ready", "source",
        "source_name", "tokens", "until", "wanted",
    )  # fmt: skip

    def __init__(self, source: int, source_name: str, tokens: int, cached: int, predicted_s: float, now: float) -> None:
        self.source = source
        self.source_name = source_name
        self.tokens = tokens  # of the prompt, that shall be cached at the prefill worker afterwards
        self.cached = cached  # of them, those believed to be there before
        self.predicted_s = predicted_s
        self.began_at = now
        self.until = now  # then the prefill begins without
        self.wanted = False  # everything else is ready: the prefill waits for this
        self.held = NOBODY  # blocks that the prefill worker had; NOBODY: it has not said
        self.ready: Ready | None = None  # what the source has announced
        self.pulled = 0  # leading blocks that the prefill worker has when the pull is done; 0: it has not begun
        self.blocks = 0  # that came, verified
        self.ended_at = -1.0
        self.outcome = ""  # "" while it goes on, OK, or why there is nothing


class Move(Fetch):
    """The way of a sequence that decodes from ``source`` to ``target``: move.py."""

    __slots__ = ("loan", "number", "target", "yields")

    def __init__(
        self, source: int, source_name: str, tokens: int, predicted_s: float, now: float, target: int, loan: int,
        number: int,
    ) -> None:  # fmt: skip
        super().__init__(source, source_name, tokens, 0, predicted_s, now)
        self.target = target
        self.loan = loan  # number under which the source keeps its blocks
        self.number = number  # of the reservation at the target
        self.yields = False  # its KV is there, and the source was told to stop it


class Placement(NamedTuple):
    """Where one request goes. ``decode`` = NOBODY: found later, or not needed (see ``path``)."""

    prefill: int
    decode: int
    path: str  # split | local
    reason: str  # for people: why this path and these workers
    cached: int  # prompt tokens predicted to be cached at ``prefill``
    seconds: float  # predicted from the worker's being free to the first token: prefill work, and waiting for a fetch
    source: int = NOBODY  # worker from which ``fetched`` of the cached tokens come first
    fetched: int = 0
    fetch_s: float = 0.0  # predicted

    @property
    def local(self) -> bool:
        """One worker does both."""
        return self.path == "local"


class Expected(NamedTuple):
    """What a request was predicted to be, to compare with what it was."""

    seconds: float  # of its prompt's steps; 0 where a fetch came before, whose time is in it
    cached: int
    output: int


class Request:
    """State of one request in the core. Times in seconds of the driver's clock; a stamp of -1 did not happen."""

    __slots__ = (
        "arrival", "attempt", "attempts", "backend", "bound_to", "cached", "charged_output", "compute_s", "deadline",
        "decode", "decode_name", "decoding_at", "emitted", "emitted_before", "ended", "expected", "expected_output",
        "fetch", "finished_at", "first_at", "give_up", "hashes", "held", "itl_s", "klass", "kv_bytes", "late", "length",
        "loan", "losses", "max_tokens", "move", "moves", "path", "phase", "placed_at", "prefill", "prefill_done",
        "prefill_name", "prefill_started_at", "prompt_len", "queue_until", "rank", "ready", "reason", "reserved",
        "reserved_at", "returns", "rid", "session", "shown", "stays", "suspect", "tenant", "transferred_at",
        "ttft_factor", "ttft_s", "turn", "verified", "work_s",
    )  # fmt: skip

    def __init__(
        self,
        rid: int,
        prompt_len: int,
        max_tokens: int,
        hashes: list[int],
        *,
        ttft_s: float,
        ttft_factor: float,
        itl_s: float,
        rank: int = 0,
        klass: str = "realtime",
        tenant: str = "",
        session: str = "",
        returns: bool = False,
        give_up: float = float("inf"),
        queue_until: float = float("inf"),
        resumed: int = 0,
    ) -> None:
        self.rid = rid
        self.prompt_len = prompt_len
        self.max_tokens = max_tokens
        self.hashes = hashes  # of the full blocks of prompt + resumed tokens
        self.ttft_s = ttft_s
        self.ttft_factor = ttft_factor
        self.itl_s = itl_s
        self.rank = rank
        self.klass = klass
        self.tenant = tenant
        self.session = session
        self.returns = returns  # its conversation will come back: what it leaves is worth keeping
        self.give_up = give_up  # the caller's own deadline
        self.queue_until = queue_until
        self.emitted = resumed  # output tokens known, those the client brought along included
        self.arrival = self.turn = 0.0  # turn: its place in the queue: who has the least is first
        self.deadline = 0.0  # of the first token
        self.work_s = 0.0  # predicted seconds of its prompt with nothing cached and nobody beside it
        self.phase = Phase.QUEUED
        self.attempts = self.moves = 0  # moves: of the attempts, those that went on at another decode worker
        self.losses = 0  # attempts lost by a fault (preemptions are not)
        self.shown = self.late = False  # late: its first token cannot come in time: it waits behind those that can
        self.ended = self.backend = ""
        self.placed_at = self.first_at = self.finished_at = -1.0
        self.compute_s = 0.0
        self.kv_bytes = self.cached = 0
        self.expected_output = max_tokens  # tokens of an attempt, predicted when it was queued, or as they came
        self.expected: Expected | None = None  # of its first attempt
        self.charged_output = -1  # tokens that its tenant was charged for; -1: not served yet
        self.bound_to = NOBODY  # the worker in whose ``bound`` it waits
        self.begin_attempt(0)

    def begin_attempt(self, attempt: int) -> None:
        """Forget everything of the last attempt; 0 means that none runs."""
        self.attempt = attempt
        self.prefill = NOBODY
        self.decode = NOBODY
        self.prefill_name = ""  # kept for the answer: the worker may be gone by then
        self.decode_name = ""
        self.path = ""
        self.reason = ""
        self.held = 0
        self.reserved = False
        self.suspect = False  # its KV did not match its checksums
        self.fetch: Fetch | None = None
        self.loan = 0  # number under which its source keeps blocks for it; 0: none does
        self.move: Move | None = None
        self.stays = False  # a move failed
        self.ready: list[Ready] = []
        self.verified = 0
        self.prefill_done = False
        self.emitted_before = self.emitted
        # Tokens to have in KV before this attempt's first token: the prompt and all output so far.
        self.length = self.prompt_len + self.emitted
        self.reserved_at = self.prefill_started_at = self.transferred_at = self.decoding_at = -1.0

    @property
    def left(self) -> int:
        """Output tokens that may still come."""
        return self.max_tokens - self.emitted

    @property
    def output_to_come(self) -> int:
        """Output tokens of this attempt to book for: as predicted, at most what may come."""
        return min(self.max_tokens - self.emitted_before, self.expected_output)

    @property
    def wants_transfer(self) -> bool:
        """Whether KV must move: not on path local, not for a single token."""
        return self.path == "split" and self.max_tokens - self.emitted_before > 1

    def awaits(self, number: int) -> bool:
        """Whether a timer set for this number still means something; 0: whatever attempt."""
        if number in (0, self.loan) or (self.move is not None and number == self.move.loan):
            return True
        return number == self.attempt and not self.reserved

    @property
    def over(self) -> bool:
        """FINISHED, CANCELLED or REJECTED."""
        return self.phase >= Phase.FINISHED

    @property
    def keep(self) -> int:
        """Leading blocks that its conversation will come back with; 0 where nobody says so."""
        return len(self.hashes) if self.returns else 0

    def blocks(self, block_size: int) -> int:
        """Blocks that hold ``length`` tokens."""
        return -(-self.length // block_size)


class Bound(NamedTuple):  # after Request: compiled, the types of a named tuple are looked up where it stands
    """A placed request that its prefill worker has no memory for yet (policies that bind at arrival)."""

    request: Request
    placement: Placement
    tokens: int  # uncached, by prediction
