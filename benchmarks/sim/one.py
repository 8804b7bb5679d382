"""One timed replay in a process of its own: what ``run.py`` starts. Prints one JSON line.

    python benchmarks/sim/one.py TRACE [--prefill 4] [--decode 4] [--copies 1] [--speed 1] [--policy NAME]

Counted is everything from opening the file to the last exact percentile. ``--copies`` puts the trace several times in
a row, with hash ids of their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from array import array
from dataclasses import replace
from pathlib import Path

from twinpool.sim.readers import read_trace
from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed


def copies(trace: Trace, count: int) -> Trace:
    """The trace ``count`` times in a row; prefixes are shared within a copy only."""
    step = trace.duration_s + 1.0
    ids = max(trace.hashes, default=0) + 1
    arrival, hashes, offsets = array("d"), array("q"), array("q", [0])
    for copy in range(count):
        arrival.extend(at + copy * step for at in trace.arrival)
        hashes.extend(key + copy * ids for key in trace.hashes)
        offsets.extend(end + copy * len(trace.hashes) for end in trace.offsets[1:])
    return replace(trace, arrival=arrival, prompt=trace.prompt * count, output=trace.output * count, hashes=hashes,
                   offsets=offsets, tail=None)  # fmt: skip


def main() -> None:
    """Time one replay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--prefill", type=int, default=4)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--policy", default="least_seconds")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    args = parser.parse_args()
    started, cpu = time.perf_counter(), time.process_time()
    trace, _ = read_trace(args.trace)
    if args.copies > 1:
        trace = copies(trace, args.copies)
    if args.speed != 1.0:
        trace = speed(trace, args.speed)
    settings = Settings(prefill=args.prefill, decode=args.decode, policy=args.policy, chunk_tokens=args.chunk_tokens)
    summary = replay(trace, settings).summary()
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    print(
        json.dumps(
            {
                "requests": summary["requests"],
                "completed": summary["completed"],
                "wall_s": wall_s,
                "cpu_s": cpu_s,
                "requests_per_wall_s": summary["requests"] / wall_s,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "form": summary["wall_core"],
                "digest": summary["digest"],
                "attainment": summary["attainment"],
                "ttft_mean_ms": summary["ttft_ms"]["mean"],
            }
        )
    )


if __name__ == "__main__":
    main()
