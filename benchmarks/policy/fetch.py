"""Fetch or recompute: what it is worth that prefill workers get cached prefixes from others.

    python benchmarks/policy/fetch.py [--traces FOLDER] [--repeats 2] [--processes 0] [--requests 4000]

FOLDER holds mooncake_conversation.jsonl.gz (public); without it only generated traffic is run. (The Azure trace has no
block hashes.) 12 workers, profile Llama-3.1-70B on 4 H100 (TP4), policy ``least_seconds`` with fetch off and on, TTFT
SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms. Each figure is the mean of whole runs that differ in a microsecond of
latency. Writes fetch.md beside this file. The compiled form takes half the time: benchmarks/sim/run.py says how.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy.base import Policy
from twinpool.router.state import Limits
from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, build, result_of, run
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed

HERE = Path(__file__).parent
MOONCAKE = "mooncake_conversation.jsonl.gz"
MISSES = 0.01  # share at the capacity
GB, MILLION = 1e9, 1_000_000
FETCH = ("off", "on")
HEAD = (
    "| speed | fetch | missed an SLO | found or fetched | TTFT mean, ms | p99 | fetched | tokens each | ms | predicted "
    "| not OK | CPU s |\n" + "|---" * 12 + "|"
)


@dataclass
class Counts:
    """What became of the fetches of a run."""

    outcomes: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    predicted_s: float = 0.0


class CountingCore(Core):
    """Looks at requests that end."""

    def __init__(self, policy: Policy, limits: Limits) -> None:
        super().__init__(policy, limits)
        self.counts = Counts()

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """See Core."""
        actions = super().on(event, now)
        for action in actions:
            if isinstance(action, ev.Finish) and action.request.fetch is not None:
                self._count(action)
        return actions

    def _count(self, action: ev.Finish) -> None:
        fetch, counts = action.request.fetch, self.counts
        assert fetch is not None
        counts.outcomes[fetch.outcome] = counts.outcomes.get(fetch.outcome, 0) + 1
        if fetch.outcome == "OK":
            counts.tokens += fetch.tokens - fetch.cached
            counts.seconds += fetch.ended_at - fetch.began_at
            counts.predicted_s += fetch.predicted_s


class Run(NamedTuple):
    """One run's figures."""

    missed: int
    found: float
    ttft_ms: float
    p99_ms: float
    counts: Counts
    cpu_s: float


class Case(NamedTuple):
    """A section of the file: traffic, cluster, speeds."""

    name: str
    traffic: str  # a path, or the kind and rate of generated traffic
    settings: Settings
    speeds: tuple[float, ...]


def traffic_of(text: str, requests: int) -> Trace:
    """The trace of a case."""
    if " " not in text:
        return read_trace(Path(text))[0]
    kind, rate = text.split()
    return generate(kind, requests=requests, rate=float(rate))


def one(case: Case, times: float, fetch: str, repeat: int, requests: int) -> Run:
    """A whole run, in a process of its own."""
    trace = speed(traffic_of(case.traffic, requests), times)
    settings = replace(case.settings, parameters={"fetch": fetch}, latency_s=100e-6 + repeat * 1e-6)
    loop = build(trace, settings, make_core=CountingCore)
    started = time.process_time()
    run(loop)
    cpu_s = time.process_time() - started
    assert isinstance(loop.core, CountingCore)
    figures = result_of(loop, trace, settings).summary()
    missed = round((1 - figures["attainment"]) * len(trace))
    ttft = figures["ttft_ms"]
    return Run(missed, figures["cached_token_share"], ttft["mean"], ttft["p99"], loop.core.counts, cpu_s)


def line(times: float, fetch: str, runs: list[Run]) -> str:
    """A row of a table."""
    ok = sum(each.counts.outcomes.get("OK", 0) for each in runs)
    bad = sum(sum(each.counts.outcomes.values()) for each in runs) - ok
    cells = [f"{times:g}", fetch, f"{statistics.mean(each.missed for each in runs):.0f}"]
    cells += [f"{statistics.mean(each.found for each in runs):.2%}"]
    cells += [f"{statistics.mean(value):.0f}" for value in zip(*[(r.ttft_ms, r.p99_ms) for r in runs], strict=True)]
    if ok:
        counts = [each.counts for each in runs]
        cells += [f"{ok / len(runs):.0f}", f"{sum(each.tokens for each in counts) / ok:,.0f}"]
        cells += [f"{1000 * sum(each.seconds for each in counts) / ok:.0f}"]
        cells += [f"{1000 * sum(each.predicted_s for each in counts) / ok:.0f}", f"{bad / len(runs):.1f}"]
    else:
        cells += ["-"] * 5
    return f"| {' | '.join([*cells, f'{min(each.cpu_s for each in runs):.1f}'])} |"


def crossing(points: dict[float, float], slope: float, allowed: float) -> float:
    """The speed at which misses reach ``allowed``: of a line of this slope through the means of both logarithms."""
    x = statistics.mean(math.log(times) for times in points)
    y = statistics.mean(math.log(max(0.5, missed)) for missed in points.values())
    return math.exp(x + (math.log(allowed) - y) / slope)


def worth(case: Case, missed: dict[str, dict[float, float]], requests: int) -> str:
    """Both capacities in a sentence; their slope is that of both together."""
    slopes = []
    for points in missed.values():
        xs, ys = [math.log(times) for times in points], [math.log(max(0.5, each)) for each in points.values()]
        slopes.append(statistics.linear_regression(xs, ys).slope)
    slope = statistics.mean(slopes)
    off, on = (crossing(missed[fetch], slope, MISSES * requests) for fetch in FETCH)
    return (
        f"Capacity (1 % missed, by a line of both logarithms, slope {slope:.1f}): {off:.3f} without, {on:.3f} with "
        f"fetches: {on / off - 1:+.1%}."
    )


def section(case: Case, args: argparse.Namespace, pool: ProcessPoolExecutor) -> Iterator[str]:
    """All runs of a case."""
    yield f"## {case.name}\n\n{HEAD}"
    keys = [(times, fetch, repeat) for times in case.speeds for fetch in FETCH for repeat in range(args.repeats)]
    futures = {key: pool.submit(one, case, *key, args.requests) for key in keys}
    missed: dict[str, dict[float, float]] = {fetch: {} for fetch in FETCH}
    for times in case.speeds:
        for fetch in FETCH:
            runs = [futures[times, fetch, repeat].result() for repeat in range(args.repeats)]
            missed[fetch][times] = statistics.mean(each.missed for each in runs)
            yield line(times, fetch, runs)
    yield ""
    if len(case.speeds) > 1:
        yield worth(case, missed, len(traffic_of(case.traffic, args.requests))) + "\n"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything that is run."""
    base = Settings(prefill=8, decode=4)
    if args.traces is not None:
        path, speeds = str(args.traces / MOONCAKE), (2.5, 2.7, 2.9)
        yield Case("Mooncake conversation, 8P+4D", path, base, speeds)
        yield Case("Mooncake conversation, 6P+6D", path, replace(base, prefill=6, decode=6), speeds)
        slow = replace(base, link_bytes_per_s=10 * GB)
        yield Case("Mooncake conversation, 8P+4D, links of 10 GB/s", path, slow, (2.3, 2.5))
        large = replace(base, kv_tokens=2 * MILLION)
        yield Case("Mooncake conversation, 8P+4D, two million KV tokens a worker", path, large, (2.9, 3.1))
    yield Case("Generated, agentic", "agentic 12", base, (1.0,))
    yield Case("Generated, chat", "chat 60", base, (1.0,))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--requests", type=int, default=4000)
    args = parser.parse_args()
    started = time.perf_counter()
    text = [f"# Fetch or recompute\n\n{describe()}; {FORM} core; the mean of {args.repeats} runs\n"]
    with ProcessPoolExecutor(args.processes or None, mp_context=get_context("spawn")) as pool:
        for case in cases(args):
            for each in section(case, args, pool):
                print(each, flush=True)
                text.append(each)
    text.append(f"Took {(time.perf_counter() - started) / 60:.0f} minutes.")
    (HERE / "fetch.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
