"""A cell without workers, in process: it writes the ids that a test tells it to, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import dataclasses
from array import array
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from twinpool.config import ClusterConfig
from twinpool.errors import AlreadyExists, Cancelled, NotFound, TwinpoolError
from twinpool.proto.twinpool.v1 import admin_pb2_grpc, inference_pb2_grpc
from twinpool.router.cell import CellModel, CellStatus, FinishedOut, Submission, TokensOut, WorkerView
from twinpool.router.edge.server import EdgeServer
from twinpool.router.metrics import Metrics
from twinpool.sampling import TokenLogprob
from twinpool.tokenizer import Tokenizer, load_tokenizer

MODEL = CellModel("tiny", "f" * 64, "float32", vocab_size=49152, max_context=256, eos_ids=(2,), block_size=16)
WORKER = WorkerView("w1", ("prefill", "decode"), "ready", 100, 75, 5, 2, 1, 0.05, 0, 4242, 0.1)
FINISHED = FinishedOut(
    reason="length", stop=None, text="", prompt_tokens=0, completion_tokens=0, cached_tokens=16, prefill_worker="p1",
    decode_worker="d1", path="split", path_reason="predicted", kv_bytes=4096, backend="shm", attempts=1, queue_s=0.001,
    reserve_s=0.002, prefill_s=0.02, compute_s=0.018, transfer_s=0.003, ttft_s=0.025, itl_s=0.01, total_s=0.1,
)  # fmt: skip


def counting(submission: Submission) -> list[int]:
    """max_tokens ids from 1000 + seed on: tells the sequences of one request apart."""
    start = 1000 + submission.sampling.seed % 1000
    return list(range(start, start + submission.sampling.max_tokens))


class FakeStream:
    """One output, a token at a time; waits before the token of index ``cell.hold`` until it is cancelled."""

    def __init__(self, cell: FakeCell, submission: Submission) -> None:
        self.submission = submission
        self.cancelled = False
        self.written = 0
        self.failure: TwinpoolError | None = None
        self.wake = asyncio.Event()
        self._cell = cell

    def cancel(self) -> None:
        self.cancelled = True
        self._cell.running.pop(self.submission.request_id, None)

    def fail(self, error: TwinpoolError) -> None:
        self.failure = error
        self.wake.set()

    async def __aiter__(self) -> AsyncIterator[TokensOut | FinishedOut]:
        resumed, wanted = len(self.submission.resumed), self.submission.sampling.logprobs
        ids = self._cell.script(self.submission)
        for position, token in enumerate(ids[resumed:], start=resumed):
            if position == self._cell.hold:
                await self.wake.wait()
            if self.failure is not None:
                raise self.failure
            logprob = TokenLogprob(-0.5, 1, (token,) * max(0, wanted), (-0.5,) * max(0, wanted))
            self.written = position + 1
            yield TokensOut(
                position, array("I", [token]), f"<{token}>{self._cell.padding}", (logprob,) if wanted >= 0 else ()
            )
        prompt_tokens = len(self.submission.prompt)
        yield dataclasses.replace(self._cell.finished, prompt_tokens=prompt_tokens, completion_tokens=len(ids))


class FakeCell:
    """Implements ``twinpool.router.cell.Cell``."""

    def __init__(self) -> None:
        self.model: CellModel | None = MODEL
        self.script: Callable[[Submission], list[int]] = counting
        self.hold = -1
        self.padding = ""
        self.finished = FINISHED
        self.refusal: Exception | None = None
        self.streams: list[FakeStream] = []
        self.running: dict[str, FakeStream] = {}
        self.drained: list[str] = []

    def submit(self, submission: Submission) -> FakeStream:
        if self.refusal is not None:
            raise self.refusal
        if submission.request_id in self.running and not submission.resumed:
            raise AlreadyExists("running")
        stream = self.running[submission.request_id] = FakeStream(self, submission)
        self.streams.append(stream)
        return stream

    def cancel(self, request_id: str) -> bool:
        stream = self.running.pop(request_id, None)
        if stream is not None:
            stream.fail(Cancelled("cancelled"))
        return stream is not None

    def status(self) -> CellStatus:
        return CellStatus("r1", self.model, 3, len(self.running), 7, 1, 2, 0, (WORKER,))

    def drain_worker(self, worker: str) -> None:
        if worker != WORKER.worker:
            raise NotFound(f"no worker {worker!r}")
        self.drained.append(worker)

    def set_roles(self, worker: str, roles: tuple[str, ...]) -> None:
        self.drain_worker(worker)

    async def watch(self) -> AsyncIterator[str]:
        yield '{"request":1}'
        yield '{"request":2}'


class Refusal:
    """What a client can see of an error status."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        metadata: Any = error.trailing_metadata() or ()
        trailers: dict[str, Any] = dict(metadata)
        details = trailers.get("grpc-status-details-bin", b"")
        self.info = error_details_pb2.ErrorInfo()
        self.retry = error_details_pb2.RetryInfo()
        for detail in status_pb2.Status.FromString(details).details:
            detail.Unpack(self.info)
            detail.Unpack(self.retry)

    @property
    def reason(self) -> str:
        return str(self.info.reason)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture
def cell() -> FakeCell:
    return FakeCell()


@pytest.fixture
def config() -> ClusterConfig:
    """Loopback, free ports, a short wait for workers, a tenant on the VllmEngine port."""
    free = "127.0.0.1:0"
    return ClusterConfig.model_validate(
        {
            "edge": {
                "inference": free,
                "admin": free,
                "metrics": free,
                "vllm": {"listen": free, "tenant": "gateway", "class": "streaming"},
                "max_message_mib": 1,
            },
            "scheduling": {"no_worker_wait_ms": 60},
        }
    )


@pytest.fixture
async def edge(cell: FakeCell, config: ClusterConfig, tokenizer: Tokenizer) -> AsyncIterator[Any]:
    """A started edge: ``server``, ``metrics``, ``addresses``, ``channel`` and the stubs of its three services."""
    metrics = Metrics()
    server = EdgeServer(cell, config, tokenizer, metrics)
    addresses = await server.start()
    await server.set_ready(True)
    ports = (addresses.inference, addresses.vllm, addresses.admin)
    channels = [grpc.aio.insecure_channel(address) for address in ports]
    yield SimpleNamespace(
        server=server,
        metrics=metrics,
        addresses=addresses,
        channel=channels[0],
        inference=inference_pb2_grpc.InferenceStub(channels[0]),
        vllm=vllm_engine_pb2_grpc.VllmEngineStub(channels[1]),
        admin=admin_pb2_grpc.AdminStub(channels[2]),
    )
    for channel in channels:
        await channel.close(None)
    await server.stop()


@pytest.fixture
def refused() -> Callable[[Any], Any]:
    """``await refused(call)``: the error status that a unary call, or a stream read to its end, was answered with."""

    async def answer(call: Any) -> Refusal:
        async def whole() -> None:
            _ = [message async for message in call]

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (whole() if hasattr(call, "read") else call)
        return Refusal(caught.value)

    return answer


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], Any]:
    """``await eventually(condition)``: waits for it, within the test's own time limit."""

    async def wait(condition: Callable[[], bool]) -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    return wait
