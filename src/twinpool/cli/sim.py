"""``twinpool sim``: questions about a cluster that is not there yet, answered by the router's own decisions.

Here are the options that its commands share and ``replay``; sim_search.py has the commands that run more than once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from twinpool.cli.common import ConfigFile, SetOptions, reporting
from twinpool.errors import ConfigError
from twinpool.sim.scenario import from_config, with_scenario
from twinpool.sim.settings import DEFAULT_PROFILE, Settings
from twinpool.workers.eviction import RULES

if TYPE_CHECKING:  # numpy and the router's core take half a second to import: only commands that simulate wait for it
    from twinpool.sim.trace import Trace

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Replay traffic through the router's decisions.")

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="Trace file, gzip or not; the format is detected.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All figures as JSON; - for stdout.")]
Prefill = Annotated[int | None, typer.Option(min=0, help="Prefill workers; 4 if not given.")]
Decode = Annotated[int | None, typer.Option(min=0, help="Decode workers; 4 if not given.")]
Both = Annotated[int | None, typer.Option(min=0, help="Workers of both pools; alone: no others.")]
ProfileName = Annotated[str | None, typer.Option(help=f"GPU/model/TP; {DEFAULT_PROFILE} if not given.")]
PolicyName = Annotated[str | None, typer.Option(help="See `twinpool sim policies`; least_seconds if not given.")]
Parameters = Annotated[list[str] | None, typer.Option("--param", metavar="NAME=VALUE", help="Of the policy.")]
Speed = Annotated[float, typer.Option(min=1e-6, help="Arrivals so many times as fast.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many requests.")]
Spread = Annotated[bool, typer.Option("--spread-timestamps", help="Spread stamps that were rounded to a grid.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed lines out and count them.")]
TtftMs = Annotated[float | None, typer.Option(min=0.001, help="Fixed part of the TTFT SLO; 1000 if not given.")]
TtftFactor = Annotated[float | None, typer.Option(min=0, help="Plus this x the prompt's own prefill; 2.")]
ItlMs = Annotated[float | None, typer.Option(min=0.001, help="ITL SLO; 50 if not given.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
ChunkTokens = Annotated[int | None, typer.Option(min=1, help="Most prompt tokens in a step; 2048 if not given.")]
PrefillError = Annotated[
    float | None, typer.Option(min=0, metavar="SIGMA", help="Lognormal error of predicted prompt work; 0.")
]
OutputError = Annotated[
    float | None, typer.Option(min=0, metavar="SIGMA", help="Lognormal error of output lengths; 0.")
]
KvDelayMs = Annotated[float | None, typer.Option(min=0, help="News of prefix caches come so late; 0.")]
KvLoss = Annotated[float | None, typer.Option(min=0, max=1, metavar="SHARE", help="Of those messages lost; 0.")]
Eviction = Annotated[str | None, typer.Option(help=f"What leaves the cache first: {', '.join(RULES)}; lru.")]
Processes = Annotated[int, typer.Option(min=0, help="Runs at a time; 0: one a core.")]
Scenario = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="YAML of failures and role changes, at seconds of the sped-up trace."),
]
Target = Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of requests that must meet their SLO.")]


def settings_of(
    config_file: Path | None,
    sets: list[str] | None,
    scenario: Path | None = None,
    params: list[str] | None = None,
    **flags: Any,
) -> Settings:
    """The YAML's settings with the flags that were given on top. Raises ConfigError.

    Parameters are those of the flags, if there are any, else the YAML's where its policy is kept.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("ttft_ms", "itl_ms", "kv_delay_ms"):
        if name in given:
            given[name.replace("_ms", "_s")] = given.pop(name) / 1000.0
    profile = given.pop("profile", None)
    named = config_file is not None or bool(sets)
    base = from_config(config_file, sets, profile) if named else Settings(profile=profile or DEFAULT_PROFILE)
    if flags.get("both") and flags.get("prefill") is None and flags.get("decode") is None:
        given |= {"prefill": 0, "decode": 0}
    if params:
        given["parameters"] = dict(_parameter(text) for text in params)
    elif given.get("policy", base.policy) != base.policy:
        given["parameters"] = {}
    settings = replace(base, **given)
    return settings if scenario is None else with_scenario(settings, scenario)


def ready(settings: Settings, seed: int) -> Settings:
    """The settings, with a seed for errors and random policies, and what a calibrated profile knows of the edge.

    Raises ConfigError where policy, a parameter of it or profile does not exist: before a trace is read.
    """
    from twinpool.router.policy.registry import POLICIES, make_policy
    from twinpool.sim.profiles import with_measured

    info = POLICIES.get(settings.policy)
    if info is not None and "seed" in info.parameters:
        settings = replace(settings, parameters={"seed": seed} | settings.parameters)
    if settings.prefill_error or settings.output_error or settings.kv_loss:
        settings = replace(settings, error_seed=seed)
    make_policy(settings.policy, settings.parameters)
    return with_measured(settings)


def _parameter(text: str) -> tuple[str, float | str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--param {text}: must be NAME=VALUE; `twinpool sim policies` lists the names")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


class Screen:
    """Where tables, notices and the progress bar go: stderr where stdout is to have JSON only."""

    def __init__(self, json_file: Path | None) -> None:
        """Raises ConfigError where the file could not be written: before hours of simulation, not after."""
        self.json_file = json_file
        self.only_json = json_file is not None and str(json_file) == "-"
        self.errors = Console(stderr=True)
        if json_file is not None and not self.only_json:
            if not json_file.parent.is_dir():
                raise ConfigError(f"--json {json_file}: there is no folder {json_file.parent}: create it first")
            if json_file.is_dir():
                raise ConfigError(f"--json {json_file}: is a folder: give the name of a file in it")

    def notices(self, notices: list[str]) -> None:
        """Sentences about the trace or the run."""
        for notice in notices:
            typer.echo(f"notice: {notice}", err=True)

    def write(self, figures: Any) -> None:
        """The JSON, where one was asked for. Raises ConfigError where it cannot be written."""
        if self.json_file is None:
            return
        text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
        if self.only_json:
            sys.stdout.write(text)
            return
        try:
            self.json_file.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {self.json_file}: cannot be written ({error.strerror})") from None

    @contextmanager
    def progress(self, what: str, total: float | None) -> Iterator[Callable[[float], None]]:
        """A bar on a terminal's stderr; the yielded function takes how much is done."""
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        silent = not self.errors.is_terminal
        with Progress(*columns, console=self.errors, transient=True, disable=silent) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)


class Loaded(NamedTuple):
    """A trace as the flags want it, what there is to say about it, and the real seconds that reading it took."""

    trace: Trace
    notices: list[str]
    wall_s: float


def load_trace(
    path: Path, screen: Screen, *, limit: int | None, spread: bool, seed: int, skip_bad: bool, factor: float = 1.0
) -> Trace:
    """The trace as the flags want it, its notices told. Raises ConfigError."""
    return load(path, screen, limit=limit, spread=spread, seed=seed, skip_bad=skip_bad, factor=factor).trace


def load(
    path: Path, screen: Screen, *, limit: int | None, spread: bool, seed: int, skip_bad: bool, factor: float = 1.0
) -> Loaded:
    """``load_trace``, and what was told and how long it took."""
    from twinpool.sim import readers
    from twinpool.sim import trace as traces

    started = perf_counter()
    trace, notices = readers.read_trace(path, skip_bad=skip_bad, spread_seed=seed if spread else None)
    if limit is not None:
        trace = traces.limit(trace, limit)
    screen.notices(notices)
    return Loaded(traces.speed(trace, factor), list(notices), perf_counter() - started)


def unservable(summary: dict[str, Any]) -> list[str]:
    """A sentence where requests of a run were larger than any worker's memory."""
    from twinpool.sim.search import UNSERVABLE

    count = summary["refusals"].get(UNSERVABLE, 0)
    if not count:
        return []
    sentence = (
        f"{count} of {summary['requests']} requests need more KV memory than any worker has; they were refused "
        f"({UNSERVABLE}) and count as missed: leave them out, or take a profile with more memory"
    )
    return [sentence]


@app.command()
def replay(
    trace: TraceFile, prefill: Prefill = None, decode: Decode = None, both: Both = None, profile: ProfileName = None,
    policy: PolicyName = None, param: Parameters = None, speed: Speed = 1.0, limit: Limit = None,
    spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None, slo_ttft_factor: TtftFactor = None,
    slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None, scenario: Scenario = None, seed: Seed = 0,
    prefill_error: PrefillError = None, output_error: OutputError = None, kv_delay_ms: KvDelayMs = None,
    kv_loss: KvLoss = None, skip_bad: SkipBad = False, json_file: JsonFile = None, config_file: ConfigFile = None,
    sets: SetOptions = None, eviction: Eviction = None,
) -> None:  # fmt: skip
    """One run: latencies, attainment, goodput, cache hits."""
    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                               profile=profile, policy=policy, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor,
                               itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens, prefill_error=prefill_error,
                               output_error=output_error, kv_delay_ms=kv_delay_ms, kv_loss=kv_loss,
                               eviction=eviction)  # fmt: skip
        settings = ready(settings, seed)
        loaded = load(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad, factor=speed)
        from twinpool.sim import present
        from twinpool.sim.replay import replay as run

        with screen.progress("replaying", len(loaded.trace)) as done:
            result = run(loaded.trace, settings, watch=lambda count, _: done(count))
        result.wall.load_s = loaded.wall_s
        summary = result.summary()
        late = unservable(summary)
        screen.notices(late)
        screen.write({"trace": loaded.trace.name, **summary, "notices": loaded.notices + late})
        if not screen.only_json:
            present.show(summary)
