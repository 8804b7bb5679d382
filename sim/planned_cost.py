"""Steps that last longer than whoever plans them thinks.

A live worker fills a step with prompt tokens until *its own* cost says that the ITL SLO is used up, and the router
plans by the same cost (the worker's Hello). What the step then takes on top (the loop around the engine, sending
tokens) is in the step log, not in that cost: full steps end later than planned. Where that is so much that it is news
(``workers/pace.py``) the worker takes it for the prompt's own, and cuts its next chunk by it.
"""

from __future__ import annotations

from collections.abc import Iterable

from twinpool.cost import Cost, DecodeRow


class PlannedCost:
    """``Cost`` of a worker: how long steps last is of ``true``, how many tokens fit into one of ``planned``."""

    __slots__ = ("_true", "planned")

    def __init__(self, true: Cost, planned: Cost) -> None:
        self._true = true
        self.planned = planned

    def step(self, chunks: Iterable[tuple[int, int]], batch: int, context: int) -> float:
        """See ``Cost``; true."""
        return self._true.step(chunks, batch, context)

    def decode(self, batch: int, context: int) -> float:
        """See ``Cost``; true."""
        return self._true.decode(batch, context)

    def row(self, batch: int) -> DecodeRow:
        """See ``Cost``; true."""
        return self._true.row(batch)

    def prefill(self, uncached: int, cached: int, chunk: int) -> float:
        """See ``Cost``; planned."""
        return self.planned.prefill(uncached, cached, chunk)

    def attention(self, tokens: int, cached: int) -> float:
        """See ``Cost``; planned."""
        return self.planned.attention(tokens, cached)

    def largest_chunk(self, seconds: float, cached: int, batch: int, context: int, tokens: int = 0) -> int:
        """See ``Cost``; planned."""
        return self.planned.largest_chunk(seconds, cached, batch, context, tokens)
