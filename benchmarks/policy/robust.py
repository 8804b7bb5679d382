"""Robust: capacity of the default policy where what it predicts and what it hears is wrong.

    python benchmarks/policy/robust.py [--traces FOLDER] [--splits 6,8] [--workers 12] [--repeats 3] [--processes 0]

FOLDER holds mooncake_conversation.jsonl.gz and azure_2023_conv.csv.gz (public); without it two generated traffics take
their place. ``least_seconds`` with its default parameters, Llama-3.1-70B on 4 H100 (TP4), 99 % of offered requests
within TTFT 1 s + 2 x unloaded prefill and ITL 50 ms. Each error alone, then all together. Writes robust.md beside this
file; exit status 1 where an error costs more than asked. The compiled form takes half the time: benchmarks/sim/run.py
says how a copy of the package is compiled; give its ``src`` as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, build, run
from twinpool.sim.search import Runner, Search, allowed_misses, capacity, narrow, nearest, runner, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed

HERE = Path(__file__).parent
TARGET = 0.99
JUMP = 4  # steps of 0.5 %, of the first move away from the capacity without errors
TRACES = {"Mooncake conversation": ("mooncake_conversation.jsonl.gz", 2.0),
          "Azure conversation": ("azure_2023_conv.csv.gz", 10.0)}  # fmt: skip  # file, speed to begin at
GENERATED = {"generated long chats": ("long", 1.5), "generated chat": ("chat", 10.0)}
REQUESTS, RATE = 8000, 3.0  # of generated traffic
WITHOUT = "no error"


class Error(NamedTuple):
    """What is wrong, and the share of capacity that it may cost."""

    name: str
    prefill: float = 0.0
    output: float = 0.0
    delay_s: float = 0.0
    loss: float = 0.0
    may_cost: float = 0.04

    def on(self, settings: Settings, repeat: int) -> Settings:
        """The settings with it; ``repeat`` chooses which requests and messages are hit, and moves every message's
        latency by a microsecond, which changes nothing but what chance makes of it."""
        return replace(
            settings, prefill_error=self.prefill, output_error=self.output, kv_delay_s=self.delay_s, kv_loss=self.loss,
            error_seed=repeat, latency_s=settings.latency_s + 1e-6 * repeat,
        )  # fmt: skip


ERRORS = (
    Error(WITHOUT),
    Error("prefill work, sigma 0.1", prefill=0.1),
    Error("output length, sigma 0.5", output=0.5),
    Error("KV events 500 ms late", delay_s=0.5),
    Error("1 % of KV events lost", loss=0.01),
    Error("all together", prefill=0.1, output=0.5, delay_s=0.5, loss=0.01, may_cost=0.10),
)
TEXT = """
An error is lognormal with mean 1, one factor a request, so the work offered is the same and only what is known of it
changes. *Prefill work*: what a request's prompt adds to a step takes so many times as long as router and worker
predict; chunks are cut by the prediction, a step that is 2 ms and 2 % off is reported. *Output length*: the policy
predicts no request's length, it books the running mean of those that ended; so the truth is what is disturbed: each
output is the trace's times a factor, at most what the request may ask for, tokens in all unchanged. *KV events late*:
each message on top of its 20 ms grid. *Lost*: such messages vanish; the next one of that worker shows the gap, the
router drops it and asks for a snapshot, and drops all that comes before that, as the live router does. (Live workers
tell of blocks of output, too, so that a gap is noticed sooner than here.)

Each figure is the mean of {repeats} searches (0.5 % a step) that differ in which requests and messages are hit and in
a microsecond of latency; +- is the standard error of the share lost, from the spread of both. Attainment is noisy near
the limit: searches without any error differ by as much as the column "from .. to" says.
"""


class Row(NamedTuple):
    """Capacities found with one error."""

    error: Error
    speeds: list[float]

    @property
    def mean(self) -> float:
        """Of the speed-ups."""
        return statistics.fmean(self.speeds)

    @property
    def variance(self) -> float:
        """Of the mean, relative to it squared; 0 for a single search."""
        if len(self.speeds) < 2:
            return 0.0
        return statistics.variance(self.speeds) / len(self.speeds) / self.mean**2

    def lost(self, base: Row) -> float:
        """Share of the capacity without errors."""
        return 1.0 - self.mean / base.mean

    def line(self, base: Row) -> str:
        """Of the table."""
        span = f"| {self.error.name} | {self.mean:.3f} | {min(self.speeds):.3f} .. {max(self.speeds):.3f} |"
        if self.error.name == WITHOUT:
            return f"{span} | | |"
        lost, noise = self.lost(base), math.sqrt(self.variance + base.variance) * self.mean / base.mean
        kept = "yes" if lost <= self.error.may_cost else "**no**"
        return f"{span} {lost:+.1%} +- {noise:.1%} | {self.error.may_cost:.0%} | {kept} |"


def measured(made: Runner, settings: Settings, errors: list[Error], repeats: int, start: float) -> list[Row]:
    """Capacities with each error, searched side by side from the first one's."""
    first = capacity(made, settings, TARGET, start=start).speed
    allowed, place = allowed_misses(made.requests, TARGET), nearest(first)
    rows = [[Search(error.on(settings, i), allowed, place, JUMP) for i in range(repeats)] for error in errors]
    searches = [search for row in rows for search in row]

    def step(search: Search) -> None:
        done = sum(each.done() for each in searches)
        print(f"{done} of {len(searches)} searches, {len(search.trials)} runs each", end="\r", file=sys.stderr)

    narrow(made, searches, TARGET, step=step)
    return [Row(error, [speed_of(search.low or 0) for search in row]) for error, row in zip(errors, rows, strict=True)]


def messages(trace: Trace, settings: Settings, factor: float) -> str:
    """How many there were of which kind, in one run with losses."""
    loop = build(speed(trace, factor), ERRORS[4].on(settings, 0))
    run(loop)
    feed = loop.feed
    assert feed is not None
    return (
        f"Of {feed.sent:,} messages {feed.lost:,} were lost; {feed.dropped:,} more were dropped, each with a question, "
        f"and {feed.asked:,} snapshots were sent."
    )


def spread_of(trace: Trace) -> float:
    """Standard deviation of the logarithm of output lengths: how wrong the mean is for a single request."""
    return statistics.pstdev([math.log(output) for output in trace.output])


def traffic(folder: Path | None) -> Iterator[tuple[str, Trace, float]]:
    """Name, trace and a speed to begin at."""
    for name, (file, start) in TRACES.items() if folder is not None else ():
        assert folder is not None
        yield name, read_trace(folder / file)[0], start
    for name, (kind, start) in GENERATED.items() if folder is None else ():
        yield name, generate(kind, requests=REQUESTS, rate=RATE, seed=0), start


def section(name: str, trace: Trace, start: float, args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """Lines about one trace, and whether each is of an error that costs too much."""
    errors = [error for error in ERRORS if trace.block_tokens or not (error.delay_s or error.loss) or error.prefill]
    notes = "" if trace.block_tokens else " It has no block hashes, so there are no KV events to be late or lost."
    yield f"## {name}", False
    yield "", False
    yield f"The mean is off by sigma {spread_of(trace):.2f} for single outputs without any error.{notes}", False
    with runner(trace, args.processes) as made:
        for split in args.splits:
            settings = Settings(prefill=split, decode=args.workers - split)
            rows = measured(made, settings, errors, args.repeats, start)
            yield "", False
            yield f"| {split}P+{args.workers - split}D | capacity | from .. to | lost | may cost | kept |", False
            yield "|---" * 6 + "|", False
            for row in rows:
                yield row.line(rows[0]), row.lost(rows[0]) > row.error.may_cost
            if trace.block_tokens:
                yield "", False
                yield messages(trace, settings, rows[0].mean), False
    yield "", False


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--splits", type=lambda text: [int(part) for part in text.split(",")], default=[6, 8])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    """Measure, write, and say whether all errors cost no more than asked."""
    args, started = arguments(), time.perf_counter()
    text = ["# What errors cost", "", f"{describe()}; {FORM} core", TEXT.format(repeats=args.repeats)]
    missed = 0
    for name, trace, start in traffic(args.traces):
        for line, bad in section(name, trace, start, args):
            print(line, flush=True)
            text.append(line)
            missed += bad
    verdict = "All errors cost no more than asked." if not missed else f"{missed} rows cost more than asked."
    text.append(f"{verdict} Took {(time.perf_counter() - started) / 60:.0f} minutes.")
    print(text[-1])
    (HERE / "robust.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
