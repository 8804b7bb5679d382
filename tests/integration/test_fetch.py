"""A prefix that another worker has is fetched, between real processes: the same tokens, whatever becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client import Running, until
from tests.integration.cluster import TORCH, Cluster
from tests.integration.emulation import assert_whole, new_prompt

TOKENS = 12
SHARED = 1_600  # tokens of a prefix: 100 blocks
LONG = 12_000  # tokens that keep a prefill worker busy for half a second and more


def fetch_of(cluster: Cluster, request_id: str) -> dict[str, Any]:
    """What the request log says of it, once its line is there."""
    path = cluster.folder / "requests"

    def lines() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [line for line in found if line["id"] == request_id]

    until(lambda: bool(lines()), "the request's line")
    fetch: dict[str, Any] = lines()[0].get("fetch", {})
    return fetch


def cached_prefix(cluster: Cluster) -> tuple[list[int], str]:
    """A prefix, and the prefill worker that has computed it."""
    prefix = new_prompt(SHARED)
    answer = cluster.client.generate([*prefix, *new_prompt(5)], max_tokens=2)
    name = answer.route.prefill_worker

    def told() -> bool:
        worker = cluster.client.worker(name)
        return worker is not None and worker.cached_blocks >= SHARED // 16

    until(told, "news of what is cached")
    return prefix, name


def decoders_forget(cluster: Cluster) -> None:
    """Only the prefill worker has the prefix then."""
    for name in ("d0", "d1"):
        cluster.kill(name)
        cluster.restart(name)


def occupy(cluster: Cluster, name: str) -> Running:
    """A long prompt on this worker, which had the first one, too."""
    running = cluster.client.start(new_prompt(LONG), max_tokens=2)
    until(lambda: waiting(cluster, name) > 0, f"a prompt in computation at {name}")
    return running


def waiting(cluster: Cluster, name: str) -> int:
    worker = cluster.client.worker(name)
    return 0 if worker is None else worker.waiting


def test_from_the_decode_worker_of_the_conversation(timed: Cluster) -> None:
    """Its prefill worker is gone; what the decode worker has is worth fetching."""
    prefix, name = cached_prefix(timed)
    timed.kill(name)
    prompt = [*prefix, *new_prompt(200)]
    answer = timed.client.generate(prompt, max_tokens=TOKENS, request_id="decoder")
    assert_whole(answer, prompt, TOKENS)
    assert answer.route.attempts == 1
    assert answer.end.usage.cached_tokens == SHARED
    fetch = fetch_of(timed, "decoder")
    assert (fetch["fetch_outcome"], fetch["fetched_blocks"]) == ("OK", SHARED // 16)
    assert fetch["fetch_s"] > 0.0
    timed.client.wait_idle()


def test_from_a_busy_prefill_worker(timed: Cluster) -> None:
    prefix, name = cached_prefix(timed)
    decoders_forget(timed)
    occupied = occupy(timed, name)
    prompt = [*prefix, *new_prompt(200)]
    answer = timed.client.generate(prompt, max_tokens=TOKENS, request_id="busy")
    assert_whole(answer, prompt, TOKENS)
    assert answer.route.prefill_worker != name
    assert fetch_of(timed, "busy")["fetch_outcome"] == "OK"
    assert f"from {name}" in answer.route.path_reason
    occupied.result()
    timed.client.wait_idle()


@pytest.mark.parametrize("dies", [False, True])
def test_a_source_that_hangs(timed: Cluster, dies: bool) -> None:
    """It does not answer any more when it is asked: the prompt is computed, be it dead or only slow."""
    prefix, name = cached_prefix(timed)
    decoders_forget(timed)
    occupied = occupy(timed, name)
    timed.pause(name)
    prompt = [*prefix, *new_prompt(200)]
    running = timed.client.start(prompt, max_tokens=TOKENS, request_id=f"hangs-{dies}")
    if dies:
        timed.kill(name)
    answer = running.result()
    assert_whole(answer, prompt, TOKENS)
    if not dies:
        assert answer.route.attempts == 1
        assert answer.end.usage.cached_tokens == 0
        assert fetch_of(timed, f"hangs-{dies}")["fetch_outcome"] == "LATE"
        timed.resume(name)
    occupied.result()
    timed.client.wait_idle()


@pytest.mark.timeout(240)
def test_the_embedded_model_says_the_same(tmp_path: Path) -> None:
    settings = TORCH | {"scheduling.path": "split", "edge.request_log": tmp_path / "requests"}
    text = "The tide comes in twice a day, and the harbour fills with small boats. " * 6
    with Cluster(tmp_path, settings, prefill=2, decode=1) as cluster:
        first = cluster.client.generate(text, max_tokens=16, request_id="first")
        cluster.kill(first.route.prefill_worker)
        again = cluster.client.generate(text, max_tokens=16, request_id="again")
        assert again.ids == first.ids
        assert fetch_of(cluster, "first") == {}
        assert fetch_of(cluster, "again")["fetch_outcome"] == "OK"
        assert again.end.usage.cached_tokens > 0
        cluster.client.wait_idle()
