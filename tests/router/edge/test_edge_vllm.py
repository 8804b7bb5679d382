"""``VllmEngine`` over real gRPC, with a fake cell behind it: what upstream gateways see."""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from tokenizers import Tokenizer as Backend


def ask(**changes: Any) -> Any:
    """A small good request; ``changes`` are fields of ``sampling_params``, or of the request where they are there."""
    own = {key: value for key, value in changes.items() if key in pb.GenerateRequest.DESCRIPTOR.fields_by_name}
    params = {"max_tokens": 4, "seed": 0, **{key: value for key, value in changes.items() if key not in own}}
    own.setdefault("request_id", "a")
    own.setdefault("stream", True)
    if "text" not in own:
        own.setdefault("tokenized", pb.TokenizedInput(input_ids=[5, 6, 7]))
    return pb.GenerateRequest(sampling_params=pb.SamplingParams(**params), **own)


async def responses(call: Any) -> list[Any]:
    return [response async for response in call]


async def test_streaming(edge: Any, cell: Any) -> None:
    *chunks, last = await responses(edge.vllm.Generate(ask(logprobs=1)))
    assert [list(response.chunk.token_ids) for response in chunks] == [[1000], [1001], [1002], [1003]]
    assert [response.chunk.completion_tokens for response in chunks] == [1, 2, 3, 4]
    assert {response.chunk.prompt_tokens for response in chunks} == {3}
    assert list(chunks[0].chunk.output_logprobs.top_logprobs[0].token_ids) == [1000]
    complete = last.complete
    assert list(complete.output_ids) == [1000, 1001, 1002, 1003]
    assert (complete.finish_reason, complete.prompt_tokens, complete.completion_tokens) == ("length", 3, 4)
    assert complete.cached_tokens == 16
    assert len(complete.output_logprobs.token_logprobs) == 4
    assert not complete.HasField("matched_stop_str")
    submission = cell.streams[0].submission
    assert (submission.tenant, submission.klass, submission.request_id) == ("gateway", "streaming", "a")


async def test_in_one_piece(edge: Any, cell: Any, tokenizer: Any) -> None:
    (only,) = await responses(edge.vllm.Generate(ask(stream=False, text="Hello")))
    assert list(only.complete.output_ids) == [1000, 1001, 1002, 1003]
    assert list(cell.streams[0].submission.prompt) == tokenizer.encode("Hello")


async def test_zero_means_unset(edge: Any, cell: Any) -> None:
    request = ask(stream=False)
    request.sampling_params.Clear()
    request.sampling_params.skip_special_tokens = True
    await responses(edge.vllm.Generate(request))
    sampling = cell.streams[0].submission.sampling
    assert sampling.max_tokens == 253  # what the context has left
    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty, sampling.logprobs) == (1.0, 1.0, 1.0, -1)


async def test_every_parameter_is_passed_on(edge: Any, cell: Any) -> None:
    params = {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
    }
    more = {"repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "skip_special_tokens": True, "logprobs": 0}
    lists = {"stop": ["x", "y"], "stop_token_ids": [9], "logit_bias": {3: -1.0}, "include_stop_str_in_output": True}
    await responses(edge.vllm.Generate(ask(**params, **more, **lists, seed=-1)))
    sampling = cell.streams[0].submission.sampling
    for name, value in {**params, **more}.items():
        assert getattr(sampling, name) == value, name
    assert (sampling.stop, sampling.stop_token_ids, sampling.logit_bias) == (("x", "y"), (9,), {3: -1.0})
    assert sampling.include_stop
    assert sampling.seed == 2**63 - 1


async def test_n_sequences(edge: Any, cell: Any) -> None:
    got = await responses(edge.vllm.Generate(ask(n=2)))
    for index, stream in enumerate(cell.streams):
        (complete,) = [r.complete for r in got if r.HasField("complete") and r.complete.index == index]
        deltas = [t for r in got if r.HasField("chunk") and r.chunk.index == index for t in r.chunk.token_ids]
        assert list(complete.output_ids) == deltas == cell.script(stream.submission)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"json_schema": "{}"}, "sampling_params.json_schema"),
        ({"json_object": True}, "sampling_params.json_object"),
        ({"prompt_logprobs": 1}, "sampling_params.prompt_logprobs"),
        ({"truncate_prompt_tokens": 3}, "sampling_params.truncate_prompt_tokens"),
        ({"kv_transfer_params_json": "{}"}, "kv_transfer_params_json"),
        ({"kv_transfer_params": pb.KvTransferParams(remote_port=1)}, "kv_transfer_params"),
        ({"mm_inputs": pb.MultimodalInputs()}, "mm_inputs"),
        ({"extra_mm_inputs": [pb.MultimodalInputs()]}, "extra_mm_inputs"),
        ({"media_refs": pb.MediaRefs()}, "media_refs"),
        ({"data_parallel_rank": 1}, "data_parallel_rank"),
    ],
)
async def test_unsupported_fields_are_named(edge: Any, refused: Any, changes: dict[str, Any], field: str) -> None:
    refusal = await refused(edge.vllm.Generate(ask(**changes)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "UNSUPPORTED_FIELD")
    assert refusal.message.endswith(f": {field}")


async def test_bad_input(edge: Any, refused: Any) -> None:
    no_prompt = await refused(edge.vllm.Generate(pb.GenerateRequest(request_id="a")))
    assert no_prompt.reason == "NO_PROMPT"
    assert (await refused(edge.vllm.Generate(ask(logprobs=-1)))).reason == "BAD_LOGPROBS"
    assert (await refused(edge.vllm.Generate(ask(max_tokens=0)))).reason == "BAD_MAX_TOKENS"


async def test_abort(edge: Any, cell: Any, refused: Any, eventually: Any) -> None:
    cell.hold = 1
    call = edge.vllm.Generate(ask(n=2))
    await eventually(lambda: len(cell.streams) == 2)
    await edge.vllm.Abort(pb.AbortRequest(request_ids=["unknown", "a"]))
    assert (await refused(call)).code == grpc.StatusCode.CANCELLED
    assert all(stream.cancelled for stream in cell.streams)


async def test_the_tokenizer_comes_as_a_zip(edge: Any, tokenizer: Any) -> None:
    chunks = await responses(edge.vllm.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in chunks)
    assert [chunk.sha256 for chunk in chunks] == [""] * (len(chunks) - 1) + [hashlib.sha256(data).hexdigest()]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert "config.json" in archive.namelist()
        rebuilt = Backend.from_str(archive.read("tokenizer.json").decode())
    assert rebuilt.encode("Grüße 123", add_special_tokens=False).ids == tokenizer.encode("Grüße 123")


async def test_what_a_gateway_asks_first(edge: Any, refused: Any) -> None:
    assert (await edge.vllm.HealthCheck(pb.HealthCheckRequest())).healthy
    model = await edge.vllm.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.served_model_name, model.max_context_length, model.tokenizer_path) == ("tiny", 256, "")
    assert (list(model.eos_token_ids), model.bos_token_id, model.is_generation) == ([2], 1, True)
    server = await edge.vllm.GetServerInfo(pb.GetServerInfoRequest())
    assert (server.max_num_seqs, server.kv_connector, server.kv_role) == (64 + 1024, "", "")
    (load,) = (await edge.vllm.GetLoads(pb.GetLoadsRequest())).loads
    assert (load.num_waiting_reqs, load.token_usage, load.num_used_tokens) == (3, 0.25, 400)
    flush = await refused(edge.vllm.FlushCache(common_pb2.FlushCacheRequest()))
    assert flush.code == grpc.StatusCode.UNIMPLEMENTED
    events = await refused(edge.vllm.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()))
    assert events.code == grpc.StatusCode.UNIMPLEMENTED


async def test_not_ready_is_not_healthy(edge: Any) -> None:
    await edge.server.set_ready(False)
    assert not (await edge.vllm.HealthCheck(pb.HealthCheckRequest())).healthy
