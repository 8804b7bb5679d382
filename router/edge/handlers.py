"""Registers services so that every request is parsed, and every exception answered, by us.

``grpc.aio`` left alone answers bytes that do not parse with UNKNOWN and the text of a Python exception. So the handlers
of the generated code are taken apart: they are registered without a deserialiser, parse in the call, and map errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from twinpool.errors import InvalidRequest, TwinpoolError
from twinpool.router.edge.status import Context, abort

Handler = Any  # grpc.RpcMethodHandler: its stub has no fields
Behaviour = Callable[[bytes, Context], Any]


class _Unimplemented(TwinpoolError):
    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class _Collector:
    """Stands in for a server and keeps the handlers by name."""

    def __init__(self) -> None:
        self.services: dict[str, dict[str, Handler]] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """The same handlers once more; the other call brings them by name."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: dict[str, Handler]) -> None:
        self.services[service_name] = method_handlers


def register(server: Any, add: Callable[[Any, Any], None], servicer: object) -> None:
    """Add ``servicer``, whose methods take one request each, to ``server``; ``add`` is the generated function for it.

    ``server`` is a ``grpc.aio.Server``, whose stubs lack a method used here.
    """
    collector = _Collector()
    add(servicer, collector)
    for name, handlers in collector.services.items():
        raw = {method: _raw(handler) for method, handler in handlers.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, raw),))
        server.add_registered_method_handlers(name, raw)


def _raw(handler: Handler) -> Handler:
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(_streaming(handler), None, handler.response_serializer)
    return grpc.unary_unary_rpc_method_handler(_unary(handler), None, handler.response_serializer)


def _parse(handler: Handler, raw: bytes) -> Any:
    try:
        return handler.request_deserializer(raw)
    except DecodeError as error:
        raise InvalidRequest(
            "the bytes of the request are not a message of this method, or a string in it is not UTF-8",
            reason="UNPARSABLE",
        ) from error


def _unary(handler: Handler) -> Behaviour:
    async def call(raw: bytes, context: Context) -> Any:
        try:
            return await handler.unary_unary(_parse(handler, raw), context)
        except Exception as error:
            await abort(context, _presented(error))

    return call


def _streaming(handler: Handler) -> Behaviour:
    async def call(raw: bytes, context: Context) -> None:
        try:
            answers = handler.unary_stream(_parse(handler, raw), context)
            if not inspect.isasyncgen(answers):
                await answers  # it writes by itself
                return
            async with aclosing(answers):  # so that its finally runs here, also when the client goes in mid-write
                async for answer in answers:
                    await context.write(answer)
        except Exception as error:
            await abort(context, _presented(error))

    return call


def _presented(error: Exception) -> Exception:
    if isinstance(error, NotImplementedError):  # what generated servicers raise
        return _Unimplemented("this method is not offered here")
    return error
