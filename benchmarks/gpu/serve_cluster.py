"""What serve.py asks of a cluster, and what the cluster wrote down of it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import grpc

sys.path.insert(0, str(Path(__file__).parents[1]))
from cluster import cluster

from twinpool.proto.twinpool.v1 import inference_pb2 as pb
from twinpool.proto.twinpool.v1 import inference_pb2_grpc as rpc
from twinpool.router import events as ev
from twinpool.router.decision_log import Turn
from twinpool.router.decision_replay import read_decisions
from twinpool.workers.models.config import DTypeName, LlamaConfig, tensor_shapes
from twinpool.workers.models.kv_layout import DTYPES, KvDTypeName, kv_layout

BLOCK = 16
READY_S = 900.0
TOKEN_IDS = (300, 40_000)


class Load(NamedTuple):
    """What is asked; lengths in tokens. Prompts do not fill their last block."""

    prompt: int
    output: int
    requests: int  # greedy, and as many sampled
    streams: int  # at once
    short_prompt: int
    short_output: int
    chunk: int

    @property
    def kv_tokens(self) -> int:
        """KV memory of each worker."""
        return int(1.25 * max(2 * (self.prompt + self.output), self.streams * (self.short_prompt + self.short_output)))


LOADS = {
    "cuda": Load(prompt=8180, output=64, requests=6, streams=32, short_prompt=500, short_output=256, chunk=512),
    "cpu": Load(prompt=380, output=12, requests=2, streams=4, short_prompt=20, short_output=256, chunk=64),
}


class Model(NamedTuple):
    """What is served, and what a step of it costs at least."""

    folder: Path
    config: LlamaConfig
    dtype: DTypeName
    kv_dtype: KvDTypeName

    @property
    def kv_token_bytes(self) -> int:
        """KV of a token."""
        return kv_layout(self.config, self.kv_dtype, BLOCK).block_bytes // BLOCK

    def weights(self, *, head: bool) -> int:
        """Numbers in the matrices of the layers, and of the head."""
        shapes = tensor_shapes(self.config).items()
        layers = sum(prod(shape) for name, shape in shapes if "layers." in name and len(shape) == 2)
        return layers + (self.config.vocab_size * self.config.hidden if head else 0)

    def chunk_flops(self, tokens: int, cached: int) -> float:
        """Arithmetic of a chunk; its one row of logits is left out."""
        config = self.config
        attention = 4 * config.layers * config.heads * config.head_dim * tokens * (cached + tokens / 2)
        return 2 * self.weights(head=False) * tokens + attention

    def decode_bytes(self, context: int) -> float:
        """Read by a step of decoding rows with so much context together."""
        return self.weights(head=True) * DTYPES[self.dtype].itemsize + context * self.kv_token_bytes


class Seen(NamedTuple):
    """An answer and what came with it; milliseconds of the router's clock."""

    ids: list[int]
    ttft: float
    gap: float  # mean, after the first token
    path: str
    backend: str
    kv_bytes: int
    attempts: int


class Run(NamedTuple):
    """One cluster: answers by request id, its workers' steps, and what its router wrote of requests and decisions."""

    answers: dict[str, Seen]
    steps: list[dict[str, Any]]
    edges: dict[str, dict[str, float]]
    early: dict[str, float]  # share of KV bytes verified before the first token


def served(device: str, model: Model, load: Load, folder: Path, path: str) -> Run:
    """All requests through a cluster of its own, and what it wrote down; ``path`` is split or local."""
    folder.mkdir()
    memory = -(-load.kv_tokens * model.kv_token_bytes // 2**20)
    pools = {"prefill": 1, "decode": 1, "both": 0} if path == "split" else {"prefill": 0, "decode": 0, "both": 1}
    settings = {
        **{f"pools.{pool}.workers": count for pool, count in pools.items()},
        "model.path": model.folder, "model.dtype": model.dtype, "model.kv_dtype": model.kv_dtype,
        "worker.device": device, "worker.kv_memory_mib": memory, "worker.chunk_tokens": load.chunk,
        "worker.step_log": folder / "steps", "edge.request_log": folder / "requests",
        "scheduling.decision_log": folder / "decisions", "scheduling.path": path, "log_level": "warning",
    }  # fmt: skip
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with cluster(*flags, within_s=READY_S) as addresses, grpc.insecure_channel(addresses["inference"]) as channel:
        answers = ask_all(rpc.InferenceStub(channel), load)
    wrong = {seen.path for seen in answers.values()} - {path}
    if wrong:
        raise SystemExit(f"requests took the path {', '.join(wrong)}, not {path}")
    lost = sum(seen.attempts - 1 for seen in answers.values())
    if lost:
        raise SystemExit(
            f"{lost} attempts were lost and made again: no figure of such a run counts; see the workers' log"
        )
    steps = [line for line in json_lines(folder / "steps") if "chunks" in line]
    edges = {line["id"]: line["edges"] for line in json_lines(folder / "requests")}
    return Run(answers, steps, edges, early_shares(folder / "decisions"))


def ask_all(stub: rpc.InferenceStub, load: Load) -> dict[str, Seen]:
    """Answers by name. No prompt comes twice, or it would be cached."""
    warm = [call(stub, f"warm-{i}", load.prompt, load.output, i) for i in range(2)]
    answers = {}
    for i in range(load.requests):
        for name in (f"greedy-{i}", f"seeded-{i}"):
            answers[name] = call(stub, name, load.prompt, load.output, i)
    if len({tuple(seen.ids) for seen in [*warm, *answers.values()]}) < len(answers):
        raise SystemExit("answers do not depend on their prompts: that they are equal would say nothing")
    with ThreadPoolExecutor(load.streams) as threads:
        names = [f"stream-{i}" for i in range(load.streams)]
        seen = threads.map(lambda name: call(stub, name, load.short_prompt, load.short_output, 0), names)
        return answers | dict(zip(names, seen, strict=True))


def call(stub: rpc.InferenceStub, name: str, prompt: int, output: int, seed: int) -> Seen:
    """Ask for ``output`` tokens after a prompt that ``name`` stands for; greedy unless it begins with "seeded"."""
    ids = random.Random(name).choices(range(*TOKEN_IDS), k=prompt)
    temperature = 0.8 if name.startswith("seeded") else 0.0
    sampling = pb.Sampling(max_tokens=output, temperature=temperature, seed=seed, ignore_eos=True)
    request = pb.GenerateRequest(request_id=name, token_ids=pb.TokenIds(ids=ids), sampling=sampling, stream=True)
    tokens, finished = [], pb.Finished()
    for event in stub.Generate(request, timeout=600):
        if event.HasField("tokens"):
            tokens += event.tokens.token_ids
        elif event.HasField("finished"):
            finished = event.finished
    if len(tokens) != output:
        raise SystemExit(f"{name}: {len(tokens)} tokens, not {output}")
    route, timing = finished.route, finished.timing
    return Seen(tokens, timing.ttft_ms, timing.itl_ms, route.path, route.backend, route.kv_bytes, route.attempts)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Of a log."""
    return map(json.loads, path.read_text(encoding="utf-8").splitlines())


def early_shares(path: Path) -> dict[str, float]:
    """By request: KV bytes verified before its first token, of all. From the router's decision log."""
    names: dict[int, str] = {}  # by rid
    owners: dict[int, str] = {}  # by attempt
    early: dict[str, int] = {}
    total: dict[str, int] = {}
    first: set[int] = set()
    for turn in read_decisions(path):
        if not isinstance(turn, Turn):
            continue
        event = turn.event
        kind = type(event).__name__
        if kind == "Submit":
            names[event.request.rid] = turn.id
        elif kind == "Emitted":
            first.add(event.attempt)
        elif kind == "BlocksVerified" and event.attempt in owners:
            name = owners[event.attempt]
            total[name] = total.get(name, 0) + event.bytes
            early[name] = early.get(name, 0) + (0 if event.attempt in first else event.bytes)
        for row in turn.said:
            if row[0] == ev.SendPrefill.__name__:
                said = dict(zip(ev.fields(ev.SendPrefill), row[1:], strict=False))
                owners[said["attempt"]] = names[said["request"]]
    return {name: early[name] / count for name, count in total.items() if count}
