"""Errors as statuses."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from twinpool import errors
from twinpool.proto.twinpool.v1 import inference_pb2_grpc
from twinpool.router.edge.handlers import register
from twinpool.router.edge.status import MAX_MESSAGE, abort, presentable, to_proto

CALL = """
import sys, grpc
from twinpool.proto.twinpool.v1 import inference_pb2, inference_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        list(inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(), timeout=0.2))
    except grpc.RpcError as error:
        print(error.code().name)
"""


@pytest.mark.parametrize("kind", errors.BY_CODE.values(), ids=list(errors.BY_CODE))
def test_every_error_has_its_status(kind: Any) -> None:
    status = to_proto(kind("words", retry_s=0.25))
    assert status.code == grpc.StatusCode[kind.code].value[0]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (info.reason, info.domain) == (kind.default_reason, "twinpool")
    assert retry.retry_delay.ToMilliseconds() == 250


def test_no_retry_no_hint() -> None:
    assert len(to_proto(errors.InvalidRequest("words")).details) == 1


def test_messages_are_bounded() -> None:
    assert len(to_proto(errors.Internal("x" * 100_000)).message) == MAX_MESSAGE


@pytest.mark.parametrize("error", [ValueError("/etc/secret"), errors.ConfigError("/etc/secret")])
def test_only_errors_for_clients_are_shown(error: Exception) -> None:
    shown = presentable(error)
    assert shown.code == "INTERNAL"
    assert "secret" not in shown.message


async def test_a_call_that_just_ended_is_not_an_incident(caplog: pytest.LogCaptureFixture) -> None:
    """The caller's deadline can end a call between our noticing it and our status being sent."""

    class Slow(inference_pb2_grpc.InferenceServicer):
        Cancel = GetModel = None  # type: ignore[assignment]

        async def Generate(self, request: Any, context: Any) -> Any:
            time.sleep(0.4)  # noqa: ASYNC251 the event loop cannot hear of the call's end meanwhile
            raise errors.DeadlineExceeded("the caller's deadline passed")
            yield

    server = grpc.aio.server()
    register(server, inference_pb2_grpc.add_InferenceServicer_to_server, Slow())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        command = [sys.executable, "-c", CALL, f"127.0.0.1:{port}"]
        client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(client.communicate(), 30)
    finally:
        await server.stop(1)
    assert out.decode().split() == ["DEADLINE_EXCEEDED"]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_status_that_can_no_longer_be_sent() -> None:
    class Ended:
        async def abort(self, *_: Any) -> None:
            raise grpc.aio.InternalError("Failed execute_batch")

    with pytest.raises(asyncio.CancelledError):
        await abort(cast("Any", Ended()), errors.DeadlineExceeded("late"))
