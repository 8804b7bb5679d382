"""``twinpool sim compare | capacity | tune | policies``: many runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from twinpool.cli import sim
from twinpool.cli.common import ConfigFile, SetOptions, reporting
from twinpool.cli.sim import (
    Both, ChunkTokens, Decode, ItlMs, JsonFile, Limit, Parameters, PolicyName, Prefill, Processes, ProfileName, Scenario,
    Screen, Seed, SkipBad, Speed, Spread, Target, TraceFile, TtftFactor, TtftMs, load_trace, settings_of,
)  # fmt: skip
from twinpool.errors import ConfigError
from twinpool.router.policy.registry import DEFAULT, POLICIES
from twinpool.sim import present
from twinpool.sim.search import Job, Runner, capacity, runner
from twinpool.sim.settings import Settings

Policies = Annotated[list[str] | None, typer.Option("--policy", metavar="NAME", help="Again for each.")]
Configs = Annotated[list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="Again for each.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs in all.")]
SECOND = 2  # pools


@sim.app.command()
def compare(
    trace: TraceFile, policy: Policies = None, config: Configs = None, prefill: Prefill = None, decode: Decode = None,
    both: Both = None, profile: ProfileName = None, speed: Speed = 1.0, limit: Limit = None,
    spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None, slo_ttft_factor: TtftFactor = None,
    slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None, scenario: Scenario = None, seed: Seed = 0,
    skip_bad: SkipBad = False, processes: Processes = 0, json_file: JsonFile = None,
) -> None:  # fmt: skip
    """Several policies or configs on the same traffic, side by side; without any, all policies."""
    with reporting():
        screen = Screen(json_file)
        flags = {"prefill": prefill, "decode": decode, "both": both, "profile": profile, "ttft_ms": slo_ttft_ms,
                 "ttft_factor": slo_ttft_factor, "itl_ms": slo_itl_ms, "chunk_tokens": chunk_tokens}  # fmt: skip
        chosen: list[tuple[str, Settings]] = []
        for file in config or [None]:
            base = settings_of(file, None, scenario, **flags)
            names = policy or ([base.policy] if config else sorted(POLICIES))
            for name in names:
                label = name if file is None else file.stem if len(names) == 1 else f"{file.stem}/{name}"
                parameters = base.parameters if name == base.policy else {}
                chosen.append((label, replace(base, policy=name, parameters=parameters)))
        loaded = load_trace(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        jobs = [Job(settings, speed) for _, settings in chosen]
        done = 0
        with screen.progress("comparing", len(jobs)) as bar, runner(loaded, processes) as made:

            def step() -> None:
                nonlocal done
                done += 1
                bar(done)

            summaries = made.summaries(jobs, step)
        labelled = [(label, summary) for (label, _), summary in zip(chosen, summaries, strict=True)]
        screen.write([{"label": label, **summary} for label, summary in labelled])
        if not screen.only_json:
            present.compare(labelled)


@sim.app.command("capacity")
def capacity_command(
    trace: TraceFile, policy: PolicyName = None, param: Parameters = None, target: Target = 0.99,
    prefill: Prefill = None, decode: Decode = None, both: Both = None, profile: ProfileName = None, speed: Speed = 1.0,
    limit: Limit = None, spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None,
    slo_ttft_factor: TtftFactor = None, slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None,
    scenario: Scenario = None, seed: Seed = 0, skip_bad: SkipBad = False, processes: Processes = 0,
    json_file: JsonFile = None, config_file: ConfigFile = None, sets: SetOptions = None,
) -> None:  # fmt: skip
    """The largest speed-up of the trace, to 0.5 %, at which the target share of requests meets its SLO."""
    from twinpool.sim.bound import bound_capacity

    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                               profile=profile, policy=policy, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor,
                               itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens)  # fmt: skip
        loaded = load_trace(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        with screen.progress("searching", 1.0) as bar, runner(loaded, processes) as made:
            found = capacity(made, settings, target, start=speed, step=lambda low, high: bar(_closeness(low, high)))
            bound = bound_capacity(loaded, settings, target)
        rate = len(loaded) / loaded.duration_s * found.speed if loaded.duration_s else None
        figures = {"policy": settings.policy, "capacity": found.speed, "requests_per_s": rate, "bound": bound,
                   "share_of_bound": found.speed / bound if bound else None, "target": target, "runs": found.runs,
                   "requests": len(loaded), "trace": loaded.name}  # fmt: skip
        screen.write(figures)
        if not screen.only_json:
            _show(figures, settings)


def _closeness(low: float, high: float) -> float:
    """How far the search is, 0 to 1: the bracket in halvings on the way to the tolerance."""
    if low <= 0.0 or high == math.inf:
        return 0.0
    return max(0.0, min(1.0, 1.0 - math.log2(max(1.0, math.log(high / low) / math.log(1.005))) / 8))


def _show(figures: dict[str, Any], settings: Settings) -> None:
    console = Console()
    table = Table(show_header=False, box=None)
    table.add_row("policy", settings.policy)
    table.add_row("workers", " + ".join(settings.names()))
    table.add_row(f"capacity at {figures['target']:.1%}", f"{figures['capacity']:.3f} x the trace's speed")
    if figures["requests_per_s"] is not None:
        table.add_row("", f"{figures['requests_per_s']:.2f} requests/s")
    table.add_row("no policy can do more than", f"{figures['bound']:.3f} x (clairvoyant bound)")
    table.add_row("share of the bound", f"{figures['share_of_bound']:.1%}")
    console.print(table)


@sim.app.command()
def tune(
    trace: TraceFile, gpus: Gpus, policy: PolicyName = None, param: Parameters = None, target: Target = 0.99,
    profile: ProfileName = None, limit: Limit = None, spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None,
    slo_ttft_factor: TtftFactor = None, slo_itl_ms: ItlMs = None, seed: Seed = 0, skip_bad: SkipBad = False,
    processes: Processes = 0, json_file: JsonFile = None, config_file: ConfigFile = None, sets: SetOptions = None,
) -> None:  # fmt: skip
    """The best split of so many GPUs into prefill and decode workers, and the best chunk size."""
    from twinpool.sim.tune import tune as search

    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, None, param, profile=profile, policy=policy, ttft_ms=slo_ttft_ms,
                               ttft_factor=slo_ttft_factor, itl_ms=slo_itl_ms)  # fmt: skip
        loaded = load_trace(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        with screen.progress("tuning", 1.0) as bar, runner(loaded, processes) as made:
            tuned = search(made, loaded, settings, gpus, target, bar)
        screen.write(tuned.figures())
        if not screen.only_json:
            tuned.show(Console())


@sim.app.command()
def policies(json_file: JsonFile = None) -> None:
    """Names, parameters and sources of all policies."""
    with reporting():
        screen = Screen(json_file)
        screen.write({"default": DEFAULT, "policies": [info.figures() for _, info in sorted(POLICIES.items())]})
        if not screen.only_json:
            table = Table("policy", "what it does", "parameters", "source")
            for name, info in sorted(POLICIES.items()):
                knobs = ", ".join(f"{key}={knob.default}" for key, knob in info.parameters.items())
                table.add_row(f"{name} (default)" if name == DEFAULT else name, info.summary, knobs, info.source)
            Console().print(table)


__all__ = ["Runner", "ConfigError", "compare", "policies", "tune"]
