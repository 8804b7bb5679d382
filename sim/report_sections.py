"""What a report shows: a section for each question an operator asks, its pictures first and its figures below."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from twinpool.sim.gaps import Floats
from twinpool.sim.present import METRICS, Metric
from twinpool.sim.report import Report
from twinpool.sim.report_axes import (
    NONE,
    Axis,
    linear,
    logarithmic,
    milliseconds,
    percent,
    plain,
    seconds,
    whole_percent,
)
from twinpool.sim.report_load import (
    attainment_told,
    caption_of,
    ceiling_section,
    cost_section,
    load_section,
    ratio_section,
    told_of,
)
from twinpool.sim.report_page import Page, Section, Table
from twinpool.sim.report_svg import Bar, Caption, Line, Rule, bar_chart, line_chart
from twinpool.sim.report_workers import queue_section, time_axis, times, utilisation_section
from twinpool.sim.result import Summary
from twinpool.sim.series import SHARES, Series

MARKED = tuple(SHARES.index(share) for share in (0.5, 0.9, 0.99))
EVERY = 12  # a marker each so many bins
FASTEST_S = 1e-5  # where logarithmic axes of time begin at the earliest


def page_of(report: Report) -> Page:
    """The whole report as a page."""
    made = (
        _glance, ceiling_section, load_section, ratio_section, _ttft_section, _itl_section, _course_section,
        _decile_section, queue_section, utilisation_section, _cache_section, _transfer_section, cost_section,
        _settings_section,
    )  # fmt: skip
    sections = [section for make in made if (section := make(report)) is not None]
    return Page(f"{report.trace}: simulated by twinpool", _facts(report), _reading(report), report.notices, sections)


def _facts(report: Report) -> list[str]:
    first = report.runs[0].summary
    slo = first["slo"]
    requests = f"{first['requests']:,} requests in {first['duration_s']:,.1f} s"
    workers = ", ".join(f"{worker['name']} ({worker['roles']})" for worker in first["workers"][:16])
    if len(first["workers"]) > 16:
        workers += f" and {len(first['workers']) - 16} more"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    limit = f"{plain(slo['ttft_ms'])} ms + {plain(slo['ttft_factor'])} x the prompt's own prefill"
    return [
        f"Trace {report.trace} at {plain(report.plan.speed)} times its own speed: {requests}.",
        f"Profile {first['profile']}, {first['gpus']} GPUs. Workers: {workers}.",
        f"SLO: first token within {limit}; worst tenth of gaps within {plain(slo['itl_ms'])} ms on average.",
        "Digests of all decisions: " + ", ".join(f"{run.label} {run.summary['digest']}" for run in report.runs) + ".",
        *([f"Made with {versions}."] if versions else []),
    ]


def _reading(report: Report) -> list[str]:
    return [
        "Every section asks one question: its picture comes first, the figures behind it are below.",
        "A policy has the same colour, dashes and marker in all of them.",
        (
            "A request attains its SLO if it was completed within both limits; attainment is the share of all offered "
            "requests that did, so refused and lost ones count as missed, and goodput is how many did in a second."
        ),
    ]


def _policies(runs: Sequence[Series]) -> list[str]:
    return [run.label for run in runs]


# --- one figure a policy ------------------------------------------------------------------------------------------


def _glance(report: Report) -> Section:
    runs = report.runs
    axis = Axis("share of offered requests that met their SLO", 0.0, 1.0, whole_percent)
    bars = [
        Bar(run.label, run.summary["attainment"] or 0.0, percent(run.summary["attainment"]), i)
        for i, run in enumerate(runs)
    ]
    chart = bar_chart(caption_of("glance", "Attainment by policy", runs, attainment_told), axis, bars)
    metrics: tuple[Metric, ...] = (Metric("completed", ("completed",), ",.0f"), *METRICS)
    rows = [[run.label, *(metric.text(run.summary) for metric in metrics)] for run in runs]
    intro = "How many requests were served as they should be, and at what latencies. Times are in milliseconds."
    return Section("glance", "At a glance", intro, [(chart, "")], Table(["policy", *_titles(metrics)], rows), True)


def _titles(metrics: Sequence[Metric]) -> list[str]:
    return [metric.title for metric in metrics]


# --- distributions ------------------------------------------------------------------------------------------------


def _distribution(
    report: Report, name: str, title: str, key: str, values: Callable[[Series], Floats], rules: Sequence[Rule] = ()
) -> str | None:
    """Shares of values up to each one, on a logarithmic axis; None where no run has any."""
    runs = [(i, run) for i, run in enumerate(report.runs) if len(values(run))]
    if not runs:
        return None
    x = logarithmic(title, [*(values(run) for _, run in runs), np.array([r.value for r in rules])], seconds, FASTEST_S)
    y = Axis("share of them up to this", 0.0, 1.0, whole_percent)
    shares = np.array(SHARES)
    lines = [Line(run.label, values(run), shares, i, MARKED, _quantile_hints(run, values)) for i, run in runs]
    told = told_of([run for _, run in runs], lambda summary: _spread_told(summary[key]))
    return line_chart(Caption(name, title, told), x, y, lines, rules)


def _quantile_hints(run: Series, values: Callable[[Series], Floats]) -> list[str]:
    return [f"{run.label}: {whole_percent(SHARES[at])} within {seconds(values(run)[at])}" for at in MARKED]


def _spread_told(spread: dict[str, Any]) -> str:
    parts = [f"{name} {milliseconds(value)} ms" for name, value in spread.items()]
    return ", ".join(parts)


def _spread_table(report: Report, key: str) -> Table:
    names = list(report.runs[0].summary[key])
    rows = [[run.label, *(milliseconds(run.summary[key][name]) for name in names)] for run in report.runs]
    return Table(["policy", *(f"{name}, ms" for name in names)], rows)


BELOW = "Markers: half, 90 % and 99 % of them are up to here."


def _ttft_section(report: Report) -> Section | None:
    fixed = report.runs[0].summary["slo"]["ttft_ms"] / 1000.0
    rules = [Rule("fixed part of the limit", fixed, True)]
    chart = _distribution(report, "ttft", "time to first token", "ttft_ms", lambda run: run.ttft, rules)
    if chart is None:
        return None
    intro = (
        "How long completed requests waited for their first token, from arrival to when the router showed it. The "
        "limit of a request is the fixed part and its prompt's own share."
    )
    return Section("ttft", "Time to first token", intro, [(chart, BELOW)], _spread_table(report, "ttft_ms"))


def _itl_section(report: Report) -> Section | None:
    limit = report.runs[0].summary["slo"]["itl_ms"] / 1000.0
    rules = [Rule("limit for the worst tenth", limit, True)]
    chart = _distribution(report, "itl", "time between two tokens", "itl_ms", lambda run: run.itl, rules)
    if chart is None:
        return None
    intro = (
        "All gaps between tokens of all requests, exact. A request's limit is on the mean of its worst tenth of gaps, "
        "so a tail beyond it may still be within the SLO."
    )
    return Section("itl", "Time between tokens", intro, [(chart, BELOW)], _spread_table(report, "itl_ms"))


def _transfer_section(report: Report) -> Section | None:
    chart = _distribution(report, "transfer", "transfer after the first token", "transfer_ms", lambda run: run.transfer)
    if chart is None:
        return None
    rows = [
        [run.label, *(milliseconds(run.summary["transfer_ms"][name]) for name in ("mean", "p99")),
         plain(run.summary["transfer_bytes"] / 1e9), percent(run.summary["path_share"]["split"])]
        for run in report.runs
    ]  # fmt: skip
    intro = (
        "Blocks move while the prompt is still computed; this is what remains of the transfer after the first token, "
        "of completed requests that moved any."
    )
    table = Table(["policy", "mean, ms", "p99, ms", "moved, GB", "split path"], rows)
    return Section("transfer", "Transfer", intro, [(chart, BELOW)], table)


# --- over time, by length -----------------------------------------------------------------------------------------


def _course(
    report: Report, name: str, title: str, values: Callable[[Series], Floats], told: str, *, whole: bool
) -> str:
    """Shares over time; ``whole``: the axis goes up to all of them."""
    lines = [
        Line(run.label, times(report, run), values(run), i, range(3 * i % EVERY, len(values(run)), EVERY))
        for i, run in enumerate(report.runs)
    ]
    y = Axis(title, 0.0, 1.0, whole_percent) if whole else linear(title, [line.y for line in lines], percent)
    return line_chart(Caption(name, title, told), time_axis(report), y, lines)


def _course_section(report: Report) -> Section:
    told = told_of(report.runs, lambda summary: f"{percent(summary['attainment'])} over the whole run")
    chart = _course(report, "course", "attainment by time of arrival", lambda run: run.attained, told, whole=True)
    rows = [_range_row(run.label, run.attained, run.summary["attainment"]) for run in report.runs]
    intro = "When requests missed their SLO: the share of those arriving at a time that met it. A gap: nobody arrived."
    return Section("course", "Attainment over time", intro, [(chart, "")], Table(RANGE_HEAD, rows))


RANGE_HEAD = ["policy", "whole run", "worst bin", "median bin", "best bin"]


def _range_row(label: str, course: Floats, whole: float | None) -> list[str]:
    known = course[np.isfinite(course)]
    ends = [known.min(), np.median(known), known.max()] if len(known) else [math.nan] * 3
    return [label, percent(whole), *(percent(float(value)) for value in ends)]


def _cache_section(report: Report) -> Section | None:
    if not any(run.summary["cached_token_share"] for run in report.runs):
        return None
    told = told_of(report.runs, lambda summary: f"{percent(summary['cached_token_share'])} over the whole run")
    chart = _course(report, "cache", "cached share of prompt tokens", lambda run: run.cached, told, whole=False)
    rows = [_range_row(run.label, run.cached, run.summary["cached_token_share"]) for run in report.runs]
    intro = (
        "Prompt tokens that were in a prefix cache of the prefill worker, by time of arrival, of completed requests."
    )
    return Section("cache", "Cache hits over time", intro, [(chart, "")], Table(RANGE_HEAD, rows))


def _decile_section(report: Report) -> Section:
    first = report.runs[0].summary
    ends = first["decile_prompt_tokens"]
    known = [i for i, tokens in enumerate(ends) if tokens is not None]
    x = np.array([i + 1.0 for i in known])
    lines = [
        Line(run.label, x, np.array([run.summary["attainment_by_decile"][i] for i in known], np.float64), i,
             range(len(known)))
        for i, run in enumerate(report.runs)
    ]  # fmt: skip

    def name(tick: float) -> str:
        at = round(tick) - 1
        return f"{ends[at]:,}" if tick == round(tick) and 0 <= at < len(ends) and ends[at] is not None else ""

    axis = Axis("prompt tokens of the tenth, up to", 0.7, 10.3, name, step=1.0)
    y = Axis("attainment", 0.0, 1.0, whole_percent)
    told = told_of(report.runs, _decile_told)
    chart = line_chart(Caption("deciles", "Attainment by prompt length", told), axis, y, lines)
    rows = [[run.label, *(percent(share) for share in run.summary["attainment_by_decile"])] for run in report.runs]
    table = Table(["policy", *(NONE if tokens is None else f"up to {tokens:,}" for tokens in ends)], rows)
    intro = (
        "Requests in tenths by length of prompt, shortest first: an average can hide that the longest were given up."
    )
    return Section("deciles", "Attainment by prompt length", intro, [(chart, "")], table)


def _decile_told(summary: Summary) -> str:
    known = [share for share in summary["attainment_by_decile"] if share is not None]
    return f"shortest prompts {percent(known[0])}, longest {percent(known[-1])}" if known else "no requests"


def _settings_section(report: Report) -> Section:
    """Everything that the runs were told."""
    names = list(dict.fromkeys(name for run in report.runs for name in run.summary["settings"]))
    rows = [[name, *(str(run.summary["settings"].get(name, NONE)) for run in report.runs)] for name in names]
    intro = "The same trace and settings give the same decisions, and so the same digests."
    return Section("settings", "Settings", intro, (), Table(["", *_policies(report.runs)], rows, words=True))
