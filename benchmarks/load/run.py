"""64 concurrent streams for three minutes over one prefill and one decode worker with the real model, bfloat16.

    python benchmarks/load/run.py [--streams 64] [--seconds 180]

Asked for: every stream completes, no token is lost or out of order (the client checks positions), the router's memory
stays flat and under 200 MB, a worker's under 1.2 GB, and when all is idle no block is leaked. Writes results.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster import cluster
from machine import describe

INPUT, OUTPUT = "32:96", "32:64"
SAMPLE_S = 2.0
MB = 1e6


def status(admin: str) -> dict[str, Any]:
    """What `twinpool status --json` says."""
    command = [sys.executable, "-m", "twinpool.cli", "status", "--json", "--address", admin]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


class Memory:
    """Resident memory of processes over time, in MB, sampled from a thread."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self.samples: dict[str, list[float]] = {name: [] for name in processes}
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for name, process in self._processes.items():
                self.samples[name].append(process.memory_info().rss / MB)

    def end(self) -> dict[str, tuple[float, float, float]]:
        """For each process: after a third of the run, at the end, and the peak."""
        self._stop.set()
        self._thread.join()
        return {name: (seen[len(seen) // 3], seen[-1], max(seen)) for name, seen in self.samples.items()}


def processes_of(admin: str) -> dict[str, psutil.Process]:
    """Router and workers: workers say their process, the router is their sibling that listens on the admin port."""
    workers = {row["worker"]: psutil.Process(row["pid"]) for row in status(admin)["workers"]}
    parent = next(iter(workers.values())).parent()
    assert parent is not None
    known = {process.pid for process in workers.values()}
    routers = [child for child in parent.children() if child.pid not in known and "router" in child.cmdline()]
    return {"router": routers[0], **workers}


def bench(address: str, streams: int, seconds: int) -> dict[str, Any]:
    """Run the load; the figures of `twinpool bench`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "twinpool.cli", "bench", "--address", address]
        command += ["--concurrency", str(streams), "--duration", str(seconds), "--timeout", "600"]
        command += ["--input-tokens", INPUT, "--output-tokens", OUTPUT, "--json", str(out)]
        subprocess.run(command, check=False)
        result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return result


def idle(admin: str) -> dict[str, Any]:
    """Status once nothing runs and every worker has checked its blocks since (it does so every 5 s when idle)."""
    deadline = time.monotonic() + 30
    while (now := status(admin))["active"] + now["queued"] and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(6)
    return status(admin)


def main() -> None:
    """Run, check, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=180)
    options = parser.parse_args()
    with cluster("--dtype", "bfloat16") as addresses:
        memory = Memory(processes_of(addresses["admin"]))
        figures = bench(addresses["inference"], options.streams, options.seconds)
        used = memory.end()
        after = idle(addresses["admin"])
    text = report(options.streams, options.seconds, figures, used, after)
    (Path(__file__).parent / "results.md").write_text(text, encoding="utf-8")
    print(text)


def report(
    streams: int,
    seconds: int,
    figures: dict[str, Any],
    used: dict[str, tuple[float, float, float]],
    after: dict[str, Any],
) -> str:
    """The text that is committed."""
    lines = ["`python benchmarks/load/run.py`", "", describe(), ""]
    lines += [
        f"{streams} streams, {seconds} s, prompts of {INPUT} tokens, outputs of {OUTPUT}, bfloat16, 1 + 1 workers",
        "",
    ]
    lines += ["```json", json.dumps(figures, indent=1), "```", ""]
    lines += ["| process | MB after a third | at the end | peak |", "|---|---|---|---|"]
    lines += [f"| {name} | {third:.0f} | {end:.0f} | {peak:.0f} |" for name, (third, end, peak) in used.items()]
    lines += ["", "| worker when idle | blocks | free | leaked |", "|---|---|---|---|"]
    for row in after["workers"]:
        lines.append(f"| {row['worker']} | {row['blocks']} | {row['free_blocks']} | {row['leaked_blocks']} |")
    lines += ["", f"active {after['active']}, queued {after['queued']}, resumed {after['resumed']}", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
