"""The step log says what every step was and took, whole lines only, and never holds up the loop."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tests.parity.virtual import virtual_loop
from tests.workers.test_worker_news import BLOCKS, CHUNK, COST, SIZE, NoTransfer, prefill

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError
from twinpool.proto import frames
from twinpool.tokenizer import Tokenizer, load_tokenizer
from twinpool.workers import step_log as module
from twinpool.workers.blocks import BlockPool
from twinpool.workers.engine.base import ModelInfo
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.scheduler import Scheduler
from twinpool.workers.step_log import BATCH, StepLog, WorkerLine
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.worker import Parts, Worker

LINE = WorkerLine("p0", "emulated", "m", BLOCKS, SIZE, 8 * SIZE, CHUNK, 8)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def logged_steps(path: Path, tokenizer: Tokenizer, asked: list[frames.Prefill]) -> None:
    """A worker on a virtual clock logs its steps; it is asked for the next prompt a second after the one before."""
    loop = virtual_loop()

    async def play() -> None:
        pool = HostPool(BLOCKS, 8 * SIZE)
        info = ModelInfo("m", "f", "float32", "l", SIZE, 8 * SIZE, tokenizer.vocab_size, 1024, ())
        engine = EmulatedEngine(info, pool.data, COST, 1.0, loop.time, loop.sleep_until)
        scheduler = Scheduler(BlockPool(BLOCKS, SIZE), COST, CHUNK, 8)
        worker = Worker(
            Parts(engine, scheduler, pool, NoTransfer(), tokenizer), lambda _: None, lambda: None, loop.time
        )
        worker.step_log = StepLog(path, LINE, loop.time)
        loop.create_task(worker.run())
        worker.take(frames.Welcome(router="r", heartbeat_s=10.0, lease_s=60.0))
        for one in asked:
            worker.take(one)
            await loop.sleep_until(loop.time() + 1.0)
            worker.take(frames.Cancel(attempt=one.attempt))
        worker.step_log.close()
        pool.close()

    loop.run(play())


def test_every_step_is_there_with_what_it_took(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "steps.jsonl"
    logged_steps(path, tokenizer, [prefill(1, 40, local=True, max_tokens=4), prefill(2, 10)])
    head, *steps = lines(path)
    assert head == {"v": 1, "worker": "p0", "device": "emulated", "model": "m", "blocks": BLOCKS, "block_tokens": SIZE,
                    "block_bytes": 8 * SIZE, "chunk_tokens": CHUNK, "max_batch": 8}  # fmt: skip
    chunks = [step["chunks"] for step in steps]
    assert chunks == [[[16, 0]], [[16, 16]], [[8, 32]], [], [], [], [[2, 8]]]  # the last: 8 of its 10 were cached
    assert [(step["batch"], step["context"]) for step in steps] == [(0, 0)] * 3 + [(1, 41), (1, 42), (1, 43), (0, 0)]
    for step in steps:
        taken = COST.step([tuple(chunk) for chunk in step["chunks"]], step["batch"], step["context"])
        assert step["seconds"] == pytest.approx(taken, abs=2e-7)
        assert step["worker"] == "p0"
    # the clock stands still between a step and the next plan; before the first of each prompt the worker waited
    assert ["pause" in step for step in steps] == [False, True, True, True, True, True, False]
    assert all(step.get("pause", 0.0) == 0.0 for step in steps)


def test_a_pause_belongs_to_the_next_step_unless_the_worker_waited(tmp_path: Path) -> None:
    log = StepLog(tmp_path / "steps.jsonl", LINE, lambda: 0.0)
    log.add([(8, 0)], 0, 0, 1.0, 1.25)
    log.add([], 1, 9, 1.5, 2.0)
    log.add([], 0, 0, 2.0, 2.0)  # everybody was preempted: no step
    log.add([], 1, 10, 2.125, 2.5)
    log.idle()
    log.add([], 1, 11, 9.0, 9.5)
    log.close()
    steps = lines(tmp_path / "steps.jsonl")[1:]
    assert [(step["seconds"], step.get("pause")) for step in steps] == [(0.25, None), (0.5, 0.25), (0.375, 0.125),
                                                                       (0.5, None)]  # fmt: skip


def test_workers_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    logs = [StepLog(path, LINE._replace(worker=name)) for name in ("p0", "p1", "d0")]
    for i in range(500):
        for log in logs:
            log.add([(i, 0)] * (1 + i % 50), i, i, i / 64, i / 64 + 0.01)
    for log in logs:
        log.close()
        log.close()
    rows = lines(path)
    assert len(rows) == 3 + 3 * 500
    for name in ("p0", "p1", "d0"):
        own = [row for row in rows if row["worker"] == name]
        assert own[0]["v"] == 1
        assert [row["batch"] for row in own[1:]] == list(range(500))


def test_a_slow_disk_loses_steps_but_never_holds_up_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 4)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)  # so that nobody waits for an other end; a full pipe takes nothing
    log = StepLog(path, LINE)
    began = time.monotonic()
    count = BATCH * 200
    for i in range(count):
        log.add([(512, 0)] * 40, 1, 1, i / 64, i / 64 + 0.01)
    assert time.monotonic() - began < 20.0, "the loop waited for the disk"
    got: list[bytes] = []

    def drain() -> None:
        while b"\n\n" not in (got or [b""])[-1]:
            got.append(os.read(reader, 1 << 16))

    thread = threading.Thread(target=drain)
    thread.start()
    log.close()
    os.write(reader, b"\n\n")
    thread.join()
    os.close(reader)
    rows = [json.loads(row) for row in b"".join(got).splitlines() if row]
    assert 0 < len(rows) - 1 < count // 2
    assert f"{count - len(rows) + 1} steps were not written" in caplog.text


def test_a_log_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "MAX_LINES", 10)
    log = StepLog(tmp_path / "steps.jsonl", LINE)
    for i in range(15):
        log.add([], 1, i, float(i), i + 0.5)
    log.close()
    assert len(lines(tmp_path / "steps.jsonl")) == 11
    assert "10 steps are written, later ones are not" in caplog.text
    assert "5 steps were not written" in caplog.text


def test_a_full_disk_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        log = StepLog(Path("/dev/full"), LINE)
        for i in range(3 * BATCH):
            log.add([], 1, i, float(i), i + 0.5)
        log.close()
    assert caplog.text.count("worker.step_log") == 1


def test_a_file_that_cannot_be_written_is_the_operators_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"worker\.step_log: cannot write"):
        StepLog(tmp_path / "nowhere" / "steps.jsonl", LINE)
    assert ClusterConfig().worker.step_log is None
    assert ClusterConfig.model_validate({"worker": {"step_log": "a.jsonl"}}).worker.step_log == Path("a.jsonl")
