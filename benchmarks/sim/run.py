"""Speed of the simulator: requests simulated per wall second on one core, against the fastest peer in the same run.

    python benchmarks/sim/run.py --traces FOLDER [--peer PYTHON] [--rounds 3] [--compiled]

FOLDER holds mooncake_conversation.jsonl.gz and azure_2023_conv.csv.gz (public). ``--peer``: the interpreter of an
environment with Dynamo 1.6.1 (peer_dynamo.py says how). All run pinned to the same core, in turns, and the least
disturbed round of each counts. 4 prefill and 4 decode workers, prefix caches, KV-aware policy, measured latency grids.
Two configurations: twinpool's own, which prefills on decode workers too, in many small chunks; and what the peer
simulates, its rule (the policy ``dynamo``) on fixed roles with its chunks of at most 8,192 tokens (the default of its
MockEngineArgs). ``--compiled``: the compiled form, too, built in a temporary folder; decisions must be the same.
Also: cost against the number of requests (the trace once, 4 and 16 times in a row) and of workers (8 to 512, with the
load growing alike). Results go to benchmarks/sim/results.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
ROOT = HERE.parents[1]
TRACES = {"Mooncake conversation": "mooncake_conversation.jsonl.gz", "Azure conversation": "azure_2023_conv.csv.gz"}
COPIES = (1, 4, 16)
WORKERS = (8, 32, 128, 512)
CONFIGURATIONS: dict[str, tuple[object, ...]] = {
    "own": (),
    "peer's": ("--policy", "dynamo", "--chunk-tokens", 8192),
}
BUILT = ("setup.py", "pyproject.toml", "README.md", "LICENSE")  # beside src
Row = dict[str, Any]


def timed(python: str, script: str, *args: object, source: Path | None = None) -> Row:
    """The JSON line of a script that runs on one core; ``source``: a folder to take the package from."""
    core = max(os.sched_getaffinity(0))
    command = [python, str(HERE / script), *map(str, args)]
    more = {"DYN_LOG": "off"} | ({"PYTHONPATH": str(source)} if source else {})
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | more,
                          preexec_fn=lambda: os.sched_setaffinity(0, {core}))  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def compiled_copy(folder: Path) -> Path:
    """The package in its compiled form, in a folder of its own."""
    for name in BUILT:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True,
                   stdout=subprocess.DEVNULL, env=os.environ | {"TWINPOOL_COMPILE": "1"})  # fmt: skip
    return folder / "src"


def best(rows: list[Row]) -> Row:
    """The least disturbed one."""
    return max(rows, key=lambda row: float(row["requests_per_wall_s"]))


def against_peer(folder: Path, peer: str | None, rounds: int, forms: list[Path | None]) -> list[str]:
    """Each configuration in each form, and the peer, in turns."""
    lines = ["| trace | requests | configuration | form | req/s | peer req/s | ratio | CPU ratio | peak MB | digest |"]
    lines.append("|" + "---|" * 10)
    for name, file in TRACES.items():
        ours: dict[tuple[str, Path | None], list[Row]] = {}
        theirs: list[Row] = []
        with tempfile.TemporaryDirectory() as temporary:
            converted = Path(temporary) / "trace.jsonl"
            trace, _ = read_trace(folder / file)
            write_trace(trace, converted, "mooncake")
            for _ in range(rounds):
                for label, flags in CONFIGURATIONS.items():
                    for form in forms:
                        row = timed(sys.executable, "one.py", folder / file, *flags, source=form)
                        ours.setdefault((label, form), []).append(row)
                if peer is not None:
                    theirs.append(timed(peer, "peer_dynamo.py", converted, 4, 4))
        for label in CONFIGURATIONS:
            digests = {row["digest"] for form in forms for row in ours[label, form]}
            assert len(digests) == 1, "the same input gave different decisions"
        for (label, _), rows in ours.items():
            lines.append(_line(name, label, rows, theirs))
            print(lines[-1], flush=True)
    return lines


def _line(name: str, label: str, rows: list[Row], theirs: list[Row]) -> str:
    mine = best(rows)
    rate, cpu, versus = "not measured", "", ""
    if theirs:
        other = best(theirs)
        rate = f"{other['requests_per_wall_s']:,.0f}"
        versus = f"{mine['requests_per_wall_s'] / other['requests_per_wall_s']:.2f}"
        cpu = f"{min(row['cpu_s'] for row in theirs) / min(row['cpu_s'] for row in rows):.2f}"
    return (
        f"| {name} | {mine['requests']:,} | {label} | {mine['form']} | {mine['requests_per_wall_s']:,.0f} | {rate} "
        f"| {versus} | {cpu} | {mine['peak_mb']:.0f} | {mine['digest'][:12]} |"
    )


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
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--no-scaling", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        forms: list[Path | None] = [None]
        if args.compiled:
            forms.append(compiled_copy(Path(temporary)))
        text = ["# Speed of the simulator", "", describe(), ""]
        text += against_peer(args.traces, args.peer, args.rounds, forms)
    if not args.no_scaling:
        text += ["", *scaling(args.traces)]
    (HERE / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
