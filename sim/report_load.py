"""The parts of a report about load: capacities, goodput as traffic grows, the ratio of the pools, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from twinpool.sim.report import COARSE, TOLERANCE, Ceiling, LoadCurve, Report
from twinpool.sim.report_axes import NONE, Axis, linear, milliseconds, percent, plain
from twinpool.sim.report_page import Section, Table
from twinpool.sim.report_svg import Bar, Caption, Line, Rule, bar_chart, line_chart
from twinpool.sim.result import Summary
from twinpool.sim.series import Series


def told_of(runs: Sequence[Series], tell: Callable[[Summary], str]) -> str:
    """A sentence a run."""
    return " ".join(f"{run.label}: {tell(run.summary)}." for run in runs)


def caption_of(name: str, title: str, runs: Sequence[Series], tell: Callable[[Summary], str]) -> Caption:
    """A chart's caption that tells each run."""
    return Caption(name, title, told_of(runs, tell))


def attainment_told(summary: Summary) -> str:
    """How many met their SLO."""
    return f"{percent(summary['attainment'])} of {summary['requests']:,} requests met their SLO"


def ceiling_section(report: Report) -> Section | None:
    """Capacity of each policy, beside the clairvoyant bound."""
    if not report.ceilings:
        return None
    bars = [
        Bar(each.label, each.speed, _ceiling_words(each), i, each.bound if math.isfinite(each.bound) else None)
        for i, each in enumerate(report.ceilings)
    ]
    every = [np.array([bar.value, bar.bound or 0.0]) for bar in bars]
    axis = linear("times the trace's own speed", every, plain)
    told = " ".join(f"{each.label}: {_ceiling_words(each)}." for each in report.ceilings)
    chart = bar_chart(Caption("capacity", "Capacity by policy, and the bound", told), axis, bars)
    intro = (
        f"The largest speed-up of the trace at which {percent(report.plan.target)} of requests still meet their SLO, "
        f"found to {percent(TOLERANCE, 0)}. No policy can do more than the clairvoyant bound, the thick line; how much "
        "of it can be had is not known."
    )
    return Section("capacity", "Capacity", intro, [(chart, "")], _ceiling_table(report, report.ceilings, "policy"))


def _ceiling_words(each: Ceiling) -> str:
    if not 0.0 < each.bound < math.inf:
        return f"{plain(each.speed)} x"
    return f"{plain(each.speed)} x, {percent(each.speed / each.bound, 0)} of the bound"


def _ceiling_table(report: Report, ceilings: Sequence[Ceiling], first: str) -> Table:
    rate = report.rate
    rows = [
        [each.label if first == "policy" else _split_name(each), plain(each.speed, 4),
         NONE if rate is None else plain(rate * each.speed, 4), plain(each.bound, 4),
         percent(each.speed / each.bound if each.bound > 0.0 else None)]
        for each in ceilings
    ]  # fmt: skip
    return Table([first, "capacity, x", "requests/s", "bound, x", "share of the bound"], rows)


def _split_name(each: Ceiling) -> str:
    return f"{each.prefill} prefill + {each.decode} decode"


def ratio_section(report: Report) -> Section | None:
    """Capacity of each split into prefill and decode workers."""
    if not report.ratio:
        return None
    ratio = report.ratio
    x = np.array([each.prefill for each in ratio], np.float64)
    found = np.array([each.speed for each in ratio])
    bounds = np.array([each.bound for each in ratio])
    workers = ratio[0].prefill + ratio[0].decode
    marks = list(range(len(ratio)))
    hints = [f"{_split_name(each)}: {_ceiling_words(each)}" for each in ratio]
    lines = [
        Line(ratio[0].label, x, found, 0, marks, hints),
        Line("clairvoyant bound", x, bounds, len(report.runs), marks),
    ]
    best = max(ratio, key=lambda each: each.speed)
    axis = Axis(
        f"prefill workers, of {workers}",
        min(0.5, x[0]),
        max(workers - 0.5, 1.5),
        _whole,
        step=1.0 if workers <= 24 else 0.0,
    )
    y = linear("capacity, times the trace's own speed", [found, bounds], plain)
    told = f"The best split is {_split_name(best)} with {plain(best.speed)} times the trace's speed."
    chart = line_chart(Caption("ratio", "Capacity by split", told), axis, y, lines)
    intro = (
        f"How many of {workers} workers should prefill: the capacity of every split under {ratio[0].label}, found to "
        f"{percent(COARSE, 0)}, and the bound of each. A narrow peak means that the split must follow the traffic."
    )
    return Section("ratio", "Prefill to decode", intro, [(chart, told)], _ceiling_table(report, ratio, "split"))


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else ""


def load_section(report: Report) -> Section | None:
    """Goodput a GPU at several speeds."""
    if not report.loads:
        return None
    rate, gpus = report.rate, report.runs[0].summary["gpus"]
    unit = rate if rate is not None else 1.0
    lines = [_load_line(curve, i, unit) for i, curve in enumerate(report.loads)]
    x = linear("requests offered a second" if rate is not None else "times the trace's own speed",
               [line.x for line in lines], plain)  # fmt: skip
    y = linear("goodput a GPU, requests/s", [line.y for line in lines], plain)
    if rate is not None:  # up to where it leaves the picture
        ideal = np.array([0.0, min(x.high, y.high * gpus)])
        lines.append(Line("everything that is offered", ideal, ideal / gpus, len(lines)))
    told = " ".join(
        f"{curve.label}: at most {plain(_best(curve))} requests a second and GPU." for curve in report.loads
    )
    rules = [Rule("load of this report", unit * report.plan.speed, True)]
    chart = line_chart(Caption("load", "Goodput a GPU against load", told), x, y, lines, rules)
    intro = (
        "What happens as traffic grows: the same trace, faster and faster. As long as a curve follows the straight "
        "one, all requests meet their SLO (a little below it, since the last ones take time to finish); where it "
        "bends, the cluster is full."
    )
    return Section("load", "Goodput against load", intro, [(chart, "")], _load_table(report.loads, unit))


def _load_line(curve: LoadCurve, style: int, unit: float) -> Line:
    x = np.array([unit * speed for speed, _ in curve.points])
    y = np.array([summary["goodput_rps_per_gpu"] or 0.0 for _, summary in curve.points])
    hints = [f"{curve.label}, {plain(speed)} x: {attainment_told(summary)}" for speed, summary in curve.points]
    return Line(curve.label, x, y, style, range(len(x)), hints)


def _best(curve: LoadCurve) -> float:
    return max(summary["goodput_rps_per_gpu"] or 0.0 for _, summary in curve.points)


def _load_table(loads: Sequence[LoadCurve], unit: float) -> Table:
    rows = [
        [curve.label, plain(speed), plain(unit * speed), percent(summary["attainment"]), plain(summary["goodput_rps"]),
         plain(summary["goodput_rps_per_gpu"]), milliseconds(summary["ttft_ms"]["p99"]),
         milliseconds(summary["itl_ms"]["p99"]), plain(summary["cost_per_million_tokens"])]
        for curve in loads for speed, summary in curve.points
    ]  # fmt: skip
    head = ["policy", "speed, x", "offered", "attainment", "goodput/s", "goodput/s a GPU", "TTFT p99, ms",
            "ITL p99, ms", "cost /M tokens"]  # fmt: skip
    return Table(head, rows)


def cost_section(report: Report) -> Section | None:
    """Price of tokens; None where the profile knows none."""
    runs = [run for run in report.runs if run.summary["cost_per_million_tokens"] is not None]
    if not runs:
        return None
    costs = [run.summary["cost_per_million_tokens"] for run in runs]
    axis = linear("price of a million output tokens", [np.array(costs)], plain)
    bars = [Bar(run.label, cost, f"{cost:,.2f}", i) for i, (run, cost) in enumerate(zip(runs, costs, strict=True))]
    told = caption_of(
        "cost", "Cost by policy", runs, lambda s: f"{s['cost_per_million_tokens']:,.2f} a million output tokens"
    )
    rows = [
        [run.label, f"{run.summary['cost_per_million_tokens']:,.2f}",
         f"{run.summary['cost_per_million_all_tokens']:,.3f}", plain(run.summary["tokens_per_joule"])]
        for run in runs
    ]  # fmt: skip
    intro = (
        "All GPUs for the whole run at the profile's price, for the tokens of completed requests. The same cluster "
        "gets cheaper with load until requests miss their SLO: see goodput against load."
    )
    head = ["policy", "a million output tokens", "a million prompt and output tokens", "output tokens per joule"]
    return Section("cost", "Cost", intro, [(bar_chart(told, axis, bars), "")], Table(head, rows))
