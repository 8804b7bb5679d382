"""Speed of the simulator: requests simulated per wall second on one core, against the fastest peer in the same run.

    python benchmarks/sim/run.py --traces FOLDER [--peer PYTHON] [--rounds 3]

FOLDER holds mooncake_conversation.jsonl.gz and azure_2023_conv.csv.gz (public). ``--peer``: the interpreter of an
environment with Dynamo 1.6.1 (peer_dynamo.py says how). Both run pinned to the same core, in turns, and the least
disturbed round of each counts. 4 prefill and 4 decode workers, prefix caches, KV-aware policy, measured latency grids.
Also: cost against the number of requests (the trace once, 4 and 16 times in a row) and of workers (8 to 512, with the
load growing alike). Results go to benchmarks/sim/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.sim.readers import read_trace
from twinpool.sim.trace_write import write_trace

HERE = Path(__file__).parent
TRACES = {"Mooncake conversation": "mooncake_conversation.jsonl.gz", "Azure conversation": "azure_2023_conv.csv.gz"}
COPIES = (1, 4, 16)
WORKERS = (8, 32, 128, 512)
Row = dict[str, Any]


def timed(python: str, script: str, *args: object) -> Row:
    """The JSON line of a script that runs on one core."""
    core = max(os.sched_getaffinity(0))
    command = [python, str(HERE / script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DYN_LOG": "off"},
                          preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def best(rows: list[Row]) -> Row:
    """The least disturbed one."""
    return max(rows, key=lambda row: float(row["requests_per_wall_s"]))


def against_peer(folder: Path, peer: str | None, rounds: int) -> list[str]:
    """Ours and the peer's, in turns."""
    lines = ["| trace | requests | twinpool req/s | peer req/s | ratio | CPU ratio | form | peak MB | digest |"]
    lines.append("|" + "---|" * 9)
    for name, file in TRACES.items():
        ours: list[Row] = []
        theirs: list[Row] = []
        with tempfile.TemporaryDirectory() as temporary:
            converted = Path(temporary) / "trace.jsonl"
            trace, _ = read_trace(folder / file)
            write_trace(trace, converted, "mooncake")
            for _ in range(rounds):
                ours.append(timed(sys.executable, "one.py", folder / file))
                if peer is not None:
                    theirs.append(timed(peer, "peer_dynamo.py", converted, 4, 4))
        mine = best(ours)
        assert len({row["digest"] for row in ours}) == 1, "the same input gave different decisions"
        rate, cpu, versus = "not measured", "", ""
        if theirs:
            other = best(theirs)
            rate = f"{other['requests_per_wall_s']:,.0f}"
            versus = f"{mine['requests_per_wall_s'] / other['requests_per_wall_s']:.2f}"
            cpu = f"{min(row['cpu_s'] for row in theirs) / min(row['cpu_s'] for row in ours):.2f}"
        lines.append(
            f"| {name} | {mine['requests']:,} | {mine['requests_per_wall_s']:,.0f} | {rate} | {versus} | {cpu} "
            f"| {mine['form']} | {mine['peak_mb']:.0f} | {mine['digest'][:12]} |"
        )
        print(lines[-1], flush=True)
    return lines


def scaling(folder: Path) -> list[str]:
    """Microseconds a request as traces and clusters grow."""
    lines = ["| trace | copies | workers | us a request | peak MB |", "|---|---|---|---|---|"]
    for name, file in TRACES.items():
        plans = [(copies, 8) for copies in COPIES] + [(1, workers) for workers in WORKERS[1:]]
        for copies, workers in plans:
            half = workers // 2
            row = timed(sys.executable, "one.py", folder / file, "--copies", copies, "--prefill", half,
                        "--decode", half, "--speed", workers / 8)  # fmt: skip
            micros = 1e6 * row["wall_s"] / row["requests"]
            lines.append(f"| {name} | {copies} | {workers} | {micros:.0f} | {row['peak_mb']:.0f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--peer", default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-scaling", action="store_true")
    args = parser.parse_args()
    text = ["# Speed of the simulator", "", describe(), "", *against_peer(args.traces, args.peer, args.rounds)]
    if not args.no_scaling:
        text += ["", *scaling(args.traces)]
    (HERE / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
