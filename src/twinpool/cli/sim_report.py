"""``twinpool sim report``: one file to look at, of what the other commands print."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twinpool import __version__
from twinpool.cli import sim
from twinpool.cli.common import ConfigFile, SetOptions, reporting
from twinpool.cli.sim_search import Policies
from twinpool.errors import ConfigError
from twinpool.sim.settings import Settings

Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="HTML file to write.")]
Gpus = Annotated[int, typer.Option(min=0, help="GPUs of the ratio curve; 0: as many as the cluster has.")]
Loads = Annotated[bool, typer.Option("--loads/--no-loads", help="Goodput against load: runs at several speeds.")]
Splits = Annotated[bool, typer.Option("--splits/--no-splits", help="The ratio curve: capacities of all splits.")]


@sim.app.command()
def report(
    trace: sim.TraceFile, output: Output = Path("report.html"), policy: Policies = None, param: sim.Parameters = None,
    gpus: Gpus = 0, loads: Loads = True, splits: Splits = True, target: sim.Target = 0.99, prefill: sim.Prefill = None,
    decode: sim.Decode = None, both: sim.Both = None, profile: sim.ProfileName = None, speed: sim.Speed = 1.0,
    limit: sim.Limit = None, spread_timestamps: sim.Spread = False, slo_ttft_ms: sim.TtftMs = None,
    slo_ttft_factor: sim.TtftFactor = None, slo_itl_ms: sim.ItlMs = None, chunk_tokens: sim.ChunkTokens = None,
    scenario: sim.Scenario = None, seed: sim.Seed = 0, skip_bad: sim.SkipBad = False, processes: sim.Processes = 0,
    json_file: sim.JsonFile = None, config_file: ConfigFile = None, sets: SetOptions = None,
) -> None:  # fmt: skip
    """Pictures and figures of a trace in one HTML file: distributions, courses over time, capacity, the best ratio."""
    from twinpool.sim.report import Plan, gather
    from twinpool.sim.report_sections import page_of

    with reporting():
        screen = sim.Screen(json_file)
        base = sim.settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                               profile=profile, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor, itl_ms=slo_itl_ms,
                               chunk_tokens=chunk_tokens)  # fmt: skip
        chosen = _chosen(base, policy, param)
        _writable(output)
        loaded = sim.load_trace(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad)
        plan = Plan(speed, target, loads, splits, gpus, processes)
        made = gather(loaded, chosen, plan, screen.progress, versions())
        screen.notices(list(made.notices))
        _write(output, page_of(made).html())
        screen.write(made.figures() | {"report": str(output)})
        if not screen.only_json:
            Console().print(f"{output}: open it in a browser", highlight=False, soft_wrap=True)


def versions() -> dict[str, str]:
    """What a report was made with."""
    return {"twinpool": __version__, platform.python_implementation(): platform.python_version()}


def _chosen(base: Settings, policies: list[str] | None, params: list[str] | None) -> list[tuple[str, Settings]]:
    """Settings by policy. sim.Parameters are those of the one policy that was named, or of the configuration's."""
    names = list(dict.fromkeys(policies or [base.policy]))
    if params and len(names) > 1:
        raise ConfigError("--param belongs to one policy: give one --policy only, or leave --param out")
    own = bool(params)
    return [
        (name, replace(base, policy=name, parameters=base.parameters if own or name == base.policy else {}))
        for name in names
    ]


def _writable(path: Path) -> None:
    """Raises ConfigError where the report cannot be written: better told before the runs than after."""
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}; make it first")


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from None
