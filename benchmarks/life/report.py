"""What is written of a comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from client import Answer
from figures import TABLE_HEAD, Row
from machine import describe

from twinpool.cost import StepCost
from twinpool.sim.result import Result


@dataclass(frozen=True, slots=True)
class Run:
    """All that a report needs."""

    kind: str
    trace: str
    seconds: float
    speed: float  # times the trace's
    load: str
    divide: int
    answers: list[Answer]
    simulated: Result
    calibrated: dict[str, Any]
    rows: list[Row]
    steps: Path
    cores: dict[str, float]  # CPU seconds a second of each process
    cost: StepCost | None  # what the engines were asked to take; None: they compute
    busy: float  # load average of the machine before the run
    preferred: bool  # it went before other work of the machine

    @property
    def errors(self) -> Counter[str]:
        """Requests that failed."""
        return Counter(answer.error for answer in self.answers if answer.error)


def report(run: Run) -> str:
    """Markdown."""
    lines = [f"## {run.kind.capitalize()} engines, live and simulated", ""]
    lines += [
        f"`python benchmarks/life/run.py {run.kind} --trace {run.trace}{' --prefer' if run.preferred else ''}`",
        "",
        describe(),
        "",
    ]
    lines += [_load(run), "", TABLE_HEAD, *[row.text() for row in run.rows], ""]
    lines += ["Calibrated from the logs of the run:", "", *_calibrated(run), ""]
    lines += ["How the live run was:", "", *_live(run), ""]
    return "\n".join(lines)


def _load(run: Run) -> str:
    lengths = "" if run.divide == 1 else f", lengths divided by {run.divide}"
    return (
        f"{len(run.answers)} requests of {run.trace}{lengths}, {run.seconds:g} s at {run.speed:.3f} times its speed: "
        f"{run.load}."
    )


def _calibrated(run: Run) -> list[str]:
    fit, edge = run.calibrated["fit"], run.calibrated["edge"]
    kinds = ", ".join(f"{kind['kind']} {kind['mean']:.1%}" for kind in fit["kinds"])
    lines = [
        f"- step formula: mean error {fit['mean_error']:.1%} ({kinds}), all steps {fit['time_ratio'] - 1:+.2%}",
        f"- so the simulated steps are longer by {1e3 * fit['late_s']:.2f} ms",
    ]
    for name in ("latency_s", "edge_s", "outside_s", "setup_s"):
        value = edge[name]["value"]
        told = edge[name]["note"] if value is None else f"{1e3 * value:.3f} ms, median of {edge[name]['requests']}"
        lines.append(f"- {name}: {told}")
    return lines


def _live(run: Run) -> list[str]:
    good = [answer for answer in run.answers if not answer.error]
    counts = np.array([n for answer in good for n in answer.tokens if n])
    late = 1e3 * np.array([answer.sent - answer.due for answer in run.answers])
    paths = Counter(answer.last.route.path for answer in good if answer.last is not None)
    shares = run.simulated.summary()["path_share"]
    again = sum(answer.last.route.attempts > 1 for answer in good if answer.last is not None)
    shared = " (the cluster and the client went before other work of the machine)" if run.preferred else ""
    lines = [
        f"- load average of the machine before it: {run.busy:.1f}{shared}",
        f"- {len(good)} answered, {again} after more than one attempt; failed: {dict(run.errors) or 'none'}",
        f"- sent late: median {np.median(late):.3f} ms, 99 % {np.quantile(late, 0.99):.3f} ms",
        f"- of TTFT outside of the router's core (gRPC, client): {_quantiles([answer.outside_s for answer in good])}",
        f"- cores used: {', '.join(f'{name} {share:.2f}' for name, share in run.cores.items())}",
        f"- tokens that came in a message with others: {1 - (counts == 1).sum() / counts.sum():.2%}",
        f"- paths live: {dict(paths)}; simulated: { ({name: round(share, 3) for name, share in shares.items()}) }",
    ]
    return lines + [f"- {line}" for line in _steps(run)]


def _steps(run: Run) -> list[str]:
    """What the workers' own loops, and whatever else had their cores, added to the steps: the noise of the run."""
    steps = [json.loads(line) for line in run.steps.read_text(encoding="utf-8").splitlines()]
    steps = [step for step in steps if "seconds" in step]
    pauses = [step["pause"] for step in steps if "pause" in step]
    lines = [f"{len(steps)} steps; from one to the next {_quantiles(pauses)}"]
    if run.cost is not None:
        late = [step["seconds"] - run.cost.step(step["chunks"], step["batch"], step["context"]) for step in steps]
        lines.append(f"steps were longer than asked of the emulated engine by {_quantiles(late)}")
    return lines


def _quantiles(seconds: Sequence[float]) -> str:
    p50, p90, p99 = 1e3 * np.quantile(np.array(seconds), (0.5, 0.9, 0.99))
    return f"{p50:.2f} ms (median), {p90:.2f} ms (90 %), {p99:.2f} ms (99 %)"


def put(path: Path, kind: str, text: str) -> None:
    """Replace the part of this kind in a file of several reports; each begins with ``## Kind``."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    parts = {}
    for part in old.removeprefix("## ").split("\n## "):
        if part.strip():
            parts[part.split(None, 1)[0].lower()] = f"## {part.strip()}\n"
    parts[kind] = text.strip() + "\n"
    path.write_text("\n".join(parts[name] for name in sorted(parts, reverse=True)), encoding="utf-8")
