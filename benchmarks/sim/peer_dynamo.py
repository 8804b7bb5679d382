"""One timed replay by Dynamo's offline replay engine (Rust), the fastest peer; prints one JSON line.

    PEER_PYTHON benchmarks/sim/peer_dynamo.py TRACE.jsonl PREFILL DECODE

Runs in an environment of its own, which has no twinpool: ``pip install --no-deps ai-dynamo==1.6.1
ai-dynamo-runtime==1.6.1`` and ``pip install pydantic uvloop msgspec pyzmq prometheus-client aiohttp``. KV-aware
routing, prefix caches of 16,384 blocks of 64 tokens a worker, its own built-in step times.
"""

import json
import sys
import time
from pathlib import Path

from dynamo._core import run_mocker_trace_replay


def main() -> None:
    """Time one replay."""
    trace, prefill, decode = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with Path(trace).open(encoding="utf-8") as lines:
        requests = sum(1 for _ in lines)
    arguments = {role: {"engine": {"worker_type": role, "num_gpu_blocks": 16384, "block_size": 64}}
                 for role in ("prefill", "decode")}  # fmt: skip
    started, cpu = time.perf_counter(), time.process_time()
    run_mocker_trace_replay(
        [trace],
        prefill_engine_args=arguments["prefill"],
        decode_engine_args=arguments["decode"],
        num_prefill_workers=prefill,
        num_decode_workers=decode,
        router_mode="kv_router",
        arrival_speedup_ratio=1.0,
        trace_block_size=512,
        trace_format="mooncake",
    )
    wall_s = time.perf_counter() - started
    print(
        json.dumps(
            {
                "requests": requests,
                "wall_s": wall_s,
                "cpu_s": time.process_time() - cpu,
                "requests_per_wall_s": requests / wall_s,
            }
        )
    )


if __name__ == "__main__":
    main()
