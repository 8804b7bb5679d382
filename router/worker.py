"""The core's picture of one worker: roles, capacity, what is booked there, and when it will be free. Pure.

Bookings are made at decision time, not when load is reported: otherwise a burst herds onto one worker between two
reports. Reports only correct what cannot be booked (free blocks, running batch).
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from twinpool.cost import ITL_SHARE
from twinpool.router.demand import Rate
from twinpool.router.events import WorkerUp
from twinpool.router.line import Commitment, Line
from twinpool.router.pace import Pace
from twinpool.router.request import Bound, Request

FAR_TOKENS: Final = 16384  # position in a prompt at which the seconds of a token are looked up a second time
MEMORY_LIMIT: Final = 0.97  # share of a worker's KV tokens that may be booked


class Beside(NamedTuple):
    """How prompts fare beside the decodes of a worker, in steps as full as their ITL allows."""

    tokens: int  # in such a step, of a prompt's beginning
    load_s: float  # of a step of the decodes alone
    token_s: float  # seconds of prompt for a token at position 0
    token_rise: float  # ... and how much more for each token before it: steps hold fewer, for their attention


class Worker:
    """One worker. ``booked`` counts KV tokens promised to attempts, whatever the worker has allocated so far."""

    __slots__ = (
        "_beside", "attempts", "block_bytes", "block_size", "blocks", "booked", "bound", "bound_s", "capacity",
        "changes", "chunk_tokens", "context", "cost", "decodes", "device", "draining", "fills", "full", "held", "id",
        "index_tokens", "itl_s", "leaves_decode", "limit", "line", "link_busy", "max_batch", "name", "noted", "pace",
        "pending", "prefills", "returns", "roles", "slos", "wanted",
    )  # fmt: skip

    def __init__(self, up: WorkerUp) -> None:
        self.id = up.worker
        self.name = up.name
        self.roles = up.roles
        self.index_tokens = up.index_tokens or up.block_size
        self.blocks = up.blocks
        self.block_size = up.block_size
        self.capacity = up.blocks * up.block_size  # KV tokens
        self.limit = MEMORY_LIMIT * self.capacity  # of them, what may be booked
        self.block_bytes = up.block_bytes
        self.device = up.device
        self.cost = up.cost
        self.pace = Pace()
        self.chunk_tokens = up.chunk_tokens
        self.max_batch = up.max_batch
        self.draining = False
        self.leaves_decode = False  # it is no decode worker any more: sequences that it has go on elsewhere
        self.link_busy = 0.0  # until when KV that was asked for is predicted to be on its link
        self.full = False  # it said NoRoom: nothing new until it reports room, or something there ends
        self.wanted = 0  # KV tokens that it had no room for then
        self.line = Line()  # of prompts to compute
        self.prefills = self.line.prompts  # attempt -> work, in commit order
        self.fills: dict[int, Commitment] = {}  # of the batch class: prompts that give way to all others
        self.returns = Rate()  # of prompts that come here for what is cached, each by the share of it that is
        self.pending = 0  # uncached prompt tokens committed or bound here and not computed, by prediction
        self.bound_s = 0.0  # predicted prefill seconds of ``bound``
        self.bound: deque[Bound] = deque()  # placed here, not sent yet: no memory for it (early binding only)
        self.decodes: dict[int, int] = {}  # attempt -> context tokens when it joined
        self.held: dict[int, int] = {}  # attempt -> booked KV tokens
        self.attempts: dict[int, int] = {}  # attempt -> rid, everything this worker has to do with
        self.booked = 0
        self.context = 0
        self.itl_s: dict[int, float] = {}  # attempt -> SLO of a decoding sequence
        self.slos: dict[float, int] = {}  # how many of them have which
        self._beside: dict[float, Beside] = {}  # ITL SLO -> ..., until other sequences decode here
        self.changes: list[Worker] = []  # the pool's, of workers whose prompts, decodes or bookings changed
        self.noted = False  # it is in there

    def note(self) -> None:
        """Its prompts, decodes or bookings changed."""
        if not self.noted:
            self.noted = True
            self.changes.append(self)

    @property
    def batch(self) -> int:
        """Sequences that decode here or are booked to."""
        return len(self.decodes)

    def prefill_s(self, uncached: int, cached: int) -> float:
        """Predicted seconds of a prompt alone, corrected by what was seen."""
        return self.pace.prefill * self.cost.prefill(uncached, cached, self.chunk_tokens)

    def decode_s(self, batch: int, context: int) -> float:
        """Predicted seconds of a decode step, corrected by what was seen."""
        return self.pace.decode * self.cost.decode(batch, context)

    def chunk_within(self, seconds: float, cached: int) -> int:
        """Prompt tokens that a step beside the present decodes can take within ``seconds``."""
        seconds /= max(self.pace.prefill, self.pace.decode)
        return min(self.chunk_tokens, self.cost.largest_chunk(seconds, cached, self.batch, self.context))

    def beside(self, itl_s: float) -> Beside:
        """See ``Beside``; at least a block goes into a step."""
        itl_s = self.tightest_itl(itl_s)
        beside = self._beside.get(itl_s)
        if beside is None:
            step_s, load_s = ITL_SHARE * itl_s, self.decode_s(self.batch, self.context)
            near = max(self.block_size, self.chunk_within(step_s, 0))
            far = max(self.block_size, self.chunk_within(step_s, FAR_TOKENS))
            step_s = max(step_s, load_s)
            beside = Beside(near, load_s, step_s / near, step_s * (1.0 / far - 1.0 / near) / FAR_TOKENS)
            self._beside[itl_s] = beside
        return beside

    def prompt_s(self, uncached: int, cached: int, itl_s: float) -> float:
        """Predicted seconds of a prompt beside what decodes here, from the next step on."""
        if not self.decodes:
            return self.prefill_s(uncached, cached)
        beside = self.beside(itl_s)
        return beside.load_s + uncached * (beside.token_s + beside.token_rise * (cached + uncached / 2))

    def saw_prefill(self, uncached: int, cached: int, seconds: float) -> None:
        """A prompt that had the worker for itself took so long."""
        predicted = self.cost.prefill(uncached, cached, self.chunk_tokens)
        self.pace.prefill = Pace.blend(self.pace.prefill, seconds, predicted)

    def saw_decode(self, batch: int, context: int, seconds: float) -> None:
        """A step of decodes alone took so long."""
        self.pace.decode = Pace.blend(self.pace.decode, seconds, self.cost.decode(batch, context))

    def free_at(self, now: float) -> float:
        """When the committed prefill work is predicted to end; ``now`` if there is none."""
        return self.line.end(now)

    def begins_by(self, limit: float, now: float, tokens: int, itl_s: float) -> bool:
        """Whether a prompt of so many uncached tokens is predicted to begin until then: behind all others, or in one
        step with those that are next."""
        return self.line.begins_by(limit, now, tokens, self.step_tokens(itl_s))

    def begins(self) -> float:
        """No prompt begins earlier, whatever ``begins_by`` is asked; there must be some in line."""
        return self.line.begins(self.chunk_tokens)

    def free_within(self, horizon: float) -> float:
        """When, without news, a prompt might begin within ``horizon`` seconds; infinity if only news can bring that."""
        return self.line.begins_within(horizon, self.chunk_tokens)

    def step_tokens(self, itl_s: float) -> int:
        """Prompt tokens of a step."""
        return self.beside(itl_s).tokens if self.decodes else self.chunk_tokens

    def _shared_s(self, tokens: int) -> float:
        """Seconds that a prompt takes less for sharing a step with those that are next."""
        behind = self.line.behind
        if self.decodes or behind <= 0 or behind + tokens > self.chunk_tokens:
            return 0.0
        saved = self.prefill_s(behind, 0) + self.prefill_s(tokens, 0) - self.prefill_s(behind + tokens, 0)
        return saved if saved > 0.0 else 0.0

    def commit_prefill(
        self, attempt: int, seconds: float, tokens: int, cached: int, now: float, fills: bool = False
    ) -> None:
        """Predicted work of one prompt joins the end of the line, or (``fills``) what is done beside the line."""
        self.note()
        self.pending += tokens
        if fills:
            self.fills[attempt] = Commitment(seconds, tokens, cached)
            return
        shared_s = self._shared_s(tokens)
        work = Commitment(seconds - shared_s if shared_s < seconds else 0.0, tokens, cached)
        self.line.add(attempt, work, now, self.step_tokens(math.inf))

    def progress(self, attempt: int, left: int, cached: int, pace: float, now: float) -> None:
        """The worker reports ``left`` uncached tokens of a prompt that takes ``pace`` times as long as by its cost."""
        fill = self.fills.get(attempt)
        if fill is not None:
            self.pending += left - fill.tokens
            fill.tokens = left
            fill.cached = cached
        work = self.prefills.get(attempt)
        if work is not None:
            self.note()
            self.pending += left - work.tokens
            work.cached = cached
            if pace == 1.0:
                seconds = self.prefill_s(left, cached)
            else:  # seen of this very prompt: what others were like does not count
                seconds = pace * self.cost.prefill(left, cached, self.chunk_tokens)
            self.line.change(attempt, seconds, left, now, self.step_tokens(math.inf))

    def end_prefill(self, attempt: int, now: float) -> None:
        """The prompt is computed, or nobody wants it any more. Idempotent."""
        fill = self.fills.pop(attempt, None)
        if fill is not None:
            self.note()
            self.pending -= fill.tokens
        if attempt in self.prefills:
            work = self.line.remove(attempt, now, self.step_tokens(math.inf))
            self.note()
            self.pending -= work.tokens

    def carry(self, seconds: float, now: float) -> None:
        """KV that takes its link for so long was asked for; it waits for what was before."""
        self.link_busy = (self.link_busy if self.link_busy > now else now) + seconds

    def bind(self, bound: Bound) -> None:
        """A placed request joins the line of those that wait for memory here."""
        self.bound.append(bound)
        self.pending += bound.tokens
        self.bound_s += bound.placement.seconds

    def unbind(self, request: Request) -> None:
        """Out of the line, if it is in it."""
        for bound in self.bound:
            if bound.request is request:
                self.bound.remove(bound)
                self.pending -= bound.tokens
                self.bound_s = self.bound_s - bound.placement.seconds if self.bound else 0.0
                return

    def book(self, attempt: int, rid: int, tokens: int) -> None:
        """Promise KV room for an attempt, in whole blocks; replaces an earlier promise to the same one."""
        self.note()
        tokens = -(-tokens // self.block_size) * self.block_size
        self.booked += tokens - self.held.get(attempt, 0)
        self.held[attempt] = tokens
        self.attempts[attempt] = rid

    def join_decode(self, attempt: int, context: int, itl_s: float) -> None:
        """A sequence decodes here, or will."""
        self.note()
        self.decodes[attempt] = context
        self.context += context
        self._beside.clear()
        self.itl_s[attempt] = itl_s
        self.slos[itl_s] = self.slos.get(itl_s, 0) + 1

    def grew(self, attempt: int, context: int) -> None:
        """A sequence that decodes here has so many tokens by now. Books nothing."""
        self.context += context - self.decodes[attempt]
        self.decodes[attempt] = context
        self._beside.clear()

    def forget(self, attempt: int, now: float) -> bool:
        """Drop everything of an attempt; whether there was anything. Idempotent."""
        if self.attempts.pop(attempt, None) is None:
            return False
        self.note()
        self.booked -= self.held.pop(attempt, 0)
        context = self.decodes.pop(attempt, None)
        if context is not None:
            self.context -= context
            self._beside.clear()
            self._drop_slo(self.itl_s.pop(attempt))
        self.end_prefill(attempt, now)
        self.full = False
        return True

    def refused(self, tokens: int) -> None:
        """It had no room for so many, whatever was booked: sequences outgrow what was predicted."""
        self.full = True
        self.wanted = tokens

    def reported(self, free: int) -> bool:
        """It has ``free`` blocks; whether it has room again."""
        if not self.full or free * self.block_size < self.wanted:
            return False
        self.full = False
        return True

    def _drop_slo(self, itl_s: float) -> None:
        if self.slos[itl_s] == 1:
            del self.slos[itl_s]
        else:
            self.slos[itl_s] -= 1

    def could_fit(self, tokens: int) -> bool:
        """Whether that many KV tokens could be booked if nothing else was."""
        return tokens <= self.limit

    def fits(self, tokens: int) -> bool:
        """Whether that many more KV tokens may be booked."""
        return not self.full and self.booked + tokens <= self.limit

    def tightest_itl(self, itl_s: float) -> float:
        """The smallest ITL SLO among the sequences here and ``itl_s``."""
        for slo in self.slos:  # a handful of classes
            if slo < itl_s:
                itl_s = slo
        return itl_s

    @property
    def active(self) -> int:
        """Attempts that this worker has a part in, bound ones included."""
        return len(self.attempts) + len(self.bound)

    def check_integrity(self) -> None:
        """Sums match their parts, or AssertionError."""
        assert self.booked == sum(self.held.values()), f"{self.name}: booked {self.booked} != {sum(self.held.values())}"
        assert self.context == sum(self.decodes.values()), f"{self.name}: context {self.context}"
        keys = set(self.attempts)
        for table in (self.held, self.decodes, self.prefills, self.fills, self.itl_s):
            assert set(table) <= keys, f"{self.name}: {set(table) - keys} without an attempt"
        works = [*self.prefills.values(), *self.fills.values()]
        tokens = sum(work.tokens for work in works) + sum(bound.tokens for bound in self.bound)
        assert self.pending == tokens, f"{self.name}: {self.pending} tokens pending, {tokens} committed"
        self.line.check_integrity()
        assert sum(self.slos.values()) == len(self.itl_s), f"{self.name}: {self.slos} for {len(self.itl_s)} sequences"
