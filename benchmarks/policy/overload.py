"""Overload: goodput up to twice the capacity, and the GPU time that goes into requests that are not served in time.

    python benchmarks/policy/overload.py --traces FOLDER [--splits 8,6] [--workers 12] [--policies NAME[:KEY=VALUE],...]

FOLDER holds mooncake_conversation.jsonl.gz (stamps spread within their 3 s) and azure_2023_conv.csv.gz (public).
Profile Llama-3.1-70B on 4 H100 (TP4), TTFT SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms, all requests realtime. Asked
of the first policy: at twice its capacity at least 85 % of its best goodput, weighed by uncached prefill seconds, and
at every speed under 2 % of GPU time for requests that then miss or are refused. Writes overload.md beside this file;
exit status 1 where less was found. The compiled form takes a quarter of the time: benchmarks/sim/run.py says how a copy
of the package is compiled; give its ``src`` as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from contest import AZURE, MOONCAKE, TARGET
from machine import describe

from twinpool.sim.profiles import load_profile
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, replay
from twinpool.sim.result import Result
from twinpool.sim.search import capacity, runner
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed

HERE = Path(__file__).parent
POLICIES = "least_seconds:late=refuse,mooncake_conductor,dynamo"
TRACES = {"Mooncake conversation, spread": (MOONCAKE, 0, 2.6), "Azure conversation": (AZURE, None, 14.0)}
LADDER = (0.85, 1.0, 1.25, 1.5, 2.0)  # times the capacity of the first policy
LEAST_GOODPUT, MOST_WASTE = 0.85, 0.02
TEXT = """
*Goodput*: seconds of prefill of what was not cached, of requests that met both SLOs, per second of the trace; in
brackets of whole prompts, cached or not. *Wasted*: share of all GPU time in steps that went into requests that missed
an SLO or were refused in the end. A request's GPU time is that of its uncached prompt alone, and of all other busy time
the part that its output tokens are of all. *In time* counts requests, of all offered.
"""


class Rung(NamedTuple):
    """One run."""

    speed: float
    met: float  # share of offered requests
    goodput: float  # prefill seconds of uncached tokens a second
    whole: float  # ... of all tokens
    wasted: float  # share of GPU time


def settings_of(policy: str, split: int, workers: int) -> Settings:
    """One cluster; ``policy`` may carry parameters."""
    name, *given = policy.split(":")
    parameters: dict[str, float | str] = dict(pair.split("=", 1) for pair in given)
    return Settings(prefill=split, decode=workers - split, policy=name, parameters=parameters)


def rung(trace: Trace, settings: Settings, factor: float) -> Rung:
    """The trace that many times as fast."""
    result = replay(speed(trace, factor), settings)
    return Rung(factor, *measured(result, settings))


def measured(result: Result, settings: Settings) -> tuple[float, float, float, float]:
    """Share in time, both goodputs, share of GPU time wasted."""
    columns, cost = result.columns, load_profile(settings.profile).cost
    chunk, prompts, cached = settings.chunk_tokens, columns.prompt, columns.cached
    begun = np.asarray(columns.shown) >= 0.0
    met = np.asarray(columns.attained(), dtype=bool)
    rest = [cost.prefill(int(n - hit), int(hit), chunk) for n, hit in zip(prompts, cached, strict=True)]
    whole = np.array([cost.prefill(int(n), 0, chunk) for n in prompts])
    prefill_s, drawn = np.array(rest) * begun, np.asarray(columns.output) * begun
    busy_s = sum(worker.busy_s for worker in result.workers)
    spent = prefill_s + max(0.0, busy_s - prefill_s.sum()) * drawn / max(1, drawn.sum())
    arrival = np.asarray(columns.arrival)
    length = float(arrival.max() - arrival.min())
    wasted = float(spent[~met].sum() / max(busy_s, 1e-9))
    return float(met.mean()), float(prefill_s[met].sum() / length), float(whole[met].sum() / length), wasted


def capacity_of(trace: Trace, settings: Settings, start: float) -> float:
    """Where 99 % meet both SLOs."""
    with runner(trace, 1) as made:
        return capacity(made, settings, TARGET, start=start).speed


class Ladder(NamedTuple):
    """What one policy showed."""

    policy: str
    rungs: list[Rung]

    @property
    def kept(self) -> float:
        """Goodput at the end, of the best."""
        return self.rungs[-1].goodput / max(each.goodput for each in self.rungs)

    @property
    def waste(self) -> float:
        """The most."""
        return max(each.wasted for each in self.rungs)

    def lines(self, limit: float) -> Iterator[str]:
        """Of the table."""
        for each in self.rungs:
            yield (
                f"| {self.policy} | {each.speed / limit:.2f} | {each.met:.1%} "
                f"| {each.goodput:.2f} ({each.whole:.2f}) | {each.wasted:.2%} |"
            )

    def verdict(self, asked: bool) -> tuple[str, bool]:
        """A sentence, and whether less was found than asked for."""
        missed = asked and (self.kept < LEAST_GOODPUT or self.waste > MOST_WASTE)
        text = (
            f"{self.policy}: {self.kept:.1%} of its best goodput at twice the capacity, at most {self.waste:.2%} wasted"
        )
        if not asked:
            return f"- {text}.", False
        wanted = f"asked: at least {LEAST_GOODPUT:.0%}, at most {MOST_WASTE:.0%}"
        return f"- {text} ({wanted}: {'**missed**' if missed else 'met'}).", missed


def section(name: str, trace: Trace, start: float, split: int, args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Lines of one trace and split, and which of them say that something was missed."""
    policies = args.policies.split(",")
    first = settings_of(policies[0], split, args.workers)
    limit = capacity_of(trace, first, start)
    yield f"## {name}, {split}P+{args.workers - split}D, capacity {limit:.3f} times the trace", False
    yield "", False
    yield "| policy | of capacity | in time | goodput | wasted |", False
    yield "|---" * 5 + "|", False
    ladders: list[Ladder] = []
    for policy in policies:
        settings = settings_of(policy, split, args.workers)
        ladders.append(Ladder(policy, [rung(trace, settings, limit * times) for times in LADDER]))
        for line in ladders[-1].lines(limit):
            yield line, False
    yield "", False
    for ladder in ladders:
        yield ladder.verdict(ladder is ladders[0])
    yield "", False


def main() -> int:
    """Measure, write, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--splits", type=lambda text: [int(part) for part in text.split(",")], default=[8, 6])
    parser.add_argument("--workers", type=int, default=12)
    args = parser.parse_args()
    started, missed = time.process_time(), 0
    text = ["# Overload", "", f"{describe()}; {FORM} core", TEXT]
    for name, (file, seed, start) in TRACES.items():
        trace, _ = read_trace(args.traces / file, spread_seed=seed)
        for split in args.splits:
            for line, bad in section(name, trace, start, split, args):
                print(line, flush=True)
                text.append(line)
                missed += bad
    text.append(f"Took {(time.process_time() - started) / 60:.0f} minutes of CPU, the searches for the capacity aside.")
    (HERE / "overload.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
