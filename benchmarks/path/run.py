"""The cost of the path: what router, pools and transfer add to the engine's own time, at concurrency 1.

    python benchmarks/path/run.py [--requests 30]

* TTFT at the client minus the worker's own prefill steps (``Timing.compute_ms``): target, a median under 8 ms.
* Gap between tokens at the client against the engine's own decode step, which is measured in this process with the
  same model, context and thread count, in turns with the cluster (both are idle while the other runs): target, 10 %.

Results go to benchmarks/path/results.md. KV transfer against a plain copy: benchmarks/path/transfer.py.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import NamedTuple

import grpc
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster import cluster
from machine import describe

from twinpool.proto.twinpool.v1 import inference_pb2 as pb
from twinpool.proto.twinpool.v1 import inference_pb2_grpc as rpc
from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import load_model
from twinpool.workers.sampler import Sampler
from twinpool.workers.transfer.pool import open_pool

BLOCK = 16
PROMPT, OUTPUT = 256, 33
ROUNDS = 6


class Call(NamedTuple):
    """One request as its client saw it; milliseconds."""

    ttft: float
    compute: float
    gaps: list[float]
    path: str


def call(stub: rpc.InferenceStub, ids: list[int], output: int) -> Call:
    """Generate greedily and time every message; each holds one token at concurrency 1."""
    sampling = pb.Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=sampling, stream=True)
    start = time.perf_counter()
    times: list[float] = []
    finished = pb.Finished()
    for event in stub.Generate(request, timeout=120):
        if event.HasField("tokens"):
            times.append(time.perf_counter())
        elif event.HasField("finished"):
            finished = event.finished
    gaps = [1000 * (after - before) for before, after in itertools.pairwise(times[1:])]
    return Call(1000 * (times[0] - start), finished.timing.compute_ms, gaps, finished.route.path)


class OwnEngine:
    """The same engine in this process, one thread."""

    def __init__(self) -> None:
        model = load_model(None, "float32", "cpu")
        layout = kv_layout(model.config, "float32", BLOCK)
        pool = open_pool(64, layout.block_bytes)
        self._engine = TorchEngine(model, pool.data, BLOCK, 1, Sampler(model.config.vocab_size, "cpu"))
        self._table = list(range(64))

    def gaps(self, ids: list[int], output: int) -> list[float]:
        """Milliseconds of each decode step after a prefill of ``ids``."""
        tokens = array("I", ids)
        params = SamplingParams(max_tokens=output, temperature=0.0)
        state = SampleState(params, tokens, len(ids))
        start, times = 0, []
        for _ in range(output):
            begin = time.perf_counter()
            drawn = self._engine.step([Row(tokens[start:], start, self._table, state)])[0]
            times.append(1000 * (time.perf_counter() - begin))
            assert drawn is not None
            start = len(tokens)
            tokens.append(drawn.token)
        return times[2:]


def measure(address: str, requests: int) -> dict[str, float]:
    """All figures, milliseconds."""
    torch.set_num_threads(1)
    rng = random.Random(1)
    stub = rpc.InferenceStub(grpc.insecure_channel(address))
    call(stub, [rng.randrange(300, 40_000) for _ in range(64)], 4)
    overheads = []
    for _ in range(requests):
        seen = call(stub, [rng.randrange(300, 40_000) for _ in range(64)], 2)
        assert seen.path == "split", seen.path
        overheads.append(seen.ttft - seen.compute)
    engine = OwnEngine()
    client_gaps: list[float] = []
    engine_gaps: list[float] = []
    for _ in range(ROUNDS):
        ids = [rng.randrange(300, 40_000) for _ in range(PROMPT)]
        engine_gaps += engine.gaps(ids, OUTPUT)
        client_gaps += call(stub, ids, OUTPUT).gaps
    return {
        "ttft_overhead_median": statistics.median(overheads),
        "ttft_overhead_p90": statistics.quantiles(overheads, n=10)[8],
        "client_gap_median": statistics.median(client_gaps),
        "engine_step_median": statistics.median(engine_gaps),
        "gap_over_step": statistics.median(client_gaps) / statistics.median(engine_gaps),
    }


def report(figures: dict[str, float]) -> str:
    """The table that is committed."""
    rows = [
        f"| TTFT minus the engine's own prefill, median | {figures['ttft_overhead_median']:.2f} ms | under 8 ms |",
        f"| the same, 90th percentile | {figures['ttft_overhead_p90']:.2f} ms | |",
        f"| gap between tokens at the client, median | {figures['client_gap_median']:.2f} ms | |",
        f"| the engine's own decode step, median | {figures['engine_step_median']:.2f} ms | |",
        f"| gap over step | {figures['gap_over_step']:.3f} | at most 1.10 |",
    ]
    head = "| figure | seen | target |\n|---|---|---|\n"
    return f"`python benchmarks/path/run.py`\n\n{describe()}\n\n{head}" + "\n".join(rows) + "\n"


def main() -> None:
    """Run and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=30)
    options = parser.parse_args()
    with cluster() as addresses:
        figures = measure(addresses["inference"], options.requests)
    text = report(figures)
    (Path(__file__).parent / "results.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
