"""Summaries as tables for a terminal: one run in full, or several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twinpool.sim.result import Summary

UNBOUNDED = 10_000  # columns
NONE = "-"
MORE, LESS = 1, -1  # which is better
TIMES = (("TTFT", "ttft_ms"), ("ITL", "itl_ms"), ("end to end", "e2e_ms"))
TIME_COLUMNS = ("mean", "p50", "p90", "p99", "max")


class Metric(NamedTuple):
    """A column of ``compare``: heading, path of keys in a summary, scale and format, and which way is better."""

    title: str
    path: tuple[str, ...]
    form: str
    scale: float = 1.0
    better: int = 0

    def value(self, summary: Summary) -> float | None:
        """The scaled figure; None where the summary has none."""
        found: Any = summary
        for key in self.path:
            found = found[key]
        return None if found is None else self.scale * float(found)

    def text(self, summary: Summary) -> str:
        """The figure as printed."""
        return _text(self.value(summary), self.form)


METRICS = (
    Metric("attain. %", ("attainment",), ".2f", 100.0, MORE),
    Metric("goodput /s", ("goodput_rps",), ".3f", 1.0, MORE),
    Metric("per GPU", ("goodput_rps_per_gpu",), ".4f", 1.0, MORE),
    Metric("refused", ("refused",), ".0f", 1.0, LESS),
    Metric("lost", ("lost",), ".0f", 1.0, LESS),
    Metric("TTFT p50", ("ttft_ms", "p50"), ".0f", 1.0, LESS),
    Metric("TTFT p99", ("ttft_ms", "p99"), ".0f", 1.0, LESS),
    Metric("ITL p50", ("itl_ms", "p50"), ".1f", 1.0, LESS),
    Metric("ITL p99", ("itl_ms", "p99"), ".1f", 1.0, LESS),
    Metric("gap p99", ("worst_gap_ms", "p99"), ".0f", 1.0, LESS),
    Metric("cached %", ("cached_token_share",), ".1f", 100.0, MORE),
    Metric("local %", ("path_share", "local"), ".1f", 100.0),
)
COST = Metric("cost /M", ("cost_per_million_tokens",), ".2f", 1.0, LESS)


def _text(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def show(summary: Summary, console: Console | None = None) -> None:
    """Prints one summary: what was simulated, the headline figures, times, deciles."""
    console = console or Console()
    slo = ", ".join(f"{name} {value:g}" for name, value in summary["slo"].items())
    policy, profile = escape(summary["policy"]), escape(summary["profile"])
    console.print(f"[bold]{policy}[/bold] on {profile}, {summary['gpus']} GPUs; SLO: {escape(slo)}")
    for table in (_headline(summary), _times(summary), _deciles(summary)):
        console.print(table)
    wall, rate = summary["wall_s"], _text(summary["requests_per_wall_s"], ",.0f")
    console.print(f"{wall:.2f} s of real time ({summary['wall_core']}), {rate} requests a second")
    console.print(f"digest {summary['digest']}", soft_wrap=True)


def _headline(summary: Summary) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    for label, text in _headline_rows(summary):
        table.add_row(escape(label), escape(text))
    return table


def _headline_rows(summary: Summary) -> list[tuple[str, str]]:
    counts = f"{summary['completed']:,} completed, {summary['refused']:,} refused, {summary['lost']:,} lost"
    rates = summary["throughput"]
    rows = [
        ("requests", f"{summary['requests']:,} in {summary['duration_s']:,.1f} s: {counts}"),
        ("attainment", f"{_percent(summary['attainment'])} of offered requests met their SLO"),
        ("goodput", f"{summary['goodput_rps']:.3f} requests/s, {_text(summary['goodput_rps_per_gpu'], '.4f')} a GPU"),
        ("throughput", f"{rates['requests_per_s']:.3f} requests/s, {rates['output_tokens_per_s']:,.0f} tokens/s"),
        ("cache", f"{_percent(summary['cached_token_share'])} of prompt tokens cached"),
        ("paths", ", ".join(f"{name} {_percent(share)}" for name, share in summary["path_share"].items())),
    ]
    return rows + _rows_if_known(summary)


def _rows_if_known(summary: Summary) -> list[tuple[str, str]]:
    """What not every run has."""
    rows = []
    if (transfer := summary["transfer_ms"])["mean"] is not None:
        rows.append(("transfer", f"{transfer['mean']:.1f} ms after the first token, p99 {transfer['p99']:.1f} ms"))
    if summary["refusals"]:
        rows.append(("refused for", ", ".join(f"{reason} {count:,}" for reason, count in summary["refusals"].items())))
    if summary["jain"] is not None:
        tenants = len(summary["attainment_by_tenant"])
        rows.append(("fairness", f"{summary['jain']:.4f}, Jain index of {tenants} tenants' attainment"))
    rows += [(f"class {name}", _percent(share)) for name, share in summary["attainment_by_class"].items()]
    if summary["cost_per_million_tokens"] is not None:
        rows.append(("cost", f"{summary['cost_per_million_tokens']:.2f} per million output tokens"))
    if summary["tokens_per_joule"] is not None:
        rows.append(("energy", f"{summary['tokens_per_joule']:.3f} output tokens per joule"))
    return rows


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100.0 * share:.2f} %"


def _times(summary: Summary) -> Table:
    table = Table("ms", box=None, pad_edge=False)
    for column in TIME_COLUMNS:
        table.add_column(column, justify="right")
    for label, key in (*TIMES, ("worst gap", "worst_gap_ms")):
        table.add_row(label, *(_text(summary[key].get(column), ",.1f") for column in TIME_COLUMNS))
    return table


def _deciles(summary: Summary) -> Table:
    """Attainment of the ten groups of prompts, shortest first: an average can hide that the longest were given up."""
    table = Table(box=None, pad_edge=False)
    table.add_column("prompts up to")
    for tokens in summary["decile_prompt_tokens"]:
        table.add_column(_text(tokens, ",d"), justify="right", no_wrap=True)
    table.add_row("met SLO, %", *(NONE if x is None else f"{100.0 * x:.1f}" for x in summary["attainment_by_decile"]))
    return table


def compare(summaries: Sequence[tuple[str, Summary]], console: Console | None = None) -> None:
    """Prints (label, summary) pairs, a row each in the order given, in several parts where one would be too wide.

    The best of each figure is bold.
    """
    console = console or Console()
    runs = [summary for _, summary in summaries]
    metrics = [*METRICS, *([COST] if any(COST.value(summary) is not None for summary in runs) else [])]
    labels = [escape(label) for label, _ in summaries]
    first = 0
    while first < len(metrics):
        last = len(metrics)
        while last > first + 1 and _width(_part(labels, runs, metrics[first:last]), console) > console.width:
            last -= 1
        console.print(_part(labels, runs, metrics[first:last]))
        first = last
    console.print("Times in ms; gap: the longest of a request; bold: best of its column.")


def _part(labels: Sequence[str], runs: Sequence[Summary], metrics: Sequence[Metric]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True)
    for metric in metrics:
        table.add_column(metric.title, justify="right", min_width=max(map(len, metric.title.split())))
    best = [_best(metric, runs) for metric in metrics]
    for label, run in zip(labels, runs, strict=True):
        texts = [_bold(metric.text(run), top) for metric, top in zip(metrics, best, strict=True)]
        table.add_row(label, *texts)
    return table


def _width(table: Table, console: Console) -> int:
    """Columns of the terminal below which figures would be cut."""
    return console.measure(table, options=console.options.update(max_width=UNBOUNDED)).minimum


def _bold(text: str, best: str | None) -> str:
    return f"[bold]{text}[/bold]" if text == best else text


def _best(metric: Metric, summaries: Sequence[Summary]) -> str | None:
    """The text of the best figure; None where no way is better or all are the same."""
    known = [value for summary in summaries if (value := metric.value(summary)) is not None]
    if not metric.better or len({_text(value, metric.form) for value in known}) < 2:
        return None
    return _text(max(known) if metric.better == MORE else min(known), metric.form)
