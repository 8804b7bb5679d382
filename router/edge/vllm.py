"""The service ``vllm.grpc.engine.VllmEngine``: to upstream gateways a cell looks like one vLLM engine.

No metadata comes in there, so tenant and class are the port's. Statuses say what a gateway should do: UNAVAILABLE is
tried elsewhere, RESOURCE_EXHAUSTED sheds, INVALID_ARGUMENT is the client's fault, INTERNAL is not repeated.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

import twinpool
from twinpool.config import ClusterConfig
from twinpool.errors import InvalidRequest
from twinpool.router.cell import Cell, FinishedOut, TokensOut
from twinpool.router.edge.archive import CHUNK_BYTES, TokenizerArchive
from twinpool.router.edge.calls import Call, Calls
from twinpool.router.edge.checks import bad
from twinpool.router.edge.convert import Ask, Caller, Intake, deadline_at
from twinpool.router.edge.status import Context
from twinpool.router.metrics import Metrics
from twinpool.sampling import TokenLogprob

# Our name of each sampling field and the gateway's; 0 there means the same as unset.
_FIELDS = {
    "top_k": "top_k", "min_p": "min_p", "frequency_penalty": "frequency_penalty", "min_tokens": "min_tokens",
    "presence_penalty": "presence_penalty", "ignore_eos": "ignore_eos", "include_stop": "include_stop_str_in_output",
    "skip_special_tokens": "skip_special_tokens",
}  # fmt: skip
_ZERO_IS_UNSET = ("top_p", "repetition_penalty")
_OPTIONAL = ("temperature", "max_tokens", "logprobs")
_UNSUPPORTED_SAMPLING = ("prompt_logprobs", "truncate_prompt_tokens")
_UNSUPPORTED = ("kv_transfer_params", "mm_inputs", "kv_transfer_params_json", "media_refs")
_SEEDS = 1 << 63


def ask_of(request: Any) -> Ask:
    """What a message asks for. Raises InvalidRequest for fields that are not supported, by name."""
    _refuse_unsupported(request)
    params = request.sampling_params
    return Ask(
        prompt=_prompt_of(request),
        sampling=_sampling_of(params),
        stream=request.stream,
        n=params.n,
        request_id=request.request_id,
    )


def _refuse_unsupported(request: Any) -> None:
    params = request.sampling_params
    found = [field for field in _UNSUPPORTED if request.HasField(field)]
    found += ["extra_mm_inputs"] if request.extra_mm_inputs else []
    found += ["data_parallel_rank"] if request.data_parallel_rank else []
    found += [f"sampling_params.{field}" for field in _UNSUPPORTED_SAMPLING if params.HasField(field)]
    constraint = params.WhichOneof("constraint")
    found += [f"sampling_params.{constraint}"] if constraint else []
    if found:
        raise InvalidRequest(f"not supported here: {', '.join(found)}", reason="UNSUPPORTED_FIELD")


def _prompt_of(request: Any) -> str | array[int]:
    match request.WhichOneof("input"):
        case "text":
            return str(request.text)
        case "tokenized":
            return array("I", request.tokenized.input_ids)
        case _:
            raise InvalidRequest("the request has no prompt: set tokenized or text", reason="NO_PROMPT")


def _sampling_of(params: Any) -> dict[str, Any]:
    if params.HasField("logprobs") and params.logprobs < 0:
        raise bad("logprobs", f"logprobs must be from 0 to 20, got {params.logprobs}")
    fields = {ours: getattr(params, theirs) for ours, theirs in _FIELDS.items()}
    fields |= {field: getattr(params, field) for field in _ZERO_IS_UNSET if getattr(params, field)}
    fields |= {field: getattr(params, field) for field in _OPTIONAL if params.HasField(field)}
    if params.HasField("seed"):
        fields["seed"] = params.seed % _SEEDS
    return fields | {
        "stop": tuple(params.stop),
        "stop_token_ids": tuple(params.stop_token_ids),
        "logit_bias": dict(params.logit_bias),
    }


def _logprobs(ids: array[int], logprobs: tuple[TokenLogprob, ...]) -> Any:
    if not logprobs:
        return None
    return pb.OutputLogProbs(
        token_ids=ids,
        token_logprobs=[logprob.logprob for logprob in logprobs],
        top_logprobs=[pb.TopLogProbs(token_ids=logprob.top_ids, values=logprob.top_logprobs) for logprob in logprobs],
    )


class _Sequence:
    """The answer for one sequence: chunks while it runs, then everything at once."""

    def __init__(self, index: int, prompt_tokens: int) -> None:
        self._index = index
        self._prompt_tokens = prompt_tokens
        self._ids = array("I")
        self._logprobs: list[TokenLogprob] = []

    def add(self, out: TokensOut) -> None:
        self._ids.extend(out.ids)
        self._logprobs += out.logprobs

    def chunk(self, out: TokensOut) -> Any:
        """``out``, which was added before, as a delta with cumulative counts."""
        return pb.GenerateResponse(
            chunk=pb.GenerateStreamChunk(
                token_ids=out.ids,
                prompt_tokens=self._prompt_tokens,
                completion_tokens=len(self._ids),
                output_logprobs=_logprobs(out.ids, out.logprobs),
                index=self._index,
            )
        )

    def complete(self, out: FinishedOut) -> Any:
        return pb.GenerateResponse(
            complete=pb.GenerateComplete(
                output_ids=self._ids,
                finish_reason=out.reason,
                prompt_tokens=out.prompt_tokens,
                completion_tokens=out.completion_tokens,
                cached_tokens=out.cached_tokens,
                output_logprobs=_logprobs(self._ids, tuple(self._logprobs)),
                index=self._index,
                matched_token_id=out.stop if isinstance(out.stop, int) else None,
                matched_stop_str=out.stop if isinstance(out.stop, str) else None,
            )
        )


class VllmService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """Handlers of ``VllmEngine``; registered through ``handlers.register``. What is not here is UNIMPLEMENTED."""

    def __init__(
        self,
        cell: Cell,
        config: ClusterConfig,
        intake: Intake,
        calls: Calls,
        metrics: Metrics,
        archive: TokenizerArchive,
        ready: Callable[[], bool],
    ) -> None:
        self._cell = cell
        self._config = config
        self._intake = intake
        self._calls = calls
        self._metrics = metrics
        self._archive = archive
        self._ready = ready
        self._started = time.monotonic()

    async def HealthCheck(self, request: Any, context: Context) -> Any:
        """Healthy when requests pass through both pools."""
        ready = self._ready()
        return pb.HealthCheckResponse(healthy=ready, message="" if ready else "not ready, or draining")

    async def GetModelInfo(self, request: Any, context: Context) -> Any:
        """The model; without a tokenizer path, so that a gateway asks GetTokenizer."""
        model = await self._intake.model()
        return pb.GetModelInfoResponse(
            model_path=model.name,
            served_model_name=model.name,
            is_generation=True,
            max_context_length=model.max_context,
            max_req_input_len=model.max_context - 1,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_ids,
            pad_token_id=model.eos_ids[0] if model.eos_ids else 0,
            bos_token_id=self._archive.bos_id or 0,
        )

    async def GetServerInfo(self, request: Any, context: Context) -> Any:
        """What a gateway bounds its admission by. No KV connector: pairing is our work, not the gateway's."""
        status = self._cell.status()
        return pb.GetServerInfoResponse(
            active_requests=status.active + status.queued,
            uptime_seconds=time.monotonic() - self._started,
            last_receive_timestamp=time.time(),
            server_type="vllm-grpc",
            data_parallel_size=1,
            block_size=status.model.block_size if status.model else 0,
            model_dtype=status.model.dtype if status.model else "",
            max_num_seqs=self._slots() + self._config.scheduling.max_queue,
        )

    async def GetLoads(self, request: Any, context: Context) -> Any:
        """Load of the whole cell, from the numbers of /metrics, as one rank."""
        status = self._cell.status()
        size = status.model.block_size if status.model else 0
        blocks = sum(worker.blocks for worker in status.workers)
        used = blocks - sum(worker.free_blocks for worker in status.workers)
        load = pb.SchedulerLoad(
            num_running_reqs=status.active,
            num_waiting_reqs=status.queued,
            num_total_reqs=status.active + status.queued,
            num_used_tokens=used * size,
            max_total_num_tokens=blocks * size,
            token_usage=used / blocks if blocks else 0.0,
            max_running_requests=self._slots(),
        )
        now = datetime.now(UTC).isoformat()
        return pb.GetLoadsResponse(timestamp=now, version=twinpool.__version__, dp_rank_count=1, loads=[load])

    async def GetTokenizer(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The tokenizer's files as a zip in chunks; its sha256 on the last one only."""
        archive = await self._archive.read()
        for start in range(0, len(archive.data), CHUNK_BYTES):
            last = start + CHUNK_BYTES >= len(archive.data)
            data = archive.data[start : start + CHUNK_BYTES]
            yield common_pb2.GetTokenizerChunk(data=data, sha256=archive.sha256 if last else "")

    async def Abort(self, request: Any, context: Context) -> Any:
        """Stop calls of this port's tenant; ids that do not run are ignored."""
        for request_id in request.request_ids:
            self._calls.cancel(request_id, self._config.edge.vllm.tenant)
        return pb.AbortResponse()

    async def Generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Chunks as tokens come (when streaming), then one complete a sequence."""
        port = self._config.edge.vllm
        with self._calls.refusals():
            caller = Caller(tenant=port.tenant, klass=port.klass, deadline_at=deadline_at(context.time_remaining()))
            order = await self._intake.order(ask_of(request), caller)
            call = self._calls.start(order)
        with call:
            async for response in self._responses(call):
                yield response

    async def _responses(self, call: Call) -> AsyncIterator[Any]:
        order = call.order
        sequences = [_Sequence(index, order.prompt_tokens) for index in range(len(order.submissions))]
        async for index, out in call.outputs():
            for response in self._response(call, sequences[index], index, out):
                yield response

    def _response(self, call: Call, sequence: _Sequence, index: int, out: TokensOut | FinishedOut) -> Iterator[Any]:
        if isinstance(out, FinishedOut):
            submission = call.order.submissions[index]
            self._metrics.observe_finished(out, submission.tenant, submission.klass)
            yield sequence.complete(out)
            return
        sequence.add(out)
        if call.order.stream:
            yield sequence.chunk(out)

    def _slots(self) -> int:
        decoders = sum("decode" in worker.roles for worker in self._cell.status().workers)
        return decoders * self._config.worker.max_batch
