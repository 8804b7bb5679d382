"""``twinpool sim``: questions about a cluster that is not there yet, answered by the router's own decisions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from twinpool.cli.common import ConfigFile, SetOptions, reporting
from twinpool.errors import ConfigError
from twinpool.sim import present
from twinpool.sim.scenario import from_config, with_scenario
from twinpool.sim.settings import DEFAULT_PROFILE, Settings

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Replay traffic through the router's decisions.")

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="Trace file, gzip or not; the format is detected.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures as JSON; - for stdout.")]
Prefill = Annotated[int | None, typer.Option(min=0, help="Prefill workers; 4 if not given.")]
Decode = Annotated[int | None, typer.Option(min=0, help="Decode workers; 4 if not given.")]
Both = Annotated[int | None, typer.Option(min=0, help="Workers of both pools.")]
ProfileName = Annotated[str | None, typer.Option(help=f"GPU/model/TP; {DEFAULT_PROFILE} if not given.")]
PolicyName = Annotated[str | None, typer.Option(help="See `twinpool sim policies`.")]
Parameters = Annotated[list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="Of the policy.")]
Speed = Annotated[float, typer.Option(min=1e-6, help="Arrivals so many times as fast.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")]
Spread = Annotated[bool, typer.Option("--spread-timestamps", help="Spread stamps that were rounded to a grid.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed lines out and count them.")]
TtftMs = Annotated[float | None, typer.Option(min=0.001, help="Fixed part of the TTFT SLO; 1000 if not given.")]
TtftFactor = Annotated[float | None, typer.Option(min=0, help="Plus this x the prompt's own prefill; 2.")]
ItlMs = Annotated[float | None, typer.Option(min=0.001, help="ITL SLO; 50 if not given.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
ChunkTokens = Annotated[int | None, typer.Option(min=1, help="Most prompt tokens in a step; 2048 if not given.")]
Processes = Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a core.")]
Scenario = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML of failures and role changes.")]
Target = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of requests that must meet their SLO.")]


def settings_of(
    config_file: Path | None, sets: list[str] | None, scenario: Path | None = None, params: list[str] | None = None,
    **flags: Any,
) -> Settings:  # fmt: skip
    """The YAML's settings with the flags that were given on top. Raises ConfigError."""
    base = from_config(config_file, sets) if config_file is not None or sets else Settings()
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("ttft_ms", "itl_ms"):
        if name in given:
            given[name.replace("_ms", "_s")] = given.pop(name) / 1000.0
    if flags.get("both") is not None and flags.get("prefill") is None and flags.get("decode") is None:
        given |= {"prefill": 0, "decode": 0}
    if params:
        given["parameters"] = dict(_parameter(text) for text in params)
    settings = replace(base, **given)
    return settings if scenario is None else with_scenario(settings, scenario)


def _parameter(text: str) -> tuple[str, float | str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--param {text}: must be NAME=VALUE; `twinpool sim policies` lists the names")
    try:
        return name, float(value)
    except ValueError:
        return name, value


class Screen:
    """Where tables, notices and the progress bar go: stderr where stdout is to have JSON only."""

    def __init__(self, json_file: Path | None) -> None:
        self.json_file = json_file
        self.only_json = json_file is not None and str(json_file) == "-"
        self.console = Console(stderr=self.only_json)
        self.errors = Console(stderr=True)

    def notices(self, notices: list[str]) -> None:
        """Sentences about the trace."""
        for notice in notices:
            self.errors.print(f"note: {notice}", style="yellow", highlight=False, soft_wrap=True)

    def write(self, figures: Any) -> None:
        """The JSON, where one was asked for."""
        if self.json_file is None:
            return
        text = json.dumps(figures, indent=2) + "\n"
        if self.only_json:
            sys.stdout.write(text)
            return
        try:
            self.json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {self.json_file}: cannot be written ({error.strerror})") from None

    @contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """A bar; the yielded function takes how much is done."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.errors, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


def load_trace(
    path: Path, screen: Screen, *, limit: int | None, spread: bool, seed: int, skip_bad: bool, factor: float = 1.0
) -> Any:
    """The trace with what the flags change, its notices told."""
    from twinpool.sim import readers, trace as traces

    trace, notices = readers.read_trace(path, skip_bad=skip_bad)
    if limit is not None:
        trace = traces.limit(trace, limit)
    if spread:
        trace = traces.spread(trace, seed)
    else:
        notices += traces.quantised_notice(trace)
    screen.notices(notices)
    return traces.speed(trace, factor) if factor != 1.0 else trace


@app.command()
def replay(
    trace: TraceFile, prefill: Prefill = None, decode: Decode = None, both: Both = None, profile: ProfileName = None,
    policy: PolicyName = None, param: Parameters = None, speed: Speed = 1.0, limit: Limit = None,
    spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None, slo_ttft_factor: TtftFactor = None,
    slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None, scenario: Scenario = None, seed: Seed = 0,
    skip_bad: SkipBad = False, json_file: JsonFile = None, config_file: ConfigFile = None, sets: SetOptions = None,
) -> None:  # fmt: skip
    """One run: latencies, attainment, goodput, cache hits."""
    from twinpool.sim.replay import replay as run

    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                               profile=profile, policy=policy, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor,
                               itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens, seed=seed)  # fmt: skip
        loaded = load_trace(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad,
                            factor=speed)  # fmt: skip
        with screen.progress("replaying", len(loaded)) as done:
            result = run(loaded, settings, watch=lambda count, _: done(count))
        summary = result.summary()
        screen.write(summary)
        if not screen.only_json:
            present.show(summary)
