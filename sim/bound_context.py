"""Context that lies in a worker's memory, each block counted for one request of a step: what ``K'`` of the bound is.

Those that decode in a step have their context in the memory of its worker; a block that several share lies there once.
So a block may be counted once a step, for whichever of them. A request that is served decodes between its arrival and
the due time of its last token, its *window*; so two with windows that do not overlap are in no step together. (One that
misses may decode at any time, but nothing is counted for it.) Each block is counted for requests of which no two
windows overlap: of all such choices the one with the most decode steps, found from the last to come to the first.

At a lower speed arrivals lie further apart and limits are the same, so windows that do not overlap do not there either:
what is counted at some speed is right for all up to it. What is counted with all arrivals at once is right for any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from twinpool.sim.bound_lines import Floats
from twinpool.sim.bound_misses import Ints
from twinpool.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Contexts:
    """Full blocks of some requests, ``request`` and ``block``: an entry for each of each, by block and arrival."""

    request: Ints  # place among these requests
    block: Ints
    size: float  # tokens of a block
    own: Floats  # prompt tokens behind the last full block, one entry a request

    def counted(self, arrival: Floats, window: Floats, steps: Floats) -> Floats:
        """Prompt tokens that are counted for each of the requests in each of its ``steps``, all before ``window`` is
        over; ``arrival`` is sorted. Rounding does not matter, a step takes longer."""
        n = len(arrival)
        before = np.searchsorted(arrival, arrival + window, side="right")
        places = self.block * (n + 1) + self.request
        after = np.searchsorted(places, self.block * (n + 1) + before[self.request]).tolist()
        weights = steps[self.request].tolist()
        best = [0.0] * (len(weights) + 1)  # steps of the best choice among what begins here and later
        for i in range(len(weights) - 1, -1, -1):  # all blocks in one: what is left of one is the same for all choices
            best[i] = max(best[i + 1], weights[i] + best[after[i]])
        chosen = []
        i = 0
        while i < len(weights):
            if best[i] > best[i + 1]:
                chosen.append(self.request[i])
                i = after[i]
            else:
                i += 1
        return self.own + self.size * np.bincount(np.array(chosen, dtype=np.int64), minlength=n)


def contexts_of(trace: Trace, counted: Ints) -> Contexts:
    """Of the requests ``counted``, in order of arrival."""
    request, block = by_block(trace, counted)
    block = np.asarray(np.unique(block, return_inverse=True)[1], dtype=np.int64)
    full = np.diff(np.asarray(trace.offsets)) * float(trace.block_tokens)
    own = (np.asarray(trace.prompt) - full)[counted]
    return Contexts(np.searchsorted(counted, request), block, float(trace.block_tokens), own)


def by_block(trace: Trace, counted: Ints) -> tuple[Ints, Ints]:
    """(request, hash id) of each full block of the requests ``counted``, sorted by id, then by arrival."""
    offsets = np.asarray(trace.offsets)
    request = np.repeat(np.arange(len(trace)), np.diff(offsets))
    some = np.isin(request, counted)
    request, block = request[some], np.asarray(trace.hashes)[some]
    order = np.lexsort((request, block))
    return request[order], block[order]
