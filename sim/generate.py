"""Synthetic traffic with the shapes of the public traces, from a seed.

A *session* is one conversation: turns that follow each other in a closed loop. Sessions begin by an open process; turn
k + 1 begins a think time after turn k has *ended*, which only a simulation can tell, so its ``arrival`` here is the
lower bound (as if serving took no time). A prompt is::

    turn 1:      shared prefix (one of a few, popular ones more often) + first text
    turn k + 1:  prompt of turn k + its output + new text           (chat, long, agentic)
                 prompt of turn k up to the edited place + new text  (code; edits are more likely late in the prompt)

and its hash ids say so: equal ids are equal blocks with equal prefixes. All lengths are lognormal, given by median and
mean (mu = ln median, sigma = sqrt(2 ln(mean / median))), cut to a range. Numbers of turns are geometric.

Starts of sessions, all with the same mean rate:

- poisson: exponential gaps.
- gamma: gamma gaps with a coefficient of variation ``cv`` (shape 1 / cv**2); cv 2 to 4 is bursty.
- onoff: a Poisson process whose rate is three times the mean in bursts (exponential, mean 10 s) and a third of it
  between them (exponential, mean 30 s): a two-state Markov-modulated process.

The traffic is already going on when the trace begins: sessions start WARMUP_LIVES mean lives (turns x think) before it,
and what arrives before 0 is cut off. Servers whose caches are empty then have everybody's whole prompts to compute at
once; with ``ramp`` nobody is there at 0, and load and caches grow together. ``rate`` counts requests; it is that of a
server which takes no time, and in the long run that of any server which keeps up.

Where the numbers come from: the lengths published with the traces of Azure (2023: conversation, input mean 1,155 p50
1,020, output mean 211 p50 129; code, input mean 2,048 p50 1,500, output mean 28 p50 13) and Mooncake (conversation:
input mean 12,035 p50 6,909, output mean 343; 37 % of the tokens found in an infinite cache). Turns, think times and
shared prefixes are not published there: those are choices, and so are all figures of ``agentic``.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from statistics import NormalDist
from typing import NamedTuple

from twinpool.errors import ConfigError
from twinpool.sim.trace import NO_REQUEST, NO_TAIL, Trace

WARMUP_LIVES = 4.0  # 98 % of the turns are that early in a session of geometric length
BURST_S, QUIET_S = 10.0, 30.0
BURST_RATE, QUIET_RATE = 3.0, 1 / 3  # times the mean: 10 s * 3 + 30 s / 3 = 40 s
BLOCK_TOKENS = 64
MOST_REQUESTS = 10_000_000


class Spread(NamedTuple):
    """A lognormal amount, cut to ``low``..``high``."""

    median: float
    mean: float
    low: float
    high: float

    def at(self, z: float) -> float:
        """The amount that lies ``z`` standard deviations from the middle."""
        sigma = math.sqrt(2 * math.log(self.mean / self.median))
        return min(self.high, max(self.low, self.median * math.exp(z * sigma)))

    def draw(self, rng: random.Random) -> float:
        """One amount."""
        return self.at(rng.gauss(0.0, 1.0))

    def tokens(self, rng: random.Random) -> int:
        """One whole amount."""
        return round(self.draw(rng))


@dataclass(frozen=True, slots=True)
class Kind:
    """One sort of traffic. Lengths in tokens, think in seconds."""

    prefixes: int  # shared prefixes; the i-th most popular is asked for in proportion to 1 / i
    prefix: Spread
    first: Spread  # text of the first turn
    new: Spread  # text that each later turn adds
    output: Spread
    think: Spread
    turns: float  # mean
    most_tokens: int  # a session ends before a prompt and its output would be longer
    edits: bool = False  # later turns replace the end of the prompt instead of going on with it


KINDS: dict[str, Kind] = {
    "chat": Kind(
        prefixes=8,
        prefix=Spread(350, 370, 16, 2_000),
        first=Spread(150, 330, 4, 8_000),
        new=Spread(40, 90, 4, 8_000),
        output=Spread(129, 211, 1, 2_000),
        think=Spread(12, 20, 0.5, 300),
        turns=2.8,
        most_tokens=32_768,
    ),
    "long": Kind(
        prefixes=4,
        prefix=Spread(900, 1_000, 64, 4_000),
        first=Spread(5_900, 11_300, 256, 120_000),
        new=Spread(60, 150, 4, 8_000),
        output=Spread(268, 343, 1, 2_000),
        think=Spread(20, 30, 1, 300),
        turns=1.5,
        most_tokens=131_072,
    ),
    "code": Kind(
        prefixes=24,
        prefix=Spread(1_450, 1_540, 64, 16_000),
        first=Spread(350, 850, 16, 16_000),
        new=Spread(30, 70, 2, 4_000),
        output=Spread(13, 28, 1, 1_000),
        think=Spread(4, 9, 0.2, 120),
        turns=8.0,
        most_tokens=32_768,
        edits=True,
    ),
    "agentic": Kind(
        prefixes=4,
        prefix=Spread(6_500, 6_800, 512, 24_000),
        first=Spread(700, 1_500, 16, 32_000),
        new=Spread(250, 800, 8, 32_000),
        output=Spread(80, 160, 1, 4_000),
        think=Spread(1, 2.5, 0.05, 60),
        turns=15.0,
        most_tokens=131_072,
    ),
}
MIXED = {"chat": 0.5, "code": 0.25, "agentic": 0.15, "long": 0.1}  # shares of the requests
BURSTS = ("poisson", "gamma", "onoff")


def kind_names() -> list[str]:
    """What ``generate`` makes."""
    return [*KINDS, "mixed"]


def generate(
    kind: str,
    *,
    requests: int | None = None,
    seconds: float | None = None,
    rate: float = 1.0,
    seed: int = 0,
    bursts: str = "poisson",
    cv: float = 2.0,
    block_tokens: int = BLOCK_TOKENS,
    ramp: bool = False,
) -> Trace:
    """A trace of ``requests`` requests, or of ``seconds`` seconds (either, or both: what ends first).

    ``rate``: requests a second; ``cv`` is that of the gamma gaps. The same arguments make the same trace. Raises
    ConfigError on arguments that make no traffic.
    """
    _check(kind, requests, seconds, rate, bursts, cv, block_tokens)
    shares = MIXED if kind == "mixed" else {kind: 1.0}
    rng = random.Random(seed)
    session_rate = rate * sum(share / KINDS[name].turns for name, share in shares.items())
    starts = {"poisson": _gamma(1.0), "gamma": _gamma(cv), "onoff": _on_off}[bursts](rng, session_rate)
    if not ramp:
        warmup = WARMUP_LIVES * max(KINDS[name].turns * KINDS[name].think.mean for name in shares)
        starts = (start - warmup for start in starts)
    turns = _in_order(_Source(rng, shares, block_tokens), starts, math.inf if seconds is None else seconds)
    trace = _columns(kind, turns, block_tokens, MOST_REQUESTS if requests is None else requests)
    if not len(trace):
        raise ConfigError(f"no request arrives within {seconds:g} s at {rate:g} a second: ask for more of either")
    return trace


def _check(
    kind: str, requests: int | None, seconds: float | None, rate: float, bursts: str, cv: float, block_tokens: int
) -> None:
    if kind not in kind_names():
        raise ConfigError(f"no traffic {kind!r}: there are {', '.join(kind_names())}")
    if bursts not in BURSTS:
        raise ConfigError(f"no arrivals {bursts!r}: there are {', '.join(BURSTS)}")
    if requests is None and seconds is None:
        raise ConfigError("give a number of requests, a number of seconds, or both")
    ranges: Sequence[tuple[str, float | None, float]] = (
        ("requests", requests, MOST_REQUESTS),
        ("seconds", seconds, 1e7),
        ("rate", rate, 1e4),
        ("cv", cv, 20),
        ("block-tokens", block_tokens, 4096),
    )
    for name, value, most in ranges:
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{name} is {value:g}: it is above 0, and at most {most:g}")
    if requests is None and (seconds or 0) * rate > MOST_REQUESTS:
        raise ConfigError(f"{seconds:g} s at {rate:g} a second are more than {MOST_REQUESTS} requests: ask for fewer")


# --- starts of sessions -------------------------------------------------------------------------------------------

Starts = Callable[[random.Random, float], Iterator[float]]  # ascending seconds, without end


def _gamma(cv: float) -> Starts:
    def starts(rng: random.Random, rate: float) -> Iterator[float]:
        now, shape = 0.0, 1 / cv**2
        while True:
            now += rng.gammavariate(shape, 1 / (rate * shape))
            yield now

    return starts


def _on_off(rng: random.Random, rate: float) -> Iterator[float]:
    now, burst = 0.0, False
    while True:
        end = now + rng.expovariate(1 / (BURST_S if burst else QUIET_S))
        here = rate * (BURST_RATE if burst else QUIET_RATE)
        now += rng.expovariate(here)
        while now < end:
            yield now
            now += rng.expovariate(here)
        now, burst = end, not burst


# --- turns --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Session:
    """One conversation, with the prompt and output of its next turn."""

    name: str
    kind: Kind
    shared: int  # tokens of the shared prefix
    left: int  # turns after the next one
    prompt: int
    output: int
    ids: array[int]  # of the full blocks of the prompt
    tail: int  # of the partly filled last block, or NO_TAIL
    think: float = 0.0  # seconds from the end of the turn before
    last: int = NO_REQUEST  # index of the turn before in the trace


class _Source:
    """Makes sessions and their turns; owns the counter of hash ids and the shared prefixes."""

    def __init__(self, rng: random.Random, shares: dict[str, float], block_tokens: int) -> None:
        self._rng = rng
        self._size = block_tokens
        self._names = count()
        self._next_id = 0
        self._kinds = list(shares)
        self._odds = list(accumulate(share / KINDS[name].turns for name, share in shares.items()))
        self._prefixes = {name: self._make_prefixes(KINDS[name]) for name in shares}

    def session(self) -> Session:
        """A new session, before its first turn."""
        rng = self._rng
        name = self._kinds[self._pick(self._odds)]
        kind = KINDS[name]
        odds, prefixes = self._prefixes[name]
        shared, known = prefixes[self._pick(odds)]
        left = int(math.log(1 - rng.random()) / math.log(1 - 1 / kind.turns))
        output = kind.output.tokens(rng)
        prompt = min(shared + kind.first.tokens(rng), kind.most_tokens - output)
        ids, tail = self._ids(known, prompt)
        return Session(f"{name}-{next(self._names)}", kind, shared, left, prompt, output, ids, tail)

    def go_on(self, session: Session) -> bool:
        """Turn to the session's next turn; False where it is over."""
        kind, rng = session.kind, self._rng
        added, output, think = kind.new.tokens(rng), kind.output.tokens(rng), kind.think.draw(rng)
        kept = session.prompt + session.output
        if kind.edits:
            kept = session.shared + round((session.prompt - session.shared) * math.sqrt(rng.random()))
        if not session.left or kept + added + output > kind.most_tokens:
            return False
        session.ids, session.tail = self._ids(session.ids[: kept // self._size], kept + added)
        session.prompt, session.output = kept + added, output
        session.think = round(think, 3)
        session.left -= 1
        return True

    def _pick(self, odds: Sequence[float]) -> int:
        """An index, drawn by cumulated odds."""
        return bisect(odds, self._rng.random() * odds[-1], hi=len(odds) - 1)

    def _ids(self, known: array[int], prompt: int) -> tuple[array[int], int]:
        """Ids of the full blocks of a prompt that begins with ``known`` ones, and of its tail; the others are new."""
        ids = known + self._new_ids(prompt // self._size - len(known))
        return ids, self._new_ids(1)[0] if prompt % self._size else NO_TAIL

    def _make_prefixes(self, kind: Kind) -> tuple[list[float], list[tuple[int, array[int]]]]:
        """Cumulated popularity, and tokens and ids of the full blocks, of the shared prefixes.

        Lengths are quantiles of their distribution, in any order: so few draws would make each seed its own traffic.
        """
        middle = NormalDist().inv_cdf
        lengths = [round(kind.prefix.at(middle((i + 0.5) / kind.prefixes))) for i in range(kind.prefixes)]
        self._rng.shuffle(lengths)
        odds = list(accumulate(1 / (rank + 1) for rank in range(kind.prefixes)))
        return odds, [(tokens, self._new_ids(tokens // self._size)) for tokens in lengths]

    def _new_ids(self, many: int) -> array[int]:
        first = self._next_id
        self._next_id += many
        return array("q", range(first, self._next_id))


# --- the trace ----------------------------------------------------------------------------------------------------


class _Waiting(NamedTuple):
    """A session whose next turn arrives then; equal arrivals go by ``order``."""

    arrival: float
    order: int
    session: Session


def _in_order(source: _Source, starts: Iterator[float], end: float) -> Iterator[_Waiting]:
    """Turns by arrival, to before ``end``. A session goes on when its turn has been taken."""
    heap: list[_Waiting] = []
    order = count()
    start = next(starts)
    while True:
        if not heap or start <= heap[0].arrival:
            heapq.heappush(heap, _Waiting(round(start, 6), next(order), source.session()))
            start = next(starts)
            continue
        turn = heapq.heappop(heap)
        if turn.arrival >= end:
            return
        yield turn
        if source.go_on(turn.session):
            arrival = round(turn.arrival + turn.session.think, 6)
            heapq.heappush(heap, _Waiting(arrival, next(order), turn.session))


def _columns(name: str, turns: Iterator[_Waiting], block_tokens: int, most: int) -> Trace:
    arrival, think = array("d"), array("d")
    prompt, output, hashes, tail, after = (array("q") for _ in range(5))
    offsets = array("q", [0])
    names: list[str] = []
    for when, _, session in turns:
        if when < 0:
            continue
        after.append(session.last)
        think.append(session.think if session.last != NO_REQUEST else 0.0)
        session.last = len(arrival)
        arrival.append(when)
        prompt.append(session.prompt)
        output.append(session.output)
        hashes += session.ids
        offsets.append(len(hashes))
        tail.append(session.tail)
        names.append(session.name)
        if len(arrival) == most:
            break
    return Trace(name, block_tokens, arrival, prompt, output, hashes, offsets, after, think, session=names, tail=tail)
