"""One report: runs of the policies that were asked for, goodput against load, capacities, the ratio curve.

``gather`` runs everything; ``Report`` holds it; report_sections.py draws it. Runs that are only summarised use all
cores. Nothing in a report depends on the machine but the number of processes, which capacities depend on within their
tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.result import Summary
from twinpool.sim.search import Job, Runner, capacities, runner, splits
from twinpool.sim.series import Series, observe, series_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace
from twinpool.sim.trace import speed as faster

LOADS = (0.4, 0.7, 0.9, 1.0, 1.15, 1.4)  # of the best capacity, or where none is known of the speed
TOLERANCE = 0.02  # of capacities
COARSE = 0.05  # of those in the ratio curve

Progress = Callable[[str, float | None], AbstractContextManager[Callable[[float], None]]]
Chosen = Sequence[tuple[str, Settings]]
Bounds = dict[str, Future[float]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a report holds besides the runs themselves. ``gpus``: of the ratio curve, 0: those of the cluster."""

    speed: float = 1.0
    target: float = 0.99
    loads: bool = True
    splits: bool = True
    gpus: int = 0
    processes: int = 0


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A capacity: the largest speed-up found that meets the target, and the clairvoyant bound on any policy's."""

    label: str
    prefill: int
    decode: int
    both: int
    speed: float
    bound: float


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """A policy's summaries at several speeds, rising."""

    label: str
    points: Sequence[tuple[float, Summary]]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is drawn."""

    trace: str
    rate: float | None  # requests a second that the trace offers at its own speed; None: not known before a run
    plan: Plan
    runs: Sequence[Series]
    ceilings: Sequence[Ceiling] = ()  # one a policy
    ratio: Sequence[Ceiling] = ()  # one a split, by prefill workers
    loads: Sequence[LoadCurve] = ()
    notices: Sequence[str] = ()
    versions: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "trace": self.trace,
            "speed": self.plan.speed,
            "target": self.plan.target,
            "runs": [{"label": run.label, **run.summary} for run in self.runs],
            "capacities": [_ceiling(each) for each in self.ceilings],
            "ratio": [_ceiling(each) for each in self.ratio],
            "loads": [
                {"label": curve.label, "speed": times, **summary}
                for curve in self.loads for times, summary in curve.points
            ],
            "notices": list(self.notices),
        }  # fmt: skip


def _ceiling(each: Ceiling) -> dict[str, Any]:
    return {
        "label": each.label, "prefill": each.prefill, "decode": each.decode, "both": each.both, "capacity": each.speed,
        "bound": each.bound if math.isfinite(each.bound) else None,
    }  # fmt: skip


def gather(trace: Trace, chosen: Chosen, plan: Plan, progress: Progress, versions: dict[str, str]) -> Report:
    """Runs all that the plan asks for. ``chosen``: settings by name. Raises ConfigError as ``replay`` does."""
    runs = _observed(trace, chosen, plan, progress)
    rate = len(trace) / trace.duration_s if trace.duration_s and trace.after is None else None
    notices: list[str] = []
    ceilings: list[Ceiling] = []
    ratio: list[Ceiling] = []
    curves: list[LoadCurve] = []
    if plan.loads or plan.splits:
        with runner(trace, plan.processes) as made:
            try:
                ceilings = _ceilings(made, chosen, plan, progress)
                cut = _splits(chosen[0][1], plan, notices) if plan.splits else []
                ratio = _ratio(made, cut, chosen[0][1], ceilings[0], plan, progress) if cut else []
            except ConfigError as error:
                left = "The ratio curve is" if ceilings else "Capacities are"
                notices.append(f"{left} left out: {error.message}.")
            if plan.loads:
                curves = _loads(made, chosen, runs, plan, _speeds(ceilings, plan), progress)
    return Report(trace.name, rate, plan, runs, ceilings, ratio, curves, notices, versions)


def _observed(trace: Trace, chosen: Chosen, plan: Plan, progress: Progress) -> list[Series]:
    sped = faster(trace, plan.speed)
    runs = []
    for label, settings in chosen:
        with progress(f"replaying {label}", len(sped)) as done:
            result, log = observe(sped, settings, lambda count, _, done=done: done(count))  # type: ignore[misc]
        runs.append(series_of(label, result, log))
    return runs


def _ceilings(made: Runner, chosen: Chosen, plan: Plan, progress: Progress) -> list[Ceiling]:
    """Capacities of all that was chosen."""
    settings = [each for _, each in chosen]
    with progress("capacities", None) as bar:
        bounds = _bounds(made, settings, plan)
        found = capacities(made, settings, plan.target, start=plan.speed, tolerance=TOLERANCE, step=_counter(bar))
    return [_made(label, each, at.speed, bounds) for (label, each), at in zip(chosen, found, strict=True)]


def _ratio(
    made: Runner, cut: Sequence[Settings], own: Settings, known: Ceiling, plan: Plan, progress: Progress
) -> list[Ceiling]:
    """Capacities of every split, looked for around that of the cluster's own settings, which is known."""
    asked = [each for each in cut if each != own]
    with progress("splits", None) as bar:
        bounds = _bounds(made, asked, plan)
        found = capacities(made, asked, plan.target, start=known.speed, tolerance=COARSE, step=_counter(bar))
    ratio = [_made(known.label, each, at.speed, bounds) for each, at in zip(asked, found, strict=True)]
    if len(asked) < len(cut):
        ratio.append(known)
    return sorted(ratio, key=lambda each: each.prefill)


def _made(label: str, settings: Settings, speed: float, bounds: Bounds) -> Ceiling:
    return Ceiling(label, settings.prefill, settings.decode, settings.both, speed, bounds[_fleet(settings)].result())


def _counter(bar: Callable[[float], None]) -> Callable[[float, float], None]:
    """Shows how many runs a search has made."""
    tried = 0

    def step(low: float, high: float) -> None:
        nonlocal tried
        tried += 1
        bar(tried)

    return step


def _bounds(made: Runner, wanted: Sequence[Settings], plan: Plan) -> Bounds:
    """The bound for each of them by ``_fleet``, worked out beside whatever else is run."""
    fleets = {_fleet(settings): settings for settings in wanted}
    return {fleet: made.bound(settings, plan.target) for fleet, settings in fleets.items()}


def _fleet(settings: Settings) -> str:
    """What the bound depends on: everything but the policy."""
    return repr(replace(settings, policy="", parameters={}))


def _splits(settings: Settings, plan: Plan, notices: list[str]) -> list[Settings]:
    """Every split of the GPUs; without failures, which name workers that a split may not have."""
    size = load_profile(settings.profile).gpus
    workers = plan.gpus // size if plan.gpus else settings.workers
    if workers < 2:
        have = f"{plan.gpus} GPUs make {workers} workers" if plan.gpus else f"{workers} workers"
        notices.append(f"There is no ratio curve: {have} of {size} GPUs each, and a split needs two.")
        return []
    if plan.gpus % size:
        notices.append(f"Of {plan.gpus} GPUs the ratio curve uses {workers * size}: a worker has {size}.")
    if settings.failures:
        notices.append("The ratio curve is without the scenario's events.")
        settings = replace(settings, failures=())
    return splits(settings, workers)


def _speeds(ceilings: Sequence[Ceiling], plan: Plan) -> list[float]:
    """Where goodput is looked at besides the speed of the runs: around the best capacity."""
    middle = max((each.speed for each in ceilings), default=plan.speed)
    return sorted({float(f"{middle * part:.4g}") for part in LOADS} - {plan.speed})


def _loads(
    made: Runner, chosen: Chosen, runs: Sequence[Series], plan: Plan, speeds: Sequence[float], progress: Progress
) -> list[LoadCurve]:
    """Summaries at the speeds, and those of the runs that there are already."""
    jobs = [Job(settings, speed) for _, settings in chosen for speed in speeds]
    with progress("loads", len(jobs)) as bar:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            bar(done)

        summaries = [_lasting(summary) for summary in made.summaries(jobs, step)]
    curves = []
    for i, run in enumerate(runs):
        here = summaries[i * len(speeds) : (i + 1) * len(speeds)]
        points = [(plan.speed, run.summary), *zip(speeds, here, strict=True)]
        curves.append(LoadCurve(run.label, sorted(points, key=lambda point: point[0])))
    return curves


def _lasting(summary: Summary) -> Summary:
    """What does not depend on the machine."""
    return {key: value for key, value in summary.items() if "wall" not in key}
