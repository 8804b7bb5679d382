"""``twinpool sim compare | capacity | tune | policies``: many runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from twinpool.cli import sim
from twinpool.cli.common import ConfigFile, SetOptions, reporting
from twinpool.cli.sim import (
    Both,
    ChunkTokens,
    Decode,
    Eviction,
    ItlMs,
    JsonFile,
    KvDelayMs,
    KvLoss,
    Limit,
    OutputError,
    Parameters,
    PolicyName,
    Prefill,
    PrefillError,
    Processes,
    ProfileName,
    Scenario,
    Screen,
    Seed,
    SkipBad,
    Speed,
    Spread,
    Target,
    TraceFile,
    TtftFactor,
    TtftMs,
    load,
    ready,
    settings_of,
    unservable,
)
from twinpool.sim.settings import Settings

Policies = Annotated[list[str] | None, typer.Option("--policy", metavar="NAME", help="Again for each.")]
Configs = Annotated[list[Path] | None, typer.Option("--config", "-c", metavar="FILE", help="Again for each.")]
Gpus = Annotated[int, typer.Option(min=1, help="GPUs in all.")]
Start = Annotated[
    float, typer.Option("--speed", min=1e-6, help="Where the search begins; what it finds is of the trace's own speed.")
]
GRID = 1.005  # ratio of neighbouring speeds
HALVINGS = 8.0  # of the widest bracket, on the way to one step


@sim.app.command()
def compare(
    trace: TraceFile, policy: Policies = None, config: Configs = None, prefill: Prefill = None, decode: Decode = None,
    both: Both = None, profile: ProfileName = None, speed: Speed = 1.0, limit: Limit = None,
    spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None, slo_ttft_factor: TtftFactor = None,
    slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None, scenario: Scenario = None, seed: Seed = 0,
    prefill_error: PrefillError = None, output_error: OutputError = None, kv_delay_ms: KvDelayMs = None,
    kv_loss: KvLoss = None, skip_bad: SkipBad = False, processes: Processes = 0, json_file: JsonFile = None,
    eviction: Eviction = None,
) -> None:  # fmt: skip
    """Several policies or configs on the same traffic, side by side; without any, all built-in policies."""
    with reporting():
        screen = Screen(json_file)
        flags = {"prefill": prefill, "decode": decode, "both": both, "profile": profile, "ttft_ms": slo_ttft_ms,
                 "ttft_factor": slo_ttft_factor, "itl_ms": slo_itl_ms, "chunk_tokens": chunk_tokens,
                 "prefill_error": prefill_error, "output_error": output_error, "kv_delay_ms": kv_delay_ms,
                 "kv_loss": kv_loss, "eviction": eviction}  # fmt: skip
        chosen = _chosen(config or [], policy or [], scenario, seed, flags)
        loaded = load(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        from twinpool.sim import present
        from twinpool.sim.search import Job, runner

        jobs = [Job(settings, speed) for _, settings in chosen]
        with screen.progress("comparing", len(jobs)) as bar, runner(loaded.trace, processes) as made:
            over = [0]

            def step() -> None:
                over[0] += 1
                bar(over[0])

            summaries = made.summaries(jobs, step)
        labelled = [(label, summary) for (label, _), summary in zip(chosen, summaries, strict=True)]
        late = unservable(summaries[0])
        screen.notices(late)
        screen.write({"trace": loaded.trace.name, "speed": speed, "notices": loaded.notices + late,
                      "runs": [{"label": label, **summary} for label, summary in labelled]})  # fmt: skip
        if not screen.only_json:
            present.compare(labelled)


def _chosen(
    configs: list[Path], policies: list[str], scenario: Path | None, seed: int, flags: dict[str, Any]
) -> list[tuple[str, Settings]]:
    """Labels and settings of a comparison: each policy on each config."""
    from twinpool.router.policy.registry import POLICIES

    chosen: list[tuple[str, Settings]] = []
    files: list[Path | None] = [*configs] or [None]
    names: list[str | None] = [*dict.fromkeys(policies)] or ([None] if configs else [*sorted(POLICIES)])
    for file in files:
        for name in names:
            settings = ready(settings_of(file, None, scenario, None, policy=name, **flags), seed)
            label = [*([file.stem] if file is not None else []), *([name] if name is not None else [])]
            chosen.append(("/".join(label), settings))
    return chosen


@sim.app.command("capacity")
def capacity_command(
    trace: TraceFile, policy: PolicyName = None, param: Parameters = None, target: Target = 0.99,
    prefill: Prefill = None, decode: Decode = None, both: Both = None, profile: ProfileName = None, speed: Start = 1.0,
    limit: Limit = None, spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None,
    slo_ttft_factor: TtftFactor = None, slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None,
    scenario: Scenario = None, seed: Seed = 0, prefill_error: PrefillError = None, output_error: OutputError = None,
    kv_delay_ms: KvDelayMs = None, kv_loss: KvLoss = None, skip_bad: SkipBad = False, processes: Processes = 0,
    json_file: JsonFile = None, config_file: ConfigFile = None, sets: SetOptions = None,
    eviction: Eviction = None,
) -> None:  # fmt: skip
    """The largest speed-up of the trace, to 0.5 %, at which the target share of requests meets its SLO."""
    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                               profile=profile, policy=policy, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor,
                               itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens, prefill_error=prefill_error,
                               output_error=output_error, kv_delay_ms=kv_delay_ms, kv_loss=kv_loss,
                               eviction=eviction)  # fmt: skip
        settings = ready(settings, seed)
        loaded = load(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        from twinpool.sim.search import capacity, runner

        with screen.progress("searching", 1.0) as bar, runner(loaded.trace, processes) as made:
            limit_of_all = made.bound(settings, target)
            found = capacity(made, settings, target, start=speed, step=lambda low, high: bar(_closeness(low, high)))
            bound = limit_of_all.result()
        figures = {
            "trace": loaded.trace.name, "requests": len(loaded.trace), "policy": settings.policy,
            "parameters": settings.parameters, "profile": settings.profile, "prefill": settings.prefill,
            "decode": settings.decode, "both": settings.both, "target": target, "capacity": found.speed,
            "requests_per_s": _rate(loaded.trace, found.speed), "bound": bound if math.isfinite(bound) else None,
            "share_of_bound": found.speed / bound if 0.0 < bound < math.inf else None, "runs": found.runs,
            "notices": loaded.notices,
        }  # fmt: skip
        screen.write(figures)
        if not screen.only_json:
            _show_capacity(figures)


def _rate(trace: Any, speed: float) -> float | None:
    """Requests a second that a trace offers at a speed-up; None where that is not known before a run."""
    return len(trace) / trace.duration_s * speed if trace.duration_s and trace.after is None else None


def _closeness(low: float, high: float) -> float:
    """How far the search is, 0 to 1: the bracket in halvings on the way to one step of the grid."""
    if low <= 0.0 or high == math.inf:
        return 0.0
    steps = max(1.0, math.log(high / low) / math.log(GRID))
    return max(0.0, 1.0 - math.log2(steps) / HALVINGS)


def _show_capacity(figures: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    table.add_row("policy", figures["policy"])
    table.add_row("workers", _workers(figures))
    table.add_row(f"capacity at {figures['target']:.4g}", f"{figures['capacity']:.4g} x the trace's speed")
    if figures["requests_per_s"] is not None:
        table.add_row("", f"{figures['requests_per_s']:.4g} requests/s")
    if figures["bound"] is None:
        table.add_row("no policy can do more than", "no clairvoyant bound is known for this trace and target")
    else:
        table.add_row("no policy can do more than", f"{figures['bound']:.4g} x (clairvoyant bound)")
        table.add_row("share of the bound", f"{figures['share_of_bound']:.1%}")
    Console(highlight=False).print(table)


def _workers(figures: dict[str, Any]) -> str:
    parts = [(figures[pool], pool) for pool in ("prefill", "decode", "both") if figures[pool]]
    return f"{' + '.join(f'{count} {pool}' for count, pool in parts)} of {figures['profile']}"


@sim.app.command()
def tune(
    trace: TraceFile, gpus: Gpus, policy: PolicyName = None, param: Parameters = None, target: Target = 0.99,
    profile: ProfileName = None, limit: Limit = None, spread_timestamps: Spread = False, slo_ttft_ms: TtftMs = None,
    slo_ttft_factor: TtftFactor = None, slo_itl_ms: ItlMs = None, chunk_tokens: ChunkTokens = None, seed: Seed = 0,
    skip_bad: SkipBad = False, processes: Processes = 0, json_file: JsonFile = None, config_file: ConfigFile = None,
    sets: SetOptions = None,
) -> None:  # fmt: skip
    """The best split of so many GPUs into prefill and decode workers, and the best chunk size."""
    with reporting():
        screen = Screen(json_file)
        settings = settings_of(config_file, sets, None, param, profile=profile, policy=policy, ttft_ms=slo_ttft_ms,
                               ttft_factor=slo_ttft_factor, itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens)  # fmt: skip
        settings = ready(settings, seed)
        loaded = load(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        from twinpool.sim.search import runner
        from twinpool.sim.tune import tune as search

        with screen.progress("tuning", 1.0) as bar, runner(loaded.trace, processes) as made:
            tuned = search(made, loaded.trace, settings, gpus, target, bar)
        figures = tuned.figures()
        figures |= {"requests_per_s": _rate(loaded.trace, tuned.capacity), "notices": loaded.notices}
        screen.write(figures)
        if not screen.only_json:
            _show_tuned(figures)


def _show_tuned(figures: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    table.add_row("best split", f"{figures['prefill']} prefill + {figures['decode']} decode of {figures['profile']}")
    table.add_row("best chunk size", f"{figures['chunk_tokens']} tokens")
    rate = figures["requests_per_s"]
    per_second = "" if rate is None else f", {rate:.4g} requests/s"
    table.add_row(f"capacity at {figures['target']:.4g}", f"{figures['capacity']:.4g} x the trace's speed{per_second}")
    for name, title, unit in (
        ("goodput_rps_per_gpu", "goodput", "requests/s a GPU"),
        ("cost_per_million_tokens", "cost", "per million output tokens"),
        ("tokens_per_joule", "energy", "output tokens a joule"),
    ):
        table.add_row(title, "unknown" if figures[name] is None else f"{figures[name]:.4g} {unit}")
    used = figures["workers"] * figures["gpus_per_worker"]
    if used < figures["gpus"]:
        table.add_row("idle", f"{figures['gpus'] - used} GPUs: a worker has {figures['gpus_per_worker']}")
    console.print(table)
    console.print(_neighbours(figures))


def _neighbours(figures: dict[str, Any]) -> Table:
    table = Table("neighbour", "chunk", "capacity, less than the best's", box=None)
    for each in figures["neighbours"]:
        low, most = f"by {max(0.0, 100 * each['margin_at_least']):.1f}", each["margin_at_most"]
        margin = f"{low} % or more" if most is None else f"{low} to {max(0.0, 100 * most):.1f} %"
        table.add_row(f"{each['prefill']} + {each['decode']}", str(each["chunk_tokens"]), margin)
    return table


@sim.app.command()
def policies(json_file: JsonFile = None) -> None:
    """Names, parameters and sources of all policies."""
    from twinpool.router.policy.registry import DEFAULT, POLICIES, policy_names

    with reporting():
        screen = Screen(json_file)
        infos = [info for _, info in sorted(POLICIES.items())]
        installed = [name for name in policy_names() if name not in POLICIES]
        figures = [info.figures() for info in infos]
        screen.write({"default": DEFAULT, "policies": figures, "installed": installed})
        if screen.only_json:
            return
        table = Table("policy", "what it does", "parameters", "source")
        table.columns[0].no_wrap = True
        for info in infos:
            knobs = ", ".join(f"{key}={knob.default}" for key, knob in info.parameters.items())
            name = f"{info.name} (default)" if info.name == DEFAULT else info.name
            table.add_row(name, info.summary, knobs, info.source)
        for name in installed:
            table.add_row(name, "of an installed package", "", "")
        Console(highlight=False).print(table)
