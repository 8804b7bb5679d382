"""The HTTP/2 connection of benchmarks/life against a server of grpc.aio: what it sends and what it hears."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

METHOD = "/test.Echo/Stream"
LONG = bytes(range(256)) * 2000  # several frames, and more than a stream's first window


def _load() -> Any:
    path = Path(__file__).parents[1] / "benchmarks/life/wire.py"
    spec = importlib.util.spec_from_file_location("life_wire", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["life_wire"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


wire = _load()


class _Echo(grpc.GenericRpcHandler):  # type: ignore[type-arg]
    """Sends a request's bytes back three times; "refuse" gets a status, "stay" nothing at all."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_stream_rpc_method_handler(self._stream, None, None)

    async def _stream(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        if request == b"refuse":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        if request == b"stay":
            await asyncio.sleep(60)
        for _ in range(3):
            yield request


@pytest.fixture
async def connection() -> AsyncIterator[Any]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((_Echo(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(lambda: wire.Connection("127.0.0.1", METHOD), "127.0.0.1", port)
    await asyncio.wait_for(made.ready.wait(), 30)
    yield made
    made.close()
    await server.stop(None)


async def _ended(connection: Any) -> None:
    await asyncio.wait_for(connection.idle.wait(), 30)


async def test_each_stream_has_its_own_messages_in_order_with_their_times(connection: Any) -> None:
    bodies = [b"", b"short", LONG, *(b"%d" % i for i in range(50))]
    streams = [connection.send(body) for body in bodies]
    await _ended(connection)
    for body, stream in zip(bodies, streams, strict=True):
        assert not stream.error
        assert [message for _, message in stream.messages()] == [body] * 3
        times = [when for when, _ in stream.messages()]
        assert times == sorted(times)


async def test_a_status_can_be_read_in_the_trailers(connection: Any) -> None:
    refused = connection.send(b"refuse")
    await _ended(connection)
    assert refused.messages() == []
    assert "the queue is full" in refused.trailers


async def test_open_streams_fail_with_the_connection(connection: Any) -> None:
    stays = connection.send(b"stay")
    connection.close()
    await _ended(connection)
    assert "connection was lost" in stays.error
    with pytest.raises(ConnectionError):
        connection.send(b"more")


async def test_a_message_may_come_in_pieces() -> None:
    incoming = wire.Incoming()
    body = b"\0" + (5).to_bytes(4, "big") + b"hello"
    for when, piece in enumerate((body[:3], body[3:8], body[8:] + body)):
        incoming.times.append(float(when))
        incoming.payloads.append(piece)
    assert incoming.messages() == [(2.0, b"hello"), (2.0, b"hello")]
