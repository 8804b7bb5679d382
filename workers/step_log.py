"""The step log: one JSON line a step, for ``twinpool sim calibrate``. Several workers may write to one file.

The first line of a worker says what it is; then, for each step (tokens, seconds)::

    {"worker":"p0","chunks":[[512,0]],"batch":3,"context":1200,"seconds":0.0431,"pause":0.0004}

``chunks`` are (tokens, cached tokens before), ``context`` is the sum over the ``batch`` decoding sequences, ``seconds``
go from the plan to the result, ``pause`` from the result of the step before to this plan: it is there only where the
worker did not wait for work in between, so it belongs to the steps.

Steps are collected on the loop and written by a thread, whole lines at once. What a slow disk leaves behind, and what
goes beyond ``MAX_LINES``, is dropped and counted: the loop never waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from twinpool.cost import StepCost
from twinpool.errors import ConfigError

log = logging.getLogger("twinpool.worker")

MAX_LINES = 2_000_000  # of one process; some 300 MB
MAX_WAITING = 256  # batches for the thread
BATCH = 64  # steps handed over at once
BATCH_S = 1.0  # or whatever there is after so long


class StepLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """One step as the file has it."""

    worker: str
    chunks: Sequence[tuple[int, int]]
    batch: int
    context: int
    seconds: float
    pause: float | None = None


class WorkerLine(NamedTuple):
    """What a worker is; see ``first_line``."""

    worker: str
    device: str
    model: str
    blocks: int
    block_tokens: int
    block_bytes: int
    chunk_tokens: int
    max_batch: int
    cost: StepCost | None = None  # what the worker itself takes a step to last when it plans one

    def encoded(self) -> bytes:
        """The first line of a worker."""
        said = {name: value for name, value in self._asdict().items() if value is not None}
        return msgspec.json.encode({"v": 1, **said}) + b"\n"


class StepLog:
    """Appends to ``path``. Use on one event loop; ``close`` at the end."""

    def __init__(self, path: Path, worker: WorkerLine, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError when the file cannot be opened."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"worker.step_log: cannot write {path} ({error.strerror})") from None
        self._worker = worker.worker
        self._clock = clock
        self._batches: queue.SimpleQueue[list[StepLine] | bytes | None] = queue.SimpleQueue()
        self._lines: list[StepLine] = []
        self._written = 0
        self._dropped = 0
        self._handed_at = clock()
        self._ended_at: float | None = None  # of the step before; None: the worker waited for work since
        self._batches.put(worker.encoded())
        self._thread = threading.Thread(target=self._run, name="step-log", daemon=True)
        self._thread.start()

    def add(self, chunks: Sequence[tuple[int, int]], batch: int, context: int, started: float, ended: float) -> None:
        """A step that was planned at ``started`` and done at ``ended``, seconds of the worker's clock."""
        pause = None if self._ended_at is None else round(started - self._ended_at, 7)
        self._ended_at = ended
        if not chunks and not batch:
            return  # everybody in it was preempted
        if self._written >= MAX_LINES:
            self._dropped += 1
            return
        self._written += 1
        self._lines.append(StepLine(self._worker, chunks, batch, context, round(ended - started, 7), pause))
        if self._written == MAX_LINES:
            log.warning("worker.step_log: %d steps are written, later ones are not", MAX_LINES)
            self._hand_over(ended)
        elif len(self._lines) >= BATCH or ended - self._handed_at >= BATCH_S:
            self._hand_over(ended)

    def idle(self) -> None:
        """The worker waits for work: what was collected may be written."""
        self._ended_at = None
        if self._lines:
            self._hand_over(self._clock())

    def close(self) -> None:
        """Everything collected is in the file when this returns. Idempotent."""
        if self._file < 0:
            return
        if self._lines:
            self._hand_over(self._clock())
        self._batches.put(None)
        self._thread.join()
        os.close(self._file)
        self._file = -1
        if self._dropped:
            log.warning("worker.step_log: %d steps were not written", self._dropped)

    def _hand_over(self, now: float) -> None:
        self._handed_at = now
        lines, self._lines = self._lines, []
        if self._batches.qsize() >= MAX_WAITING:
            self._dropped += len(lines)
        else:
            self._batches.put(lines)

    def _run(self) -> None:
        encode = msgspec.json.Encoder().encode
        failing = False
        with contextlib.suppress(OSError):
            for batch in iter(self._batches.get, None):
                data = batch if isinstance(batch, bytes) else b"".join([encode(line) + b"\n" for line in batch])
                try:
                    os.write(self._file, data)  # O_APPEND: in one piece, also beside other workers
                    failing = False
                except OSError as error:
                    if not failing:
                        log.error("worker.step_log: %s; steps are lost until that is mended", error.strerror)
                    failing = True
