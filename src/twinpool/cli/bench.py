"""``bench``: load on a running cell, and what it looked like from outside."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from twinpool.cli.common import FAILED, Address, ConfigFile, loaded, reporting
from twinpool.cli.load import Lengths, Load, LoadSpec, Sample, run_load
from twinpool.client import AsyncClient
from twinpool.deploy.local import dialable

PERCENTILES = (50, 90, 99)
REFRESH_HZ = 4


def bench(
    rate: Annotated[float | None, typer.Option(help="Requests a second, arriving by a Poisson process.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Callers that wait for their answers.")] = None,
    input_tokens: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Tokens of a prompt.")] = "128",
    output_tokens: Annotated[str, typer.Option(metavar="N|MIN:MAX", help="Tokens of an answer.")] = "32",
    duration: Annotated[float | None, typer.Option(help="Seconds in which requests start.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests in all; 32 where no duration is given.")] = None,
    shared_prefix: Annotated[int, typer.Option(min=0, help="First tokens that all prompts share.")] = 0,
    seed: Annotated[int, typer.Option(help="Of prompts, lengths and arrivals.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Deadline of a request in seconds.")] = None,
    klass: Annotated[str, typer.Option("--class", help="SLO class.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all figures there.")] = None,
    address: Address = None,
    config_file: ConfigFile = None,
) -> None:
    """Put load on a running cluster and show TTFT, ITL and throughput; exit status 1 where a request failed."""
    with reporting():
        spec = LoadSpec(
            input_tokens=Lengths.parse(input_tokens),
            output_tokens=Lengths.parse(output_tokens),
            rate=rate,
            concurrency=concurrency if rate is not None or concurrency is not None else 1,
            duration_s=duration,
            requests=requests if duration is not None or requests is not None else 32,
            shared_prefix=shared_prefix,
            timeout_s=timeout,
            seed=seed,
        )
        spec.check()
        target = address or dialable(loaded(config_file, None).config.edge.inference)
        load = uvloop.run(_run(target, klass, spec))
        figures = report(spec, load)
        if json_file is not None:
            json_file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        _print(figures)
        if figures["errors"]:
            raise typer.Exit(FAILED)


def percentile(values: list[float], percent: float) -> float:
    """Nearest-rank percentile of sorted ``values``; 0 where there are none."""
    if not values:
        return 0.0
    rank = -(-percent * len(values) // 100)  # ceil
    return values[max(0, int(rank) - 1)]


def report(spec: LoadSpec, load: Load) -> dict[str, Any]:
    """Figures of a run: milliseconds, tokens and requests a second, counts by error."""
    good = [sample for sample in load.samples if not sample.error]
    seconds = load.seconds or 1.0
    return {
        "spec": asdict(spec),
        "seconds": round(load.seconds, 3),
        "requests": {"sent": load.sent, "completed": len(good), "a_second": round(len(good) / seconds, 3)},
        "errors": dict(Counter(sample.error for sample in load.samples if sample.error)),
        "paths": dict(Counter(sample.path for sample in good)),
        "attempts_lost": sum(max(0, sample.attempts - 1) for sample in good),
        "tokens": _tokens(good, seconds),
        "ttft_ms": _spread([sample.ttft_s for sample in good]),
        "itl_ms": _spread([gap for sample in good for gap in sample.gaps_s]),
        "longest_gap_ms": _spread([sample.longest_gap_s for sample in good]),
        "total_ms": _spread([sample.total_s for sample in good]),
        "sent_late_ms": _spread([sample.late_s for sample in load.samples]),
    }


def _tokens(good: list[Sample], seconds: float) -> dict[str, float]:
    prompt = sum(sample.prompt_tokens for sample in good)
    completion = sum(sample.completion_tokens for sample in good)
    return {
        "prompt": prompt,
        "cached": sum(sample.cached_tokens for sample in good),
        "completion": completion,
        "prompt_a_second": round(prompt / seconds, 1),
        "completion_a_second": round(completion / seconds, 1),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    """Mean, percentiles and maximum in milliseconds."""
    values = sorted(seconds)
    spread = {"mean": sum(values) / len(values) if values else 0.0}
    spread |= {f"p{percent}": percentile(values, percent) for percent in PERCENTILES}
    spread["max"] = values[-1] if values else 0.0
    return {name: round(1000 * value, 3) for name, value in spread.items()}


async def _run(address: str, klass: str, spec: LoadSpec) -> Load:
    line = Text("connecting")

    def changed(load: Load) -> None:
        failed = sum(1 for sample in load.samples if sample.error)
        running = load.sent - len(load.samples)
        line.plain = f"{load.sent} sent, {running} running, {failed} failed, {load.tokens} tokens received"

    with Live(line, console=Console(stderr=True), refresh_per_second=REFRESH_HZ, transient=True):
        async with AsyncClient(address, klass=klass) as client:
            return await run_load(client, spec, changed)


def _print(figures: dict[str, Any]) -> None:
    console = Console(highlight=False)
    requests, tokens = figures["requests"], figures["tokens"]
    console.print(
        f"{requests['completed']} of {requests['sent']} requests in {figures['seconds']:.1f} s: "
        f"{requests['a_second']:.2f} requests/s, {tokens['completion_a_second']:.1f} output tokens/s, "
        f"{tokens['prompt_a_second']:.1f} prompt tokens/s ({tokens['cached']} of {tokens['prompt']} cached)",
        soft_wrap=True,
    )
    console.print(f"paths {figures['paths'] or 'none'}, attempts lost {figures['attempts_lost']}")
    table = Table("ms", *(f"p{percent}" for percent in PERCENTILES), "mean", "max")
    for column in table.columns[1:]:
        column.justify = "right"
    names = {"ttft_ms": "TTFT", "itl_ms": "ITL", "longest_gap_ms": "longest gap", "total_ms": "whole request"}
    for key, name in names.items():
        spread = figures[key]
        table.add_row(name, *(f"{spread[k]:.1f}" for k in (*(f"p{p}" for p in PERCENTILES), "mean", "max")))
    if requests["completed"]:
        console.print(table)
    for error, count in figures["errors"].items():
        console.print(f"{count} failed: {error}")
