"""What a cell takes besides its steps, from the router's request log: messages, the router itself, transfers.

All are what the simulator's own timeline (``loop.py``, ``worker.py``) lacks without them, of requests of one attempt::

    latency_s   (reserved - placed) / 2: a reservation needs nothing but its two messages
    edge_s      first - placed - (reserved - placed) - compute - 2 latency, of prompts whose worker did nothing else
    setup_s, link_bytes_per_s
                transferred - first - 2 latency = setup + bytes / rate, over the bytes of a prompt's last chunk: those
                before it move while the prompt is computed

Each is a median (the last a median of slopes: Theil, 1950; Sen, 1968), so some slow requests change nothing. What is
outside of the router's core (a caller's network, gRPC, the tokenizer) is not in its log: only clients can tell. Then

    outside_s   the client's time to the first token - the router's, which every answer says

is a part of edge_s, too, and how single requests differ from that median is told as quantiles: of times that wait for
one another in a router the tail is long.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from twinpool.sim.calibrate_logs import ClientTime, LoggedRequest
from twinpool.sim.profiles import Edge

ENOUGH = 10  # requests without which nothing is said
QUANTILES = 64  # of what is outside, evenly spaced
MOST_POINTS = 400  # transfers whose slopes are compared: 80,000 pairs
CLEAR = 3.0  # the bytes must explain so many times the scatter of transfer times, or their rate is not told


class Measured(NamedTuple):
    """A figure, from how many requests, their 10th and 90th percentile; ``value`` None: why not, in ``note``."""

    value: float | None
    requests: int = 0
    low: float = 0.0
    high: float = 0.0
    note: str = ""


NO_CLIENTS = Measured(None, note="no times of clients were given")


@dataclass(frozen=True, slots=True)
class EdgeFound:
    """Seconds, and bytes a second of a link."""

    latency_s: Measured
    edge_s: Measured
    setup_s: Measured
    link_bytes_per_s: Measured
    requests: int
    outside_s: Measured = NO_CLIENTS  # a part of edge_s
    spread_s: tuple[float, ...] = ()  # quantiles of what is outside, less their median

    def edge(self) -> Edge:
        """What a profile holds of it."""
        rounded = [None if m.value is None else float(f"{m.value:.6g}") for m in self._times()]
        least_s = -(rounded[1] or 0.0)  # no token comes before it is drawn
        spread = tuple(max(least_s, float(f"{value:.6g}")) for value in self.spread_s)
        return Edge(latency_s=rounded[0], edge_s=rounded[1], setup_s=rounded[2], edge_spread_s=spread)

    def _times(self) -> tuple[Measured, Measured, Measured]:
        return self.latency_s, self.edge_s, self.setup_s

    def text(self) -> str:
        """Where the figures of a profile are from."""
        return f"medians of {self.requests} requests of the router's log, twinpool sim calibrate"

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        names = ("latency_s", "edge_s", "outside_s", "setup_s", "link_bytes_per_s")
        return {name: getattr(self, name)._asdict() for name in names} | {"requests": self.requests}


def measure_edge(
    log: Sequence[LoggedRequest],
    *,
    chunk_tokens: int,
    kv_bytes_per_token: float | None,
    clients: Sequence[ClientTime] = (),
) -> EdgeFound:
    """What the requests of a log say. ``chunk_tokens``: most prompt tokens in a step of their workers."""
    once = [request for request in log if request.attempts == 1]
    latency = _latency(once)
    one_way = latency.value or 0.0
    setup, rate = _transfers(once, one_way, chunk_tokens, kv_bytes_per_token)
    outside = _median([client.outside_s for client in clients], "times of clients") if clients else NO_CLIENTS
    overhead = _overhead(log, one_way, outside.value or 0.0)
    if overhead.value is None and outside.value is not None:
        overhead = outside._replace(note=f"what is outside of the router alone, for {overhead.note}")
    return EdgeFound(latency, overhead, setup, rate, len(log), outside, _spread(clients))


def _spread(clients: Sequence[ClientTime]) -> tuple[float, ...]:
    """Quantiles (i + 0.5) / QUANTILES of what is outside, less the median; none of few clients."""
    values = np.array([client.outside_s for client in clients])
    if len(values) < QUANTILES:
        return ()
    found = np.quantile(values, (np.arange(QUANTILES) + 0.5) / QUANTILES) - np.median(values)
    return tuple(found.tolist())


def _median(values: list[float], what: str, *, note: str = "") -> Measured:
    if len(values) < ENOUGH:
        return Measured(None, len(values), note=f"{len(values)} {what}; {ENOUGH} are wanted")
    low, high = np.quantile(values, (0.1, 0.9))
    return Measured(max(0.0, statistics.median(values)), len(values), float(low), float(high), note)


def _latency(once: list[LoggedRequest]) -> Measured:
    trips = [
        (request.edges["reserved"] - request.edges["placed"]) / 2.0
        for request in once
        if request.path == "split" and {"placed", "reserved"} <= request.edges.keys() and _room_at_once(request)
    ]
    return _median(trips, "requests whose KV moved and that found room at once")


def _room_at_once(request: LoggedRequest) -> bool:
    """Its decode worker was asked when it was placed: the prompt began when the answer came."""
    return abs(request.edges["reserved"] - request.edges.get("prefill", -1.0)) < 1e-4


def _overhead(log: Sequence[LoggedRequest], one_way: float, outside: float) -> Measured:
    """Of prompts that had their worker to themselves, and what is outside of the router."""
    alone = _alone(log)
    spent = [
        outside + request.edges["first"] - request.edges["prefill"] - request.compute_s - 2.0 * one_way
        for request, is_alone in zip(log, alone, strict=True)
        if is_alone and request.attempts == 1 and "prefill" in request.edges
    ]
    return _median(spent, "prompts had their worker to themselves: log some at low load")


def _alone(log: Sequence[LoggedRequest]) -> list[bool]:
    """Whether nothing else was computed at a request's prefill worker from its start there to its first token."""
    spans: dict[str, list[tuple[float, float, int]]] = {}  # worker -> (start, end, request)
    for index, request in enumerate(log):
        edges, ended = request.edges, request.edges.get("ended", float("inf"))
        start = request.arrival + edges.get("prefill", edges.get("placed", 0.0))
        if request.path == "local":
            spans.setdefault(request.prefill, []).append((start, request.arrival + ended, index))
            continue
        spans.setdefault(request.prefill, []).append((start, request.arrival + edges["first"], index))
        if request.decode:
            joined = edges.get("transferred", edges["first"])
            spans.setdefault(request.decode, []).append((request.arrival + joined, request.arrival + ended, -1))
    alone = [False] * len(log)
    for places in spans.values():
        places.sort()
        busy_until = -float("inf")
        for (start, end, index), (following, _, _) in itertools.zip_longest(
            places, places[1:], fillvalue=(float("inf"), 0.0, -1)
        ):
            if index >= 0:
                first = log[index].arrival + log[index].edges["first"]
                alone[index] = busy_until <= start and following >= first
            busy_until = max(busy_until, end)
    return alone


def _transfers(
    once: list[LoggedRequest], one_way: float, chunk_tokens: int, kv_bytes_per_token: float | None
) -> tuple[Measured, Measured]:
    """Set-up and rate."""
    points = []
    for request in once:
        edges = request.edges
        if request.kv_bytes and "transferred" in edges and edges.get("reserved", float("inf")) <= edges["first"]:
            taken = edges["transferred"] - edges["first"] - 2.0 * one_way
            points.append((_last_bytes(request, chunk_tokens, kv_bytes_per_token), taken))
    if len(points) < ENOUGH:
        why = Measured(None, len(points), note=f"{len(points)} requests had KV to move; {ENOUGH} are wanted")
        return why, why
    few = points[:: -(-len(points) // MOST_POINTS)]
    slope = _slope(few)
    rest = [taken - slope * nbytes for nbytes, taken in points]
    setup = _median(rest, "transfers")
    scatter = statistics.median([abs(value - statistics.median(rest)) for value in rest])
    low, high = np.quantile([nbytes for nbytes, _ in points], (0.1, 0.9))
    if slope <= 0.0 or slope * (high - low) < CLEAR * scatter:
        note = "the transfers are too small, or too alike, to tell the rate from the set-up"
        return _median([taken for _, taken in points], "transfers", note="rate not told apart"), Measured(
            None, len(points), note=note
        )
    return setup, Measured(1.0 / slope, len(points), 1.0 / slope, 1.0 / slope)


def _last_bytes(request: LoggedRequest, chunk_tokens: int, kv_bytes_per_token: float | None) -> float:
    """Bytes that can move only after the last chunk: of whole blocks."""
    uncached = max(1, request.prompt_tokens - request.cached_tokens)
    last, size = (uncached - 1) % chunk_tokens + 1, max(1, request.block_tokens)
    tokens = -(-request.prompt_tokens // size) * size - (request.prompt_tokens - last) // size * size
    per_token = kv_bytes_per_token or request.kv_bytes / request.prompt_tokens
    return min(float(request.kv_bytes), tokens * per_token)


def _slope(points: list[tuple[float, float]]) -> float:
    """Median slope over all pairs that differ in bytes; 0 where none do."""
    x, y = np.array([point[0] for point in points]), np.array([point[1] for point in points])
    first, second = np.triu_indices(len(points), 1)
    run = x[second] - x[first]
    apart = np.abs(run) > 0.0
    return float(np.median((y[second] - y[first])[apart] / run[apart])) if apart.any() else 0.0
