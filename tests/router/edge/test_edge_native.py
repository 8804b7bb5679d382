"""``twinpool.v1.Inference`` over real gRPC, with a fake cell behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from twinpool.errors import Internal, Overloaded
from twinpool.proto.twinpool.v1 import inference_pb2 as pb

GENERATE = "/twinpool.v1.Inference/Generate"


def ask(**changes: Any) -> pb.GenerateRequest:
    """A small good request; ``changes`` are fields of it, or of ``sampling`` where they are not."""
    sampling: dict[str, Any] = {"max_tokens": 4, "seed": 0}
    own = {key: value for key, value in changes.items() if key in pb.GenerateRequest.DESCRIPTOR.fields_by_name}
    sampling |= {key: value for key, value in changes.items() if key not in own}
    if not own.keys() & {"text", "token_ids", "messages"}:
        own["token_ids"] = pb.TokenIds(ids=[5, 6, 7])
    own.setdefault("stream", True)
    return pb.GenerateRequest(sampling=pb.Sampling(**sampling), **own)


async def events(call: Any) -> list[Any]:
    return [event async for event in call]


async def test_one_stream_from_accepted_to_finished(edge: Any, cell: Any) -> None:
    call = edge.inference.Generate(ask(request_id="a", seed=3), metadata=(("x-twinpool-class", "batch"),))
    first, *middle, last = await events(call)
    assert first.accepted == pb.Accepted(request_id="a", seed=3, model="tiny", model_version="f" * 64)
    assert [event.tokens.position for event in middle] == [0, 1, 2, 3]
    assert [token for event in middle for token in event.tokens.token_ids] == [1003, 1004, 1005, 1006]
    assert last.finished.reason == pb.FINISH_REASON_LENGTH
    assert last.finished.usage == pb.Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=16)
    assert (last.finished.route.path, last.finished.route.kv_bytes) == ("split", 4096)
    assert last.finished.timing.prefill_ms == pytest.approx(20)
    trailers = dict(await call.trailing_metadata())
    assert trailers["x-twinpool-route"] == "prefill=p1 decode=d1 path=split"
    assert trailers["x-twinpool-cached-tokens"] == "16"
    assert trailers["x-twinpool-attempts"] == "1"
    assert "ttft=25.000" in trailers["x-twinpool-timing"]
    submission = cell.streams[0].submission
    assert list(submission.prompt) == [5, 6, 7]
    assert (submission.klass, submission.slo.itl_s, submission.max_queue_s) == ("batch", 5.0, 3600.0)
    assert submission.deadline_s is None


async def test_an_answer_in_one_piece(edge: Any) -> None:
    _, tokens, finished = await events(edge.inference.Generate(ask(stream=False, logprobs=2)))
    assert list(tokens.tokens.token_ids) == [1000, 1001, 1002, 1003]
    assert tokens.tokens.text == "<1000><1001><1002><1003>"
    assert [len(logprob.top) for logprob in tokens.tokens.logprobs] == [2, 2, 2, 2]
    assert finished.HasField("finished")


async def test_metadata_deadline_slo_and_salt_reach_the_cell(edge: Any, cell: Any) -> None:
    trace = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
    metadata = (
        *(("x-request-id", "mine"), ("traceparent", trace)),
        *(("x-twinpool-tenant", "t"), ("x-twinpool-session", "s"), ("x-twinpool-returns", "yes")),
    )
    request = ask(slo=pb.Slo(ttft_ms=10, ttft_factor=0), cache_salt="pepper", max_queue_ms=1500)
    first, *_ = await events(edge.inference.Generate(request, metadata=metadata, timeout=30))
    submission = cell.streams[0].submission
    assert first.accepted.request_id == submission.request_id == "mine"
    assert (submission.trace, submission.tenant, submission.session, submission.returns) == (trace, "t", "s", True)
    assert (submission.slo.ttft_s, submission.slo.ttft_factor, submission.slo.itl_s) == (0.01, 0.0, 0.25)
    assert (submission.salt, submission.max_queue_s) == ("t\x00pepper", 1.5)
    assert 0 < submission.deadline_s < 31  # on the wire it is rounded up


async def test_a_seed_is_drawn_and_told(edge: Any, cell: Any) -> None:
    request = ask()
    request.sampling.ClearField("seed")
    first, *_ = await events(edge.inference.Generate(request))
    assert first.accepted.seed == cell.streams[0].submission.sampling.seed
    assert len(first.accepted.request_id) == 32


async def test_text_and_messages_are_tokenised(edge: Any, cell: Any, tokenizer: Any) -> None:
    long_text = "word " * 200  # beyond the context after all, but short enough to be read
    await events(edge.inference.Generate(ask(text="Hello, Grüße 漢字")))
    message = pb.Message(role="user", content="Hi")
    await events(edge.inference.Generate(ask(messages=pb.Messages(messages=[message]))))
    assert [list(stream.submission.prompt) for stream in cell.streams] == [
        tokenizer.encode("Hello, Grüße 漢字"),
        tokenizer.chat([{"role": "user", "content": "Hi"}]),
    ]
    assert len(tokenizer.encode(long_text)) < 256
    await events(edge.inference.Generate(ask(text=long_text)))


async def test_n_sequences_share_one_answer(edge: Any, cell: Any) -> None:
    got = await events(edge.inference.Generate(ask(request_id="many", n=3, seed=5)))
    assert [stream.submission.request_id for stream in cell.streams] == ["many#0", "many#1", "many#2"]
    assert cell.streams[0].submission.sampling.seed == 5
    assert len({stream.submission.sampling.seed for stream in cell.streams}) == 3
    for index, stream in enumerate(cell.streams):
        mine = [event.tokens for event in got if event.HasField("tokens") and event.tokens.index == index]
        assert [token for tokens in mine for token in tokens.token_ids] == cell.script(stream.submission)
        assert [tokens.position for tokens in mine] == [0, 1, 2, 3]
    assert sorted(event.finished.index for event in got if event.HasField("finished")) == [0, 1, 2]


async def test_the_other_sequences_wait_for_the_first_token(edge: Any, cell: Any, eventually: Any) -> None:
    cell.hold = 0
    call = edge.inference.Generate(ask(n=2))
    assert (await call.read()).HasField("accepted")
    await asyncio.sleep(0.02)
    assert len(cell.streams) == 1
    cell.hold = -1
    cell.streams[0].wake.set()
    await eventually(lambda: len(cell.streams) == 2)
    call.cancel()


async def test_one_failing_sequence_fails_the_call(edge: Any, cell: Any, refused: Any, eventually: Any) -> None:
    cell.hold = 2
    call = edge.inference.Generate(ask(n=3))
    await eventually(lambda: len(cell.streams) == 3)
    cell.streams[1].fail(Overloaded("no room", retry_s=2.5))
    refusal = await refused(call)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
    assert refusal.retry.retry_delay.ToMilliseconds() == 2500
    assert refusal.info.domain == "twinpool"
    assert all(stream.cancelled for stream in cell.streams)


async def test_a_client_that_goes_frees_everything(edge: Any, cell: Any, eventually: Any) -> None:
    cell.hold = 2
    call = edge.inference.Generate(ask(n=2))
    await eventually(lambda: len(cell.streams) == 2)
    call.cancel()
    await eventually(lambda: all(stream.cancelled for stream in cell.streams))
    await eventually(lambda: cell.running == {})


async def test_a_slow_reader_holds_back_its_own_stream(edge: Any, cell: Any, eventually: Any) -> None:
    cell.padding = "x" * 100_000
    slow = edge.inference.Generate(ask(max_tokens=200))
    await slow.read()
    await eventually(lambda: cell.streams[0].written > 0)
    cell.padding = ""
    assert len(await events(edge.inference.Generate(ask()))) == 6
    cell.padding = "x" * 100_000
    await asyncio.sleep(0.1)
    assert cell.streams[0].written < 200
    slow.cancel()
    await eventually(lambda: cell.streams[0].cancelled)


async def test_the_deadline_ends_the_stream(edge: Any, cell: Any, refused: Any, eventually: Any) -> None:
    cell.hold = 1
    refusal = await refused(edge.inference.Generate(ask(), timeout=0.1))
    assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await eventually(lambda: cell.streams[0].cancelled)
    labels = {"class": "realtime", "path": "", "outcome": "deadline_exceeded"}
    assert edge.metrics.registry.get_sample_value("twinpool_requests_total", labels) == 1


async def test_a_deadline_that_has_passed(edge: Any, cell: Any, refused: Any) -> None:
    refusal = await refused(edge.inference.Generate(ask(), timeout=-1))
    assert refusal.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert cell.streams == []


async def test_the_same_id_twice(edge: Any, cell: Any, refused: Any) -> None:
    cell.hold = 1
    first = edge.inference.Generate(ask(request_id="one", n=2))
    await first.read()
    refusal = await refused(edge.inference.Generate(ask(request_id="one")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    first.cancel()


async def test_resume_goes_on_after_the_tokens_at_hand(edge: Any, cell: Any) -> None:
    _, tokens, *rest = await events(edge.inference.Generate(ask(resume_tokens=pb.TokenIds(ids=[1000, 1001]))))
    assert (tokens.tokens.position, list(tokens.tokens.token_ids)) == (2, [1002])
    assert rest[-1].finished.usage.completion_tokens == 4


async def test_resume_is_for_the_same_tenant(edge: Any, cell: Any, refused: Any) -> None:
    cell.hold = 3
    first = edge.inference.Generate(ask(request_id="one"), metadata=(("x-twinpool-tenant", "a"),))
    await first.read()
    again = ask(request_id="one", resume_tokens=pb.TokenIds(ids=[1000]))
    refusal = await refused(edge.inference.Generate(again, metadata=(("x-twinpool-tenant", "b"),)))
    assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
    assert not cell.streams[0].cancelled
    first.cancel()


async def test_cancel_by_id_and_tenant(edge: Any, cell: Any, refused: Any, eventually: Any) -> None:
    cell.hold = 1
    call = edge.inference.Generate(ask(request_id="one"), metadata=(("x-twinpool-tenant", "a"),))
    await eventually(lambda: "one" in cell.running)
    other = await refused(edge.inference.Cancel(pb.CancelRequest(request_id="one")))
    assert (other.code, other.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_REQUEST")
    await edge.inference.Cancel(pb.CancelRequest(request_id="one"), metadata=(("x-twinpool-tenant", "a"),))
    assert (await refused(call)).code == grpc.StatusCode.CANCELLED


async def test_held_back_text_comes_before_the_end(edge: Any, cell: Any) -> None:
    cell.finished = cell.finished.__class__(
        **{**{name: getattr(cell.finished, name) for name in cell.finished.__slots__}, "text": "tail", "stop": "END"}
    )
    *_, tail, last = await events(edge.inference.Generate(ask()))
    assert (tail.tokens.text, tail.tokens.position, list(tail.tokens.token_ids)) == ("tail", 4, [])
    assert last.finished.stop_string == "END"


async def test_get_model(edge: Any) -> None:
    model = await edge.inference.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_context, model.vocab_size, list(model.eos_token_ids)) == ("tiny", 256, 49152, [2])


async def test_no_worker_yet(edge: Any, cell: Any, refused: Any) -> None:
    model, cell.model = cell.model, None
    refusal = await refused(edge.inference.Generate(ask()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER")
    assert refusal.retry.retry_delay.ToMilliseconds() == 1000
    call = edge.inference.Generate(ask())
    await asyncio.sleep(0.01)
    cell.model = model
    assert len(await events(call)) == 6


BAD = [
    ({"text": ""}, "EMPTY_PROMPT", "at least one token"),
    ({"token_ids": pb.TokenIds()}, "EMPTY_PROMPT", "at least one token"),
    ({"messages": pb.Messages()}, "EMPTY_PROMPT", "at least one token"),
    ({"token_ids": pb.TokenIds(ids=[1, 49152])}, "TOKEN_OUT_OF_RANGE", "token 1 of the prompt is 49152"),
    ({"token_ids": pb.TokenIds(ids=[1] * 256)}, "PROMPT_TOO_LONG", "256 tokens"),
    ({"text": "a" * (64 * 256 + 1)}, "PROMPT_TOO_LONG", "16385 characters"),
    ({"token_ids": pb.TokenIds(ids=[1] * 250), "max_tokens": 7}, "CONTEXT_EXCEEDED", "6 are left"),
    ({"max_tokens": 0}, "BAD_MAX_TOKENS", "at least 1"),
    ({"temperature": -0.1}, "BAD_TEMPERATURE", "at least 0"),
    ({"temperature": float("nan")}, "BAD_TEMPERATURE", "got nan"),
    ({"temperature": float("inf")}, "BAD_TEMPERATURE", "at most 100"),
    ({"top_p": 0.0}, "BAD_TOP_P", "above 0"),
    ({"top_p": 1.1}, "BAD_TOP_P", "at most 1"),
    ({"min_p": float("nan")}, "BAD_MIN_P", "got nan"),
    ({"repetition_penalty": 0.0}, "BAD_REPETITION_PENALTY", "above 0"),
    ({"presence_penalty": float("-inf")}, "BAD_PRESENCE_PENALTY", "at least -10"),
    ({"frequency_penalty": 11}, "BAD_FREQUENCY_PENALTY", "at most 10"),
    ({"logit_bias": {1: float("nan")}}, "BAD_LOGIT_BIAS", "finite"),
    ({"logit_bias": {49152: 1.0}}, "BAD_LOGIT_BIAS", "49152"),
    ({"stop_token_ids": [49152]}, "BAD_STOP_TOKEN_IDS", "49152"),
    ({"stop_token_ids": range(257)}, "BAD_STOP_TOKEN_IDS", "256"),
    ({"stop": ["x", ""]}, "BAD_STOP", "empty"),
    ({"stop": ["x"] * 17}, "BAD_STOP", "16"),
    ({"stop": ["x" * 1025]}, "BAD_STOP", "1024"),
    ({"logprobs": 21}, "BAD_LOGPROBS", "at most 20"),
    ({"seed": 2**63}, "BAD_SEED", "at most"),
    ({"n": 17}, "BAD_N", "at most 16"),
    ({"min_tokens": 5}, "BAD_MIN_TOKENS", "exceed"),
    ({"request_id": "x" * 129}, "BAD_REQUEST_ID", "128"),
    ({"request_id": "a b"}, "BAD_REQUEST_ID", "printable"),
    ({"cache_salt": "x" * 257}, "BAD_CACHE_SALT", "256"),
    ({"slo": pb.Slo(itl_ms=float("nan"))}, "BAD_ITL_MS", "positive"),
    ({"slo": pb.Slo(ttft_factor=-1)}, "BAD_TTFT_FACTOR", "positive"),
    ({"resume_tokens": pb.TokenIds(ids=[1]), "n": 2}, "BAD_RESUME_TOKENS", "one sequence"),
    ({"resume_tokens": pb.TokenIds(ids=[1] * 4)}, "BAD_RESUME_TOKENS", "nothing is left"),
    ({"resume_tokens": pb.TokenIds(ids=[49152])}, "TOKEN_OUT_OF_RANGE", "resume_tokens"),
]


@pytest.mark.parametrize(("changes", "reason", "words"), BAD, ids=[f"{i}-{row[1]}" for i, row in enumerate(BAD)])
async def test_bad_input(edge: Any, cell: Any, refused: Any, changes: dict[str, Any], reason: str, words: str) -> None:
    refusal = await refused(edge.inference.Generate(ask(**changes)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert words in refusal.message
    assert cell.streams == []
    assert len(await events(edge.inference.Generate(ask()))) == 6  # the next one is served


async def test_no_prompt(edge: Any, refused: Any) -> None:
    refusal = await refused(edge.inference.Generate(pb.GenerateRequest()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "NO_PROMPT")


async def test_unknown_model(edge: Any, refused: Any) -> None:
    refusal = await refused(edge.inference.Generate(ask(model="gpt")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_MODEL")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("x-twinpool-class", "vip", "BAD_CLASS"),
        ("x-twinpool-tenant", "t" * 129, "BAD_TENANT"),
        ("x-request-id", "r" * 129, "BAD_REQUEST_ID"),
    ],
)
async def test_bad_metadata(edge: Any, refused: Any, key: str, value: str, reason: str) -> None:
    refusal = await refused(edge.inference.Generate(ask(), metadata=((key, value),)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


@pytest.mark.parametrize(
    "raw",
    [b"\xff\xff\xff", b"\x1a\x02\xc3\x28", b"\x1a\x03\xed\xa0\x80"],
    ids=["no message", "invalid UTF-8", "lone surrogate"],
)
async def test_bytes_that_do_not_parse(edge: Any, refused: Any, raw: bytes) -> None:
    refusal = await refused(edge.channel.unary_stream(GENERATE)(raw))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNPARSABLE")
    assert "Exception" not in refusal.message
    health = edge.channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff")
    assert (await refused(health)).reason == "UNPARSABLE"


async def test_a_message_above_the_limit(edge: Any, refused: Any) -> None:
    refusal = await refused(edge.inference.Generate(ask(text="a" * (2 << 20))))
    assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(await events(edge.inference.Generate(ask()))) == 6


async def test_an_unexpected_exception_is_not_shown(edge: Any, cell: Any, refused: Any, caplog: Any) -> None:
    cell.refusal = RuntimeError("/secret/path")
    refusal = await refused(edge.inference.Generate(ask()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in refusal.message
    incident = refusal.message.split("id ")[1].rstrip(")")
    assert any(incident in record.message and record.exc_info for record in caplog.records)


async def test_an_error_in_mid_stream(edge: Any, cell: Any, refused: Any, eventually: Any) -> None:
    cell.hold = 2
    call = edge.inference.Generate(ask())
    await eventually(lambda: len(cell.streams) == 1)
    cell.streams[0].fail(Internal("ours"))
    assert (await refused(call)).code == grpc.StatusCode.INTERNAL
    assert cell.running == {}
