"""The summary against figures worked out by hand, and the tables that show it."""

from __future__ import annotations

import io
import json
import math
import random
from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.sim.gap_traffic import traffic

from twinpool.sim.gap_pool import GapPool
from twinpool.sim.gaps import GapLog, Runs, request_gaps
from twinpool.sim.present import compare, show
from twinpool.sim.result import COMPLETED, LOCAL, LOST, NEVER, REFUSED, Columns, Result, WorkerTotals, jain

# Of each request: arrival, shown, ended, prompt, output, outcome, itl. Limits: TTFT 1 s, ITL 50 ms.
ROWS = [
    (10.0, 10.5, 12.0, 100, 5, COMPLETED, 0.050),  # met, just
    (11.0, 12.0, 20.0, 200, 5, COMPLETED, 0.040),  # met, just
    (12.0, 13.5, 15.0, 300, 5, COMPLETED, 0.010),  # TTFT missed
    (13.0, 13.1, 19.0, 400, 5, COMPLETED, 0.060),  # ITL missed
    (14.0, 14.1, 14.1, 500, 1, COMPLETED, 9.000),  # one token: ITL met, whatever stands there
    (15.0, NEVER, 15.0, 600, 5, REFUSED, 0.0),
    (16.0, 16.1, 30.0, 700, 5, LOST, 0.01),
    (17.0, NEVER, NEVER, 800, 5, LOST, 0.0),
]


def columns(rows: list[tuple[float, float, float, int, int, int, float]] = ROWS, **other: Any) -> Columns:
    arrival, shown, ended, prompt, output, outcome, itl = ([*column] for column in zip(*rows, strict=True))
    n = len(rows)
    given: dict[str, Any] = {
        "arrival": array("d", arrival), "shown": array("d", shown), "ended": array("d", ended),
        "prompt": array("q", prompt), "output": output, "outcome": array("b", outcome), "itl": np.array(itl),
        "max_gap": [2.0 * value for value in itl], "cached": [tokens // 4 for tokens in prompt],
        "prefill": [0] * n, "decode": [1] * n, "path": [LOCAL if i == 0 else 0 for i in range(n)],
        "unloaded": [0.0] * n, "kv_bytes": [0] + [1000] * (n - 1),
        "transfer_s": [NEVER] + [0.001 * i for i in range(1, n)],
        "ttft_limit": [1.0] * n, "itl_limit": [0.05] * n,
    }  # fmt: skip
    return Columns(**{**given, **other})


def pool(*gaps: float) -> GapPool:
    log = GapLog()
    for gap in gaps:
        log.add_single(0, gap)
    return GapPool([Runs()], log)


def result(
    rows: Columns | None = None, workers: list[WorkerTotals] | None = None, gaps: GapPool | None = None
) -> Result:
    return Result(
        rows if rows is not None else columns(),
        workers if workers is not None else [WorkerTotals("p0", gpus=4), WorkerTotals("d0", gpus=4)],
        gaps if gaps is not None else pool(0.01, 0.02, 0.03, 0.04),
        "least_seconds", "h100_sxm/llama-3.1-70b/tp4", {"ttft_ms": 1000.0, "itl_ms": 50.0}, "d1",
        {"chunk": 2048}, {"deadline": 1},
    )  # fmt: skip


def test_attainment_counts_everything_offered() -> None:
    summary = result().summary()
    assert [summary[key] for key in ("requests", "completed", "refused", "lost")] == [8, 5, 1, 2]
    assert summary["duration_s"] == 20.0
    assert summary["attainment"] == 3 / 8
    assert summary["goodput_rps"] == 3 / 20
    assert summary["goodput_rps_per_gpu"] == 3 / 20 / 8
    assert summary["throughput"] == {
        "requests_per_s": 5 / 20, "prompt_tokens_per_s": 1500 / 20, "output_tokens_per_s": 21 / 20,
    }  # fmt: skip


def test_times_are_of_completed_requests() -> None:
    summary = result().summary()
    assert summary["ttft_ms"] == pytest.approx({"mean": 640.0, "p50": 500.0, "p90": 1500.0, "p99": 1500.0})
    assert summary["e2e_ms"]["p50"] == pytest.approx(3000.0)
    assert summary["itl_ms"] == pytest.approx({"mean": 25.0, "p50": 20.0, "p90": 40.0, "p99": 40.0})
    assert summary["worst_gap_ms"] == pytest.approx({"p50": 80.0, "p99": 120.0, "max": 120.0})
    assert summary["transfer_ms"] == pytest.approx({"mean": 2.5, "p99": 4.0})
    assert summary["transfer_bytes"] == 4000
    assert summary["cached_token_share"] == 375 / 1500
    assert summary["path_share"] == {"split": 4 / 5, "local": 1 / 5}


def test_deciles_are_of_equal_numbers_by_prompt_length() -> None:
    rows = [(float(i), i + 0.1 if i % 20 else i + 5.0, i + 9.0, 1000 - i, 2, COMPLETED, 0.01) for i in range(200)]
    summary = result(columns(rows)).summary()
    assert summary["decile_prompt_tokens"] == [820 + 20 * k for k in range(10)]
    assert summary["attainment_by_decile"] == [0.95] * 10


def test_fewer_requests_than_deciles() -> None:
    summary = result(columns(ROWS[:2])).summary()
    assert summary["attainment_by_decile"] == [1.0, 1.0] + [None] * 8


def test_cost_and_energy() -> None:
    worker = WorkerTotals("b0", gpus=2, busy_prefill_s=3.0, busy_decode_s=1.0, busy_mixed_s=1.0, price_per_gpu_hour=3.6)
    worker.idle_watts, worker.busy_watts = 100.0, 500.0
    summary = result(workers=[worker]).summary()
    assert summary["cost_per_million_tokens"] == pytest.approx(2 * 3.6 * 20 / 3600 / 21 * 1e6)
    assert summary["cost_per_million_all_tokens"] == pytest.approx(2 * 3.6 * 20 / 3600 / 1521 * 1e6)
    assert summary["tokens_per_joule"] == pytest.approx(21 / (2 * (100.0 * 15.0 + 500.0 * 5.0)))
    assert summary["workers"][0]["busy_share"] == 0.25
    unknown = result(workers=[worker, WorkerTotals("b1")]).summary()
    assert unknown["cost_per_million_tokens"] is None
    assert unknown["tokens_per_joule"] is None


def test_tenants_and_classes() -> None:
    tenants = ["b", "b", "b", "b", "a", "a", "a", "a"]
    summary = result(columns(tenant=tenants, klass=["batch"] * 7 + ["realtime"])).summary()
    assert summary["attainment_by_tenant"] == {"a": 0.25, "b": 0.5}
    assert summary["jain"] == pytest.approx(0.75**2 / (2 * (0.25**2 + 0.5**2)))
    assert summary["attainment_by_class"] == {"batch": 3 / 7, "realtime": 0.0}
    assert result().summary()["jain"] is None


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_jain_is_between_one_share_and_all(shares: list[float]) -> None:
    assert 1.0 / len(shares) - 1e-9 <= jain(shares) <= 1.0 + 1e-9
    assert jain([0.5] * len(shares)) == pytest.approx(1.0)
    assert jain([1.0] + [0.0] * (len(shares) - 1)) == pytest.approx(1.0 / len(shares))


def test_nothing_happened() -> None:
    empty = result(columns([(0.0, NEVER, NEVER, 5, 5, LOST, 0.0)]), gaps=pool()).summary()
    assert empty["attainment"] == 0.0
    assert empty["goodput_rps"] == 0.0
    assert empty["ttft_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert empty["worst_gap_ms"] == {"p50": None, "p99": None, "max": None}
    assert empty["itl_ms"]["p99"] is None
    no_rows: list[Any] = []
    none = result(Columns(**{name: no_rows for name in Columns.__slots__ if name not in ("tenant", "klass")}), [])
    summary = none.summary()
    assert summary["requests"] == 0
    assert summary["attainment"] is None
    assert summary["goodput_rps_per_gpu"] is None
    show(summary, Console(file=io.StringIO()))


def test_a_request_that_never_arrived_does_not_stretch_the_run() -> None:
    rows = columns([*ROWS, (NEVER, NEVER, NEVER, 900, 5, LOST, 0.0)])
    assert rows.duration_s() == 20.0
    assert result(rows).summary()["attainment"] == 3 / 9


def test_columns_have_one_length() -> None:
    with pytest.raises(ValueError, match=r"different lengths.*'itl': 3"):
        columns(itl=[0.0, 0.0, 0.0])


def replayed(seed: int) -> Result:
    """A run of the size of a small trace, with gaps of made-up workers."""
    workers, log = traffic(300, 3, seed=seed, rate=3.0)
    found = request_gaps(workers, log, 300)
    rng = random.Random(seed)
    rows = []
    for i in range(300):
        shown = i + rng.expovariate(2.0)
        tokens = int(found.gaps[i]) + 1
        rows.append((float(i), shown, shown + float(found.mean[i]) * (tokens - 1), rng.randrange(1, 9999), tokens,
                     COMPLETED, float(found.worst[i])))  # fmt: skip
    run = result(columns(rows, max_gap=found.longest), gaps=GapPool(workers, log))
    run.wall.load_s, run.wall.run_s = 0.5, rng.random()
    return run


def test_same_inputs_same_bytes_but_for_wall() -> None:
    first, second = replayed(4).summary(), replayed(4).summary()
    walls = {key for key in first if "wall" in key}
    assert walls == {"wall_s", "wall_load_s", "wall_run_s", "wall_stats_s", "requests_per_wall_s", "wall_core"}

    def printed(summary: dict[str, Any]) -> str:
        return json.dumps({key: value for key, value in summary.items() if key not in walls}, allow_nan=False)

    assert printed(first) == printed(second)
    assert printed(first) != printed(replayed(5).summary())


def test_wall_includes_the_statistics() -> None:
    run = replayed(1)
    before = run.wall.stats_s
    summary = run.summary()
    assert run.wall.stats_s > before
    assert summary["wall_s"] == run.wall.total_s == math.fsum([run.wall.load_s, run.wall.run_s, run.wall.stats_s])
    assert run.summary() == summary


def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def text(where: Console) -> str:
    assert isinstance(where.file, io.StringIO)
    return where.file.getvalue()


def test_show_names_the_headline_figures() -> None:
    where = console()
    rows = columns(tenant=["[red]"] * 8, klass=["[batch]"] * 8)
    show(result(rows, [WorkerTotals("b0", gpus=2, price_per_gpu_hour=3.0)]).summary(), where)
    for piece in ("least_seconds", "37.50 %", "0.150 requests/s", "1,500.0", "deadline 1", "class [batch]", "digest d1",
                  "per million output tokens", "split 80.00 %"):  # fmt: skip
        assert piece in text(where)


def test_compare_marks_the_best_of_each_column() -> None:
    worse, better = result().summary(), result(columns(ROWS[:2])).summary()
    where = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    compare([("a [1]", worse), ("b", better)], where)
    line_a, line_b = (
        next(line for line in text(where).splitlines() if line.startswith(name)) for name in ("a [1]", "b")
    )
    assert "37.50" in line_a
    assert "\x1b[1m100.00\x1b[0m" in line_b
    assert "\x1b[1m37.50" not in line_a


def test_compare_of_one_marks_nothing() -> None:
    where = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    compare([("only", result().summary())], where)
    (line,) = [line for line in text(where).splitlines() if line.startswith("only")]
    assert "\x1b[1m" not in line
