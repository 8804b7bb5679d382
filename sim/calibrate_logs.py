"""What ``sim calibrate`` reads: step logs of workers, measured tables, the router's request log, clients' times.

A step log is as workers/step_log.py writes it. A table is a CSV with the columns tokens, cached, batch, context,
seconds: one step a row, with one chunk of ``tokens`` after ``cached`` ones (0: none), ``batch`` sequences decoding and
the sum of their context tokens. Times of clients are JSON lines, one a request, with what a client measured and what
the router's answer says (``Timing.ttft_ms``): {"ttft_s": 0.0934, "router_ttft_s": 0.0911}.
"""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO, TypeVar

import msgspec
import numpy as np

from twinpool.cost import StepCost
from twinpool.sim.fit import Floats, StepSample, sample
from twinpool.sim.trace_columns import TraceError

TABLE_COLUMNS = ("tokens", "cached", "batch", "context", "seconds")
SKIP = "mend it, or leave such lines out with --skip-bad"

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
T = TypeVar("T")


class StepWorker(msgspec.Struct, frozen=True):
    """What a worker says of itself in the first line of its step log."""

    worker: str
    device: str
    model: str
    blocks: Count
    block_tokens: Annotated[int, msgspec.Meta(ge=1)]
    block_bytes: Count
    chunk_tokens: Count = 0
    max_batch: Count = 0
    cost: StepCost | None = None  # what it plans its steps by

    @property
    def kind(self) -> tuple[str, str]:
        """Workers of one kind have one cost."""
        return self.device, self.model


class _Line(msgspec.Struct, gc=False):
    worker: str
    chunks: list[tuple[Count, Count]]
    batch: Count
    context: Count
    seconds: Positive
    pause: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class _Kind(msgspec.Struct, gc=False):
    v: int = 0


class LoggedRequest(msgspec.Struct, gc=False):
    """What calibration needs of a line of the request log; edges are seconds after arrival."""

    arrival: float
    prompt_tokens: Count
    cached_tokens: Count
    output_tokens: Count
    path: str
    prefill: str
    decode: str
    attempts: Count
    kv_bytes: Count
    compute_s: float
    edges: dict[str, float]
    block_tokens: Count = 0


class ClientTime(msgspec.Struct, gc=False):
    """One first token as a client saw it; ``router_ttft_s`` is what its answer says (``Timing.ttft_ms``)."""

    ttft_s: Positive
    router_ttft_s: Annotated[float, msgspec.Meta(ge=0, le=1e6)]

    @property
    def outside_s(self) -> float:
        """Network, gRPC, the client itself."""
        return self.ttft_s - self.router_ttft_s


@dataclass
class Steps:
    """Columns, one entry a step (see ``StepSample``), and where they are from."""

    tokens: array[int] = field(default_factory=lambda: array("q"))
    attention: array[float] = field(default_factory=lambda: array("d"))
    batch: array[int] = field(default_factory=lambda: array("q"))
    context: array[int] = field(default_factory=lambda: array("q"))
    seconds: array[float] = field(default_factory=lambda: array("d"))
    workers: dict[str, StepWorker] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.seconds)

    def add(self, one: StepSample) -> None:
        """One more step."""
        self.tokens.append(one.tokens)
        self.attention.append(one.attention)
        self.batch.append(one.batch)
        self.context.append(one.context)
        self.seconds.append(one.seconds)

    def at(self, index: int) -> StepSample:
        """One step."""
        return StepSample(
            self.tokens[index], self.attention[index], self.batch[index], self.context[index], self.seconds[index]
        )

    def matrix(self) -> Floats:
        """All of them, [step, field of ``StepSample``]."""
        columns = (self.tokens, self.attention, self.batch, self.context, self.seconds)
        return np.column_stack([np.asarray(column, dtype=np.float64) for column in columns])


def read_steps(paths: Sequence[Path], *, workers: Iterable[str] = (), skip_bad: bool = False) -> Steps:
    """All steps of these logs, or of the named workers only. Raises TraceError, saying which line is wrong.

    The seconds of a step are those from the end of the one before where the worker did not wait for work in between:
    a decoding sequence feels both. The last line of a file may be cut short: its worker was killed.
    """
    wanted = frozenset(workers)
    steps = Steps()
    for path in paths:
        _read_log(path, steps, wanted, skip_bad)
    if missing := sorted(wanted - steps.workers.keys()):
        raise TraceError(paths[0], None, f"no worker {missing[0]!r} in it; there are {', '.join(steps.workers)}")
    if not len(steps):
        raise TraceError(paths[0], None, "no steps in it: let workers with worker.step_log serve some requests first")
    kinds = {worker.kind for worker in steps.workers.values()}
    if len(kinds) > 1:
        names = ", ".join(f"{w.worker} ({w.device}, {w.model})" for w in steps.workers.values())
        raise TraceError(paths[0], None, f"workers of different kinds, so name those to use with --worker: {names}")
    return steps


def _read_log(path: Path, steps: Steps, wanted: frozenset[str], skip_bad: bool) -> None:
    kinds, workers, steps_of = (
        msgspec.json.Decoder(_Kind),
        msgspec.json.Decoder(StepWorker),
        msgspec.json.Decoder(_Line),
    )
    bad = 0
    for number, text, whole in _lines(path):
        try:
            if kinds.decode(text).v:
                worker = workers.decode(text)
                if not wanted or worker.worker in wanted:
                    steps.workers[worker.worker] = worker
                continue
            line = steps_of.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if not whole:
                steps.notices.append(f"{path}: its last line, {number}, is cut short and left out")
            elif skip_bad:
                bad += 1
            else:
                raise TraceError(path, number, f"no step: {error}; {SKIP}") from None
            continue
        if (line.chunks or line.batch) and (not wanted or line.worker in wanted):
            steps.add(sample(line.chunks, line.batch, line.context, line.seconds + line.pause))
    if bad:
        steps.notices.append(f"{path}: {bad} malformed lines are left out")


def read_table(path: Path, *, skip_bad: bool = False) -> Steps:
    """The steps of a measured table. Raises TraceError, saying which line is wrong."""
    steps = Steps()
    bad = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            missing = [name for name in TABLE_COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise TraceError(path, 1, f"no column {missing[0]}; wanted are {', '.join(TABLE_COLUMNS)}")
            for row in rows:
                problem = _table_row(row, steps)
                if problem and not skip_bad:
                    raise TraceError(path, rows.line_num, f"{problem}; {SKIP}")
                bad += bool(problem)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(path, None, f"cannot be read ({error})") from None
    if bad:
        steps.notices.append(f"{path}: {bad} malformed lines are left out")
    if not len(steps):
        raise TraceError(path, None, "no steps in it")
    return steps


def _table_row(row: dict[str, str | None], steps: Steps) -> str:
    """Takes a row in; what is wrong with it, or nothing."""
    try:
        tokens, cached, batch, context = (int(row[name] or "") for name in TABLE_COLUMNS[:4])
        seconds = float(row["seconds"] or "")
    except ValueError as error:
        return f"no number: {error}"
    if min(tokens, cached, batch, context) < 0 or not 0.0 < seconds < math.inf:
        return "numbers must not be negative, and a step takes some time"
    if not tokens and not batch:
        return "a step of nothing: tokens or batch must be above 0"
    steps.add(sample([(tokens, cached)] if tokens else [], batch, context, seconds))
    return ""


def read_requests(path: Path, *, skip_bad: bool = False) -> tuple[list[LoggedRequest], list[str]]:
    """Requests of the router's log that drew a token, and notices. Raises TraceError, saying which line is wrong."""
    lines, notices = _decoded(path, LoggedRequest, "line of the request log", skip_bad)
    requests = [request for request in lines if "first" in request.edges]
    if not requests:
        raise TraceError(path, None, "no request in it drew a token: serve some first")
    return requests, notices


def read_clients(path: Path, *, skip_bad: bool = False) -> tuple[list[ClientTime], list[str]]:
    """First tokens as clients saw them, and notices. Raises TraceError, saying which line is wrong."""
    times, notices = _decoded(path, ClientTime, "time of a client", skip_bad)
    if not times:
        raise TraceError(path, None, "no time of a client in it")
    return times, notices


def _decoded(path: Path, kind: type[T], what: str, skip_bad: bool) -> tuple[list[T], list[str]]:
    """All lines of one kind; the last may be cut short."""
    decoder = msgspec.json.Decoder(kind)
    lines: list[T] = []
    bad = 0
    for number, text, whole in _lines(path):
        try:
            lines.append(decoder.decode(text))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            if whole and not skip_bad:
                raise TraceError(path, number, f"no {what}: {error}; {SKIP}") from None
            bad += 1
    return lines, [f"{path}: {bad} malformed lines are left out"] if bad else []


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Number, text and whether it ends as a line should, of all lines that are not blank."""
    try:
        with path.open("rb") as file:
            yield from _of_file(file)
    except OSError as error:
        raise TraceError(path, None, f"cannot be read ({error.strerror or error})") from None


def _of_file(file: BinaryIO) -> Iterator[tuple[int, bytes, bool]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line, line.endswith(b"\n")
