"""What a simulation found: a column entry a request, totals a worker, and the summary that ``sim replay`` prints.

Definitions (scheduling.md section 4):

- A request *attains* its SLO if it was completed, its first token went to the client within its TTFT limit, and the
  mean of its worst tenth of gaps is within its ITL limit (met by a request of one token). Attainment is their share of
  all *offered* requests: refused and lost ones missed it.
- Goodput is attaining requests a second of the run: from the first arrival to the last end.
- TTFT, end-to-end time, worst gaps, transfers, cached share, paths and throughput are of completed requests. ITL pools
  all gaps of all requests (``gap_pool.py``). Quantiles are as ``gaps.py`` defines them.
- Cost is all GPUs for the whole run; energy is idle power plus, while a worker computes, what it takes on top.

Everything in a summary but what has ``wall`` in its name depends on the inputs alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gap_spread import SpreadGaps
from twinpool.sim.gaps import Floats, Ints, quantile

COMPLETED: Final = 0
REFUSED: Final = 1
LOST: Final = 2
SPLIT: Final = 0
LOCAL: Final = 1
NEVER: Final = -1.0  # a time that did not come
DECILES = 10

Mask = npt.NDArray[np.bool_]
Summary = dict[str, Any]  # values are what JSON has


def _as_floats(column: Floats | array[float] | Sequence[float]) -> Floats:
    return np.asarray(column, dtype=np.float64)


def _as_ints(column: Ints | array[int] | Sequence[int]) -> Ints:
    return np.asarray(column, dtype=np.int64)


class Columns:
    """One entry a request, in the order of the trace; seconds of the virtual clock, tokens, bytes.

    Takes arrays or sequences of one length; raises ValueError where lengths differ. ``tenant`` and ``klass`` may be
    missing.
    """

    __slots__ = (
        "arrival", "cached", "decode", "ended", "itl", "itl_limit", "klass", "kv_bytes", "max_gap", "outcome", "output",
        "path", "prefill", "prompt", "shown", "tenant", "transfer_s", "ttft_limit", "unloaded",
    )  # fmt: skip

    def __init__(
        self,
        *,
        arrival: Sequence[float] | Floats,
        shown: Sequence[float] | Floats,
        ended: Sequence[float] | Floats,
        prompt: Sequence[int] | Ints,
        output: Sequence[int] | Ints,
        cached: Sequence[int] | Ints,
        prefill: Sequence[int] | Ints,
        decode: Sequence[int] | Ints,
        path: Sequence[int] | Ints,
        outcome: Sequence[int] | Ints,
        itl: Sequence[float] | Floats,
        max_gap: Sequence[float] | Floats,
        unloaded: Sequence[float] | Floats,
        kv_bytes: Sequence[int] | Ints,
        transfer_s: Sequence[float] | Floats,
        ttft_limit: Sequence[float] | Floats,
        itl_limit: Sequence[float] | Floats,
        tenant: Sequence[str] | None = None,
        klass: Sequence[str] | None = None,
    ) -> None:
        self.arrival = _as_floats(arrival)  # the real one: in closed loops after the request before it; NEVER
        self.shown = _as_floats(shown)  # the first token went to the client; NEVER
        self.ended = _as_floats(ended)  # last token, refusal or loss; NEVER
        self.prompt = _as_ints(prompt)
        self.output = _as_ints(output)  # tokens wanted: a completed request has had them all
        self.cached = _as_ints(cached)  # of the prompt, on the prefill worker
        self.prefill = _as_ints(prefill)  # worker, -1: none
        self.decode = _as_ints(decode)
        self.path = _as_ints(path)  # SPLIT, LOCAL
        self.outcome = _as_ints(outcome)  # COMPLETED, REFUSED, LOST
        self.itl = _as_floats(itl)  # mean of the worst tenth of its gaps
        self.max_gap = _as_floats(max_gap)
        self.unloaded = _as_floats(unloaded)  # prefill of the whole prompt alone, without cache
        self.kv_bytes = _as_ints(kv_bytes)  # moved from prefill to decode worker
        self.transfer_s = _as_floats(transfer_s)  # that part of it which came after the first token; NEVER
        self.ttft_limit = _as_floats(ttft_limit)
        self.itl_limit = _as_floats(itl_limit)
        self.tenant = tenant
        self.klass = klass
        given = {name: len(column) for name in self.__slots__ if (column := getattr(self, name)) is not None}
        if len(set(given.values())) > 1:
            raise ValueError(f"columns of different lengths: {given}")

    def __len__(self) -> int:
        return len(self.arrival)

    def completed(self) -> Mask:
        """Which requests had all their tokens."""
        return np.equal(self.outcome, COMPLETED)

    def ttft(self) -> Floats:
        """Seconds from arrival to the first token at the client; meaningless where that never came."""
        return self.shown - self.arrival

    def attained(self) -> Mask:
        """Which requests met both limits."""
        in_time = self.completed() & (self.shown >= 0.0) & (self.ttft() <= self.ttft_limit)
        return in_time & ((self.output < 2) | (self.itl <= self.itl_limit))

    def duration_s(self) -> float:
        """From the first arrival to the last end; 0 where nothing ended."""
        over = self.ended >= 0.0
        if not over.any():
            return 0.0
        return max(0.0, float(self.ended[over].max() - self.arrival[self.arrival >= 0.0].min()))


@dataclass(slots=True)
class WorkerTotals:
    """What one worker did, and what its GPUs cost; None where the profile does not know."""

    name: str
    roles: str = ""
    gpus: int = 1
    busy_prefill_s: float = 0.0  # seconds in steps of prompts only
    busy_decode_s: float = 0.0  # of decoding only
    busy_mixed_s: float = 0.0
    computed_tokens: int = 0  # of prompts
    cached_tokens: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    blocks: int = 0
    peak_blocks: int = 0  # most that were in use by requests at once
    price_per_gpu_hour: float | None = None
    idle_watts: float | None = None  # a GPU
    busy_watts: float | None = None

    @property
    def busy_s(self) -> float:
        """Seconds in steps of any kind."""
        return self.busy_prefill_s + self.busy_decode_s + self.busy_mixed_s

    def joules(self, duration_s: float) -> float | None:
        """Energy of its GPUs over the run."""
        if self.idle_watts is None or self.busy_watts is None:
            return None
        return self.gpus * (self.idle_watts * duration_s + (self.busy_watts - self.idle_watts) * self.busy_s)

    def price(self, duration_s: float) -> float | None:
        """Cost of its GPUs over the run, in the currency of the profile."""
        if self.price_per_gpu_hour is None:
            return None
        return self.gpus * self.price_per_gpu_hour * duration_s / 3600.0


@dataclass(slots=True)
class Wall:
    """Real seconds that the simulation took: reading the inputs, running, statistics."""

    load_s: float = 0.0
    run_s: float = 0.0
    stats_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All of them."""
        return self.load_s + self.run_s + self.stats_s


@dataclass(slots=True)
class Result:
    """One simulation. ``summary`` is what is printed; the report draws from the columns."""

    columns: Columns
    workers: list[WorkerTotals]
    gaps: GapPool
    policy: str
    profile: str
    slo: Mapping[str, float]
    digest: str  # of all decisions
    settings: Mapping[str, object] = field(default_factory=dict)
    refusals: Mapping[str, int] = field(default_factory=dict)  # reason -> requests
    compiled: str = "interpreted"  # or "compiled": how the decision core ran
    wall: Wall = field(default_factory=Wall)
    gap_spread_s: Sequence[float] = ()
    _figures: Summary | None = None

    def figures(self) -> Summary:
        """The summary without what depends on the machine. Computed once; its time is added to ``wall.stats_s``."""
        if self._figures is None:
            started = perf_counter()
            self._figures = self._compute()
            self.wall.stats_s += perf_counter() - started
        return self._figures

    def summary(self) -> Summary:
        """The JSON-ready object of ``sim replay``: figures, and what the run took under keys with ``wall``."""
        figures = dict(self.figures())
        wall_s = self.wall.total_s
        return figures | {
            "wall_s": wall_s,
            "wall_load_s": self.wall.load_s,
            "wall_run_s": self.wall.run_s,
            "wall_stats_s": self.wall.stats_s,
            "requests_per_wall_s": len(self.columns) / wall_s if wall_s > 0.0 else None,
            "wall_core": self.compiled,
        }

    def _compute(self) -> Summary:
        columns = self.columns
        completed = columns.completed()
        duration_s = columns.duration_s() if len(columns) else 0.0
        return {
            "policy": self.policy,
            "profile": self.profile,
            "slo": dict(self.slo),
            "requests": len(columns),
            "completed": int(completed.sum()),
            "refused": int((columns.outcome == REFUSED).sum()),
            "refusals": dict(sorted(self.refusals.items())),
            "lost": int((columns.outcome == LOST).sum()),
            "duration_s": duration_s,
            **_attainment(columns, duration_s, sum(worker.gpus for worker in self.workers)),
            **_throughput(columns, completed, duration_s),
            **_times(columns, completed, self.gaps, SpreadGaps(self.gaps, self.gap_spread_s)),
            **_cache_and_path(columns, completed),
            **_cost(self.workers, columns, completed, duration_s),
            "workers": [_worker(worker, duration_s) for worker in self.workers],
            "settings": dict(self.settings),
            "digest": self.digest,
        }


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None


def _spread(seconds: Floats, *quantiles: int) -> Summary:
    """Mean and percentiles in milliseconds; None where there are no values."""
    if not len(seconds):
        return {"mean": None} | {f"p{percent}": None for percent in quantiles}
    ordered = np.sort(seconds)
    spread = {"mean": 1000.0 * float(ordered.mean())}
    return spread | {f"p{percent}": 1000.0 * quantile(ordered, percent / 100) for percent in quantiles}


def _attainment(columns: Columns, duration_s: float, gpus: int) -> Summary:
    attained = columns.attained()
    goodput = float(attained.sum()) / duration_s if duration_s > 0.0 else 0.0
    deciles = np.array_split(np.argsort(columns.prompt, kind="stable"), DECILES)
    tenants = _by_name(columns.tenant, attained)
    return {
        "gpus": gpus,
        "attainment": _share(attained.sum(), len(columns)),
        "attainment_by_decile": [_share(attained[decile].sum(), len(decile)) for decile in deciles],
        "decile_prompt_tokens": [int(columns.prompt[decile[-1]]) if len(decile) else None for decile in deciles],
        "attainment_by_class": _by_name(columns.klass, attained),
        "attainment_by_tenant": tenants,
        "jain": jain(list(tenants.values())) if tenants else None,
        "goodput_rps": goodput,
        "goodput_rps_per_gpu": goodput / gpus if gpus else None,
    }


def _by_name(names: Sequence[str] | None, attained: Mask) -> dict[str, float]:
    """Attainment of each tenant or class, by name."""
    if names is None:
        return {}
    known, index = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
    offered, met = np.bincount(index), np.bincount(index, attained)
    return {str(name): float(met[i] / offered[i]) for i, name in enumerate(known)}


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness index, (sum x)^2 / (n * sum x^2): 1 where all are equal, 1/n where one has everything.

    All 0 counts as equal. Raises ValueError without shares. Source: Jain, Chiu, Hawe, DEC-TR-301, 1984.
    """
    if not shares:
        raise ValueError("no shares to compare")
    most = max(shares)
    if most <= 0.0:
        return 1.0
    parts = [share / most for share in shares]
    return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))


def _throughput(columns: Columns, completed: Mask, duration_s: float) -> Summary:
    done = {
        "requests_per_s": int(completed.sum()),
        "prompt_tokens_per_s": int(columns.prompt[completed].sum()),
        "output_tokens_per_s": int(columns.output[completed].sum()),
    }
    return {"throughput": {name: count / duration_s if duration_s > 0.0 else 0.0 for name, count in done.items()}}


def _times(columns: Columns, completed: Mask, gaps: GapPool, spread: SpreadGaps) -> Summary:
    pool: Summary = {"mean": None, "p50": None, "p90": None, "p99": None}
    if gaps.count:
        pool = {"mean": 1000.0 * gaps.mean} | {f"p{p}": 1000.0 * spread.quantile(p / 100) for p in (50, 90, 99)}
    longest = columns.max_gap[completed & (columns.output > 1)]
    worst_gap = {name: value for name, value in _spread(longest, 50, 99, 100).items() if name != "mean"}
    worst_gap["max"] = worst_gap.pop("p100")
    return {
        "ttft_ms": _spread(columns.ttft()[completed], 50, 90, 99),
        "itl_ms": pool,
        "e2e_ms": _spread((columns.ended - columns.arrival)[completed], 50, 90, 99),
        "worst_gap_ms": worst_gap,
        "gaps": gaps.count,
    }


def _cache_and_path(columns: Columns, completed: Mask) -> Summary:
    moved = completed & (columns.kv_bytes > 0) & (columns.transfer_s >= 0.0)
    paths = {name: completed & (columns.path == path) for name, path in (("split", SPLIT), ("local", LOCAL))}
    return {
        "cached_token_share": _share(columns.cached[completed].sum(), columns.prompt[completed].sum()),
        "path_share": {name: _share(chosen.sum(), completed.sum()) for name, chosen in paths.items()},
        "transfer_ms": _spread(columns.transfer_s[moved], 99),
        "transfer_bytes": int(columns.kv_bytes[completed].sum()),
    }


def _cost(workers: Sequence[WorkerTotals], columns: Columns, completed: Mask, duration_s: float) -> Summary:
    """Cost for a million output tokens, and for a million of prompts and outputs; output tokens per joule."""
    output = int(columns.output[completed].sum())
    tokens = output + int(columns.prompt[completed].sum())
    price = _total([worker.price(duration_s) for worker in workers])
    joules = _total([worker.joules(duration_s) for worker in workers])
    return {
        "cost_per_million_tokens": None if price is None else _share(1e6 * price, output),
        "cost_per_million_all_tokens": None if price is None else _share(1e6 * price, tokens),
        "tokens_per_joule": None if joules is None else _share(output, joules),
    }


def _total(parts: Sequence[float | None]) -> float | None:
    """Their sum; None where one of them is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _worker(worker: WorkerTotals, duration_s: float) -> Summary:
    entry = {item.name: getattr(worker, item.name) for item in fields(worker)}
    return entry | {"busy_share": worker.busy_s / duration_s if duration_s > 0.0 else 0.0}
