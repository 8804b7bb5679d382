"""Every metric of the router in one table: name, labels, help, and what to do when it moves. Served for Prometheus.

Counters and histograms are fed by the edge, one histogram for each edge of a request's life (router/request.py); gauges
are read from the cell's status at each scrape, so nothing is measured twice. The ``vllm:`` names are those that
existing endpoint pickers, scalers and dashboards ask for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric
from prometheus_client.core import GaugeMetricFamily

from twinpool.router.cell import CellStatus, FinishedOut, WorkerView
from twinpool.router.request import Expected

MAX_TENANTS = 100  # distinct values of the tenant label; further tenants share OTHER
OTHER = "other"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Row(NamedTuple):
    """One metric. ``source`` is the field it is read from: of FinishedOut, CellStatus or WorkerView."""

    name: str
    labels: tuple[str, ...]
    help: str
    action: str
    source: str = ""


EDGES = (
    Row("twinpool_queue_seconds", ("class",), "Arrival to commit to a worker.",
        "Grows first under load: add prefill workers, or lower max_queue so that load is shed earlier.", "queue_s"),
    Row("twinpool_reserve_seconds", ("class",), "Commit to KV room booked on the decode worker.",
        "Decode workers are short of blocks: raise kv_memory_mib or add decode workers.", "reserve_s"),
    Row("twinpool_prefill_seconds", ("class",), "Prefill command to first token, at the router.",
        "Compare with compute: if that grows too, prompts are longer or hit the cache less; if not, look at the link.",
        "prefill_s"),
    Row("twinpool_prefill_compute_seconds", ("class",), "Step time within prefill, at the worker.",
        "Longer prompts, fewer cached tokens, or a slower worker: compare with twinpool_worker_step_seconds.",
        "compute_s"),
    Row("twinpool_ttft_seconds", ("class",), "Arrival to first token (TTFT).",
        "What users feel. Find the edge that grew: queue, reserve or prefill.", "ttft_s"),
    Row("twinpool_transfer_seconds", ("class",), "First token to all KV verified; 0 when it was there before.",
        "Check the backend label of twinpool_kv_bytes_total: a fall-back to tcp shows here.", "transfer_s"),
    Row("twinpool_itl_seconds", ("class",), "Mean gap between tokens after the first (ITL), one value a request.",
        "Decode batches are too large: add decode workers, or lower max_batch or chunk_tokens.", "itl_s"),
    Row("twinpool_total_seconds", ("class",), "Arrival to last token.",
        "Follows output lengths; look at TTFT and ITL first.", "total_s"),
)  # fmt: skip

COUNTERS = {
    "requests": Row("twinpool_requests", ("class", "path", "outcome"),
        "Sequences that ended, by path (split, local; empty where it failed) and outcome (stop, length or a status).",
        "internal: read the log at the id the client got. deadline_exceeded: see twinpool_ttft_seconds."),
    "refused": Row("twinpool_refused", ("reason",), "Requests that never started, by reason.",
        "OVERLOADED: add workers. NO_WORKER: see twinpool_workers. BAD_*: a client sends what can not work."),
    "tokens": Row("twinpool_tokens", ("tenant", "kind"), "Tokens of finished sequences: prompt, cached, completion.",
        "cached / prompt is the share of prompts that cost nothing; when it falls, look for eviction or new prompts."),
    "kv_bytes": Row("twinpool_kv_bytes", ("backend",), "KV bytes moved between workers.",
        "An unexpected backend means that the best one failed at connect: read the workers' logs."),
    "fetches": Row("twinpool_fetches", ("outcome",),
        "Prefixes fetched for a prefill, by outcome: OK, GONE, LATE, SOURCE_LOST or a transfer's error.",
        "Anything but OK was computed in place of it. LATE: links are slower than predicted. CHECKSUM: see the logs."),
    "fetched_blocks": Row("twinpool_fetched_blocks", (), "KV blocks that prefill workers fetched, verified.",
        "Prompt work that another worker had done. scheduling.fetch: false turns it off."),
    "fetch_seconds": Row("twinpool_fetch_seconds", ("kind",), "Seconds of fetches that came: predicted and actual.",
        "Actual far above predicted: the links carry more than the router knows of."),
    "moves": Row("twinpool_moves", (), "Sequences that went on at another decode worker.",
        "Moves with drains, role changes, and where outputs outgrow KV memory: many of these ask for decode workers."),
    "predictions": Row("twinpool_predictions", ("what", "kind"),
        "What requests were predicted to be, and were: prefill_seconds, cached_tokens, output_tokens. Those that lost"
        " an attempt or were resumed are left out.",
        "actual / predicted is near 1. prefill_seconds: see the paces. cached_tokens below 0.8: KV events are lost."),
    "lost_attempts": Row("twinpool_lost_attempts", (), "Attempts lost to dead workers, failed transfers or preemption.",
        "Clients saw a pause, no error. Look for workers that restart, and for twinpool_worker_free_blocks near 0."),
}  # fmt: skip

CELL_GAUGES = (
    Row("twinpool_queued_requests", (), "Requests waiting for a commit.",
        "Steadily above 0: prefill is the bottleneck.", "queued"),
    Row("twinpool_active_requests", (), "Requests committed and not ended.",
        "Compare with the decode slots.", "active"),
    Row("twinpool_resumed_requests", (), "Streams that went on after a loss, since the start.",
        "Moves when workers die; see twinpool_lost_attempts_total.", "resumed"),
)  # fmt: skip

WORKER_GAUGES = (
    Row("twinpool_worker_blocks", ("worker",), "KV blocks of a worker.",
        "Constant; 0 means that it never started.", "blocks"),
    Row("twinpool_worker_free_blocks", ("worker",), "KV blocks that nobody needs (cached ones included).",
        "Near 0: requests wait for room or are preempted; add decode workers or KV memory.", "free_blocks"),
    Row("twinpool_worker_cached_blocks", ("worker",), "KV blocks in the prefix cache.",
        "Falls when running requests need the room; expect fewer cached tokens.", "cached_blocks"),
    Row("twinpool_worker_running", ("worker",), "Sequences that decode.",
        "At max_batch: add decode workers.", "running"),
    Row("twinpool_worker_waiting", ("worker",), "Sequences with prompt tokens to compute.",
        "Steadily above 1: prefill is the bottleneck.", "waiting"),
    Row("twinpool_worker_step_seconds", ("worker",), "The last engine step.",
        "One worker above its peers: look at its host.", "step_s"),
    Row("twinpool_worker_leaked_blocks", ("worker",), "Blocks that the integrity check can not account for.",
        "Must be 0. Drain and restart the worker, and report it.", "leaked_blocks"),
    Row("twinpool_worker_silent_seconds", ("worker",), "Since the last frame of a worker.",
        "Nearing dead_after_ms: the worker hangs or the network is cut.", "last_seen_s"),
    Row("twinpool_worker_prefill_pace", ("worker",), "Actual over predicted seconds of prompts, of its kind of device.",
        "Predictions follow it. Far from 1: its profile is not of this device; see twinpool sim calibrate.",
        "prefill_pace"),
    Row("twinpool_worker_decode_pace", ("worker",), "The same of steps that only decode.",
        "As above.", "decode_pace"),
)  # fmt: skip

OTHER_GAUGES = {
    "ready": Row("twinpool_ready", (), "1 when a request has passed through both pools and the router is not draining.",
        "0: see twinpool_workers, then the router's log."),
    "calls": Row("twinpool_open_calls", (), "Generate calls open at this edge.", "Nearing max_streams: add edges."),
    "workers": Row("twinpool_workers", ("role", "state"), "Workers by role and state.",
        "Below the configured number: read the launcher's log."),
    "running": Row("vllm:num_requests_running", ("model_name", "engine"), "Sequences that decode, by worker.",
        "For scalers of decode workers."),
    "waiting": Row("vllm:num_requests_waiting", ("model_name", "engine"),
        "Waiting sequences, by worker; engine `router` is the queue.", "For scalers of prefill workers."),
    "kv_usage": Row("vllm:kv_cache_usage_perc", ("model_name", "engine"), "Share of KV blocks in use, 0 to 1.",
        "For endpoint pickers; near 1: see twinpool_worker_free_blocks."),
    "cache_config": Row("vllm:cache_config_info", ("model_name", "engine", "block_size", "num_gpu_blocks"),
        "1; the labels tell the block size in tokens and the number of blocks.", "Constant."),
}  # fmt: skip


class EdgeState(NamedTuple):
    """What a scrape reads at once, on the router's loop."""

    status: CellStatus
    ready: bool
    calls: int


class Metrics:
    """Counters and histograms of one router; ``metrics_port.MetricsPort`` serves them, and the gauges."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._edges = [
            (row, Histogram(row.name, row.help, row.labels, buckets=SECONDS, registry=self.registry)) for row in EDGES
        ]
        self._counters = {
            key: Counter(row.name, row.help, row.labels, registry=self.registry) for key, row in COUNTERS.items()
        }
        self._tenants: set[str] = set()

    def observe_finished(self, out: FinishedOut, tenant: str, klass: str) -> None:
        """A sequence that went well."""
        count = self._counters
        for row, histogram in self._edges:
            histogram.labels(klass).observe(getattr(out, row.source))
        count["requests"].labels(klass, out.path, out.reason).inc()
        label = self._tenant(tenant)
        for kind in ("prompt", "cached", "completion"):
            count["tokens"].labels(label, kind).inc(getattr(out, kind + "_tokens"))
        if out.kv_bytes:
            count["kv_bytes"].labels(out.backend).inc(out.kv_bytes)
        count["lost_attempts"].inc(max(0, out.attempts - 1))
        count["moves"].inc(out.moves)
        if out.fetch_outcome:
            self._observe_fetch(out)
        if out.expected is not None:
            self._observe_prediction(out, out.expected)

    def _observe_prediction(self, out: FinishedOut, expected: Expected) -> None:
        count = self._counters["predictions"]
        pairs: list[tuple[str, float, float]] = [("cached_tokens", expected.cached, out.cached_tokens)]
        pairs.append(("output_tokens", expected.output, out.completion_tokens))
        if expected.seconds > 0.0:
            pairs.append(("prefill_seconds", expected.seconds, out.compute_s))
        for what, predicted, actual in pairs:
            count.labels(what, "predicted").inc(predicted)
            count.labels(what, "actual").inc(actual)

    def _observe_fetch(self, out: FinishedOut) -> None:
        count = self._counters
        count["fetches"].labels(out.fetch_outcome).inc()
        count["fetched_blocks"].inc(out.fetched_blocks)
        if out.fetched_blocks:
            count["fetch_seconds"].labels("predicted").inc(out.fetch_predicted_s)
            count["fetch_seconds"].labels("actual").inc(out.fetch_s)

    def observe_failed(self, outcome: str, klass: str) -> None:
        """A call that started and ended otherwise: cancelled, deadline_exceeded, internal, ..."""
        self._counters["requests"].labels(klass, "", outcome).inc()

    def observe_refused(self, reason: str) -> None:
        """A request that never started."""
        self._counters["refused"].labels(reason).inc()

    def _tenant(self, tenant: str) -> str:
        if tenant not in self._tenants and len(self._tenants) >= MAX_TENANTS:
            return OTHER
        self._tenants.add(tenant)
        return tenant


def _family(row: Row) -> GaugeMetricFamily:
    return GaugeMetricFamily(row.name, row.help, labels=row.labels)


def gauges(state: EdgeState) -> Iterator[Metric]:
    """All gauges of one moment."""
    status = state.status
    for row in CELL_GAUGES:
        yield GaugeMetricFamily(row.name, row.help, value=getattr(status, row.source))
    for row in WORKER_GAUGES:
        family = _family(row)
        for worker in status.workers:
            family.add_metric([worker.worker], getattr(worker, row.source))
        yield family
    for key, value in (("ready", state.ready), ("calls", state.calls)):
        row = OTHER_GAUGES[key]
        yield GaugeMetricFamily(row.name, row.help, value=float(value))
    yield _workers(status.workers)
    yield from _vllm(status)


def _workers(workers: tuple[WorkerView, ...]) -> Metric:
    counts: dict[tuple[str, str], int] = {}
    for worker in workers:
        for role in worker.roles:
            counts[role, worker.state] = counts.get((role, worker.state), 0) + 1
    family = _family(OTHER_GAUGES["workers"])
    for labels, count in counts.items():
        family.add_metric(labels, count)
    return family


def _vllm(status: CellStatus) -> Iterator[Metric]:
    if status.model is None:
        return
    model = status.model.name
    running, waiting, usage, config = (
        _family(OTHER_GAUGES[key]) for key in ("running", "waiting", "kv_usage", "cache_config")
    )
    waiting.add_metric([model, "router"], status.queued)
    for worker in status.workers:
        labels = [model, worker.worker]
        running.add_metric(labels, worker.running)
        waiting.add_metric(labels, worker.waiting)
        usage.add_metric(labels, 1 - worker.free_blocks / worker.blocks if worker.blocks else 0.0)
        config.add_metric([*labels, str(status.model.block_size), str(worker.blocks)], 1)
    yield from (running, waiting, usage, config)


def reference() -> str:
    """The table as Markdown, for the documentation."""
    rows = [*EDGES, *(row._replace(name=row.name + "_total") for row in COUNTERS.values())]
    rows += [*CELL_GAUGES, *WORKER_GAUGES, *OTHER_GAUGES.values()]
    lines = [f"| `{row.name}` | {', '.join(row.labels)} | {row.help} | {row.action} |" for row in rows]
    return "\n".join(["| metric | labels | what it says | when it moves |", "|---|---|---|---|", *lines, ""])
