"""Who carries most: policies, their parameters and splits against each other on one traffic, by capacity.

A *capacity* is the largest speed-up at which ``TARGET`` of the offered requests meet both SLOs, to 1 %
(``twinpool.sim.search``). A *race* finds the best of many without a search for each: all run at one speed, those that
meet the target go on to a higher one, until one is left. It costs one run, cut short, for whoever is far behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from twinpool.sim.search import Job, Runner, Search, allowed_misses, narrow, nearest, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, slice_time

TARGET = 0.99
PROFILE = "h100_sxm/llama-3.1-70b/tp4"
MOONCAKE, AZURE = "mooncake_conversation.jsonl.gz", "azure_2023_conv.csv.gz"
HEAD = 0.2  # of a trace: where parameters are chosen
FINE = 2  # steps of 0.5 %: as near as capacities are found
NEAR = 4  # steps, 2 %: where a capacity is nearly known
STRIDE = 24  # steps, 12 %: of a race's first climb
LOWEST = 3  # descents of a race, each of twice the steps of the one before, to 0.43 of where it began: nobody has won
COARSE = 12  # steps, 6 %: as near as parameters are chosen

Window = tuple[float, float]
Parameters = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Entry:
    """A policy with the parameters that it may choose from; the first of each are its defaults."""

    policy: str
    choices: dict[str, tuple[float | str, ...]] = field(default_factory=dict)
    colocated: bool = False  # every worker does both: there is no split

    def variants(self) -> list[Parameters]:
        """All combinations; the defaults first."""
        return [dict(zip(self.choices, values, strict=True)) for values in product(*self.choices.values())]


OURS = Entry("least_seconds", {"late": ("refuse",)})  # who is refused has missed: nothing is gained by it but room
DISAGGREGATED = (
    Entry("mooncake_conductor", {"refuse": (1, 0)}),
    Entry("dynamo", {"overlap_weight": (1.0, 0.0, 0.5, 2.0)}),
    Entry("llm_d", {"prefix_weight": (2.0, 1.0, 4.0)}),
    Entry("sglang_cache_aware", {"cache_threshold": (0.5, 0.2), "balance_abs": (32, 4)}),
    Entry("aibrix_pd", {"match_weight": (0.1, 0.02), "prefill_gap": (32, 4)}),
    Entry("preble", {"window_s": (180.0, 30.0)}),
    Entry("lmetric", {"queued": (0, 1)}),
    Entry("least_tokens"),
    Entry("least_requests"),
    Entry("power_of_two"),
    Entry("vllm_pd"),
    Entry("session"),
)
COLOCATED = Entry("colocated", {"itl_share": (0.9, 1.0), "chunk": (0, 512, 2048)}, colocated=True)


@dataclass(frozen=True, slots=True)
class Found:
    """A policy at a split, and what it carries."""

    settings: Settings
    speed: float

    @property
    def split(self) -> str:
        """In words."""
        each = self.settings
        return f"{each.both} both" if each.both else f"{each.prefill}P+{each.decode}D"

    @property
    def name(self) -> str:
        """Policy and parameters."""
        given = ", ".join(f"{key} {value}" for key, value in self.settings.parameters.items())
        return f"{self.settings.policy} ({given})" if given else self.settings.policy


@dataclass
class Contest:
    """One traffic. ``start``: a speed to begin at."""

    made: Runner
    trace: Trace
    workers: int
    splits: Sequence[int]  # prefill workers
    start: float
    profile: str = PROFILE
    itl_s: float = 0.05
    chosen: dict[str, Parameters] = field(default_factory=dict)  # parameters by policy
    _searches: dict[tuple[object, ...], Search] = field(default_factory=dict)  # what was run is not run again

    def settings(self, entry: Entry, parameters: Parameters, split: int) -> Settings:
        """One cluster."""
        prefill, decode, both = split, self.workers - split, 0
        if entry.colocated:
            prefill, decode, both = 0, 0, self.workers
        return Settings(
            prefill=prefill, decode=decode, both=both, policy=entry.policy, parameters=parameters,
            profile=self.profile, itl_s=self.itl_s,
        )  # fmt: skip

    def of(self, entry: Entry, variants: Sequence[Parameters], splits: Sequence[int]) -> list[Settings]:
        """Every variant at every split."""
        places = [0] if entry.colocated else splits
        return [self.settings(entry, variant, split) for variant in variants for split in places]

    def head(self) -> Window:
        """The first part of the trace."""
        return 0.0, self.trace.arrival[int(HEAD * len(self.trace))]

    def choose(self, entries: Sequence[Entry], start: float) -> None:
        """Each entry's best parameters, on the head of the trace, at two splits.

        Where a race has no winner they are those with the fewest misses at its lowest speed.
        """
        middle = [self.splits[len(self.splits) // 2], self.splits[-1]]
        for entry in entries:
            variants = entry.variants()
            self.chosen[entry.policy] = variants[0]
            if len(variants) > 1:
                field = self.of(entry, variants, middle)
                best = self.race(field, start, self.head(), fine=COARSE)
                self.chosen[entry.policy] = self._least_missed(field) if best is None else best.settings.parameters

    def _least_missed(self, field: Sequence[Settings]) -> Parameters:
        """Of a race on the head of the trace that nobody won."""
        searches = [self._search(each, self.head()) for each in field]
        return min(searches, key=lambda search: search.trials[min(search.trials)].depth()).settings.parameters

    def best(self, entries: Sequence[Entry], start: float) -> Found | None:
        """The best of these with their chosen parameters, over all splits; None: none has a capacity."""
        field = [each for entry in entries for each in self.of(entry, [self.chosen[entry.policy]], self.splits)]
        return self.race(field, start)

    def missed_at(self, entry: Entry) -> float:
        """The lowest speed at which it was seen to miss the target at every split; inf: at one it never did."""
        fields = self.of(entry, [self.chosen[entry.policy]], self.splits)
        highs = [self._search(each).high for each in fields]
        return max(math.inf if high is None else speed_of(high) for high in highs)

    def curve(self, entry: Entry) -> list[Found]:
        """Its capacity at each split."""
        field = self.of(entry, [self.chosen[entry.policy]], self.splits)
        searches = [self._search(each) for each in field]
        narrow(self.made, searches, TARGET, FINE)
        return [_found(search) for search in searches]

    def above(self, field: Sequence[Settings], speed: float) -> list[Found]:
        """Those that meet the target at a speed, with their capacities."""
        level = nearest(speed)
        met = self._meeting([self._search(each) for each in field], level, None)
        narrow(self.made, met, TARGET, FINE)
        return [_found(search) for search in met]

    def again(self, supposed: Sequence[Found]) -> list[Found]:
        """Capacities of the same settings on this traffic, near those that are supposed."""
        searches = [self._search(each.settings) for each in supposed]
        for search, each in zip(searches, supposed, strict=True):
            search.start, search.jump = nearest(each.speed), NEAR
        narrow(self.made, searches, TARGET, FINE)
        return [_found(search) for search in searches]

    def race(
        self, field: Sequence[Settings], start: float, window: Window | None = None, *, fine: int = FINE
    ) -> Found | None:
        """The best of a field, to ``fine`` steps; None where nobody has a capacity."""
        level = nearest(start)
        searches = [self._search(each, window) for each in field]
        alive = self._meeting(searches, level, window)
        for i in range(0 if alive else LOWEST):
            level -= STRIDE << i
            alive = self._meeting(searches, level, window)
            if alive:
                break
        if not alive:
            return None
        stride = STRIDE
        while stride >= fine and (len(alive) > 1 or stride > STRIDE // 8):
            higher = self._meeting(alive, level + stride, window)
            if higher:
                alive, level = higher, level + stride
            else:
                stride //= 2
        best = min(alive, key=lambda search: (-(search.low or 0), search.trials[search.low or 0].misses))
        narrow(self.made, [best], TARGET, fine, window=window)
        return _found(best)

    def _search(self, settings: Settings, window: Window | None = None) -> Search:
        """The one of these settings."""
        key = (settings.policy, *settings.parameters.items(), settings.prefill, settings.decode, window)
        if key not in self._searches:
            requests = len(self.trace) if window is None else len(slice_time(self.trace, *window))
            self._searches[key] = Search(settings, allowed_misses(requests, TARGET), nearest(self.start))
        return self._searches[key]

    def _meeting(self, searches: Sequence[Search], k: int, window: Window | None) -> list[Search]:
        """Those that meet the target at ``k``, run where that is not known."""
        unknown = [search for search in searches if search.meets(k) is None]
        jobs = [Job(search.settings, speed_of(k), TARGET, window) for search in unknown]
        for search, found in zip(unknown, self.made.trials(jobs), strict=True):
            search.take({k: found})
        return [search for search in searches if search.meets(k)]


def _found(search: Search) -> Found:
    return Found(search.settings, 0.0 if search.low is None else speed_of(search.low))
