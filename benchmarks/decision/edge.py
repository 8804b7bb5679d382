"""The edge's own cost of a request: real gRPC calls over loopback to a router's edge that has no cell behind it.

The edge (``EdgeServer``: grpc.aio, checks, tokenizer, metrics) runs in a process of its own on uvloop, as in a router;
behind it is a stand-in cell that answers at once. So its CPU time is that of gRPC, both ways, and of our edge.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import AsyncIterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import uvloop

from twinpool.client import AsyncClient, request
from twinpool.config_load import Override, load
from twinpool.router.cell import CellModel, CellStatus, FinishedOut, Submission, TokensOut
from twinpool.router.edge.server import EdgeServer
from twinpool.router.metrics import Metrics
from twinpool.tokenizer import load_tokenizer

VOCAB = 49_152
MODEL = CellModel("stand-in", "f" * 64, "float32", VOCAB, 1 << 17, (2,), 16)
PORTS = ("inference", "vllm.listen", "admin", "metrics")
WARM = 20


class Answer:
    """Tokens one by one, all of them there."""

    def __init__(self, submission: Submission) -> None:
        self._submission = submission

    def cancel(self) -> None:
        """It is over at once."""

    async def __aiter__(self) -> AsyncIterator[TokensOut | FinishedOut]:
        count = self._submission.sampling.max_tokens
        for position in range(count):
            yield TokensOut(position, array("I", [1000]), " word", ())
        yield FinishedOut(
            reason="length", stop=None, text="", prompt_tokens=len(self._submission.prompt), completion_tokens=count,
            cached_tokens=0, prefill_worker="p", decode_worker="d", path="split", path_reason="", kv_bytes=0,
            backend="shm", attempts=1, queue_s=0.0, reserve_s=0.0, prefill_s=0.0, compute_s=0.0, transfer_s=0.0,
            ttft_s=0.0, itl_s=0.0, total_s=0.0,
        )  # fmt: skip


class NoCell:
    """Implements ``Cell`` without a core."""

    model: CellModel | None = MODEL

    def submit(self, submission: Submission) -> Answer:
        """It is answered."""
        return Answer(submission)

    def cancel(self, request_id: str) -> bool:
        """Nothing runs."""
        return False

    def status(self) -> CellStatus:
        """Empty."""
        return CellStatus("benchmark", MODEL, 0, 0, 0, 0, 0, 0, ())

    def drain_worker(self, worker: str) -> None:
        """There is none."""

    def set_roles(self, worker: str, roles: tuple[str, ...]) -> None:
        """There is none."""

    async def watch(self) -> AsyncIterator[str]:
        """Nothing is logged."""
        for line in ():
            yield line


def _serve(pipe: Connection) -> None:
    uvloop.run(_served(pipe))


async def _served(pipe: Connection) -> None:
    config = load(None, [Override(f"edge.{port}", "127.0.0.1:0", "benchmark") for port in PORTS]).config
    edge = EdgeServer(NoCell(), config, load_tokenizer(None), Metrics())
    addresses = await edge.start()
    await edge.set_ready(True)
    pipe.send(addresses.inference)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, pipe.recv):
        pipe.send(time.process_time())
    await edge.stop()


class EdgeCost(NamedTuple):
    """Of one kind of request."""

    prompt: int  # token ids
    messages: int  # with tokens
    cpu_s: float  # of the edge's process, a request
    p50_s: float  # the client's whole round trip
    p99_s: float


async def _calls(address: str, prompt: int, messages: int, requests: int) -> list[float]:
    rng = np.random.default_rng(0)
    took: list[float] = []
    async with AsyncClient(address) as client:
        for _ in range(requests):
            ids = rng.integers(256, VOCAB, prompt).tolist()
            wanted = request(token_ids=ids, max_tokens=messages, temperature=0.0, ignore_eos=True)
            start = time.perf_counter()
            async for _event in client.generate(wanted):
                pass
            took.append(time.perf_counter() - start)
    return took


def measure(kinds: list[tuple[int, int]], requests: int) -> list[EdgeCost]:
    """One request at a time, of each kind: (prompt tokens, messages with tokens)."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()  # so that its end is noticed
    address: str = here.recv()

    def cpu_s() -> float:
        here.send(True)
        return float(here.recv())

    found: list[EdgeCost] = []
    for prompt, messages in kinds:
        uvloop.run(_calls(address, prompt, messages, WARM))
        before = cpu_s()
        took = uvloop.run(_calls(address, prompt, messages, requests))
        spent = (cpu_s() - before) / requests
        p50, p99 = (float(np.quantile(took, share)) for share in (0.5, 0.99))
        found.append(EdgeCost(prompt, messages, spent, p50, p99))
    here.send(False)
    process.join(10.0)
    return found


if __name__ == "__main__":
    for cost in measure([(64, 1), (12_000, 1), (12_000, 65)], 100):
        print(cost)
