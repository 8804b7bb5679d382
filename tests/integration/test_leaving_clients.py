"""Clients that cancel, run out of time or die, in each phase: everything is freed, the next request is served."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from tests.integration.client import Running, until
from tests.integration.cluster import Cluster
from tests.integration.emulation import assert_whole, new_prompt

from twinpool.proto.twinpool.v1 import inference_pb2 as pb

LONG = 24_000  # tokens: some 2.5 s of prefill
SOON_S = 1.5  # a deadline that falls into the phase
DECODERS = ("d0", "d1")


@contextmanager
def _queued(cluster: Cluster, timeout: float) -> Iterator[Running]:
    blockers = [cluster.client.start(new_prompt(LONG), max_tokens=1) for _ in range(2)]
    until(lambda: cluster.client.status().active == 2, "two running prompts")
    running = cluster.client.start(new_prompt(LONG), timeout=timeout, request_id="leaver")
    until(lambda: cluster.client.status().queued == 1, "a waiting request")
    yield running
    for blocker in blockers:
        blocker.cancel()


@contextmanager
def _prefilling(cluster: Cluster, timeout: float) -> Iterator[Running]:
    running = cluster.client.start(new_prompt(LONG), timeout=timeout, request_id="leaver")
    until(lambda: any(worker.waiting for worker in cluster.client.status().workers), "a prompt in computation")
    yield running


@contextmanager
def _transferring(cluster: Cluster, timeout: float) -> Iterator[Running]:
    """Both decode workers hang once one has reserved: blocks are ready, pulls are sent, none is done."""
    prompt = new_prompt(4_000)
    running = cluster.client.start(prompt, timeout=timeout, request_id="leaver")
    workers = cluster.client.status().workers
    until(lambda: any(_reserved(cluster, name) for name in DECODERS), f"a reservation: {workers}")
    for name in DECODERS:
        cluster.pause(name)
    running.wait_tokens(1)
    yield running
    for name in DECODERS:
        cluster.resume(name)


def _reserved(cluster: Cluster, name: str) -> bool:
    worker = cluster.client.worker(name)
    return worker is not None and worker.free_blocks < worker.blocks


def _heard_lately(cluster: Cluster, name: str) -> bool:
    worker = cluster.client.worker(name)
    return worker is not None and worker.last_seen_ms < 50.0  # a paused one sent its last heartbeat before that


@contextmanager
def _decoding(cluster: Cluster, timeout: float) -> Iterator[Running]:
    running = cluster.client.start(new_prompt(100), timeout=timeout, request_id="leaver", max_tokens=400)
    yield running.wait_tokens(5)


PHASES = {"queue": _queued, "prefill": _prefilling, "transfer": _transferring, "decode": _decoding}


def _by_client(cluster: Cluster, running: Running) -> None:
    running.cancel()


def _by_call(cluster: Cluster, running: Running) -> None:
    cluster.client.inference.Cancel(pb.CancelRequest(request_id="leaver"), timeout=5.0)


def _serves(cluster: Cluster) -> None:
    prompt = new_prompt(100)
    assert_whole(cluster.client.generate(prompt, max_tokens=6), prompt, 6)


@pytest.mark.parametrize("cancel", [_by_client, _by_call])
@pytest.mark.parametrize("phase", PHASES)
def test_cancel_frees_everything(timed: Cluster, phase: str, cancel: Callable[[Cluster, Running], None]) -> None:
    before = timed.client.status().cancelled
    with PHASES[phase](timed, 45.0) as running:
        cancel(timed, running)
        answer = running.result()
        assert answer.code == grpc.StatusCode.CANCELLED
        until(lambda: timed.client.status().cancelled > before, "a counted cancel")
    timed.client.wait_idle()
    _serves(timed)


@pytest.mark.parametrize("phase", PHASES)
def test_deadline_frees_everything(timed: Cluster, phase: str) -> None:
    with PHASES[phase](timed, SOON_S) as running:
        assert not running.over
        assert running.result().code == grpc.StatusCode.DEADLINE_EXCEEDED
    timed.client.wait_idle()
    _serves(timed)


def test_cancel_while_the_sender_hangs(timed: Cluster) -> None:
    """The pull is under way, its bytes do not come: the target blocks are freed once nothing writes to them."""
    senders = ("p0", "p1")
    with _transferring(timed, 45.0) as running:
        for name in senders:
            timed.pause(name)
        for name in DECODERS:
            timed.resume(name)
        until(lambda: all(_heard_lately(timed, name) for name in DECODERS), "decode workers that go on")
        running.cancel()
        assert running.result().code == grpc.StatusCode.CANCELLED
        for name in senders:
            timed.resume(name)
    timed.client.wait_idle()
    _serves(timed)


CLIENT = """
import sys, grpc
from twinpool.proto.twinpool.v1 import inference_pb2 as pb, inference_pb2_grpc
stub = inference_pb2_grpc.InferenceStub(grpc.insecure_channel(sys.argv[1]))
request = pb.GenerateRequest(text="a client that dies", stream=True)
request.sampling.max_tokens, request.sampling.ignore_eos = 2000, True
for event in stub.Generate(request):
    print(event.WhichOneof("event"), flush=True)
"""


def test_a_killed_client_frees_everything(timed: Cluster) -> None:
    before = timed.client.status().cancelled
    address = str(timed.settings["edge.inference"])
    with subprocess.Popen([sys.executable, "-c", CLIENT, address], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    assert seen == ["accepted", "tokens", "tokens"]
    until(lambda: timed.client.status().cancelled > before, "a counted cancel")
    timed.client.wait_idle()
    _serves(timed)
