"""Is the simulator true to life? A live cluster on real time against its own simulation, request by request.

    python benchmarks/life/run.py emulated --trace azure_2023_conv.csv.gz [--seconds 600]
    python benchmarks/life/run.py embedded --trace azure_2023_conv.csv.gz [--seconds 600]

``emulated``: 2 prefill and 2 decode workers that take the time of a 70B model on 4 H100 (emulated.yaml), at 60 % of
what `twinpool sim capacity` says they can do. ``embedded``: 1 + 1 workers that compute the embedded model on this
machine's CPU (embedded.yaml), at a load that keeps the busier one computing half of the time; lengths are an eighth of
the trace's.

Steps: which speed that is (``embedded``: from a run of its own before, calibrated and simulated); the trace is replayed
over gRPC by one client; `twinpool sim calibrate` makes a profile from the logs of that run; the requests *as they were
sent* are simulated with that profile and the cluster's own YAML. Exit status 1 if a figure is further off than allowed.
Writes results.md for a run of full length. Needs a quiet machine: the report says how late the engines' steps were.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
import figures
from client import Answer, drive, open_answer
from cluster import cluster
from priority import preferred
from report import Run, put, report

from twinpool.cost import LLAMA_70B_H100_TP4, StepCost
from twinpool.sim import trace as traces
from twinpool.sim.profiles import with_measured
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import replay
from twinpool.sim.result import Result
from twinpool.sim.scenario import from_config
from twinpool.sim.trace import Trace
from twinpool.sim.trace_write import write_trace

HERE = Path(__file__).parent
FULL_S = 600.0
CAPACITY_REQUESTS = 8000  # of the trace, from its start: what is replayed, and some more
WARM, WARM_RATE = 12, 2.0  # requests before a run, and a second: nothing is to be done for the first time in it


@dataclass(frozen=True, slots=True)
class Kind:
    """A comparison. ``load``: share of the capacity, or of the time. ``divide``: lengths of the trace by so much."""

    name: str
    load: float
    what: str  # the load in words
    divide: int
    like: str | None  # profile of what the logs do not say
    allowed: dict[str, float]
    first: int = 0  # requests of a run before, from which the capacity is known; 0: from the YAML
    first_rate: float = 1.0  # requests a second in it, as regular as a clock
    cost: StepCost | None = None  # what emulated engines take


KINDS = {
    "emulated": Kind(
        "emulated", 0.6, "60 % of what `twinpool sim capacity` names", 1, "h100_sxm/llama-3.1-70b/tp4",
        dict.fromkeys(figures.NAMES, 0.05) | {"ttft_p99": 0.10}, cost=LLAMA_70B_H100_TP4,
    ),
    "embedded": Kind(
        "embedded", 0.5, "the busier worker computes half of the time", 8, None,
        dict.fromkeys(figures.NAMES, 0.15), first=100, first_rate=0.7,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Logs:
    """Files of one live run."""

    folder: Path

    @property
    def steps(self) -> Path:
        """What each step took."""
        return self.folder / "steps.jsonl"

    @property
    def requests(self) -> Path:
        """What became of each request, by the router."""
        return self.folder / "requests.jsonl"

    @property
    def clients(self) -> Path:
        """First tokens as the client saw them."""
        return self.folder / "clients.jsonl"

    @property
    def cores(self) -> Path:
        """CPU seconds a second of each process."""
        return self.folder / "cores.json"

    @property
    def profile(self) -> Path:
        """Made of both."""
        return self.folder / "profile.json"


def main() -> None:
    """Run, compare, write."""
    options = _options()
    signal.signal(signal.SIGTERM, _terminated)
    kind = KINDS[options.kind]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) if options.keep is None else options.keep
        run = compare(kind, options, root)
        text = report(run)
    print(text)
    if options.seconds >= FULL_S:
        put(HERE / "results.md", kind.name, text)
    raise SystemExit(any(row.missed for row in run.rows) or bool(run.errors))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=sorted(KINDS))
    parser.add_argument("--trace", type=Path, required=True, help="any file that `twinpool sim` reads")
    parser.add_argument("--seconds", type=float, default=FULL_S, help="of the live run")
    parser.add_argument("--speed", type=float, help="times the trace's, in place of a search for it")
    parser.add_argument("--prefer", action="store_true", help="CPU before other work of the machine; needs root "
                        "(sterner still: run all of it by `chrt --rr 5`)")  # fmt: skip
    parser.add_argument("--keep", type=Path, help="folder for all logs; a temporary one if not given")
    return parser.parse_args()


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # so that the cluster is stopped on the way out


def compare(kind: Kind, options: argparse.Namespace, root: Path) -> Run:
    """All of it."""
    config = HERE / f"{kind.name}.yaml"
    whole = _shortened(read_trace(options.trace)[0], kind.divide)
    root.mkdir(parents=True, exist_ok=True)
    speed = options.speed or _speed(kind, config, whole, root, options)
    what = "as --speed says" if options.speed else kind.what
    wanted = traces.slice_time(traces.speed(whole, speed), 0.0, options.seconds)
    logs = Logs(root / "run")
    print(f"{len(wanted)} requests in {options.seconds:g} s, {speed:.3f} times the trace's speed", flush=True)
    load = os.getloadavg()[0]
    answers = live(config, wanted, logs, options.prefer)
    calibrated = calibrate(kind, logs)
    sent = as_sent(wanted, answers)
    simulated = simulate(config, logs.profile, sent)
    (root / "answers.json").write_text(json.dumps([_kept(answer) for answer in answers]))
    table = figures.rows(figures.of_live(answers), figures.of_simulated(simulated), kind.allowed)
    return Run(kind.name, options.trace.name, options.seconds, speed, what, kind.divide, answers, simulated,
               calibrated, table, logs.steps,
               json.loads(logs.cores.read_text(encoding="utf-8")), kind.cost, load,
               options.prefer or os.sched_getscheduler(0) != os.SCHED_OTHER)  # fmt: skip


def _shortened(trace: Trace, divide: int) -> Trace:
    """Prompts and outputs a part as long."""
    prompt, output = (array("q", [max(1, n // divide) for n in column]) for column in (trace.prompt, trace.output))
    return trace if divide == 1 else replace(trace, prompt=prompt, output=output, hashes=array("q"), block_tokens=0,
                                             offsets=traces.no_hashes(len(trace)))  # fmt: skip


def evenly(trace: Trace, rate: float) -> Trace:
    """The same requests, so many a second."""
    return replace(trace, arrival=array("d", [i / rate for i in range(len(trace))]))


def _speed(kind: Kind, config: Path, whole: Trace, root: Path, options: argparse.Namespace) -> float:
    """Times the trace's speed, for the load that is wanted. Kept in the folder, and taken from there."""
    file = root / "speed.json"
    if not file.exists():
        make = _half_busy if kind.first else _of_capacity
        file.write_text(json.dumps(make(kind, config, whole, root, options)), encoding="utf-8")
    return float(json.loads(file.read_text(encoding="utf-8")))


def _of_capacity(kind: Kind, config: Path, whole: Trace, root: Path, options: argparse.Namespace) -> float:
    file = root / "trace.jsonl"
    write_trace(traces.limit(whole, CAPACITY_REQUESTS), file)
    return kind.load * float(twinpool("sim", "capacity", str(file), "-c", str(config))["capacity"])


def _half_busy(kind: Kind, config: Path, whole: Trace, root: Path, options: argparse.Namespace) -> float:
    """Where the busier worker computes that share of the time, by a profile of a run of its own."""
    logs = Logs(root / "first")
    print(f"first {kind.first} requests, {kind.first_rate:g} a second, to know the workers", flush=True)
    live(config, evenly(traces.limit(whole, kind.first), kind.first_rate), logs, options.prefer)
    calibrate(kind, logs)

    def busy(speed: float) -> float:
        part = traces.slice_time(traces.speed(whole, speed), 0.0, options.seconds)
        return max(float(one["busy_share"]) for one in simulate(config, logs.profile, part).summary()["workers"])

    low = high = 0.01  # times the trace's speed
    while busy(high) < kind.load:
        low, high = high, 2.0 * high
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if busy(middle) < kind.load else (low, middle)
    return low


def live(config: Path, trace: Trace, logs: Logs, prefer: bool, until_s: float = math.inf) -> list[Answer]:
    """A cluster of its own serves the trace; ``until_s``: see ``drive``."""
    logs.folder.mkdir(parents=True, exist_ok=True)
    for file in (logs.steps, logs.requests):
        file.unlink(missing_ok=True)
    flags = ["-c", str(config), "--set", f"worker.step_log={logs.steps}", "--set", f"edge.request_log={logs.requests}"]
    with cluster(*flags) as addresses, preferred(_processes().values(), prefer):
        drive(addresses["inference"], evenly(traces.limit(trace, WARM), WARM_RATE), seed=1)
        before, began = _cpu_s(), time.monotonic()
        answers = drive(addresses["inference"], trace, seed=2, until_s=until_s)
        seconds = time.monotonic() - began
        cores = {name: (used - before[name]) / seconds for name, used in _cpu_s().items()}
    logs.cores.write_text(json.dumps(cores), encoding="utf-8")
    for answer in answers:
        if answer.sent:
            open_answer(answer)
    times = [
        {"ttft_s": answer.ttft_s, "router_ttft_s": answer.last.timing.ttft_ms / 1e3}
        for answer in answers
        if answer.last is not None
    ]
    logs.clients.write_text("".join(json.dumps(line) + "\n" for line in times), encoding="utf-8")
    return answers


def _processes() -> dict[str, int]:
    """The router and each worker, by name."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        words = child.cmdline()
        if "router" in words:
            found["router"] = child.pid
        elif "--name" in words:
            found[words[words.index("--name") + 1]] = child.pid
    return found


def _cpu_s() -> dict[str, float]:
    """CPU seconds so far of the client (this process), the router and each worker."""
    processes = {"client": os.getpid(), **_processes()}
    return {name: sum(psutil.Process(pid).cpu_times()[:2]) for name, pid in processes.items()}


def calibrate(kind: Kind, logs: Logs) -> dict[str, Any]:
    """What `twinpool sim calibrate` finds in the logs of a run; its profile is written."""
    flags = ["--steps", str(logs.steps), "--request-log", str(logs.requests), "--client-log", str(logs.clients),
             "--output", str(logs.profile)]  # fmt: skip
    return twinpool("sim", "calibrate", *flags, *(["--like", kind.like] if kind.like else []))


def as_sent(trace: Trace, answers: list[Answer]) -> Trace:
    """The trace with the times at which its requests were really sent."""
    began = min(answer.sent for answer in answers)
    return traces.by_arrival(replace(trace, arrival=array("d", [answer.sent - began for answer in answers])))


def simulate(config: Path, profile: Path, trace: Trace) -> Result:
    """The same cluster's simulation. Each request asks for as many tokens as it gets, as the client does."""
    settings = with_measured(from_config(config, None, str(profile)))
    return replay(trace, replace(settings, max_tokens=1))


def twinpool(*arguments: str) -> dict[str, Any]:
    """What a command says as JSON."""
    command = [sys.executable, "-m", "twinpool.cli", *arguments, "--json", "-"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _kept(answer: Answer) -> dict[str, Any]:
    return {"due": answer.due, "sent": answer.sent, "times": list(answer.times), "tokens": list(answer.tokens),
            "error": answer.error}  # fmt: skip


if __name__ == "__main__":
    main()
