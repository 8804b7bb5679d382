"""Calls a cell over gRPC: :class:`Client` for threads, :class:`AsyncClient` for asyncio, one tree of errors for both.

::

    with Client("127.0.0.1:50051") as client:
        for event in client.generate(request("Tell me a story.", max_tokens=64)):
            if isinstance(event, Tokens):
                print(event.text, end="", flush=True)

Every failure is a :class:`~twinpool.errors.TwinpoolError` with the reason and the retry delay of the status. Leaving an
iterator early cancels the request. Positions are checked as they come: a stream that lost or repeated a token raises.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Self, TypeAlias, TypedDict, TypeVar, Unpack, cast

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from twinpool.errors import BY_CODE, Internal, TwinpoolError, Unavailable
from twinpool.proto.twinpool.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from twinpool.proto.twinpool.v1.inference_pb2 import Accepted, Finished, GenerateEvent, GenerateRequest, Model, Tokens

Event: TypeAlias = Accepted | Tokens | Finished
Answer = TypeVar("Answer")

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_MAX_TOKENS = 256
_DETAILS = "grpc-status-details-bin"
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


class ChatMessage(NamedTuple):
    """One message of a chat."""

    role: str  # system | user | assistant
    content: str


class SamplingOptions(TypedDict, total=False):
    """Fields of ``twinpool.v1.Sampling`` (see there); what is left out keeps the server's default."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    logprobs: int
    n: int
    keep_special_tokens: bool


def request(
    text: str | None = None,
    *,
    token_ids: Iterable[int] | None = None,
    messages: Iterable[ChatMessage] | None = None,
    stream: bool = True,
    model: str = "",
    cache_salt: str = "",
    **sampling: Unpack[SamplingOptions],
) -> GenerateRequest:
    """A request for one prompt: raw text, token ids, or a chat. Raises ValueError unless exactly one is given."""
    if sum(prompt is not None for prompt in (text, token_ids, messages)) != 1:
        raise ValueError("a request has one prompt: text, token_ids or messages")
    sampling.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    made = GenerateRequest(
        model=model, stream=stream, cache_salt=cache_salt, sampling=inference_pb2.Sampling(**sampling)
    )
    if token_ids is not None:
        made.token_ids.SetInParent()
        made.token_ids.ids.extend(token_ids)
    elif messages is not None:
        made.messages.SetInParent()
        made.messages.messages.extend(inference_pb2.Message(role=m.role, content=m.content) for m in messages)
    else:
        made.text = text or ""
    return made


class Client:
    """Blocking client of one cell; may be shared by threads. Close it, or use it in a ``with`` block."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tenant: str = "", klass: str = "") -> None:
        self._address = address
        self._metadata = _metadata(tenant, klass)
        self._channel = grpc.insecure_channel(address, _CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back; running calls end."""
        self._channel.close()

    def generate(self, request: GenerateRequest, *, timeout_s: float | None = None) -> Iterator[Event]:
        """Accepted, Tokens as they come, then one Finished a sequence. Raises TwinpoolError."""
        order = _Order(self._address, len(request.resume_tokens.ids))
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            for event in call:
                yield order.checked(event)
            order.end()
        except grpc.RpcError as error:
            raise to_error(error, self._address, started=order.started) from None
        finally:
            call.cancel()  # type: ignore[no-untyped-call]

    def cancel(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """Stop a running request. Raises NotFound."""
        try:
            self._stub.Cancel(
                inference_pb2.CancelRequest(request_id=request_id), timeout=timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise to_error(error, self._address) from None

    def model(self, *, timeout_s: float | None = 10.0) -> Model:
        """The model behind the cell. Raises TwinpoolError."""
        try:
            return self._stub.GetModel(inference_pb2.GetModelRequest(), timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error, self._address) from None


class AsyncClient:
    """The same for asyncio. Make it inside a running loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS, *, tenant: str = "", klass: str = "") -> None:
        self._address = address
        self._metadata = _metadata(tenant, klass)
        self._channel = grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection back; running calls end."""
        await self._channel.close(None)

    async def generate(self, request: GenerateRequest, *, timeout_s: float | None = None) -> AsyncIterator[Event]:
        """Accepted, Tokens as they come, then one Finished a sequence. Raises TwinpoolError."""
        order = _Order(self._address, len(request.resume_tokens.ids))
        call = self._stub.Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for event in call:
                yield order.checked(event)
            order.end()
        except grpc.RpcError as error:
            raise to_error(error, self._address, started=order.started) from None
        finally:
            call.cancel()

    async def cancel(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """Stop a running request. Raises NotFound."""
        message = inference_pb2.CancelRequest(request_id=request_id)
        try:
            await self._stub.Cancel(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error, self._address) from None

    async def model(self, *, timeout_s: float | None = 10.0) -> Model:
        """The model behind the cell. Raises TwinpoolError."""
        message = inference_pb2.GetModelRequest()
        try:
            return await self._stub.GetModel(message, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise to_error(error, self._address) from None


class AsyncAdminClient:
    """Operator's client of a router. Make it inside a running loop."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, _CHANNEL_OPTIONS)
        self._stub = admin_pb2_grpc.AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close(None)

    async def status(self, *, timeout_s: float | None = 10.0) -> admin_pb2.Status:
        """Workers, queue and counters. Raises TwinpoolError."""
        return await self._said(self._stub.GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s))

    async def drain(self, worker: str, *, timeout_s: float | None = 10.0) -> None:
        """Nothing new for that worker; it leaves when it has nothing left. Raises TwinpoolError."""
        await self._said(self._stub.DrainWorker(admin_pb2.DrainWorkerRequest(worker=worker), timeout=timeout_s))

    async def set_role(self, worker: str, roles: list[str], *, timeout_s: float | None = 10.0) -> None:
        """Put that worker into these pools. Raises TwinpoolError."""
        await self._said(self._stub.SetRole(admin_pb2.SetRoleRequest(worker=worker, roles=roles), timeout=timeout_s))

    async def _said(self, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.RpcError as error:
            raise to_error(error, self._address) from None


def to_error(error: grpc.RpcError, address: str, *, started: bool = False) -> TwinpoolError:
    """The error of our tree that a status stands for; ``started`` when an event of the call had come."""
    code, details = error.code(), error.details() or ""
    reason, retry_s = _read_details(error)
    kind = BY_CODE.get(code.name)
    if kind is Unavailable and reason is None:
        if started:
            return Unavailable(f"the connection to {address} was lost: {details}", reason="CONNECTION_LOST")
        return Unavailable(f"cannot connect to {address}: is `twinpool up` running? ({details})", reason="UNREACHABLE")
    if kind is None:
        return Internal(f"{code.name}: {details}", reason=reason or code.name)
    return kind(details, reason=reason, retry_s=retry_s)


class _Order:
    """Holds a stream against its promise: tokens of a sequence follow each other, and all sequences finish."""

    def __init__(self, address: str, first: int) -> None:
        self._address = address
        self._first = first  # position of the first token: not 0 for a resumed request
        self._next: dict[int, int] = {}  # sequence -> position of its next token; absent before the first
        self._finished: set[int] = set()
        self.started = False

    def checked(self, event: GenerateEvent) -> Event:
        self.started = True
        kind = event.WhichOneof("event")
        if kind == "tokens":
            self._check(event.tokens)
            return event.tokens
        if kind == "finished":
            self._finished.add(event.finished.index)
            return event.finished
        if kind == "accepted":
            return event.accepted
        raise Internal(f"{self._address} sent an event this client does not know", reason="UNKNOWN_EVENT")

    def _check(self, tokens: Tokens) -> None:
        expected = self._next.get(tokens.index, self._first)
        if tokens.position != expected:
            raise Internal(
                f"sequence {tokens.index}: position {tokens.position} came where {expected} was due", reason="ORDER"
            )
        self._next[tokens.index] = expected + len(tokens.token_ids)

    def end(self) -> None:
        missing = sorted(self._next.keys() - self._finished)
        if missing or not self._finished:
            raise Internal(f"{self._address} ended the stream before it was finished", reason="TRUNCATED")


def _metadata(tenant: str, klass: str) -> tuple[tuple[str, str], ...]:
    pairs = (("x-twinpool-tenant", tenant), ("x-twinpool-class", klass))
    return tuple(pair for pair in pairs if pair[1])


class _Details(NamedTuple):
    reason: str | None
    retry_s: float | None


def _read_details(error: grpc.RpcError) -> _Details:
    """Reason and retry delay of the ``google.rpc.Status`` in the trailers; None where it has none."""
    reason, retry_s = None, None
    trailers = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in trailers:
        if key != _DETAILS:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                reason = info.reason
            elif detail.Unpack(retry):
                retry_s = retry.retry_delay.ToTimedelta().total_seconds()
    return _Details(reason, retry_s)
