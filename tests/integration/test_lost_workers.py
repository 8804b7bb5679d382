"""Workers and routers that die or hang: streams go on without a lost, repeated or wrong token, and nothing leaks."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from tests.integration.client import Running, until
from tests.integration.cluster import Cluster
from tests.integration.emulation import assert_whole, expected_ids, new_prompt

DECODERS = ("d0", "d1")
LENGTHS = (30, 200, 1_000, 70, 500, 16, 300, 129)  # prompts of streams that run at once
TOKENS = 60


def _decoding_on(cluster: Cluster) -> str:
    """A worker that decodes."""
    busy = [worker.worker for worker in cluster.client.status().workers if worker.running]
    assert busy, "nothing decodes"
    return busy[0]


def _start_many(cluster: Cluster) -> list[tuple[list[int], Running]]:
    prompts = [new_prompt(length) for length in LENGTHS]
    streams = [(prompt, cluster.client.start(prompt, max_tokens=TOKENS)) for prompt in prompts]
    for _, running in streams:
        running.wait_tokens(3)
    return streams


def _assert_all_whole(streams: list[tuple[list[int], Running]]) -> int:
    """All streams are whole; how many of them took more than one attempt."""
    answers = [running.result() for _, running in streams]
    for (prompt, _), answer in zip(streams, answers, strict=True):
        assert_whole(answer, prompt, TOKENS)
    return sum(answer.route.attempts > 1 for answer in answers)


def test_killed_decode_worker(timed: Cluster) -> None:
    streams = _start_many(timed)
    timed.kill(_decoding_on(timed))
    assert _assert_all_whole(streams) > 0
    timed.client.wait_idle()


def test_killed_prefill_worker(timed: Cluster) -> None:
    prompt = new_prompt(8_000)
    running = timed.client.start(prompt, max_tokens=TOKENS)
    until(lambda: any(worker.waiting for worker in timed.client.status().workers), "a prompt in computation")
    timed.kill(next(worker.worker for worker in timed.client.status().workers if worker.waiting))
    answer = running.result()
    assert_whole(answer, prompt, TOKENS)
    assert answer.route.attempts == 2
    timed.client.wait_idle()


def test_killed_prefill_worker_before_its_blocks_were_pulled(timed: Cluster) -> None:
    """The first token is out, the KV is lost with its only holder: the resumed stream starts at the second token."""
    prompt = new_prompt(2_000)
    running = timed.client.start(prompt, max_tokens=TOKENS)
    until(lambda: any(w.free_blocks < w.blocks for w in timed.client.status().workers if w.worker in DECODERS), "room")
    for name in DECODERS:
        timed.pause(name)
    running.wait_tokens(1)
    timed.kill(next(w.worker for w in timed.client.status().workers if w.worker[0] == "p" and w.free_blocks < w.blocks))
    for name in DECODERS:
        timed.resume(name)
    answer = running.result()
    assert_whole(answer, prompt, TOKENS)
    assert answer.route.attempts == 2
    timed.client.wait_idle()


def _flip_bit(pid: int, prompt: Sequence[int]) -> None:
    """In the stand-in KV of the prompt's first token, in the worker's own mapping of its pool."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="ascii").splitlines()
    start, end = (int(at, 16) for at in next(line for line in maps if "twinpool-kv" in line).split()[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(start)
        at = memory.read(end - start).index(struct.pack("<IIII", prompt[0], 0, prompt[1], 1))
        memory.seek(start + at)
        memory.write(struct.pack("<I", prompt[0] ^ 1))


def test_corrupt_kv_is_never_decoded_from(timed: Cluster) -> None:
    """A bit flips in the sender's pool before the pull: the checksum fails, no wrong token comes, others are served."""
    prompt, other = new_prompt(2_000), new_prompt(2_000)
    running = timed.client.start(prompt, max_tokens=TOKENS)
    until(lambda: any(w.free_blocks < w.blocks for w in timed.client.status().workers if w.worker in DECODERS), "room")
    for name in DECODERS:
        timed.pause(name)
    running.wait_tokens(1)
    _flip_bit(
        next(w.pid for w in timed.client.status().workers if w.worker[0] == "p" and w.free_blocks < w.blocks), prompt
    )
    for name in DECODERS:
        timed.resume(name)
    answer = running.result()
    assert answer.ids == expected_ids(prompt, len(answer.ids))
    assert timed.router is not None
    assert "do not match their checksums" in timed.router.text()
    assert_whole(timed.client.generate(other, max_tokens=5), other, 5)
    timed.client.wait_idle()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_hung_worker_is_fenced_and_comes_back(timed: Cluster, role: str) -> None:
    """SIGSTOP: after ``link.dead_after_ms`` its requests go on elsewhere; woken up it drops them and joins again."""
    prompt = new_prompt(8_000 if role == "prefill" else 100)
    count = 10 if role == "prefill" else 100
    running = timed.client.start(prompt, max_tokens=count)
    if role == "decode":
        running.wait_tokens(5)
    until(lambda: any(w.running or w.waiting for w in timed.client.status().workers), "work")
    hung = next(w.worker for w in timed.client.status().workers if w.running or w.waiting)
    pid = timed.client.worker(hung).pid  # type: ignore[union-attr]
    timed.pause(hung)
    answer = running.result()
    assert_whole(answer, prompt, count)
    assert answer.route.attempts == 2
    assert timed.client.worker(hung) is None
    timed.resume(hung)
    timed.wait_worker(hung)
    assert timed.client.worker(hung).pid == pid  # type: ignore[union-attr]
    timed.client.wait_idle()


def test_empty_pool(timed: Cluster) -> None:
    """UNAVAILABLE after a bounded wait; served when a worker comes within it."""
    for name in DECODERS:
        timed.pause(name)
    for name in DECODERS:
        timed.wait_worker(name, connected=False)
    start = time.monotonic()
    answer = timed.client.generate(new_prompt(50))
    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER"), answer
    assert answer.retry
    assert time.monotonic() - start >= float(str(timed.settings["scheduling.no_worker_wait_ms"])) / 1000 - 0.1
    prompt = new_prompt(50)
    running = timed.client.start(prompt, max_tokens=5)
    until(lambda: timed.client.status().queued == 1, "a waiting request")
    for name in DECODERS:
        timed.resume(name)
    assert_whole(running.result(), prompt, 5)


def test_router_dies(timed: Cluster) -> None:
    """Its clients learn of it; the workers drop what it asked for, join the next one and keep their prefix cache."""
    known = new_prompt(320)
    timed.client.generate(known)
    streams = [timed.client.start(new_prompt(100), max_tokens=2_000).wait_tokens(3) for _ in range(4)]
    streams.append(timed.client.start(new_prompt(20_000)))
    until(lambda: any(worker.waiting for worker in timed.client.status().workers), "a prompt in computation")
    timed.kill_router()
    assert {running.result().code for running in streams} == {grpc.StatusCode.UNAVAILABLE}
    timed.start_router()
    timed.wait_ready()
    timed.client.wait_idle()
    answer = timed.client.generate(known, max_tokens=8)
    assert_whole(answer, known, 8)
    assert answer.end.usage.cached_tokens > 0


def test_leases_run_out_while_the_router_hangs(timed: Cluster) -> None:
    """Workers free what nobody renews, by themselves; the router wakes up and the stream still is whole."""
    prompt = new_prompt(200)
    running = timed.client.start(prompt, max_tokens=400).wait_tokens(5)
    worker = timed.workers[_decoding_on(timed)]
    before = worker.text().count("ran out")
    assert timed.router is not None
    timed.router.pause()
    until(lambda: worker.text().count("ran out") > before, "a lease that runs out")
    timed.router.resume()
    answer = running.result()
    assert_whole(answer, prompt, 400)
    assert answer.route.attempts > 1
