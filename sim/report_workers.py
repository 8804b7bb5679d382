"""The parts of a report that look at workers: what queues before them, and how busy they are, over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from twinpool.sim.gaps import Floats
from twinpool.sim.report import Report
from twinpool.sim.report_axes import Axis, linear, percent, plain
from twinpool.sim.report_page import Section, Table
from twinpool.sim.report_svg import Caption, Line, Strip, line_chart, strip_chart
from twinpool.sim.series import KINDS, Series

MOST_ROWS = 40  # of a strip chart: neighbours of more workers are drawn together, as their mean
MINUTES_FROM_S = 600.0
EVERY = 12


class AtWorkers(NamedTuple):
    """A kind of queue before workers: which of them have one, and its rows."""

    name: str
    title: str
    role: str
    rows: Callable[[Series], Floats]


QUEUES = (
    AtWorkers("waiting-at", "Requests without a first token, by the worker that computed their prompt", "prefill",
              lambda run: run.waiting_at),
    AtWorkers("decoding-at", "Requests that decode, by the worker they decode on", "decode",
              lambda run: run.decoding_at),
)  # fmt: skip


def time_axis(report: Report) -> Axis:
    """From the first arrival to the end of the longest run, in seconds, or in minutes from ten of them on."""
    end = max(float(run.edges[-1]) for run in report.runs)
    unit = _unit(end)
    name = "minutes" if unit > 1.0 else "seconds"
    return Axis(f"{name} since the first arrival", 0.0, end / unit, plain)


def _unit(end: float) -> float:
    return 60.0 if end >= MINUTES_FROM_S else 1.0


def times(report: Report, run: Series) -> Floats:
    """Middles of a run's bins in the unit of ``time_axis``."""
    end = max(float(each.edges[-1]) for each in report.runs)
    return np.asarray(0.5 * (run.edges[1:] + run.edges[:-1]) / _unit(end))


def _own_axis(report: Report, run: Series) -> Axis:
    """The time of one run alone: its strips fill their rows."""
    shared = time_axis(report)
    return Axis(shared.title, 0.0, float(run.edges[-1]) / _unit(max(float(r.edges[-1]) for r in report.runs)), plain)


def queue_section(report: Report) -> Section:
    """How many requests wait and decode over time, all together and worker by worker."""
    charts = [
        (_queue_lines(report, "waiting", "requests without a first token", lambda run: run.waiting),
         "Requests that have arrived and were not shown a token: queued, or their prompt is computed."),
        (_queue_lines(report, "decoding", "requests that decode", lambda run: run.decoding),
         "Requests that were shown a token and are not over."),
    ]  # fmt: skip
    for queue in QUEUES:
        most = max(float(queue.rows(run).max(initial=0.0)) for run in report.runs)
        charts += [(_queue_strips(report, queue, i, most), f"{queue.title}.") for i in range(len(report.runs))]
    intro = (
        "Where requests pile up: lengths are means over a bin of time. In the strips a row is a worker, the stronger "
        "its colour the more requests, and behind it is its mean; a request counts for the worker of its last attempt."
    )
    rows = [
        [
            run.label,
            *(plain(float(value)) for line in (run.waiting, run.decoding) for value in (line.mean(), line.max())),
        ]
        for run in report.runs
    ]
    head = ["policy", "waiting, mean", "waiting, fullest bin", "decoding, mean", "decoding, fullest bin"]
    return Section("queues", "Queues over time", intro, charts, Table(head, rows))


def _queue_lines(report: Report, name: str, title: str, values: Callable[[Series], Floats]) -> str:
    lines = [
        Line(run.label, times(report, run), values(run), i, range(3 * i % EVERY, len(values(run)), EVERY))
        for i, run in enumerate(report.runs)
    ]
    told = " ".join(
        f"{run.label}: {plain(float(values(run).mean()))} on average, {plain(float(values(run).max()))} at most."
        for run in report.runs
    )
    y = linear(title, [line.y for line in lines], plain)
    return line_chart(Caption(name, title, told), time_axis(report), y, lines, height=240.0)


def _queue_strips(report: Report, queue: AtWorkers, i: int, most: float) -> str:
    """A row for each worker of the role, and any other that had such requests. ``most``: what full shade means."""
    run = report.runs[i]
    rows = queue.rows(run)
    workers = run.summary["workers"]
    used = [at for at, worker in enumerate(workers) if queue.role in worker["roles"].split("+") or rows[at].any()]
    names, kept = folded([run.workers[at] for at in used], rows[used])
    strips = [
        Strip(name, row / (most or 1.0), f"mean {plain(float(row.mean()))}")
        for name, row in zip(names, kept, strict=True)
    ]
    told = ", ".join(f"{strip.label} {strip.written}" for strip in strips)
    caption = Caption(f"{queue.name}-{i}", f"{queue.title}: {run.label}", told)
    return strip_chart(caption, _own_axis(report, run), strips, (f"{run.label}: none", f"{plain(most)} requests"))


def utilisation_section(report: Report) -> Section | None:
    """How busy each worker is over time; left out where that was not noted."""
    known = [(i, run, run.busy) for i, run in enumerate(report.runs) if run.busy is not None]
    if not known:
        return None
    charts = []
    for i, run, busy in known:
        names, rows = folded(run.workers, busy)
        strips = [
            Strip(name, row, f"mean {percent(float(row.mean()), 0)}") for name, row in zip(names, rows, strict=True)
        ]
        told = ", ".join(f"{strip.label} {strip.written}" for strip in strips)
        caption = Caption(f"busy-{i}", f"Utilisation of each worker over time, {run.label}", told)
        chart = strip_chart(caption, _own_axis(report, run), strips, (f"{run.label}: idle", "always in a step"))
        charts.append(
            (chart, "The stronger the colour, the larger the share of time in steps; behind each row its mean.")
        )
    intro = (
        "The share of time in which a worker computes anything. A decode worker is in steps as soon as it has one "
        "request, so a full row there does not mean a full worker: see how many decode on it."
    )
    table = _busy_table([run for _, run, _ in known])
    return Section("utilisation", "Utilisation over time", intro, charts, table)


def _busy_table(runs: Sequence[Series]) -> Table:
    rows = [
        [f"{run.label} {worker['name']}", worker["roles"], percent(worker["busy_share"]),
         *(f"{worker[f'busy_{kind}_s']:,.1f}" for kind in KINDS), f"{worker['computed_tokens']:,}",
         f"{worker['cached_tokens']:,}", plain(worker["peak_blocks"] / worker["blocks"] if worker["blocks"] else None)]
        for run in runs for worker in run.summary["workers"]
    ]  # fmt: skip
    head = ["worker", "roles", "busy", *(f"{kind} steps, s" for kind in KINDS), "computed tokens", "cached tokens",
            "most of its blocks in use"]  # fmt: skip
    return Table(head, rows)


def folded(names: Sequence[str], rows: Floats) -> tuple[list[str], list[Floats]]:
    """At most ``MOST_ROWS`` rows: of more workers, neighbours are taken together as the mean of their rows."""
    if len(names) <= MOST_ROWS:
        return list(names), list(rows)
    groups = np.array_split(np.arange(len(names)), MOST_ROWS)
    labels = [f"{names[group[0]]}-{names[group[-1]]}" for group in groups]
    return labels, [np.asarray(rows[group].mean(axis=0)) for group in groups]
