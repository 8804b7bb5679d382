"""Whose gaps are whose: spans of a worker's runs, and what becomes of them where sequences take turns.

Normally all that decode are in every step, so a gap of one is a gap of all and a request's gaps are a range of runs.
Where more decode than a step may hold (``max_batch``), the first of them are in the step and go to the end of the line.
A sequence's gap then covers steps it had no part in, so each gap is a run and a span of its own until everybody has
drawn a token at the same boundary again.
"""

from __future__ import annotations

from twinpool.sim.decode import Batch
from twinpool.sim.net import Net
from twinpool.sim.sequence import RUNNING, Sequence


class Seats:
    """See the module's docstring. ``chosen``: who is in the step, while ``crowded``."""

    __slots__ = ("_batch", "_id", "_net", "_rest", "chosen", "crowded")

    def __init__(self, id: int, net: Net, batch: Batch) -> None:
        self._id = id
        self._net = net
        self._batch = batch
        self.crowded = False
        self.chosen: list[Sequence] = []
        self._rest: list[Sequence] = []

    def first_token(self, sequence: Sequence) -> None:
        """It has drawn its first token here, at the boundary: gaps come after that."""
        batch = self._batch
        sequence.fresh = False
        batch.felt += 1
        sequence.last_s = batch.start
        if not self.crowded:
            sequence.low = len(batch.runs.count)

    def close(self, sequence: Sequence) -> None:
        """Its gaps end with the last run."""
        high = len(self._batch.runs.count)
        if 0 <= sequence.low < high:
            self._net.span(sequence.request, self._id, sequence.low, high)
        sequence.low = -1

    def decodes(self, sequence: Sequence) -> bool:
        """Whether a running sequence is in the step that runs."""
        return not self.crowded or sequence in self.chosen

    def take_turns(self, running: dict[int, Sequence], max_batch: int, turn: int) -> int:
        """Chooses who is in the step that begins now; returns the next free turn after ``turn``."""
        batch = self._batch
        everyone = list(running.values())
        rest = everyone[max_batch:]
        if not rest and all(s.fresh or s.low >= 0 or s.last_s == batch.start for s in everyone):
            self.crowded = False
            for sequence in everyone:
                if not sequence.fresh and sequence.low < 0:
                    sequence.low = len(batch.runs.count)
            return turn
        self.crowded = True
        self.chosen = everyone[:max_batch]
        for sequence in everyone:
            if sequence.low >= 0:
                self.close(sequence)
                sequence.last_s = batch.start
        self._rest = rest
        for sequence in rest:
            batch.skip_growth(sequence)
        for sequence in self.chosen if rest else ():
            sequence.turn = turn
            turn += 1
            del running[sequence.attempt]
            running[sequence.attempt] = sequence
        return turn

    def advance(self, seconds: float) -> None:
        """The step of those chosen is over."""
        batch, runs = self._batch, self._batch.runs
        here = [sequence for sequence in self.chosen if sequence.state == RUNNING]
        batch.advance_by(seconds, len(here), 0)
        for sequence in self._rest:
            if sequence.state == RUNNING:
                batch.sat_out(sequence)
        for sequence in here:
            if not sequence.fresh:
                run = len(runs.count)
                runs.add(batch.start - sequence.last_s, 0.0, 1, 1)
                self._net.span(sequence.request, self._id, run, run + 1)
                sequence.last_s = batch.start
