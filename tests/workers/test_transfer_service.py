"""Every backend moves blocks byte for byte between two processes, verifies them, and refuses what is not there."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from tests.workers.kv_holder import Holder, Holders

from twinpool.errors import ConfigError, TransferError
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.pool import DevicePool, HostPool
from twinpool.workers.transfer.service import KVService, TransferConfig

BACKENDS = ("shm", "tcp", "gloo")
BLOCKS, BLOCK_BYTES = 48, 40_960


@pytest.fixture(scope="module")
def holder() -> Iterator[Holder]:
    with Holders() as holders:
        yield holders.start(BLOCKS, BLOCK_BYTES, BACKENDS)


@pytest.fixture
async def service() -> AsyncIterator[KVService]:
    service = KVService(HostPool(BLOCKS, BLOCK_BYTES), TransferConfig(backends=BACKENDS), "receiver", 1)
    await service.start()
    yield service
    await service.close()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_blocks_arrive_byte_for_byte(backend: str, holder: Holder, service: KVService) -> None:
    chosen = random.Random(backend)
    own = service._pool.data
    for count in (1, 7, BLOCKS):
        own.zero_()
        source, target = chosen.sample(range(BLOCKS), count), chosen.sample(range(BLOCKS), count)
        pulled = await service.pull(holder.by(backend), source, target, [holder.sums[i] for i in source], 10)
        assert (pulled.backend, pulled.bytes, pulled.bad) == (backend, count * BLOCK_BYTES, ())
        assert torch.equal(own[target], holder.data[source])
        assert not own[[i for i in range(BLOCKS) if i not in target]].any()


@pytest.mark.parametrize("backend", BACKENDS)
async def test_blocks_that_do_not_verify_are_named(backend: str, holder: Holder, service: KVService) -> None:
    sums = [holder.sums[i] for i in (4, 5, 6, 9)]
    sums[1] ^= 1
    sums[3] = holder.sums[10]  # the bytes of another block: stale, or reused meanwhile
    pulled = await service.pull(holder.by(backend), [4, 5, 6, 9], [0, 1, 2, 3], sums, 10)
    assert pulled.bad == (1, 3)


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_block_the_peer_does_not_have_fails_the_pull(backend: str, holder: Holder, service: KVService) -> None:
    with pytest.raises(TransferError, match="outside the peer's 48"):
        await service.pull(holder.by(backend), [0, BLOCKS], [0, 1], [0, 0], 10)
    pulled = await service.pull(holder.by(backend), [0], [0], holder.sums[:1], 10)
    assert pulled.bad == ()


async def test_the_first_common_backend_is_used(holder: Holder, service: KVService) -> None:
    assert (await service.pull(holder.peer, [0], [0], holder.sums[:1], 10)).backend == "shm"
    service.drop("holder")
    assert (await service.pull(holder.by("gloo", "tcp"), [0], [0], holder.sums[:1], 10)).backend == "tcp"


async def test_no_socket_at_the_path_falls_back_to_tcp(
    holder: Holder, service: KVService, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = holder.peer._replace(addresses=holder.peer.addresses | {"shm": "/nowhere/kv.sock"})
    assert (await service.pull(elsewhere, [3], [3], holder.sums[3:4], 10)).backend == "tcp"
    assert "no KV channel to holder by shm: cannot connect: No such file" in caplog.text


async def test_without_a_common_backend_the_pull_fails(holder: Holder, service: KVService) -> None:
    with pytest.raises(TransferError, match="no common backend"):
        await service.pull(holder.by(), [0], [0], [0], 10)


async def test_pulls_from_one_peer_run_in_order(holder: Holder, service: KVService) -> None:
    finished: list[int] = []

    async def pull(i: int) -> None:
        await service.pull(holder.by("tcp"), [i], [0], holder.sums[i : i + 1], 10)
        finished.append(i)

    await asyncio.gather(*(pull(i) for i in range(12)))
    assert finished == list(range(12))
    assert torch.equal(service._pool.data[0], holder.data[11])


async def test_two_services_pull_from_each_other_at_once() -> None:
    pools = [HostPool(64, 65_536) for _ in range(2)]
    services = [KVService(pool, TransferConfig(backends=("gloo",)), str(i), i) for i, pool in enumerate(pools)]
    peers = []
    for service, pool in zip(services, pools, strict=True):
        await service.start()
        pool.data[:32].random_(0, 256)
        peers.append(Peer(service.worker, service.epoch, service.secret, service.addresses))
    source, target = list(range(32)), list(range(32, 64))
    for _ in range(3):
        sums = [pool.checksums(source) for pool in pools]
        pulls = [services[i].pull(peers[1 - i], source, target, sums[1 - i], 10) for i in range(2)]
        assert [pulled.bad for pulled in await asyncio.gather(*pulls)] == [(), ()]
    await asyncio.gather(*(service.close() for service in services))


async def test_device_pools_move_by_way_of_host_memory() -> None:
    pools = [DevicePool(8, 4096, "cpu") for _ in range(2)]
    pools[0].data.random_(0, 256)
    for backend in ("tcp", "gloo"):
        giver, taker = (KVService(pool, TransferConfig(backends=(backend,)), str(i), 1) for i, pool in enumerate(pools))
        await giver.start()
        peer = Peer("0", 1, giver.secret, giver.addresses)
        pulled = await taker.pull(peer, [1, 2, 6], [0, 1, 5], pools[0].checksums([1, 2, 7]), 10)
        assert pulled.bad == (2,)
        assert torch.equal(pools[1].data[[0, 1, 5]], pools[0].data[[1, 2, 6]])
        await giver.close()
        await taker.close()


async def test_pools_of_other_shape_or_sum_are_refused(holder: Holder) -> None:
    for pool in (HostPool(4, BLOCK_BYTES // 2), DevicePool(4, BLOCK_BYTES, "cpu")):
        service = KVService(pool, TransferConfig(backends=("tcp",)), "receiver", 1)
        with pytest.raises(TransferError, match="the peer's KV blocks are"):
            await service.pull(holder.peer, [0], [0], [0], 10)
        await service.close()


async def test_nothing_to_pull_needs_no_peer(service: KVService) -> None:
    assert (await service.pull(Peer("nobody", 1, b"", {}), [], [], [], 1)).bytes == 0


@pytest.mark.parametrize(
    ("source", "target", "sums"), [([0], [0, 1], [0]), ([0], [0], []), ([0], [BLOCKS], [0]), ([0], [-1], [0])]
)
async def test_lists_that_do_not_fit_are_the_callers_fault(
    source: list[int], target: list[int], sums: list[int], holder: Holder, service: KVService
) -> None:
    with pytest.raises(ValueError, match=r"source blocks|not one of"):
        await service.pull(holder.peer, source, target, sums, 1)


@pytest.mark.parametrize("backends", [(), ("pigeon",), ("shm", "nccl")])
def test_backends_that_cannot_work_are_refused(backends: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="KV backend"):
        KVService(HostPool(1, 64), TransferConfig(backends=backends), "w", 1)


def test_shared_memory_needs_a_host_pool() -> None:
    with pytest.raises(ConfigError, match="host memory"):
        KVService(DevicePool(1, 64, "cpu"), TransferConfig(backends=("shm",)), "w", 1)


async def test_an_address_in_use_is_a_config_error(service: KVService) -> None:
    port = int(service.addresses["tcp"].rpartition(":")[2])
    with pytest.raises(ConfigError, match="cannot listen"):
        await KVService(HostPool(1, 64), TransferConfig(backends=("tcp",), port=port), "w", 1).start()
