"""A gRPC server that answers what a test tells it to: for clients, no cell behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]

from twinpool.proto.twinpool.v1 import inference_pb2, inference_pb2_grpc
from twinpool.proto.twinpool.v1.inference_pb2 import Accepted, Finished, GenerateEvent, GenerateRequest, Tokens

VOCAB_SIZE = 100


def accepted() -> GenerateEvent:
    return GenerateEvent(accepted=Accepted(request_id="r", seed=1, model="fake"))


def tokens(position: int, *ids: int, index: int = 0) -> GenerateEvent:
    text = "".join(f" {token}" for token in ids)
    return GenerateEvent(tokens=Tokens(index=index, position=position, token_ids=ids, text=text))


def finished(index: int = 0) -> GenerateEvent:
    return GenerateEvent(
        finished=Finished(
            index=index,
            reason=inference_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
            route=inference_pb2.Route(prefill_worker="p", decode_worker="d", path="split", kv_bytes=7, attempts=1),
            timing=inference_pb2.Timing(ttft_ms=1.5),
        )
    )


def refusal(reason: str, retry_s: int) -> tuple[tuple[str, bytes], ...]:
    """Trailers of a status with reason and retry delay."""
    status = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="full")
    for detail in (
        error_details_pb2.ErrorInfo(reason=reason, domain="twinpool"),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=retry_s)),
    ):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return (("grpc-status-details-bin", status.SerializeToString()),)


class FakeInference(inference_pb2_grpc.InferenceServicer):
    """``events`` None: as many tokens as asked for, two a message."""

    def __init__(self, events: Iterable[GenerateEvent] | None = None) -> None:
        self.events = None if events is None else list(events)
        self.requests: list[GenerateRequest] = []
        self.metadata: dict[str, Any] = {}
        self.left = asyncio.Event()
        self.abort: tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]] | None = None

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateEvent]:
        self.requests.append(request)
        self.metadata = dict(context.invocation_metadata())
        if self.abort is not None:
            code, details, trailers = self.abort
            await context.abort(code, details, trailers)
        try:
            for event in _full(request) if self.events is None else self.events:
                yield event
        finally:
            self.left.set()

    async def Cancel(self, request: inference_pb2.CancelRequest, context: Any) -> inference_pb2.CancelResponse:
        await context.abort(grpc.StatusCode.NOT_FOUND, "nothing runs by that id")
        raise AssertionError

    async def GetModel(self, request: inference_pb2.GetModelRequest, context: Any) -> inference_pb2.Model:
        return inference_pb2.Model(name="fake", vocab_size=VOCAB_SIZE, max_context=1000)


def _full(request: GenerateRequest) -> list[GenerateEvent]:
    wanted = range(request.sampling.max_tokens)
    pairs = [tokens(start, *wanted[start : start + 2]) for start in wanted[::2]]
    return [accepted(), *pairs, finished()]


@asynccontextmanager
async def served(fake: FakeInference) -> AsyncIterator[str]:
    """The address of a server with ``fake``."""
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
