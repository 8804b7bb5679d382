"""The router's ports: inference, VllmEngine, admin and metrics; started, made ready, drained and stopped together."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto.generated import vllm_engine_pb2, vllm_engine_pb2_grpc

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError
from twinpool.proto.twinpool.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from twinpool.router.admin import AdminService
from twinpool.router.cell import Cell
from twinpool.router.edge.archive import TokenizerArchive
from twinpool.router.edge.calls import Calls
from twinpool.router.edge.convert import Intake
from twinpool.router.edge.handlers import register
from twinpool.router.edge.native import InferenceService
from twinpool.router.edge.vllm import VllmService
from twinpool.router.metrics import EdgeState, Metrics
from twinpool.router.metrics_port import MetricsPort
from twinpool.tokenizer import Tokenizer

HEALTH_SERVICES = ("", "readiness")  # follow readiness; "liveness" is SERVING while the process runs
STOP_GRACE_S = 0.2  # calls had their time in drain()

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_VLLM = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name

_log = logging.getLogger(__name__)


class Addresses(NamedTuple):
    """Where the ports are, each ``host:port`` with the port really bound."""

    inference: str
    vllm: str
    admin: str
    metrics: str


class _Listen(NamedTuple):
    host: str
    port: int


def _split(address: str, key: str) -> _Listen:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{key}: {address!r} is not HOST:PORT")
    return _Listen(host, int(port))


def _in_use(address: str, key: str, error: Exception) -> ConfigError:
    return ConfigError(f"{key}: cannot listen on {address}: it is in use, or not an address of this host ({error})")


class EdgeServer:
    """All ports of one edge. ``start`` once, then ``set_ready``, ``drain`` and ``stop``, on one event loop."""

    def __init__(self, cell: Cell, config: ClusterConfig, tokenizer: Tokenizer, metrics: Metrics) -> None:
        """Raises ConfigError where the port's class, or the default one, does not exist."""
        _check_classes(config)
        self._cell = cell
        self._config = config
        self._metrics = metrics
        self._calls = Calls(cell, metrics, config.edge.max_streams)
        self._intake = Intake(cell, config, tokenizer)
        self._archive = TokenizerArchive(tokenizer)
        self._ready = False
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._servers: list[grpc.aio.Server] = []
        self._metrics_port: MetricsPort | None = None

    async def start(self) -> Addresses:
        """Open all ports. Raises ConfigError, with nothing left open, where one cannot be had."""
        edge = self._config.edge
        try:
            await self._publish()
            inference = await self._start_inference(edge.inference)
            vllm = await self._start_vllm(edge.vllm.listen)
            admin = await self._start_admin(edge.admin)
            return Addresses(inference, vllm, admin, self._start_metrics(edge.metrics))
        except BaseException:
            await self.stop()
            raise

    async def set_ready(self, ready: bool) -> None:
        """Say SERVING or NOT_SERVING; requests are taken either way (readiness is proved by one)."""
        self._ready = ready
        await self._publish()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new calls and wait for the running ones; False when some still run after ``timeout_s``."""
        self._calls.draining = True
        await self.set_ready(False)
        return await self._calls.drained(timeout_s)

    async def stop(self) -> None:
        """Close all ports; calls that still run are cancelled. Idempotent."""
        servers, self._servers = self._servers, []
        for server in servers:
            await server.stop(STOP_GRACE_S if len(self._calls) else None)
        if self._metrics_port is not None:
            await self._metrics_port.close()

    def is_ready(self) -> bool:
        """Whether requests are known to pass."""
        return self._ready and not self._calls.draining

    async def _publish(self) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in HEALTH_SERVICES:
            await self._health.set(service, serving if self._ready else health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._health.set("liveness", serving)

    async def _start_inference(self, address: str) -> str:
        server = self._server()
        service = InferenceService(self._intake, self._calls, self._metrics)
        register(server, inference_pb2_grpc.add_InferenceServicer_to_server, service)
        return await self._listen(server, _INFERENCE, address, "edge.inference")

    async def _start_vllm(self, address: str) -> str:
        server = self._server()
        service = VllmService(
            self._cell, self._config, self._intake, self._calls, self._metrics, self._archive, self.is_ready
        )
        register(server, vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server, service)
        return await self._listen(server, _VLLM, address, "edge.vllm.listen")

    async def _start_admin(self, address: str) -> str:
        server = self._server()
        service = AdminService(self._cell, self.is_ready)
        register(server, admin_pb2_grpc.add_AdminServicer_to_server, service)
        return await self._listen(server, _ADMIN, address, "edge.admin")

    def _start_metrics(self, address: str) -> str:
        listen = _split(address, "edge.metrics")
        self._metrics_port = MetricsPort(self._metrics.registry, self._state)
        try:
            port = self._metrics_port.open(listen.host.strip("[]"), listen.port)
        except OSError as error:
            raise _in_use(address, "edge.metrics", error) from error
        return f"{listen.host}:{port}"

    def _state(self) -> EdgeState:
        return EdgeState(self._cell.status(), self.is_ready(), len(self._calls))

    def _server(self) -> grpc.aio.Server:
        edge = self._config.edge
        return grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # else two routers on one port would both start
                ("grpc.max_receive_message_length", edge.max_message_mib << 20),
                ("grpc.max_concurrent_streams", edge.max_streams),
                ("grpc.server.max_pending_requests", edge.max_streams),  # else a burst of 1,000 calls meets CANCELLED
                ("grpc.server.max_pending_requests_hard_limit", 2 * edge.max_streams),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # gateways ping every 30 s
                ("grpc.keepalive_time_ms", 30_000),  # a client that vanished without a word is found
                ("grpc.keepalive_timeout_ms", 10_000),
            ]
        )

    async def _listen(self, server: grpc.aio.Server, service: str, address: str, key: str) -> str:
        listen = _split(address, key)
        register(server, health_pb2_grpc.add_HealthServicer_to_server, self._health)
        reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise _in_use(address, key, error) from error
        await server.start()
        self._servers.append(server)
        _log.info("%s listens on %s:%d", service, listen.host, port)
        return f"{listen.host}:{port}"


def _check_classes(config: ClusterConfig) -> None:
    known = config.scheduling.classes
    used = {
        "scheduling.default_class": config.scheduling.default_class,
        "edge.vllm.class": config.edge.vllm.klass,
    }
    for key, klass in used.items():
        if klass not in known:
            raise ConfigError(f"{key}: no class {klass!r}; there are {', '.join(known)}")
