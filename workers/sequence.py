"""What the scheduler keeps and hands out: sequences, what is held for others, steps and their outcome."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple


class Mode(enum.IntEnum):
    """What a worker does with a sequence."""

    PREFILL = 0  # compute the prompt, draw one token, hold the blocks
    LOCAL = 1  # compute the prompt, then decode here
    DECODE = 2  # all but the last token's KV is here: decode


@dataclass(slots=True, eq=False)
class Sequence:
    """One attempt of one request on this worker. The worker makes it; the scheduler changes all but the first group.

    Positions 0 to ``computed - 1`` have their KV in ``table``. ``hashes`` are those of all full blocks known: the
    prompt's when the sequence is added, later ones appended by the worker as output fills blocks (at the latest before
    ``finish``), which puts output into the prefix cache too.
    """

    attempt: int
    length: int  # tokens known: prompt, then output; grows by one with each token drawn
    hashes: list[int]
    mode: Mode
    itl_s: float  # SLO that bounds the steps it decodes in; inf: none
    rank: int = 0  # class: 0 realtime, 1 streaming, 2 batch
    transfer: bool = False  # PREFILL: announce finished blocks
    payload: object | None = None  # the worker's own data, never looked at
    keep: int = 0  # leading blocks that will be asked for again: its conversation is to come back

    prompt_len: int = field(init=False)  # tokens to compute before the first one is drawn
    computed: int = field(default=0, init=False)
    cached: int = field(default=0, init=False)  # tokens of the prompt found in the cache
    table: list[int] = field(default_factory=list, init=False)
    sealed: int = field(default=0, init=False)  # leading blocks in the prefix cache
    announced: int = field(default=0, init=False)  # leading blocks reported by Ready
    order: int = field(default=0, init=False)  # of joining this worker
    added_s: float = field(default=0.0, init=False)  # when it joined
    step_s: float = field(default=0.0, init=False)  # seconds of the steps it was in, summed
    pace: float = field(default=1.0, init=False)  # its prompt takes so many times as long as predicted (pace.py)
    in_step: bool = field(default=False, init=False)
    cancelled: bool = field(default=False, init=False)
    warned: bool = field(default=False, init=False)  # the router has heard that it may be preempted

    def __post_init__(self) -> None:
        self.prompt_len = self.length


@dataclass(slots=True, eq=False)
class Holding:
    """Blocks kept for an attempt that is not in the scheduler's steps: reserved for one to come, or computed and held.

    The first ``received`` blocks have verified KV, the first ``sealed`` are in the prefix cache; ``early`` are blocks
    that were received before one in front of them.
    """

    attempt: int
    table: list[int]
    hashes: list[int]
    received: int
    sealed: int
    keep: int = 0  # see Sequence
    early: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Chunk:
    """Prompt tokens ``start`` to ``start + count - 1`` of a sequence; after the ``last`` chunk a token is drawn."""

    sequence: Sequence
    start: int
    count: int
    last: bool


@dataclass(slots=True, eq=False)
class Step:
    """What to compute next, chunks before decodes. Borrowed until ``done``; without either there is nothing to run.

    ``preempted`` sequences are gone: out of blocks while decoding. Report them, then go on with ``done`` as ever.
    """

    chunks: list[Chunk]
    decodes: list[Sequence]
    preempted: list[Sequence]
    warned: list[Sequence]  # of them the router is to hear: see preemption.py
    predicted_s: float  # by the cost
    alone_s: float  # of them those of the decodes by themselves
    pace: float  # of the chunks together: they are expected to take so many times as long as predicted
    started_s: float  # the ``now`` of the plan


class Ready(NamedTuple):
    """Blocks ``first``.. of a sequence are final in this pool, at indices ``blocks``; the last may be partly filled."""

    sequence: Sequence
    first: int
    blocks: list[int]


class Outcome(NamedTuple):
    """What one step did; cancelled sequences are in none of the lists."""

    progressed: list[Sequence]  # prompt tokens computed
    ready: list[Ready]  # blocks to announce
    sampled: list[Sequence]  # drew a token (``length`` counts it): last chunks, then decodes, in the step's order
    step_s: float
    news: bool  # it took longer or shorter than expected


class Load(NamedTuple):
    """What a worker reports of itself; blocks and tokens."""

    running: int  # sequences that decode
    waiting: int  # sequences with prompt tokens to compute
    context: int  # tokens of the decoding sequences together
    free: int
    cached: int
