"""Every request that can not be served: its status, its reason, a sentence; and the next one is served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from tests.integration.client import Answer, Running, request
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import VOCAB, assert_whole, new_prompt

from twinpool.proto.twinpool.v1 import inference_pb2 as pb

CONTEXT = 131_072  # of the emulated model
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def _sampled(**sampling: Any) -> pb.GenerateRequest:
    return request([7, 8, 9], sampling=sampling)


CASES: dict[str, tuple[Callable[[], pb.GenerateRequest], grpc.StatusCode, str]] = {
    "no prompt": (lambda: pb.GenerateRequest(sampling=pb.Sampling(max_tokens=1)), INVALID, "NO_PROMPT"),
    "empty text": (lambda: request(""), INVALID, "EMPTY_PROMPT"),
    "no ids": (lambda: _no_ids(), INVALID, "EMPTY_PROMPT"),
    "no messages": (lambda: _no_messages(), INVALID, "EMPTY_PROMPT"),
    "token out of range": (lambda: request([1, VOCAB, 2]), INVALID, "TOKEN_OUT_OF_RANGE"),
    "prompt longer than the context": (lambda: request([5] * CONTEXT), INVALID, "PROMPT_TOO_LONG"),
    "text longer than the context": (lambda: request("a" * 9_000_000), INVALID, "PROMPT_TOO_LONG"),
    "max_tokens beyond the context": (lambda: _sampled(max_tokens=CONTEXT), INVALID, "CONTEXT_EXCEEDED"),
    "max_tokens 0": (lambda: _sampled(max_tokens=0), INVALID, "BAD_MAX_TOKENS"),
    "negative temperature": (lambda: _sampled(temperature=-0.1), INVALID, "BAD_TEMPERATURE"),
    "NaN temperature": (lambda: _sampled(temperature=math.nan), INVALID, "BAD_TEMPERATURE"),
    "infinite temperature": (lambda: _sampled(temperature=math.inf), INVALID, "BAD_TEMPERATURE"),
    "top_p 0": (lambda: _sampled(top_p=0.0), INVALID, "BAD_TOP_P"),
    "min_p 2": (lambda: _sampled(min_p=2.0), INVALID, "BAD_MIN_P"),
    "NaN bias": (lambda: _sampled(logit_bias={5: math.nan}), INVALID, "BAD_LOGIT_BIAS"),
    "bias of no token": (lambda: _sampled(logit_bias={VOCAB: 1.0}), INVALID, "BAD_LOGIT_BIAS"),
    "min_tokens above max_tokens": (lambda: _sampled(min_tokens=9, max_tokens=8), INVALID, "BAD_MIN_TOKENS"),
    "empty stop string": (lambda: _sampled(stop=[""]), INVALID, "BAD_STOP"),
    "too many sequences": (lambda: _sampled(n=1_000), INVALID, "BAD_N"),
    "more resumed than wanted": (
        lambda: request([7], resume_tokens=pb.TokenIds(ids=[1] * 8)), INVALID, "BAD_RESUME_TOKENS",
    ),
    "unknown model": (lambda: request([7], model="gpt-99"), grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL"),
    "more KV than any worker has": (lambda: request([7] * 70_000), INVALID, "KV_TOO_SMALL"),
}  # fmt: skip


def _no_ids() -> pb.GenerateRequest:
    message = pb.GenerateRequest(sampling=pb.Sampling(max_tokens=1))
    message.token_ids.SetInParent()
    return message


def _no_messages() -> pb.GenerateRequest:
    message = pb.GenerateRequest(sampling=pb.Sampling(max_tokens=1))
    message.messages.SetInParent()
    return message


def _refused(cluster: Cluster, running: Running) -> Answer:
    """The answer of a refused request; after it the next is served and nothing is held."""
    answer = running.result()
    assert answer.finished is None
    assert answer.ids == []
    assert "Traceback" not in answer.message
    assert "Error" not in answer.message
    prompt = new_prompt(20)
    assert_whole(cluster.client.generate(prompt, max_tokens=3), prompt, 3)
    cluster.client.wait_idle()
    return answer


@pytest.mark.parametrize("case", CASES)
def test_refused(timed: Cluster, case: str) -> None:
    make, code, reason = CASES[case]
    answer = _refused(timed, timed.client.send(make()))
    assert (answer.code, answer.reason) == (code, reason), answer
    assert len(answer.message) > 20


def _raw(cluster: Cluster, data: bytes, timeout: float = 20.0) -> Running:
    """Bytes as they are to Generate."""
    call = cluster.client.channel.unary_stream(
        "/twinpool.v1.Inference/Generate",
        request_serializer=bytes,
        response_deserializer=pb.GenerateEvent.FromString,
    )
    return Running(call(data, timeout=timeout))


INVALID_UTF8 = b"\x1a\x03\xff\xfe\xfd"  # field 3 (text), 3 bytes


@pytest.mark.parametrize("data", [INVALID_UTF8, b"\xff" * 40, b"\x1a\x7fshort"], ids=["utf-8", "garbage", "cut"])
def test_bytes_that_do_not_parse(timed: Cluster, data: bytes) -> None:
    answer = _refused(timed, _raw(timed, data))
    assert (answer.code, answer.reason) == (INVALID, "UNPARSABLE"), answer


def test_message_of_100_mb(timed: Cluster) -> None:
    answer = _refused(timed, _raw(timed, bytes(100_000_000)))
    assert answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED, answer


@pytest.mark.parametrize("timeout", [0.0, 1e-6])
def test_deadline_already_passed(timed: Cluster, timeout: float) -> None:
    answer = _refused(timed, timed.client.start(new_prompt(2_000), timeout=timeout))
    assert answer.code == grpc.StatusCode.DEADLINE_EXCEEDED, answer


def test_request_id_in_use(timed: Cluster) -> None:
    first = timed.client.start(new_prompt(50), max_tokens=50, request_id="mine").wait_tokens(1)
    answer = timed.client.generate(new_prompt(50), request_id="mine")
    assert (answer.code, answer.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE"), answer
    assert first.result().end.usage.completion_tokens == 50


def test_cancel_of_an_unknown_request(timed: Cluster) -> None:
    with pytest.raises(grpc.RpcError) as error:
        timed.client.inference.Cancel(pb.CancelRequest(request_id="nobody"), timeout=5.0)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A router without any worker."""
    cluster = Cluster(
        tmp_path_factory.mktemp("empty"), EMULATED | {"scheduling.no_worker_wait_ms": 300}, decode=0, prefill=0
    )
    cluster.start_router()
    yield cluster
    cluster.close()


def test_no_worker_has_ever_come(empty: Cluster) -> None:
    answer = empty.client.send(request([1, 2]), wait_for_ready=True).result()
    assert (answer.code, answer.reason, answer.retry) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", True), answer
