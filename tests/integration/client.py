"""A client of one router for tests: requests that run in threads, answers with everything the caller saw."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from twinpool.proto.twinpool.v1 import admin_pb2, admin_pb2_grpc, inference_pb2_grpc
from twinpool.proto.twinpool.v1 import inference_pb2 as pb

WAIT_S = 300.0  # ends what hangs; a busy machine may take its time
Prompt = str | Sequence[int] | Sequence[tuple[str, str]]  # text, token ids, or (role, content) of each message


def until(true: Callable[[], bool], what: str, wait_s: float = WAIT_S) -> None:
    """Wait for ``true()``; fails with ``what`` when it does not come."""
    give_up = time.monotonic() + wait_s
    while not true():
        if time.monotonic() > give_up:
            raise AssertionError(f"waited {wait_s:g} s in vain for {what}")
        time.sleep(0.01)


@dataclass
class Answer:
    """What came back of one request. ``code`` is OK unless the call ended with an error status."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    seed: int = -1
    messages: int = 0  # of tokens
    finished: pb.Finished | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""  # google.rpc.ErrorInfo
    message: str = ""
    retry: bool = False  # google.rpc.RetryInfo was there

    @property
    def end(self) -> pb.Finished:
        """The last event of a good answer; fails with the status of a bad one."""
        assert self.finished is not None, f"{self.code.name} {self.reason}: {self.message} after {len(self.ids)} tokens"
        return self.finished

    @property
    def route(self) -> pb.Route:
        """How a good answer was made."""
        return self.end.route


class Running:
    """One call whose events a thread of its own reads."""

    def __init__(self, call: Any) -> None:
        self._answer = Answer()
        self._call = call
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return len(self._answer.ids)

    @property
    def over(self) -> bool:
        """Whether the call has ended."""
        return not self._thread.is_alive()

    def wait_tokens(self, count: int) -> Running:
        """Return once ``count`` tokens have come."""
        until(lambda: self.tokens >= count or self.over, f"{count} tokens")
        assert self.tokens >= count, self._answer
        return self

    def cancel(self) -> None:
        """The client goes."""
        self._call.cancel()

    def result(self, wait_s: float = WAIT_S) -> Answer:
        """The whole answer."""
        self._thread.join(wait_s)
        assert self.over, f"no end in {wait_s:g} s after {self.tokens} tokens"
        return self._answer

    def _read(self) -> None:
        try:
            for event in self._call:
                self._take(event)
        except grpc.RpcError as error:
            self._fail(error)

    def _take(self, event: pb.GenerateEvent) -> None:
        answer = self._answer
        assert answer.finished is None, "an event after the end"
        match event.WhichOneof("event"):
            case "accepted":
                answer.seed = event.accepted.seed
            case "tokens":
                tokens = event.tokens
                assert tokens.position == len(answer.ids), f"position {tokens.position} after {len(answer.ids)} tokens"
                answer.messages += 1
                answer.ids += tokens.token_ids
                answer.text += tokens.text
            case "finished":
                answer.finished = event.finished

    def _fail(self, error: Any) -> None:
        answer = self._answer
        answer.code, answer.message = error.code(), error.details() or ""
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                assert info.domain == "twinpool"
                answer.reason = info.reason
            answer.retry |= detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR)


def request(
    prompt: Prompt, *, stream: bool = True, sampling: dict[str, Any] | None = None, **fields: Any
) -> pb.GenerateRequest:
    """A request: ``sampling`` and ``fields`` are those of the messages. Greedy and without end token if not said."""
    chosen = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True} | (sampling or {})
    message = pb.GenerateRequest(sampling=pb.Sampling(**chosen), stream=stream, **fields)
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt and isinstance(prompt[0], tuple):
        pairs: Any = prompt
        message.messages.messages.extend(pb.Message(role=role, content=content) for role, content in pairs)
    else:
        ids: Any = prompt
        message.token_ids.ids.extend(ids)
    return message


class Client:
    """Stubs of one router. Close it."""

    def __init__(self, inference: str, admin: str) -> None:
        options = [("grpc.max_send_message_length", -1), ("grpc.initial_reconnect_backoff_ms", 100)]
        self.channel = grpc.insecure_channel(inference, options=[*options, ("grpc.max_reconnect_backoff_ms", 200)])
        self._admin_channel = grpc.insecure_channel(admin, options=[*options, ("grpc.max_reconnect_backoff_ms", 200)])
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self._admin_channel)

    def close(self) -> None:
        """Close the channels."""
        self.channel.close()
        self._admin_channel.close()

    def send(self, message: pb.GenerateRequest, timeout: float = WAIT_S, **call: Any) -> Running:
        """Start a request as it is."""
        return Running(self.inference.Generate(message, timeout=timeout, **call))

    def start(self, prompt: Prompt, *, timeout: float = WAIT_S, **fields: Any) -> Running:
        """Start a request; see ``request`` for ``fields``, ``max_tokens`` is short for sampling's."""
        if "max_tokens" in fields:
            fields["sampling"] = (fields.get("sampling") or {}) | {"max_tokens": fields.pop("max_tokens")}
        return self.send(request(prompt, **fields), timeout)

    def generate(self, prompt: Prompt, **fields: Any) -> Answer:
        """Run one request to its end."""
        return self.start(prompt, **fields).result()

    def status(self) -> admin_pb2.Status:
        """What Admin says."""
        status: admin_pb2.Status = self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=5.0)
        return status

    def worker(self, name: str) -> admin_pb2.WorkerStatus | None:
        """What Admin says of a connected worker."""
        return next((worker for worker in self.status().workers if worker.worker == name), None)

    def model(self) -> pb.Model:
        """What GetModel says."""
        model: pb.Model = self.inference.GetModel(pb.GetModelRequest(), timeout=WAIT_S)
        return model

    def busy(self) -> list[str]:
        """What keeps the cell from being idle; empty when it holds nothing for anybody."""
        status = self.status()
        return [f"{status.queued} queued, {status.active} active"] * (status.queued + status.active > 0) + list(
            _busy_workers(status)
        )

    def wait_idle(self, wait_s: float = WAIT_S) -> None:
        """Everything ended, every block free, none leaked."""
        try:
            until(lambda: not self.busy(), "an idle cell", wait_s)
        except AssertionError:
            raise AssertionError(f"the cell does not become idle: {self.busy()}") from None


def _busy_workers(status: admin_pb2.Status) -> Iterator[str]:
    for w in status.workers:
        held = w.blocks - w.free_blocks
        if held or w.running or w.waiting or w.leaked_blocks:
            yield f"{w.worker}: {held} blocks held, {w.running} run, {w.waiting} wait, {w.leaked_blocks} leaked"
