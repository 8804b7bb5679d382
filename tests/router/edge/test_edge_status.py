"""Errors as statuses."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from twinpool import errors
from twinpool.router.edge.status import MAX_MESSAGE, presentable, to_proto


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
