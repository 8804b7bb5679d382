"""Open-loop load while workers are killed, hung, drained and started again at random: every stream is whole."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from tests.integration.client import Running
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import VOCAB, assert_whole, expected_ids

from twinpool.workers.engine.emulated import FIRST_ORDINARY

REQUESTS = 300
RATE = 8.0  # requests a second
PREFIXES = 12
LEAVING = 0.05  # share of clients that cancel
PATIENCE_S = 120.0
SETTINGS = EMULATED | {
    "worker.emulated.profile": "llama-70b-h100-tp4",
    "link.dead_after_ms": 2_000,
    "link.lease_ms": 5_000,
    "scheduling.no_worker_wait_ms": 90_000,
    "scheduling.max_attempts": 50,
}

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@dataclass
class Stream:
    """One request of the load."""

    prompt: list[int]
    count: int
    leave_at: int  # tokens after which the client goes; 0: it stays
    running: Running


def _load(cluster: Cluster, chooser: random.Random) -> Iterator[Stream]:
    """Requests as they arrive; some share a prefix."""
    prefixes = [_ids(chooser, chooser.randrange(16, 800)) for _ in range(PREFIXES)]
    due = time.monotonic()
    for _ in range(REQUESTS):
        due += chooser.expovariate(RATE)
        time.sleep(max(0.0, due - time.monotonic()))
        prompt = chooser.choice([[], *prefixes]) + _ids(chooser, chooser.choice((1, 17, 100, 600, 3_000)))
        count = chooser.choice((1, 2, 10, 60, 250))
        leave_at = chooser.randrange(1, count) if count > 1 and chooser.random() < LEAVING else 0
        running = cluster.client.start(prompt, max_tokens=count, timeout=PATIENCE_S)
        yield Stream(prompt, count, leave_at, running)


def _ids(chooser: random.Random, length: int) -> list[int]:
    return [chooser.randrange(FIRST_ORDINARY, VOCAB) for _ in range(length)]


class Monkey:
    """Does harm to one worker after the other, in a thread of its own, until told to stop."""

    def __init__(self, cluster: Cluster, chooser: random.Random) -> None:
        self.done: list[str] = []
        self._cluster = cluster
        self._chooser = chooser
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Monkey:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join(90.0)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        harms: list[Callable[[str], None]] = [
            self._kill,
            self._kill,
            self._kill_pool,
            self._hang,
            self._pause_shortly,
            self._drain,
        ]
        try:
            while not self._stop.wait(self._chooser.uniform(0.2, 1.5)):
                name = self._chooser.choice(sorted(self._cluster.roles))
                harm = self._chooser.choice(harms)
                harm(name)
                self.done.append(f"{harm.__name__} {name}")
        except BaseException as error:
            self._error = error

    def _kill(self, name: str) -> None:
        self._cluster.kill(name)
        self._cluster.restart(name)

    def _kill_pool(self, name: str) -> None:
        names = [other for other in self._cluster.roles if other[0] == name[0]]
        for other in names:
            self._cluster.kill(other)
        for other in names:
            self._cluster.restart(other)

    def _hang(self, name: str) -> None:
        self._cluster.pause(name)
        self._cluster.wait_worker(name, connected=False)
        self._cluster.resume(name)
        self._cluster.wait_worker(name)

    def _pause_shortly(self, name: str) -> None:
        self._cluster.pause(name)
        self._stop.wait(self._chooser.uniform(0.05, 1.0))
        self._cluster.resume(name)

    def _drain(self, name: str) -> None:
        process = self._cluster.workers.pop(name)
        process.signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
        self._cluster.restart(name)


@pytest.mark.parametrize(("backend", "path", "seed"), [("shm", "auto", 1), ("tcp", "split", 2), ("shm", "split", 3)])
def test_streams_survive(tmp_path: Path, backend: str, path: str, seed: int) -> None:
    chooser = random.Random(seed)
    settings = SETTINGS | {"transfer.backend": backend, "scheduling.path": path}
    with Cluster(tmp_path, settings, prefill=2, decode=2) as cluster:
        streams: list[Stream] = []
        with Monkey(cluster, random.Random(seed)) as monkey:
            for stream in _load(cluster, chooser):
                streams.append(stream)
                _leave(streams)
            lost = sum(_check(stream) for stream in streams)
        print(f"{len(streams)} streams, {lost} with more than one attempt, harm: {monkey.done}")
        assert len(monkey.done) > 3
        assert lost > 0, "no attempt was lost: the test shows nothing"
        cluster.restore()


def _leave(streams: list[Stream]) -> None:
    for stream in streams:
        if stream.leave_at and stream.running.tokens >= stream.leave_at:
            stream.running.cancel()


def _check(stream: Stream) -> bool:
    """Whole, or cancelled by its client with a right beginning. Whether it took more than one attempt."""
    answer = stream.running.result(PATIENCE_S)
    if stream.leave_at and answer.code == grpc.StatusCode.CANCELLED:
        assert answer.ids == expected_ids(stream.prompt, len(answer.ids))
        return False
    assert_whole(answer, stream.prompt, stream.count)
    return answer.route.attempts > 1
