"""The table of metrics, and what is counted."""

from __future__ import annotations

import dataclasses
import re

import pytest
from prometheus_client import generate_latest

from twinpool.router.cell import CellModel, CellStatus, FinishedOut, WorkerView
from twinpool.router.metrics import MAX_TENANTS, EdgeState, Metrics, gauges, reference
from twinpool.router.request import Expected

OUT = FinishedOut(
    reason="stop", stop=2, text="", prompt_tokens=100, completion_tokens=20, cached_tokens=64, prefill_worker="p1",
    decode_worker="d1", path="split", path_reason="predicted", kv_bytes=4096, backend="shm", attempts=3, queue_s=0.001,
    reserve_s=0.002, prefill_s=0.02, compute_s=0.018, transfer_s=0.003, ttft_s=0.025, itl_s=0.01, total_s=0.3,
)  # fmt: skip
MODEL = CellModel("tiny", "f", "float32", 100, 256, (2,), 16)
WORKERS = (
    WorkerView("w1", ("prefill",), "ready", 100, 75, 5, 2, 1, 0.05, 0, 1, 0.1),
    WorkerView("w2", ("prefill", "decode"), "draining", 0, 0, 0, 0, 0, 0.0, 0, 2, 0.2),
)
STATE = EdgeState(CellStatus("r1", MODEL, 3, 2, 7, 1, 2, 5, WORKERS), ready=True, calls=4)


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {key.rstrip("_"): value for key, value in labels.items()})


def test_a_finished_sequence() -> None:
    metrics = Metrics()
    metrics.observe_finished(OUT, "acme", "batch")
    assert sample(metrics, "twinpool_requests_total", class_="batch", path="split", outcome="stop") == 1
    assert sample(metrics, "twinpool_tokens_total", tenant="acme", kind="cached") == 64
    assert sample(metrics, "twinpool_kv_bytes_total", backend="shm") == 4096
    assert sample(metrics, "twinpool_lost_attempts_total") == 2
    for edge in ("queue", "reserve", "prefill", "transfer", "ttft", "itl", "total"):
        seconds = getattr(OUT, f"{edge}_s")
        assert sample(metrics, f"twinpool_{edge}_seconds_sum", class_="batch") == pytest.approx(seconds)


def test_fetches() -> None:
    metrics = Metrics()
    metrics.observe_finished(OUT, "acme", "batch")
    assert sample(metrics, "twinpool_fetches_total", outcome="") is None
    came = {"fetch_outcome": "OK", "fetched_blocks": 7, "fetch_predicted_s": 0.25, "fetch_s": 0.5}
    metrics.observe_finished(dataclasses.replace(OUT, **came), "acme", "batch")  # type: ignore[arg-type]
    late = {"fetch_outcome": "LATE", "fetch_predicted_s": 0.25, "fetch_s": 0.75}
    metrics.observe_finished(dataclasses.replace(OUT, **late), "acme", "batch")  # type: ignore[arg-type]
    assert sample(metrics, "twinpool_fetches_total", outcome="OK") == 1
    assert sample(metrics, "twinpool_fetches_total", outcome="LATE") == 1
    assert sample(metrics, "twinpool_fetched_blocks_total") == 7
    assert sample(metrics, "twinpool_fetch_seconds_total", kind="predicted") == 0.25
    assert sample(metrics, "twinpool_fetch_seconds_total", kind="actual") == 0.5


def test_predictions_stand_beside_what_came() -> None:
    metrics = Metrics()
    metrics.observe_finished(OUT, "acme", "batch")
    assert sample(metrics, "twinpool_predictions_total", what="output_tokens", kind="actual") is None
    fetched = dataclasses.replace(OUT, expected=Expected(0.0, 48, 20))
    for out in (dataclasses.replace(OUT, expected=Expected(0.25, 32, 100)), fetched):
        metrics.observe_finished(out, "acme", "batch")
    seen = {
        what: [sample(metrics, "twinpool_predictions_total", what=what, kind=kind) for kind in ("predicted", "actual")]
        for what in ("prefill_seconds", "cached_tokens", "output_tokens")
    }
    assert seen["prefill_seconds"] == [0.25, OUT.compute_s]  # a fetch's seconds are not the prompt's
    assert seen["cached_tokens"] == [80, 2 * OUT.cached_tokens]
    assert seen["output_tokens"] == [120, 2 * OUT.completion_tokens]


def test_failed_and_refused() -> None:
    metrics = Metrics()
    metrics.observe_failed("cancelled", "realtime")
    metrics.observe_refused("OVERLOADED")
    assert sample(metrics, "twinpool_requests_total", class_="realtime", path="", outcome="cancelled") == 1
    assert sample(metrics, "twinpool_refused_total", reason="OVERLOADED") == 1


def test_tenants_do_not_grow_without_bound() -> None:
    metrics = Metrics()
    for index in range(MAX_TENANTS + 50):
        metrics.observe_finished(dataclasses.replace(OUT, kv_bytes=0), f"t{index}", "batch")
    assert sample(metrics, "twinpool_tokens_total", tenant="other", kind="prompt") == 50 * 100
    assert sample(metrics, "twinpool_kv_bytes_total", backend="shm") is None


def test_gauges() -> None:
    found = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in gauges(STATE)
        for sample in family.samples
    }
    assert found["twinpool_queued_requests",] == 3
    assert found["twinpool_open_calls",] == 4
    assert found["twinpool_worker_free_blocks", ("worker", "w1")] == 75
    assert found["twinpool_workers", ("role", "prefill"), ("state", "ready")] == 1
    assert found["twinpool_workers", ("role", "prefill"), ("state", "draining")] == 1
    assert found["vllm:kv_cache_usage_perc", ("engine", "w1"), ("model_name", "tiny")] == 0.25
    assert found["vllm:kv_cache_usage_perc", ("engine", "w2"), ("model_name", "tiny")] == 0
    config = ("block_size", "16"), ("engine", "w1"), ("model_name", "tiny"), ("num_gpu_blocks", "100")
    assert found["vllm:cache_config_info", *config] == 1


def test_no_model_yet() -> None:
    state = STATE._replace(status=CellStatus("r1", None, 0, 0, 0, 0, 0, 0, ()))
    assert not any(family.name.startswith("vllm:") for family in gauges(state))


def test_the_reference_names_everything_that_is_served() -> None:
    metrics = Metrics()
    page = generate_latest(metrics.registry).decode()
    served = set(re.findall(r"^# TYPE (\S+) (?:counter|histogram)", page, re.MULTILINE))
    served |= {family.name for family in gauges(STATE)}
    named = set(re.findall(r"^\| `([^`]+)`", reference(), re.MULTILINE))
    assert served == named
