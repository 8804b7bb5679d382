"""Robust: capacity of the default policy where what it predicts and what it hears is wrong.

    python benchmarks/policy/robust.py [--traces FOLDER] [--splits 6,8] [--workers 12] [--repeats 6] [--processes 0]

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, build, run
from twinpool.sim.search import Job, Runner, Search, allowed_misses, narrow, nearest, runner, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed

HERE = Path(__file__).parent
TARGET = 0.99
NEAR = 8  # steps of 0.5 %: how near the first search comes
APART = 0.015  # ln speed: runs are that much above and below where the capacity is supposed
MOST_MOVE = 0.08  # ln speed, from one round to the next
SLOPE, SLOPES = 12.0, (4.0, 60.0)  # of ln(misses) by ln(speed): to begin with, and what is believed
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
predict. Neither knows before its first step that is 2 ms and 2 % off; by what that step shows its later chunks are cut
and what is left of it is predicted, and the router keeps in hand what prompts usually are off. *Output length*: the
policy predicts no request's length, it books the running mean of those that ended; so the truth is disturbed: each
output is the trace's times a factor, at most what the request may ask for, tokens in all unchanged. *KV events late*:
each message on top of its 20 ms grid. *Lost*: such messages vanish; the next one of that worker shows the gap, the
router drops it and asks for a snapshot, and drops all that comes before that, as the live router does. (Live workers
tell of blocks of output, too, so that a gap is noticed sooner than here.)

Near the limit attainment is noisy: a microsecond more of latency makes another run of it. So each capacity is of
{repeats} whole runs, at speeds within some percent of it, which differ in that and in which requests and messages are
hit: it is where the line of ln(misses) by ln(speed) crosses 1 %, with one slope for all errors of a table. +- is one
standard error of the share lost, from what the runs are off their line. Speeds are of the trace's own.
"""


@dataclass(slots=True)
class Row:
    """Runs with one error: (ln speed, ln misses), the first of which only finds the place."""

    error: Error
    start: float  # ln speed
    points: list[tuple[float, float]] = field(default_factory=list)

    def used(self) -> list[tuple[float, float]]:
        """All but the first, where there are others."""
        return self.points[1:] or self.points

    def middle(self) -> tuple[float, float]:
        """Means of both."""
        used = self.used()
        return statistics.fmean(x for x, _ in used), statistics.fmean(y for _, y in used)

    def crossing(self, slope: float, limit: float) -> float:
        """ln speed at which misses are ``limit``, a logarithm, too."""
        if not self.points:
            return self.start
        x, y = self.middle()
        step = (limit - y) / slope
        return x + max(-MOST_MOVE, min(MOST_MOVE, step))


class Table(NamedTuple):
    """What came of one trace and split: rows, the slope they share, ln of the misses allowed."""

    rows: list[Row]
    slope: float
    limit: float

    def speed(self, row: Row) -> float:
        """Its capacity."""
        return math.exp(row.crossing(self.slope, self.limit))

    def lost(self, row: Row) -> float:
        """Share of the capacity without errors."""
        return 1.0 - self.speed(row) / self.speed(self.rows[0])

    def noise(self) -> float:
        """Standard deviation of a run's ln(misses) from its line."""
        squares, count = 0.0, -1
        for row in self.rows:
            x0, y0 = row.middle()
            squares += sum((y - y0 - self.slope * (x - x0)) ** 2 for x, y in row.used())
            count += len(row.used()) - 1
        return math.sqrt(squares / max(1, count))

    def about_noise(self) -> str:
        """A sentence."""
        noise = self.noise()
        return (
            f"Misses rise with the speed to the power {self.slope:.1f}; those of a run are off that by a factor of "
            f"{math.exp(noise):.2f}, which is {noise / self.slope:.1%} of speed."
        )

    def line(self, row: Row) -> str:
        """Of the table."""
        if row is self.rows[0]:
            return f"| {row.error.name} | {self.speed(row):.3f} | | | |"
        error = self.noise() / self.slope * math.sqrt(2 / len(row.used()))
        kept = "yes" if self.lost(row) <= row.error.may_cost else "**no**"
        lost = f"{self.lost(row):+.1%} +- {error:.1%}"
        return f"| {row.error.name} | {self.speed(row):.3f} | {lost} | {row.error.may_cost:.0%} | {kept} |"


def slope_of(rows: list[Row]) -> float:
    """The least squares one of lines that share it; a usual one before there is any."""
    xx = xy = 0.0
    for row in rows:
        x0, y0 = row.middle()
        xx += sum((x - x0) ** 2 for x, _ in row.used())
        xy += sum((x - x0) * (y - y0) for x, y in row.used())
    return max(SLOPES[0], min(SLOPES[1], xy / xx)) if xx > 0.0 else SLOPE


def measured(made: Runner, settings: Settings, errors: list[Error], repeats: int, start: float) -> Table:
    """Runs around the capacity with each error, all errors side by side."""
    allowed = allowed_misses(made.requests, TARGET)
    search = Search(settings, allowed, nearest(start))
    narrow(made, [search], TARGET, NEAR)
    limit = math.log(allowed + 0.5)
    rows = [Row(error, math.log(speed_of(search.low or 0))) for error in errors]
    slope = SLOPE
    for i in range(repeats + 1):
        places = [row.crossing(slope, limit) + (APART if i % 2 else -APART) for row in rows]
        jobs = [Job(row.error.on(settings, i), math.exp(x)) for row, x in zip(rows, places, strict=True)]
        for row, x, trial in zip(rows, places, made.trials(jobs), strict=True):
            row.points.append((x, math.log(trial.misses + 0.5)))
        slope = slope_of(rows)
        print(f"round {i} of {repeats}, slope {slope:.1f}", file=sys.stderr)
    return Table(rows, slope, limit)


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
            table = measured(made, settings, errors, args.repeats, start)
            yield "", False
            yield f"| {split}P+{args.workers - split}D | capacity | lost | may cost | kept |", False
            yield "|---" * 5 + "|", False
            for row in table.rows:
                yield table.line(row), row is not table.rows[0] and table.lost(row) > row.error.may_cost
            yield "", False
            yield table.about_noise(), False
            if trace.block_tokens:
                yield messages(trace, settings, table.speed(table.rows[0])), False
    yield "", False


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--splits", type=lambda text: [int(part) for part in text.split(",")], default=[6, 8])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=6)
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
