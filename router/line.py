"""Prompts that a worker is to compute, in order: when they will be done, and when one more could begin. Pure.

A worker computes them in steps of so many tokens, several short ones in one. Those at the front whose tokens fit into a
step together are taken to run, from when the first of them was known to begin; what was committed since then waits for
the next step. As long as that has room, one more begins when the running ones end, not behind all.
"""

from __future__ import annotations

import math
from typing import Final

from twinpool.router.request import NOBODY

ROUNDING: Final = 1e-9  # seconds


class Commitment:
    """Prefill work committed to a worker and not finished: predicted seconds left, and of which tokens."""

    __slots__ = ("cached", "seconds", "tokens")

    def __init__(self, seconds: float, tokens: int, cached: int) -> None:
        self.seconds = seconds
        self.tokens = tokens  # uncached, left to compute
        self.cached = cached


class Line:
    """``most`` is always the tokens that a step may hold now."""

    __slots__ = ("prompts", "running", "running_s", "running_tokens", "seconds", "since", "tokens")

    def __init__(self) -> None:
        self.prompts: dict[int, Commitment] = {}  # attempt -> work, in commit order
        self.seconds = 0.0  # of all
        self.tokens = 0
        self.since = 0.0  # when the running ones were last known to have ``running_s`` left
        self.running = 0  # how many of them, from the first
        self.running_s = 0.0
        self.running_tokens = 0

    @property
    def behind(self) -> int:
        """Tokens of those that do not run yet."""
        return self.tokens - self.running_tokens

    def end(self, now: float) -> float:
        """When all are predicted to be done; ``now`` if there is none."""
        if not self.prompts:
            return now
        gone = now - self.since
        left = self.seconds - (gone if gone < self.running_s else self.running_s)
        return now + left if left > 0.0 else now

    def begins_by(self, limit: float, now: float, tokens: int, most: int) -> bool:
        """Whether a prompt of so many tokens would begin until then."""
        if self.end(now) <= limit:
            return True
        return self.since + self.running_s <= limit and self.behind + tokens <= most

    def begins(self, most: int) -> float:
        """When, by what was last known, one token more could begin at the earliest; there must be prompts."""
        return self.since + (self.running_s if self.behind < most else self.seconds)

    def begins_within(self, horizon: float, most: int) -> float:
        """When, without news, a prompt might begin within ``horizon`` seconds; infinity if only news can bring that.

        Unlike ``end`` this does not move while work takes longer than predicted.
        """
        if not self.prompts:
            return math.inf
        if self.behind < most:
            return self.since + self.running_s - horizon
        rest = self.seconds - self.running_s
        return self.since + self.seconds - horizon if rest <= horizon + ROUNDING else math.inf

    def add(self, attempt: int, work: Commitment, now: float, most: int) -> None:
        """Behind all others."""
        first = not self.prompts
        self.prompts[attempt] = work
        self.seconds += work.seconds
        self.tokens += work.tokens
        if first:
            self._begin(now, most)

    def change(self, attempt: int, seconds: float, tokens: int, now: float, most: int) -> None:
        """What is left of one; news of the first one begin a step."""
        work = self.prompts[attempt]
        place = self._place(attempt)
        more_s, more = seconds - work.seconds, tokens - work.tokens
        work.seconds, work.tokens = seconds, tokens
        self.seconds += more_s
        self.tokens += more
        if place == 0:
            self._begin(now, most)
        elif place > 0:
            self.running_s += more_s
            self.running_tokens += more

    def remove(self, attempt: int, now: float, most: int) -> Commitment:
        """It is done, or nobody wants it any more."""
        place = self._place(attempt)
        work = self.prompts.pop(attempt)
        self.tokens -= work.tokens
        self.seconds = self.seconds - work.seconds if self.prompts else 0.0  # no error outlives a quiet moment
        if place == 0:
            self._begin(now, most)
        elif place > 0:
            self.running -= 1
            self.running_s -= work.seconds
            self.running_tokens -= work.tokens
        return work

    def _begin(self, now: float, most: int) -> None:
        """The first begins a step, with all behind it that fit in."""
        self.since = now
        self.running, self.running_s, self.running_tokens = 0, 0.0, 0
        for work in self.prompts.values():
            if self.running and self.running_tokens + work.tokens > most:
                break
            self.running += 1
            self.running_s += work.seconds
            self.running_tokens += work.tokens

    def _place(self, attempt: int) -> int:
        """Which of the running ones it is, from 0; ``NOBODY``: none."""
        for place, other in enumerate(self.prompts):
            if place == self.running:
                break
            if other == attempt:
                return place
        return NOBODY

    def check_integrity(self) -> None:
        """Sums match their parts, or AssertionError."""
        works = list(self.prompts.values())
        tokens, seconds = sum(work.tokens for work in works), sum(work.seconds for work in works)
        assert self.tokens == tokens, f"{self.tokens} tokens in line, {tokens} committed"
        assert abs(self.seconds - seconds) < 1e-6, f"{self.seconds} s of work, {seconds} committed"
        assert (self.running > 0) == bool(works), f"{self.running} of {len(works)} prompts run"
        running = sum(work.tokens for work in works[: self.running])
        assert self.running_tokens == running, f"{self.running_tokens} tokens run, not {running}"
