"""Ports, health, reflection, draining, the admin service and the metrics page of one edge."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from twinpool.errors import ConfigError
from twinpool.proto.twinpool.v1 import admin_pb2, inference_pb2
from twinpool.router.edge.server import EdgeServer
from twinpool.router.metrics import Metrics

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SMALL = inference_pb2.GenerateRequest(
    token_ids=inference_pb2.TokenIds(ids=[1]), sampling=inference_pb2.Sampling(max_tokens=3), stream=True
)


async def health_of(edge: Any) -> list[Any]:
    stub = health_pb2_grpc.HealthStub(edge.channel)
    names = ("", "liveness", "readiness")
    return [(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names]


async def test_health_follows_readiness(edge: Any, refused: Any) -> None:
    assert await health_of(edge) == [SERVING, SERVING, SERVING]
    watch = health_pb2_grpc.HealthStub(edge.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == SERVING
    await edge.server.set_ready(False)
    assert (await watch.read()).status == NOT_SERVING
    watch.cancel()
    assert await health_of(edge) == [NOT_SERVING, SERVING, NOT_SERVING]
    unknown = health_pb2_grpc.HealthStub(edge.channel).Check(health_pb2.HealthCheckRequest(service="x"))
    assert (await refused(unknown)).code == grpc.StatusCode.NOT_FOUND


async def test_reflection_describes_the_service(edge: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="twinpool.v1.Inference"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert names >= {"twinpool.v1.Inference", "grpc.health.v1.Health"}
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [service.name for service in file.service] == ["Inference"]


async def test_draining_refuses_new_calls_and_finishes_old_ones(
    edge: Any, cell: Any, refused: Any, eventually: Any
) -> None:
    cell.hold = 1
    call = edge.inference.Generate(SMALL)
    await eventually(lambda: len(cell.streams) == 1)
    assert await edge.server.drain(0.01) is False
    refusal = await refused(edge.inference.Generate(SMALL))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert await health_of(edge) == [NOT_SERVING, SERVING, NOT_SERVING]
    draining = asyncio.create_task(edge.server.drain(30))
    cell.streams[0].wake.set()
    events = [event async for event in call]
    assert events[-1].HasField("finished")
    assert await draining is True


async def test_too_many_streams(cell: Any, config: Any, tokenizer: Any, refused: Any, eventually: Any) -> None:
    edge = EdgeServer(
        cell,
        config.model_copy(update={"edge": config.edge.model_copy(update={"max_streams": 1})}),
        tokenizer,
        Metrics(),
    )
    addresses = await edge.start()
    cell.hold = 0
    # a second connection: the limit of one connection makes calls wait at the client
    async with grpc.aio.insecure_channel(addresses.inference) as one:
        first = one.unary_stream("/twinpool.v1.Inference/Generate", None, None)(SMALL.SerializeToString())
        await eventually(lambda: len(cell.streams) == 1)
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(addresses.inference, options=options) as two:
            second = two.unary_stream("/twinpool.v1.Inference/Generate", None, None)(SMALL.SerializeToString())
            assert (await refused(second)).reason == "TOO_MANY_STREAMS"
        first.cancel()
    await edge.stop()
    await edge.stop()


@pytest.mark.parametrize("key", ["inference", "vllm", "admin", "metrics"])
async def test_a_port_in_use_is_named(edge: Any, cell: Any, config: Any, tokenizer: Any, key: str) -> None:
    taken = getattr(edge.addresses, key)
    change = {"vllm": config.edge.vllm.model_copy(update={"listen": taken})} if key == "vllm" else {key: taken}
    second = EdgeServer(
        cell, config.model_copy(update={"edge": config.edge.model_copy(update=change)}), tokenizer, Metrics()
    )
    with pytest.raises(ConfigError, match=rf"edge\.{key}.*{taken}"):
        await second.start()


@pytest.mark.parametrize("address", ["127.0.0.1", ":5", "127.0.0.1:x", "127.0.0.1:70000"])
async def test_a_malformed_address(cell: Any, config: Any, tokenizer: Any, address: str) -> None:
    change = {"edge": config.edge.model_copy(update={"inference": address})}
    with pytest.raises(ConfigError, match=r"edge\.inference.*HOST:PORT"):
        await EdgeServer(cell, config.model_copy(update=change), tokenizer, Metrics()).start()


async def test_a_class_that_does_not_exist(cell: Any, config: Any, tokenizer: Any) -> None:
    change = {"scheduling": config.scheduling.model_copy(update={"default_class": "vip"})}
    with pytest.raises(ConfigError, match=r"scheduling\.default_class.*vip.*realtime"):
        EdgeServer(cell, config.model_copy(update=change), tokenizer, Metrics())


async def test_admin(edge: Any, cell: Any, refused: Any) -> None:
    status = await edge.admin.GetStatus(admin_pb2.GetStatusRequest())
    assert (status.router, status.model, status.ready, status.queued) == ("r1", "tiny", True, 3)
    assert (status.workers[0].worker, status.workers[0].free_blocks, status.workers[0].step_ms) == ("w1", 75, 50.0)
    await edge.admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker="w1"))
    await edge.admin.SetRole(admin_pb2.SetRoleRequest(worker="w1", roles=["decode"]))
    assert cell.drained == ["w1", "w1"]
    missing = await refused(edge.admin.DrainWorker(admin_pb2.DrainWorkerRequest(worker="w2")))
    assert missing.code == grpc.StatusCode.NOT_FOUND
    bad = await refused(edge.admin.SetRole(admin_pb2.SetRoleRequest(worker="w1", roles=["chef"])))
    assert bad.reason == "BAD_ROLES"
    lines = [record.json async for record in edge.admin.WatchRequests(admin_pb2.WatchRequestsRequest())]
    assert lines == ['{"request":1}', '{"request":2}']


async def test_the_metrics_page(edge: Any) -> None:
    _ = [event async for event in edge.inference.Generate(SMALL)]
    url = f"http://{edge.addresses.metrics}/metrics"

    def fetch() -> str:
        with urllib.request.urlopen(url) as answer:
            text: str = answer.read().decode()
            return text

    page = await asyncio.to_thread(fetch)
    assert 'twinpool_ttft_seconds_count{class="realtime"} 1.0' in page
    assert 'vllm:num_requests_waiting{engine="router",model_name="tiny"} 3.0' in page
    assert "twinpool_ready 1.0" in page
