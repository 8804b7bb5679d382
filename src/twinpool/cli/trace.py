"""``trace stats|convert|generate``: look at traffic, change it, make it up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from twinpool.cli.common import reporting
from twinpool.errors import ConfigError
from twinpool.sim import generate as traffic
from twinpool.sim.readers import read_trace
from twinpool.sim.trace import Trace, limit, slice_time, speed
from twinpool.sim.trace_stats import Bursts, IdealHits, Lengths, Sessions, TraceStats
from twinpool.sim.trace_stats import stats as stats_of
from twinpool.sim.trace_write import FORMS, losses, trace_lines, write_trace

STDOUT = Path("-")

app = typer.Typer(help="Look at traffic traces, convert and generate them.", no_args_is_help=True)

TraceFile = Annotated[
    Path, typer.Argument(metavar="TRACE", help="Mooncake, Bailian, Azure, BurstGPT, a request log, ours; also gzip.")
]
TargetFile = Annotated[Path, typer.Argument(metavar="TARGET", help="File to write, gzip if it ends in .gz; -: stdout.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there; -: to stdout, and nothing else.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed lines out, and count them.")]
Spread = Annotated[
    bool, typer.Option("--spread-timestamps", help="Spread stamps that were rounded to a grid (Mooncake's to 3 s).")
]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Form = Annotated[
    str, typer.Option("--to", metavar="|".join(FORMS), help="twinpool keeps everything; other tools read mooncake.")
]


@app.command()
def stats(
    file: TraceFile,
    json_file: JsonFile = None,
    skip_bad: SkipBad = False,
    spread_timestamps: Spread = False,
    seed: Seed = 0,
) -> None:
    """Show what a trace holds: load, lengths, what prefix caches could save, bursts, sessions."""
    with reporting():
        with _working(f"reading {file}"):
            trace, notices = read_trace(file, skip_bad=skip_bad, spread_seed=seed if spread_timestamps else None)
            figures = stats_of(trace)
        _notify(notices)
        if json_file != STDOUT:
            _show(figures)
        _save(figures, notices, json_file)


@app.command()
def convert(
    source: TraceFile,
    target: TargetFile,
    form: Form = "twinpool",
    spread_timestamps: Spread = False,
    seed: Seed = 0,
    faster: Annotated[float, typer.Option("--speed", help="Times the load: times are divided by it.")] = 1.0,
    start: Annotated[float | None, typer.Option("--from", metavar="SECONDS", help="Leave out what is earlier.")] = None,
    end: Annotated[float | None, typer.Option("--until", metavar="SECONDS", help="Leave out this and later.")] = None,
    first: Annotated[int | None, typer.Option("--limit", metavar="N", help="Only the first N requests.")] = None,
    skip_bad: SkipBad = False,
    json_file: JsonFile = None,
) -> None:
    """Write a trace in another format: first cut by time, then by number, then sped up."""
    with reporting():
        _one_on_stdout(target, json_file)
        with _working(f"reading {source}"):
            trace, notices = read_trace(source, skip_bad=skip_bad, spread_seed=seed if spread_timestamps else None)
        if start is not None or end is not None:
            trace = slice_time(trace, start or 0.0, float("inf") if end is None else end)
        trace = trace if first is None else limit(trace, first)
        _deliver(speed(trace, faster), target, form, notices, json_file)


@app.command()
def generate(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=f"{', '.join(traffic.kind_names())}.")],
    target: TargetFile,
    requests: Annotated[int | None, typer.Option(help="Requests in all; 1,000 where no duration is given.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds in which requests arrive.")] = None,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 1.0,
    bursts: Annotated[str, typer.Option(help=f"How sessions begin: {', '.join(traffic.BURSTS)}.")] = "poisson",
    cv: Annotated[float, typer.Option(help="Coefficient of variation of the gaps, for gamma.")] = 2.0,
    block_tokens: Annotated[
        int, typer.Option(help="Prompt tokens that one hash id stands for.")
    ] = traffic.BLOCK_TOKENS,
    ramp: Annotated[bool, typer.Option("--ramp", help="Nobody is there at 0: load grows with the sessions.")] = False,
    seed: Seed = 0,
    form: Form = "twinpool",
    json_file: JsonFile = None,
) -> None:
    """Make up traffic: sessions with shared prefixes, think times and bursts, the same for the same seed."""
    with reporting():
        _one_on_stdout(target, json_file)
        with _working(f"generating {kind} traffic"):
            trace = traffic.generate(
                kind,
                requests=1000 if requests is None and seconds is None else requests,
                seconds=seconds,
                rate=rate,
                seed=seed,
                bursts=bursts,
                cv=cv,
                block_tokens=block_tokens,
                ramp=ramp,
            )
        _deliver(trace, target, form, [], json_file)


# --- output -------------------------------------------------------------------------------------------------------


@contextmanager
def _working(what: str) -> Iterator[None]:
    """Something that moves, on a terminal only."""
    with Console(stderr=True).status(what):
        yield


def _notify(notices: list[str]) -> None:
    for notice in notices:
        typer.echo(f"notice: {notice}", err=True)


def _one_on_stdout(target: Path, json_file: Path | None) -> None:
    if target == STDOUT == json_file:
        raise ConfigError("the trace and --json can not both go to stdout: give one of them a file")


def _deliver(trace: Trace, target: Path, form: str, notices: list[str], json_file: Path | None) -> None:
    """Write the trace, say so on stderr, and save its figures where wanted."""
    if target == STDOUT:
        for line in trace_lines(trace, form):
            sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        notices = notices + losses(trace, form)
    else:
        with _working(f"writing {target}"):
            notices = notices + write_trace(trace, target, form)
    _notify(notices)
    typer.echo(f"{target}: {len(trace)} requests in {trace.duration_s:.1f} s", err=True)
    if json_file is not None:
        _save(stats_of(trace), notices, json_file)


def _save(figures: TraceStats, notices: list[str], json_file: Path | None) -> None:
    if json_file is None:
        return
    text = json.dumps({**asdict(figures), "notices": notices}, indent=2)
    if json_file == STDOUT:
        typer.echo(text)
        return
    try:
        json_file.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{json_file}: cannot be written ({error.strerror or error})") from None


def _show(figures: TraceStats) -> None:
    console = Console(highlight=False)
    console.print(
        f"{figures.name}: {figures.requests:,} requests in {figures.duration_s:,.1f} s, {figures.rate:.3f} a second",
        soft_wrap=True,
    )
    lengths = Table("tokens", "mean", "p50", "p90", "p99", "max", "all")
    for column in lengths.columns[1:]:
        column.justify = "right"
    for name, row in (("prompt", figures.input), ("output", figures.output)):
        lengths.add_row(name, *_cells(row))
    console.print(lengths)
    facts = Table.grid(padding=(0, 2))
    for name, text in (*_hit_rows(figures.hits), *_session_rows(figures.sessions), *_burst_rows(figures.bursts)):
        facts.add_row(name, text)
    console.print(facts)


def _cells(row: Lengths) -> list[str]:
    return [f"{row.mean:,.1f}", *(f"{value:,}" for value in (row.p50, row.p90, row.p99, row.max, row.total))]


def _hit_rows(hits: IdealHits | None) -> list[tuple[str, str]]:
    if hits is None:
        return [("prefix hits", "unknown: no hash ids")]
    rows = [
        ("ideal prefix hits", f"{hits.blocks:.2%} of full blocks, {hits.tokens:.2%} of tokens (infinite cache)"),
        ("  with partial blocks", f"{hits.blocks_with_tails:.2%} of blocks, {hits.tokens_with_tails:.2%} of tokens"),
        ("distinct blocks", f"{hits.distinct_blocks:,} of {hits.block_tokens} tokens"),
    ]
    return rows


def _session_rows(sessions: Sessions | None) -> list[tuple[str, str]]:
    if sessions is None:
        return [("sessions", "unknown")]
    text = f"{sessions.count:,}, of {sessions.mean_turns:.2f} requests on average, {sessions.max_turns} at most"
    return [("sessions", text), ("closed loop", f"{sessions.followers:,} requests wait for the end of another")]


def _burst_rows(bursts: Bursts) -> list[tuple[str, str]]:
    rows = [
        ("gaps", f"coefficient of variation {bursts.gap_cv:.2f} (Poisson: 1)"),
        (
            "in about 10 s",
            f"variance over mean {bursts.dispersion:.2f} (Poisson: 1), busiest {bursts.peak_to_mean:.2f}x the mean",
        ),
    ]
    if bursts.quantum_s:
        rows.append(("quantised", f"to about {bursts.quantum_s:.3g} s: both figures above come from that, too"))
    return rows
