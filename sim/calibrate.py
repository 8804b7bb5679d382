"""``sim calibrate``: the cost model from what steps really took, and a profile that says so.

Steps are compared with *others like them* (of as many tokens, sequences and context tokens, to a factor of two). The
formula is fitted to what is usual among those, their median relative to the formula itself: noise is not symmetric,
and something else on the core, or a first step before everything is warm, only makes a step longer. What all of them
have in common stays in, and shows as error of the formula. No kind of steps drowns the others: of each, so many at most
are fitted, evenly spread over the log. Outliers are far from others like them; errors are told of all other steps.

What steps take beyond the usual in the mean, ``late_s``, a profile's steps have on top: a queue feels them all. How
single ones differ from that is kept as quantiles, for those of gaps between tokens (gap_spread.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from twinpool.cost import StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.errors import ConfigError
from twinpool.sim.calibrate_edge import EdgeFound
from twinpool.sim.calibrate_grid import predicted_s
from twinpool.sim.calibrate_logs import Steps, StepWorker
from twinpool.sim.fit import Floats, fit_step_cost
from twinpool.sim.gap_spread import gap_spread
from twinpool.sim.profiles import Edge, Profile, ProfileFile

ROUNDS = 8
PER_CELL = 64  # steps of one cell (a factor of two in tokens, batch and context) that are fitted
SMALL_CELL = 5  # fewer than that are compared with their whole kind
TRIM = 5.0  # standard deviations (from the median absolute deviation) off the others: an outlier
MIN_TRIM = 0.05  # of a step's seconds, that no outlier is nearer than
DEVIATION = 1.4826  # standard deviation of normal noise over its median absolute deviation
POOR_MEAN = 0.10  # mean error of a kind from which the fit is called poor
FEW = 20  # steps of a kind
KINDS = ("prompts alone", "decodes alone", "prompts beside decodes")
ASSUMED_LINK = 25e9

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
T = TypeVar("T")


class KindError(NamedTuple):
    """How far the formula is from steps of a kind, as shares of their seconds; outliers left out."""

    kind: str
    steps: int
    mean: float  # of the absolute error
    p95: float
    worst: float
    bias: float  # mean of predicted / taken - 1

    @property
    def poor(self) -> bool:
        """Not to be relied on."""
        return self.mean > POOR_MEAN


@dataclass(frozen=True, slots=True)
class CostFound:
    """The fitted cost, how good it is, and what it is from."""

    cost: StepCost
    steps: int
    fitted: int
    outliers: int
    outlier_time_share: float  # of the seconds of all steps
    time_ratio: float  # predicted / taken seconds of all steps, outliers included
    late_s: float  # mean of what steps take beyond the formula, a stall counted as one step more
    kinds: tuple[KindError, ...]
    most: dict[str, int]  # the largest step: tokens, batch, context
    notices: tuple[str, ...]

    @property
    def mean_error(self) -> float:
        """Of all steps that are no outliers."""
        return sum(kind.mean * kind.steps for kind in self.kinds) / sum(kind.steps for kind in self.kinds)

    @property
    def worst_error(self) -> float:
        """Of all steps that are no outliers."""
        return max(kind.worst for kind in self.kinds)

    def figures(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "cost": msgspec.to_builtins(self.cost), "mean_error": self.mean_error, "worst_error": self.worst_error,
            "steps": self.steps, "fitted": self.fitted, "outliers": self.outliers,
            "outlier_time_share": self.outlier_time_share, "time_ratio": self.time_ratio,
            "late_s": self.late_s, "most": self.most,
            "kinds": [kind._asdict() | {"poor": kind.poor} for kind in self.kinds],
        }  # fmt: skip


def fit_steps(steps: Steps) -> CostFound:
    """The cost of these steps. Raises ConfigError where prompts or decodes are not among them."""
    table = steps.matrix()
    tokens, batch = table[:, 0], table[:, 2]
    for there, what in ((tokens > 0, "prompt tokens"), (batch > 0, "decoding sequences")):
        if not there.any():
            raise ConfigError(
                f"no step has {what}, so nothing tells what they cost: add the log of a worker that has some "
                "(--steps may be given again)"
            )
    kinds = np.where(batch == 0, 0, np.where(tokens == 0, 1, 2))
    groups = _groups(table, kinds)
    good, usual = np.ones(len(table), dtype=np.bool_), table[:, 4]
    for turn in range(ROUNDS):
        chosen = _balanced(groups, good)
        cost = fit_step_cost([steps.at(int(i))._replace(seconds=float(usual[i])) for i in chosen]).cost
        predicted = _predict(cost, table)
        off = np.log(table[:, 4] / predicted)
        middle, alone = _middle(off, groups, kinds)
        before, good = good, _near(off - middle)
        usual = np.where(alone, table[:, 4], predicted * np.exp(middle))
        if turn and np.array_equal(before, good):
            break
    return _found(cost, table, predicted, kinds, good, len(chosen))


def _found(cost: StepCost, table: Floats, predicted: Floats, kinds: Ints, good: Mask, fitted: int) -> CostFound:
    seconds = table[:, 4]
    error = predicted / seconds - 1.0
    parts = [_kind_error(KINDS[kind], error[good & (kinds == kind)]) for kind in range(len(KINDS))]
    errors = tuple(part for part in parts if part.steps)
    most = {name: int(table[:, column].max()) for name, column in (("tokens", 0), ("batch", 2), ("context", 3))}
    return CostFound(
        cost, len(table), fitted, int((~good).sum()), float(seconds[~good].sum() / seconds.sum()),
        float(predicted.sum() / seconds.sum()), _late_s(seconds, predicted), errors, most, tuple(_notices(errors)),
    )  # fmt: skip


def _late_s(seconds: Floats, predicted: Floats) -> float:
    return max(0.0, float(np.minimum(seconds - predicted, predicted).mean()))


def _kind_error(kind: str, error: Floats) -> KindError:
    if not len(error):
        return KindError(kind, 0, 0.0, 0.0, 0.0, 0.0)
    size = np.abs(error)
    p95 = float(np.quantile(size, 0.95))
    return KindError(kind, len(error), float(size.mean()), p95, float(size.max()), float(error.mean()))


def _notices(errors: Sequence[KindError]) -> list[str]:
    notices = [
        f"the formula fits {error.kind} poorly: {error.mean:.0%} off in the mean, {error.worst:.0%} at worst; "
        "do not trust answers that hang on them"
        for error in errors
        if error.poor
    ]
    notices += [f"only {error.steps} steps of {error.kind}: log more of them" for error in errors if error.steps < FEW]
    if KINDS[2] not in [error.kind for error in errors]:
        notices.append(f"no {KINDS[2]} in the log: what such a step takes follows from the formula alone")
    return notices


def _predict(cost: StepCost, table: Floats) -> Floats:
    tokens, attention, batch, context = table[:, 0], table[:, 1], table[:, 2], table[:, 3]
    work = tokens + batch
    shared = np.maximum(cost.c0 + cost.a * work, cost.d0 + cost.d1 * work)
    predicted: Floats = np.maximum(shared + cost.d2 * context + cost.b * attention, 1e-12)
    return predicted


def _groups(table: Floats, kinds: Ints) -> list[Ints]:
    """Indices of the steps of each cell, in the order of the log."""
    octaves = np.floor(np.log2(np.maximum(table[:, [0, 2, 3]], 0.5))).astype(np.int64)
    _, cell = np.unique(np.column_stack([kinds, octaves]), axis=0, return_inverse=True)
    order = np.argsort(cell.ravel(), kind="stable")
    return np.split(order, np.flatnonzero(np.diff(cell.ravel()[order])) + 1)


def _balanced(groups: list[Ints], good: Mask) -> Ints:
    """At most PER_CELL good steps of each cell."""
    chosen = []
    for group in groups:
        kept = group[good[group]]
        if len(kept) > PER_CELL:
            kept = kept[np.linspace(0, len(kept) - 1, PER_CELL).astype(np.int64)]
        chosen.append(kept)
    return np.concatenate(chosen)


def _middle(off: Floats, groups: list[Ints], kinds: Ints) -> tuple[Floats, Mask]:
    """The median of ``off`` among those like each step; and who has too few of them, so its whole kind stands in."""
    centre = [float(np.median(off[kinds == kind])) if (kinds == kind).any() else 0.0 for kind in range(len(KINDS))]
    middle = np.array(centre)[kinds]
    alone = np.ones(len(off), dtype=np.bool_)
    for group in groups:
        if len(group) >= SMALL_CELL:
            middle[group] = np.median(off[group])
            alone[group] = False
    return middle, alone


def _near(distance: Floats) -> Mask:
    """Who is near to others like it."""
    size = np.abs(distance)
    near: Mask = size <= max(MIN_TRIM, TRIM * DEVIATION * float(np.median(size)))
    return near


# --- the profile --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """What the operator says of a worker; None: not said."""

    gpus: int | None = None
    kv_tokens: int | None = None
    kv_bytes_per_token: int | None = None
    link_bytes_per_s: float | None = None


def make_profile(
    name: str,
    found: CostFound,
    edge: EdgeFound | None,
    worker: StepWorker | None,
    like: Profile | None,
    given: Given,
    grids: Grids | None = None,
) -> ProfileFile:
    """A profile of what was measured; what was not is as given, else as the worker said, else as of ``like``.

    ``grids``: tables that count in place of the formula (calibrate_grid.py).

    Raises ConfigError where nobody knows how much KV a worker holds.
    """
    held = worker.blocks * worker.block_tokens if worker is not None else None
    per_token = worker.block_bytes // worker.block_tokens if worker is not None else None
    kv_tokens = _first(given.kv_tokens, held, like.kv_tokens if like else None)
    kv_bytes = _first(given.kv_bytes_per_token, per_token, like.kv_bytes_per_token if like else None)
    if not kv_tokens or kv_bytes is None:
        raise ConfigError(
            "nothing says how much KV memory a worker has: give --kv-tokens and --kv-bytes-per-token, or --like with "
            "the profile of a worker like it"
        )
    measured = edge.link_bytes_per_s.value if edge is not None else None
    link = _first(given.link_bytes_per_s, measured, like.link_bytes_per_s if like else None, ASSUMED_LINK)
    assert link is not None
    return ProfileFile(
        name=name, gpus=given.gpus or (like.gpus if like else 1), kv_bytes_per_token=kv_bytes,
        kv_tokens=kv_tokens, link_bytes_per_s=link, price_per_gpu_hour=like.price_per_gpu_hour if like else None,
        idle_watts_per_gpu=like.idle_watts_per_gpu if like else None,
        busy_watts_per_gpu=like.busy_watts_per_gpu if like else None,
        fit=StepCost(**{key: float(f"{value:.9g}") for key, value in msgspec.structs.asdict(_in_all(found)).items()}),
        fit_mean_error=round(found.mean_error, 5), fit_worst_error=round(found.worst_error, 5),
        source=_sources(found, edge, worker, like, given), edge=edge.edge() if edge is not None else Edge(),
        grids=grids, planned=worker.cost if worker is not None else None,
    )  # fmt: skip


def with_gap_spread(profile: ProfileFile, steps: Steps, edge: EdgeFound | None) -> ProfileFile:
    """The profile with what single gaps take more or less than simulated with it: of its steps, and of the edge.

    ``steps``: single ones, of a log; the longest count as twice what is predicted, as in ``late_s``.
    """
    table = steps.matrix()
    table = table[table[:, 2] > 0]
    cost = profile.fit if profile.grids is None else GridCost(profile.grids)
    predicted = np.array([predicted_s(cost, row) for row in table])
    off_s = np.repeat(np.minimum(table[:, 4] - predicted, predicted), table[:, 2].astype(np.int64))
    spread = gap_spread(off_s, np.array(edge.spread_s if edge is not None else ()))
    return msgspec.structs.replace(profile, edge=msgspec.structs.replace(profile.edge, gap_spread_s=spread))


def _in_all(found: CostFound) -> StepCost:
    """The cost of steps that are as late as those measured were, in the mean."""
    cost = found.cost
    return msgspec.structs.replace(cost, c0=cost.c0 + found.late_s, d0=cost.d0 + found.late_s)


def _first(*values: T | None) -> T | None:
    return next((value for value in values if value is not None), None)


def _sources(
    found: CostFound, edge: EdgeFound | None, worker: StepWorker | None, like: Profile | None, given: Given
) -> dict[str, str]:
    of_worker = f"as worker {worker.worker} ({worker.device}, {worker.model}) says" if worker is not None else ""
    of_like = f"as of {like.name}" if like is not None else ""
    measured = "measured: see edge" if edge is not None and edge.link_bytes_per_s.value is not None else ""
    assumed = f"assumed: {ASSUMED_LINK:g} bytes a second, one 200 Gb/s port a worker"
    return {
        "fit": f"twinpool sim calibrate: {found.fitted} of {found.steps} measured steps, {found.outliers} outliers",
        "kv_tokens": "as given" if given.kv_tokens else of_worker or of_like,
        "link_bytes_per_s": "as given" if given.link_bytes_per_s else measured or of_like or assumed,
        "price_per_gpu_hour": of_like or "not known",
        "watts_per_gpu": of_like or "not known",
        "edge": edge.text() if edge is not None else "not measured",
    }


def write_profile(path: Path, profile: ProfileFile) -> None:
    """Write it. Raises ConfigError where that cannot be done."""
    text = msgspec.json.format(msgspec.json.encode(profile), indent=2) + b"\n"
    try:
        path.write_bytes(text)
    except OSError as error:
        raise ConfigError(f"{path}: the profile cannot be written ({error.strerror})") from None
