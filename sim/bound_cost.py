"""The least a step can take, as a sum over what is in it: how the bound counts machine seconds.

A step with ``x`` prompt tokens in chunks and ``B`` sequences that decode with ``K`` context tokens takes, for both cost
models, at least ``W(x + B) + R(B, K) + sum of A(chunk)`` (``+ h`` with chunks), none of them falling. A ``Floor`` is a
set of rates with

    T_step >= sum over prompt tokens of (token + more + place * (position + 1/2)) - sum over last chunks of lost
              + sequence * B + context * K + alone * K'

where ``K'`` are context tokens with each block counted for one of its requests only (bound_context.py). Everything is
additive and no term of what is left out is negative, so what requests need can be added up, however steps are filled
and whoever computes what.

Each part is held from below by a straight line: ``W(y) >= pledge + const + token * y``,
``(A(x, c) + pledge) / x >= more + place * (c + x/2)``, ``R(B, K) / B >= alpha + context * K / B``. ``alpha`` may be
negative, ``token + alpha`` not. Any line under all points is valid; the one that is highest at the mean of the traffic
is taken.

``pledge``: attention of short chunks costs next to nothing, as measured, so without it ``place`` would be 0. A step has
at most one chunk that does not end its prompt (workers/chunks.py); the pledge of the step makes up for what A of that
one is short of the line. In a chunk that ends its prompt ``attention`` is short by at most ``lost``, once for each
request that may have computed the tokens: its own, and those that share the first block it brings (ids are chained, so
who shares a later block shares that one too). ``lost`` is taken off for each of them, down to no attention at all.

``const`` is paid once a step, and 1 is at least ``x / chunk_tokens``, ``B / max_batch`` and ``K' / kv_tokens`` (all of
``K'`` lies in memory at once), so ``const`` times one of these three may be charged instead. Of all ways
the one that makes most of the traffic is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from twinpool.cost import Cost
from twinpool.sim.bound_lines import Attention, Floats, Line, line_below, reading, work

PLEDGES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of the least step
LATENCY_SIZES = 6  # chunk sizes at which lines are tried


@dataclass(frozen=True, slots=True)
class Engine:
    """What bounds a step of one worker; ``kv_tokens`` 0: unknown, taken as infinite."""

    chunk_tokens: int = 2048
    max_batch: int = 256
    kv_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Amounts:
    """What steps have to do. Columns, one entry a request."""

    length: Floats  # of the prompt
    tokens: Floats  # prompt tokens to compute
    places: Floats  # sum of position + 1/2 over them
    sharers: Floats  # requests, itself too, whose chunks may compute some of them
    sequences: Floats  # decode steps that must have the request in their batch
    contexts: Floats  # its context tokens, summed over these steps
    alones: Floats  # of these, the ones that no other request of the same step counts


@dataclass(frozen=True, slots=True)
class Floor:
    """Rates in seconds; see the module's docstring. ``chunks`` knows what is lost."""

    token: float
    line: Line  # more, place
    sequence: float
    context: float
    alone: float
    chunks: Attention

    def prefill(self, need: Amounts) -> Floats:
        """Seconds of the prompt tokens."""
        lost = need.sharers * self.chunks.lost(self.line, need.length)
        attended = self.line.const * need.tokens + self.line.slope * need.places
        return np.asarray(self.token * need.tokens + np.maximum(0.0, attended - lost))

    def decode(self, need: Amounts) -> Floats:
        """Seconds of the decode steps."""
        return self.sequence * need.sequences + self.context * need.contexts + self.alone * need.alones


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all requests that lines are drawn for, and how many tokens a step can have."""

    tokens: float
    places: float
    sequences: float
    contexts: float
    alones: float
    largest: int


class Work(NamedTuple):
    """Seconds of each request's prompt tokens and decode steps, and of one prompt token more without its attention."""

    prefill: Floats
    decode: Floats
    token: float


def _most(found: list[Work]) -> Work:
    """That with the largest sum."""
    return max(found, key=lambda work: float(work.prefill.sum() + work.decode.sum()))


class Shape:
    """The parts of a cost model, sampled once; draws floors for some traffic."""

    def __init__(self, cost: Cost, engine: Engine, longest: int) -> None:
        """``longest``: tokens of the longest request, prompt and output."""
        self.engine = engine
        self._work = work(cost, engine.chunk_tokens + engine.max_batch)
        self._sizes = np.arange(1.0, len(self._work) + 1.0)
        self._chunks = Attention(cost, engine.chunk_tokens, longest)
        self._contexts, self._reading = reading(cost, self._work, engine.max_batch, longest)

    def prefill(self, need: Amounts) -> Work:
        """Of prompt tokens alone; what decodes in the same steps never makes them cheaper."""
        totals = Totals(float(need.tokens.sum()), float(need.places.sum()), 0.0, 0.0, 0.0, self.engine.chunk_tokens)
        nothing = np.zeros_like(need.tokens)
        found = [Work(floor.prefill(need), nothing, floor.token) for floor in self._floors(totals)]
        return _most([Work(nothing, nothing, 0.0), *found])

    def decode(self, need: Amounts) -> Work:
        """Of decode steps alone, whatever chunks they carry."""
        steps = float(need.sequences.sum())
        totals = Totals(0.0, 0.0, steps, float(need.contexts.sum()), float(need.alones.sum()), self.engine.max_batch)
        nothing = np.zeros_like(need.tokens)
        found = [Work(nothing, floor.decode(need), 0.0) for floor in self._floors(totals)]
        return _most([Work(nothing, nothing, 0.0), *found])

    def mixed(self, need: Amounts) -> Work:
        """Both, in seconds that may be added up."""
        columns = (need.tokens, need.places, need.sequences, need.contexts, need.alones)
        tokens, places, steps, contexts, alones = [float(column.sum()) for column in columns]
        largest = self.engine.chunk_tokens + self.engine.max_batch
        totals = Totals(tokens, places, steps, contexts, alones, largest)
        nothing = np.zeros_like(need.tokens)
        found = [Work(floor.prefill(need), floor.decode(need), floor.token) for floor in self._floors(totals)]
        return _most([Work(nothing, nothing, 0.0), *found])

    def latency(self, tokens: Floats, places: Floats) -> Floats:
        """Seconds, at least, from the start of the first to the end of the last step that computes some tokens of one
        prompt: nothing of a prompt is computed beside what comes before it, so its steps follow each other."""
        chunk = self.engine.chunk_tokens
        sizes, seconds = self._sizes[:chunk], self._work[:chunk]
        steps = np.ceil(tokens / chunk)
        best = np.zeros_like(tokens)
        for share in PLEDGES:  # each of these steps has one chunk of the prompt, and so a pledge for it
            pledge = share * float(seconds[0])
            line = self._chunks.line(float(places.sum() / max(1.0, tokens.sum())), pledge)
            attended = line.const * tokens + line.slope * places
            for at in np.unique(np.clip(np.geomspace(1, chunk, LATENCY_SIZES).round(), 1, chunk)):
                shared = line_below(sizes, seconds - pledge, float(at))
                np.maximum(best, attended + shared.const * steps + shared.slope * tokens, out=best)
        return best

    def _floors(self, totals: Totals) -> Iterator[Floor]:
        """All ways to charge what is paid once a step."""
        engine = self.engine
        ways = [("token", totals.tokens, engine.chunk_tokens), ("sequence", totals.sequences, engine.max_batch)]
        if engine.kv_tokens:
            ways.append(("alone", totals.alones, engine.kv_tokens))
        lines = [(0.0, Line(0.0, 0.0))]
        if totals.tokens:
            pledges = [share * float(self._work[0]) for share in PLEDGES]
            lines = [(pledge, self._chunks.line(totals.places / totals.tokens, pledge)) for pledge in pledges]
        for what, amount, most in ways:
            for pledge, line in lines if amount else ():
                yield self._floor(totals, what, amount / most, most, pledge, line)

    def _floor(self, totals: Totals, what: str, steps: float, most: int, pledge: float, line: Line) -> Floor:
        """Rates where ``const`` is charged to ``what``, of which a step has at most ``most``."""
        sizes, seconds = self._sizes[: totals.largest], self._work[: totals.largest] - pledge
        shared = line_below(sizes, seconds, (totals.tokens + totals.sequences) / steps)
        read = line_below(self._contexts, self._reading, totals.contexts / max(1.0, totals.sequences), shared.slope)
        part = {what: shared.const / most}
        return Floor(
            token=shared.slope + part.get("token", 0.0),
            line=line,
            sequence=shared.slope + read.const + part.get("sequence", 0.0),
            context=read.slope,
            alone=part.get("alone", 0.0),
            chunks=self._chunks,
        )
