"""The seam for scheduling policies: pure functions over the core's picture, the same live and simulated.

Every decision compares predicted seconds. A policy never changes what it looks at; the core books what it answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from twinpool.router.demand import Demand
from twinpool.router.kv_index import KvIndex, Stair
from twinpool.router.policy.orders import Orders
from twinpool.router.pool import Pool
from twinpool.router.request import NOBODY, Placement, Request
from twinpool.router.worker import Worker


class View:
    """What a policy may look at (borrowed, read-only)."""

    __slots__ = ("bytes_per_s", "commit_round_trip_s", "demand", "index", "mean_output", "orders", "pool", "unhomed")

    def __init__(
        self, pool: Pool, index: KvIndex, commit_round_trip_s: float, mean_output: float, bytes_per_s: float = 1e9,
        orders: Orders | None = None, unhomed: Mapping[int, Request] | None = None,
        demand: Demand | None = None,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.index = index
        self.commit_round_trip_s = commit_round_trip_s
        self.mean_output = mean_output  # tokens of an answer of late
        self.bytes_per_s = bytes_per_s  # of KV between two workers, running mean
        self.orders = orders  # of a large pool: refresh before use
        self.demand = Demand() if demand is None else demand
        self.unhomed = {} if unhomed is None else unhomed  # whose KV has no decode worker yet


class Refusal(NamedTuple):
    """The policy will not serve the request."""

    message: str
    retry_s: float
    reason: str = "POLICY"


class Passed(NamedTuple):
    """No worker for this request now, though others may be placed before it.

    ``late_s`` above 0: its first token cannot come in time any more, by so many seconds at least. Then all that can be
    in time go first from now on.
    """

    late_s: float = 0.0


def cached_tokens(worker: Worker, length: int, stairs: list[Stair]) -> int:
    """Prompt tokens predicted to be cached at a worker, of ``length``; the last token is always computed."""
    bit = 1 << worker.id
    for stair in stairs:
        if stair.mask & bit:
            size = worker.index_tokens
            return min(stair.depth * size, (length - 1) // size * size)
    return 0


class Policy(Protocol):
    """Decides for a cell."""

    name: str
    early: bool  # binds at arrival: what it places is sent in order of arrival, as soon as its worker has memory
    by_deadline: bool  # who waits goes in order of deadline alone, however much time is left (admission.py)
    rebalances: bool  # sequences go on elsewhere before memory runs out where they decode

    def on_room(self, request: Request, view: View, now: float) -> Placement | Refusal | Passed | None:
        """Place the next in order; None = no worker has room for anybody, ask again when something changes."""
        ...

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """A decode worker for a request whose KV waits at its prefill worker; NOBODY = none has room."""
        ...

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """Alternatives, each a set of pools that can serve the request together."""
        ...

    def next_room(self, view: View, now: float) -> float:
        """When a worker is predicted to have room by itself (infinity: only an event can make some)."""
        ...


__all__ = ["NOBODY", "Passed", "Placement", "Policy", "Refusal", "View", "cached_tokens"]
