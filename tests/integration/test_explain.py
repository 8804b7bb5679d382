"""``twinpool explain`` on the decision log of real processes, while they run and after a worker died."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.integration.client import Answer, until
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import assert_whole, new_prompt
from typer.testing import CliRunner

from twinpool.cli import app

SAME_MS = 0.01  # the answer's are rounded


def explained(log: Path, name: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["explain", name, "--log", str(log), "--json", "-"])
    assert result.exit_code == 0, result.stderr
    figures: dict[str, Any] = json.loads(result.stdout)
    return figures


def check(log: Path, name: str, answer: Answer) -> dict[str, Any]:
    """The story is that of the answer's own metadata."""
    until(lambda: explained(log, name)["ended_s"] is not None, "the end in the log")  # written by a thread
    figures = explained(log, name)
    last, route, timing = figures["attempts"][-1], answer.route, answer.end.timing
    assert (last["prefill"], last["decode"], last["path"]) == (route.prefill_worker, route.decode_worker, route.path)
    assert last["reason"] == route.path_reason
    assert last["kv_bytes"] == route.kv_bytes
    assert len(figures["attempts"]) == route.attempts
    assert figures["tokens"] == answer.end.usage.completion_tokens
    assert 0.0 < 1000.0 * figures["shown_s"] < timing.ttft_ms + SAME_MS  # it leaves when the core has said so
    placed = [look for look in figures["looks"] if look["kind"] == "placed"]
    assert len(placed) == route.attempts
    for look in placed:
        assert any(row["worker"] == look["prefill"] and not row["why_not"] for row in look["prompt"])
    return figures


def test_requests_of_a_running_router_are_explained(tmp_path: Path) -> None:
    log = tmp_path / "decisions"
    settings = EMULATED | {
        "worker.emulated.profile": "llama-70b-h100-tp4",
        "scheduling.decision_log": log,
        "link.lease_ms": 3_000,
    }
    with Cluster(tmp_path, settings, prefill=2, decode=2) as cluster:
        prompt = new_prompt(320)
        first = cluster.client.generate(prompt, max_tokens=5, request_id="first")
        until(lambda: cached_at(cluster, first.route.prefill_worker), "news of what is cached")
        again = cluster.client.generate([*prompt, *new_prompt(40)], max_tokens=5, request_id="again")
        long = new_prompt(100)
        running = cluster.client.start(long, max_tokens=150, request_id="unlucky").wait_tokens(10)
        victim = next(w.worker for w in cluster.client.status().workers if w.running and w.worker.startswith("d"))
        assert explained(log, "unlucky")["ended_s"] is None
        cluster.kill(victim)
        unlucky = running.result()
        assert_whole(unlucky, long, 150)
        names = {worker.worker for worker in cluster.client.status().workers}
        check_cached(check(log, "first", first), check(log, "again", again))
        check_lost(check(log, "unlucky", unlucky), victim, names)
    text = CliRunner().invoke(app, ["explain", "unlucky", "--log", str(log)]).stdout
    assert f"worker {victim} died" in text
    other = CliRunner().invoke(app, ["explain", "nobody", "--log", str(log)])
    assert other.exit_code == 2
    assert "there are readiness-probe, first, again, unlucky" in other.stderr


def cached_at(cluster: Cluster, name: str) -> bool:
    worker = cluster.client.worker(name)
    return worker is not None and worker.cached_blocks > 0


def check_cached(first: dict[str, Any], again: dict[str, Any]) -> None:
    """What was predicted to be cached was."""
    assert first["attempts"][0]["cached"] == first["looks"][0]["cached"] == 0
    assert again["looks"][-1]["cached"] == again["attempts"][0]["cached"] > 0
    rows = {row["name"]: row["cached"] for row in again["looks"][-1]["prompt"]}
    assert rows[again["attempts"][0]["prefill"]] == max(rows.values())
    assert min(rows.values()) == 0


def check_lost(figures: dict[str, Any], victim: str, left: set[str]) -> None:
    """The tables of the second attempt are without the worker that took the first one."""
    first, *_, last = figures["attempts"]
    assert (first["decode"], first["outcome"], last["outcome"]) == (victim, f"worker {victim} died", "finished")
    assert figures["losses"] >= 1
    seen = {row["name"] for row in figures["looks"][-1]["prompt"]}
    assert victim not in seen
    assert seen <= left
