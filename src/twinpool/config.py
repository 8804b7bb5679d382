"""One YAML for everything: ``apiVersion: twinpool/v1``, ``kind: Cluster``. Frozen, versioned, units in the names.

These are the keys and their checks; ``config_load.py`` reads the file and says what is wrong with it. The JSON schema
is committed (``deploy/cluster.schema.json``). There is no knob outside this file: flags are short for keys.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Role = Literal["prefill", "decode"]
DTypeName = Literal["float32", "bfloat16"]
KvDTypeName = Literal["float32", "bfloat16", "float8_e4m3"]


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (``[::1]:80`` for IPv6). Raises ValueError; port 0 picks a free one."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit():
        raise ValueError("an address is HOST:PORT, such as 127.0.0.1:50051")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError("an IPv6 address is written with brackets, such as [::1]:50051")
    if int(port) > 65535:
        raise ValueError("a port is at most 65535")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _checked_address(address: str) -> str:
    split_address(address)
    return address


Address = Annotated[str, AfterValidator(_checked_address)]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """What is served. Without ``path`` the embedded SmolLM2-135M-Instruct."""

    path: Path | None = Field(None, description="Hugging Face folder (safetensors) or GGUF file; empty: embedded model")
    name: str | None = Field(None, description="name clients use; empty: the model's own")
    dtype: DTypeName = Field("float32", description="of weights")
    kv_dtype: KvDTypeName | None = Field(None, description="of KV; empty: that of the weights; float8 is slow on CPUs")


class EmulatedConfig(Section):
    """The emulated engine: times from a cost model, tokens a pure function of prompt and position."""

    profile: Literal["llama-70b-h100-tp4", "llama-8b-h100-tp1", "zero"] = Field(
        "llama-70b-h100-tp4", description="cost model that is emulated; zero: steps take no time"
    )
    speed: float = Field(1.0, gt=0, description="wall time of a step = predicted seconds / speed")
    max_context: int = Field(131072, ge=16, description="tokens of prompt and answer together")
    block_bytes: int = Field(256, ge=64, description="stand-in KV bytes a block")


class WorkerConfig(Section):
    """What every worker runs with."""

    engine: Literal["torch", "emulated"] = Field("torch", description="torch computes; emulated only takes the time")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")
    threads: int = Field(1, ge=1, description="torch threads of a CPU worker")
    block_size: int = Field(16, ge=1, le=4096, description="tokens in a KV block")
    kv_memory_mib: int | None = Field(
        None,
        ge=1,
        description="KV pool of one worker; empty: on CPUs 1.25 contexts, on GPUs 85 % of what is free",
    )
    eviction: Literal["lru", "segmented", "frequency"] = Field(
        "lru", description="which cached blocks go first; see docs/simulator.md for what it is worth"
    )
    chunk_tokens: int = Field(512, ge=1, description="most prompt tokens in one step")
    max_batch: int = Field(64, ge=1, description="most sequences decoding at once")
    step_log: Path | None = Field(None, description="file of one JSON line a step, for `sim calibrate`; empty: none")
    emulated: EmulatedConfig = EmulatedConfig()


class PoolConfig(Section):
    """One pool; ``workers`` are started by ``twinpool up``."""

    workers: int = Field(1, ge=0, le=512, description="workers that `twinpool up` starts")
    tensor_parallel: int = Field(
        1, ge=1, le=32, description="ranks of one worker: each a process with its share of heads and MLP, on GPUs a GPU"
    )


class PoolsConfig(Section):
    """The two pools. Workers of ``both`` belong to both."""

    prefill: PoolConfig = PoolConfig()
    decode: PoolConfig = PoolConfig()
    both: PoolConfig = PoolConfig(workers=0)

    def ranks(self, role: str) -> int:
        """Ranks of a worker that starts as ``prefill``, ``decode`` or ``both``."""
        pool: PoolConfig = getattr(self, role)
        return pool.tensor_parallel

    @property
    def by_heads(self) -> bool:
        """Whether any worker has several ranks: then all name, sum and move KV blocks by heads."""
        return any(pool.tensor_parallel > 1 for pool in (self.prefill, self.decode, self.both))


class ClassConfig(Section):
    """SLO targets of one class; first-token deadline = ttft_ms + ttft_factor * unloaded uncached prefill."""

    ttft_ms: float = Field(1000.0, gt=0, description="fixed part of the time to the first token")
    ttft_factor: float = Field(2.0, ge=0, description="plus this many times the prompt's own uncached prefill time")
    itl_ms: float = Field(250.0, gt=0, description="gap between tokens")
    max_queue_ms: float = Field(60_000.0, gt=0, description="refused when not started by then")


class SchedulingConfig(Section):
    """Queue, paths and failure handling."""

    policy: str = Field("least_seconds", description="see `twinpool sim policies`; or module:Class")
    parameters: dict[str, float | str] = Field(default_factory=dict, description="of the policy")
    path: Literal["auto", "split", "local"] = Field("auto", description="auto: by predicted seconds")
    fetch: bool = Field(True, description="a prompt's prefix that another worker has cached is fetched, if earlier")
    max_queue: int = Field(1024, ge=1, description="waiting requests; beyond, new ones are shed")
    max_attempts: int = Field(4, ge=1, description="a request is given up after so many lost attempts")
    no_worker_wait_ms: float = Field(5_000.0, ge=0, description="how long a request waits for a pool without workers")
    classes: dict[str, ClassConfig] = Field(
        default_factory=lambda: {
            "realtime": ClassConfig(),
            "streaming": ClassConfig(ttft_ms=5000.0, itl_ms=500.0),
            "batch": ClassConfig(ttft_ms=3_600_000.0, itl_ms=5000.0, max_queue_ms=3_600_000.0),
        },
        description="SLO classes by name; what the file gives replaces all of these",
    )
    default_class: str = Field("realtime", description="class of requests that name none")
    decision_log: Path | None = Field(None, description="file of all that the core hears and does; empty: none")

    @model_validator(mode="after")
    def _default_class_exists(self) -> Self:
        if self.default_class not in self.classes:
            raise ValueError(f"default_class is {self.default_class!r}, which is none of {sorted(self.classes)}")
        return self


class TransferConfig(Section):
    """How KV moves. ``auto`` takes the best that both ends have."""

    backend: Literal["auto", "shm", "tcp", "gloo", "cuda_ipc", "nccl"] = Field(
        "auto", description="auto: the best both ends have"
    )
    listen: str = Field("127.0.0.1", min_length=1, description="address of a worker's KV server")
    timeout_ms: float = Field(10_000.0, gt=0, description="a transfer without progress for so long has failed")


class LinkConfig(Section):
    """Worker-router links and leases."""

    listen: Address = Field("127.0.0.1:0", description="HOST:PORT workers dial; port 0 picks a free one")
    token: str = Field("", max_length=256, description="workers register with it; empty: made by `twinpool up`")
    heartbeat_ms: float = Field(500.0, gt=0, description="a worker says so often that it lives")
    dead_after_ms: float = Field(3_000.0, gt=0, description="no frame for so long: the worker is fenced")
    lease_ms: float = Field(10_000.0, gt=0, description="blocks held for others are freed without renewal for so long")

    @model_validator(mode="after")
    def _heartbeat_before_death(self) -> Self:
        if self.dead_after_ms <= self.heartbeat_ms:
            raise ValueError(f"dead_after_ms must be above heartbeat_ms, which is {self.heartbeat_ms:g}")
        return self


class TenantPort(Section):
    """A VllmEngine port: no metadata comes in there, so it has a tenant and a class of its own."""

    listen: Address = Field("127.0.0.1:50052", description="vllm.grpc.engine.VllmEngine")
    tenant: str = Field("", description="tenant of all requests that come in there")
    klass: str = Field("realtime", alias="class", description="SLO class of all requests that come in there")


class EdgeConfig(Section):
    """Where clients, gateways, operators and Prometheus connect."""

    inference: Address = Field("127.0.0.1:50051", description="twinpool.v1.Inference")
    vllm: TenantPort = TenantPort()
    admin: Address = Field("127.0.0.1:50053", description="twinpool.v1.Admin")
    metrics: Address = Field("127.0.0.1:9464", description="Prometheus /metrics")
    max_message_mib: int = Field(16, ge=1, le=1024, description="largest gRPC message taken")
    max_streams: int = Field(10_000, ge=1, description="open calls of one connection")
    drain_ms: float = Field(30_000.0, ge=0, description="what still runs so long after SIGTERM is cancelled")
    request_log: Path | None = Field(None, description="file of one JSON line a request; empty: none")


class UpConfig(Section):
    """How ``twinpool up`` keeps the processes of one host."""

    ready_timeout_ms: float = Field(600_000.0, gt=0, description="give up when nothing is served by then")
    restart_first_ms: float = Field(500.0, gt=0, description="pause before the first restart; doubles with each")
    restart_max_ms: float = Field(30_000.0, gt=0, description="longest pause before a restart; as long alive resets it")
    max_restarts: int = Field(8, ge=0, description="restarts of one process in a row before all is given up")


class ClusterConfig(Section):
    """The whole file."""

    apiVersion: Literal["twinpool/v1"] = Field("twinpool/v1", description="version of this format")
    kind: Literal["Cluster"] = Field("Cluster", description="what the file describes")
    model: ModelConfig = ModelConfig()
    pools: PoolsConfig = PoolsConfig()
    worker: WorkerConfig = WorkerConfig()
    scheduling: SchedulingConfig = SchedulingConfig()
    transfer: TransferConfig = TransferConfig()
    link: LinkConfig = LinkConfig()
    edge: EdgeConfig = EdgeConfig()
    up: UpConfig = UpConfig()
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="of all processes, on stderr")

    @model_validator(mode="after")
    def _ranks_compute(self) -> Self:
        if self.pools.by_heads and self.worker.engine == "emulated":
            raise ValueError("tensor_parallel needs worker.engine torch; an emulated profile stands for all ranks")
        return self

    @model_validator(mode="after")
    def _vllm_class_exists(self) -> Self:
        if self.edge.vllm.klass not in self.scheduling.classes:
            names = sorted(self.scheduling.classes)
            raise ValueError(f"edge.vllm.class is {self.edge.vllm.klass!r}, which is none of {names}")
        return self
