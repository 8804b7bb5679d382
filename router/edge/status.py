"""Errors -> gRPC statuses. The one place where a status leaves the router: with ``google.rpc.ErrorInfo`` (reason,
domain ``twinpool``) and, where repeating can help, ``google.rpc.RetryInfo``; never with a Python exception, a path or a
host.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any, NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from twinpool.errors import ConfigError, Internal, TwinpoolError

DOMAIN = "twinpool"
MAX_MESSAGE = 400  # characters; a status travels in trailers (percent-encoded, and once more), bounded at 8 KiB

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_log = logging.getLogger(__name__)


def _packed(detail: Message) -> AnyMessage:
    box = AnyMessage()
    box.Pack(detail)
    return box


def to_proto(error: TwinpoolError) -> Any:
    """The ``google.rpc.Status`` of an error."""
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN))]
    if error.retry_s is not None:
        delay = Duration()
        delay.FromMicroseconds(round(error.retry_s * 1e6))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    code: int = grpc.StatusCode[error.code].value[0]
    return status_pb2.Status(code=code, message=error.message[:MAX_MESSAGE], details=details)


def presentable(error: Exception) -> TwinpoolError:
    """``error`` itself, or, where it is none that a client may see, an ``Internal`` that names a line of the log."""
    if isinstance(error, TwinpoolError) and not isinstance(error, ConfigError):
        return error
    incident = secrets.token_hex(4)
    _log.error("internal error %s", incident, exc_info=error)
    return Internal(f"internal error, see the router's log (id {incident})")


async def abort(context: Context, error: Exception) -> NoReturn:
    """End the call with the status of ``error``. Always raises, as ``ServicerContext.abort`` does; ``CancelledError``
    where the call has ended by itself."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = rpc_status.to_status(to_proto(presentable(error)))
    try:
        await context.abort(status.code, status.details or "", status.trailing_metadata or ())
    except grpc.aio.InternalError:  # the call ended a moment ago (its own deadline): nobody is left to tell
        raise asyncio.CancelledError from None
    raise AssertionError("abort returned")
