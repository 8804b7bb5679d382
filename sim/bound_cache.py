"""What limited KV memory adds to the bound: blocks that no eviction rule can keep until they are wanted again.

Take a served set, and of its requests that have some block two that follow each other, ``i`` and ``j``. The block is in
memory at some time until ``i`` is due, and again at some time after ``j`` came. It was *kept* if it was in memory of
some worker all the time between due time of ``i`` and arrival of ``j``. If not, it has been computed once more, by a
step that starts after ``i`` was due and ends before ``j`` is due, whoever it was computed for. Such steps of one block
are different ones for different pairs, and different from its first: the one of a pair ends before every later request
with the block is due, those of later pairs start after that.

So each pair needs ``tokens`` more prompt work between the two due times, if both are served and its blocks are not
kept. What is kept at a time is at most the KV memory of all workers, each block counted once, as if they shared it. Of
all choices of what to keep, Belady's (1966) included, none saves more than this: with a price ``rate`` on a token kept
for a second, keeping saves a pair no more than ``max(0, work - rate * tokens * time)`` beyond the price, and all prices
together are at most ``rate * memory * horizon``. This holds for any ``rate`` (weak duality); the one is taken at which
the pairs that are worth it fill the memory. What is left as work of the pair is ``min(work, rate * tokens * time)``,
and ``rate * memory * horizon`` may be taken off the sum over any set of pairs.

Only prompt tokens are counted, not their attention: which request's chunk would compute them is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twinpool.sim.bound_context import by_block
from twinpool.sim.bound_lines import Floats
from twinpool.sim.bound_misses import Ints, Pairs
from twinpool.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Reuse:
    """Columns, one entry for each two requests that have blocks one after the other."""

    first: Ints
    second: Ints
    tokens: Floats

    def pairs(
        self, arrival: Floats, limit: Floats, memory: float, token_s: float, stretch: float = 1.0
    ) -> Pairs | None:
        """Work with the requests arriving at ``arrival`` and due ``limit`` seconds later; None: all can be kept.

        ``memory``: KV tokens of all workers. ``token_s``: seconds of a prompt token, divided by the workers.
        ``stretch``: at all speeds from that of ``arrival`` up to so many times it (bound.py): time to keep is shortest
        at the highest, the horizon longest at the lowest.
        """
        start, due = arrival[self.first] + limit[self.first], arrival[self.second] + stretch * limit[self.second]
        apart = arrival[self.second] - arrival[self.first]
        time = np.maximum(0.0, apart / stretch - limit[self.first])
        some = time > 0.0
        if not some.any():
            return None
        capacity = memory * float(arrival[self.second][some].max() - start[some].min())
        order = np.argsort(time, kind="stable")
        kept = np.searchsorted(np.cumsum(self.tokens[order] * time[order]), capacity)
        if kept == len(order):
            return None
        longest = float(time[order[kept]])
        seconds = self.tokens * token_s * np.minimum(1.0, time / longest)
        credit = token_s / longest * capacity
        return Pairs(self.first[some], self.second[some], start[some], due[some], seconds[some], credit)


def reuse_of(trace: Trace, counted: Ints) -> Reuse:
    """Of the requests ``counted``, in order of arrival."""
    n = len(trace)
    request, block = by_block(trace, counted)
    again = (block[1:] == block[:-1]) & (request[1:] != request[:-1])
    pair, blocks = np.unique(request[:-1][again] * n + request[1:][again], return_counts=True)
    return Reuse(pair // n, pair % n, np.asarray(blocks * float(trace.block_tokens)))
