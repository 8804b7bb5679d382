"""Every failure a user can meet, as one tree. ``code`` is the gRPC status name, ``reason`` the machine-readable word.

    TwinpoolError
    |-- InvalidRequest      INVALID_ARGUMENT    the request can never succeed as it is
    |-- NotFound            NOT_FOUND           unknown model, unknown request
    |-- AlreadyExists       ALREADY_EXISTS      the request id is running
    |-- Unauthenticated     UNAUTHENTICATED     no key, or a wrong one
    |-- Overloaded          RESOURCE_EXHAUSTED  shed: come back after ``retry_s``
    |-- Unavailable         UNAVAILABLE         no worker, or draining: try elsewhere or later
    |-- DeadlineExceeded    DEADLINE_EXCEEDED   the caller's time ran out
    |-- Cancelled           CANCELLED           by the client, or by a newer stream of the same id
    |-- Internal            INTERNAL            ours: do not repeat
    |-- EngineError         INTERNAL            a step could not be computed
    |-- TransferError       INTERNAL            KV did not arrive, or did not verify
    `-- ConfigError         INVALID_ARGUMENT    the YAML, a flag or a model file; never leaves the process as a status

A message says what happened and what to do, and names no path, host or handle that the caller does not know already
(a ``ConfigError`` is printed to the operator, so it does).
"""

from __future__ import annotations


class TwinpoolError(Exception):
    """Base of the tree; ``retry_s`` is None where repeating the call cannot help."""

    code = "INTERNAL"
    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_s = retry_s


class InvalidRequest(TwinpoolError):
    """The request can never succeed as it is."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_REQUEST"


class NotFound(TwinpoolError):
    """Something the request names does not exist."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(TwinpoolError):
    """The request id is in use by a running request."""

    code = "ALREADY_EXISTS"
    default_reason = "REQUEST_ID_IN_USE"


class Unauthenticated(TwinpoolError):
    """No key, or a wrong one."""

    code = "UNAUTHENTICATED"
    default_reason = "BAD_KEY"


class Overloaded(TwinpoolError):
    """The cell sheds load; ``retry_s`` says when to come back."""

    code = "RESOURCE_EXHAUSTED"
    default_reason = "OVERLOADED"


class Unavailable(TwinpoolError):
    """No worker can take the request now; another cell may."""

    code = "UNAVAILABLE"
    default_reason = "NO_WORKER"


class DeadlineExceeded(TwinpoolError):
    """The caller's deadline passed."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE"


class Cancelled(TwinpoolError):
    """The request was cancelled."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class Internal(TwinpoolError):
    """A fault of ours; repeating the request would meet it again."""


class EngineError(Internal):
    """A step could not be computed."""

    default_reason = "ENGINE"


class TransferError(Internal):
    """KV blocks did not arrive or did not verify."""

    default_reason = "TRANSFER"


class ConfigError(TwinpoolError):
    """The YAML, a flag or a model file is wrong; the message is for the operator."""

    code = "INVALID_ARGUMENT"
    default_reason = "CONFIG"


_KINDS = (
    InvalidRequest,
    NotFound,
    AlreadyExists,
    Unauthenticated,
    Overloaded,
    Unavailable,
    DeadlineExceeded,
    Cancelled,
)

BY_CODE: dict[str, type[TwinpoolError]] = {kind.code: kind for kind in (*_KINDS, Internal)}
