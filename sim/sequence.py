"""One attempt of one request on an emulated worker: numbers instead of tables.

Steps of a worker are counted. A running sequence draws a token in each, so it is enough to know the step it joined at
and the step after which it has ended: nothing of it is touched in between.
"""

from __future__ import annotations

from typing import Final

from twinpool.router.request import Request

WAITING: Final = 0
HELD: Final = 1
RUNNING: Final = 2
GONE: Final = 3
NEVER: Final = 1 << 61  # a step that does not come


class Sequence:
    """See the module's docstring. Blocks and tokens are counts, times seconds, steps numbers of the worker's steps."""

    __slots__ = (
        "announced", "attempt", "blocks", "cached", "computed", "early", "end", "expects_decode", "fresh", "full",
        "growing", "grows", "hashes", "in_step", "itl_s", "join", "last_s", "left", "length", "lent", "local", "low",
        "misjudged", "order", "pace", "prompt_len", "rank", "received", "request", "reusable", "sealed", "state",
        "step_s", "told", "transfer", "turn", "warned", "work",
    )  # fmt: skip

    def __init__(self, attempt: int, request: Request, length: int, state: int) -> None:
        self.attempt = attempt
        self.request = request
        self.hashes: list[int] = request.hashes  # of the leading units; of what follows nobody knows any
        self.itl_s: float = request.itl_s
        self.rank: int = request.rank
        self.state = state
        self.length = length  # tokens known when it came, later when it joined the decoding ones
        self.order = 0  # of joining this worker
        # blocks
        self.blocks = 0  # it has so many; without the growth that is not counted yet
        self.full = 0  # leading ones whose KV is final: sealed units and anonymous blocks
        self.sealed = 0  # leading units in the prefix cache
        # a prompt to compute
        self.prompt_len = length
        self.computed = 0
        self.cached = 0
        self.announced = 0  # blocks
        self.step_s = 0.0
        self.local = False
        self.transfer = False
        self.misjudged = False  # the router predicted another cached prefix, and has not heard yet
        self.work = 1.0  # its prompt work takes so many times as long as predicted
        self.pace = 1.0  # ... and, as far as the worker has seen, so many times
        self.in_step = False  # a chunk of it is computed right now
        # a reservation
        self.reusable = 0  # units that may enter the cache while it is received
        self.received = 0  # leading blocks that are here and verified
        self.early: list[tuple[int, int]] = []  # ranges that came before one in front of them
        self.expects_decode = False
        self.lent = False  # held for another worker, which pulls it
        # decoding
        self.left = 0  # tokens to draw here
        self.told = 0  # of those drawn since it joined, how many the router knows of
        self.fresh = False  # has not drawn a token here
        self.join = NEVER  # step
        self.end = NEVER  # step
        self.turn = 0  # order among those that decode
        self.grows = NEVER  # step at whose plan it first needs a block more than it has
        self.growing = False  # that step was planned
        self.warned = False  # the router has heard that it may be preempted
        self.low = -1  # its gaps begin with this run; -1: they are in no span
        self.last_s = 0.0  # time of its last token, where gaps are counted one by one
