"""KV between two processes on a GPU: CUDA IPC, its ends and refusals; NCCL where two ranks may be had."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
import torch.distributed as dist
from tests.gpu.cuda_holder import BLOCKS, LAYOUT, CudaHolder, make_pool

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.pool import DevicePool
from twinpool.workers.transfer.service import KVService, TransferConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # ends what hangs; the first copy compiles a kernel

BACKENDS = ("cuda_ipc", "nccl", "tcp")
SOURCE, TARGET = [3, 4, 5, 63, 0], [7, 8, 1, 2, 11]
NEW_NCCL = (2, 30)


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed (Linux only; extra: gpu)")


@pytest.fixture
def holder() -> Iterator[CudaHolder]:
    with CudaHolder("cuda_ipc", "tcp") as holder:
        yield holder


@pytest.fixture
async def service() -> AsyncIterator[KVService]:
    service = KVService(make_pool(), TransferConfig(backends=("cuda_ipc", "tcp")), "receiver", 1)
    yield service
    await service.close()


def memory_of(service: KVService) -> torch.Tensor:
    """All of its pool."""
    assert isinstance(service._pool, HeadPool)
    return service._pool.memory


def by(peer: Peer, backend: str) -> Peer:
    return peer._replace(addresses={backend: peer.addresses[backend]})


@pytest.mark.parametrize("backend", ["cuda_ipc", "tcp"])
async def test_blocks_arrive_byte_for_byte(backend: str, holder: CudaHolder, service: KVService) -> None:
    own = memory_of(service)
    sums = [holder.sums[i] for i in SOURCE]
    sums[3] ^= 1
    pulled = await service.pull(by(holder.peer, backend), SOURCE, TARGET, sums, 60)
    assert (pulled.backend, pulled.bad) == (backend, (3,))
    assert torch.equal(own[TARGET].cpu(), holder.data[SOURCE])
    assert not own[[i for i in range(BLOCKS) if i not in TARGET]].any()


async def test_some_heads_arrive_byte_for_byte(holder: CudaHolder) -> None:
    pool = make_pool(1, 3)
    service = KVService(pool, TransferConfig(backends=("cuda_ipc",)), "receiver", 1)
    pulled = await service.pull(holder.peer._replace(heads=(1, 3)), SOURCE, TARGET, None, 60)
    lines = holder.data.view(BLOCKS, LAYOUT.lines, LAYOUT.kv_heads, -1)[:, :, 1:3]
    assert torch.equal(pool.data[TARGET].cpu(), lines[SOURCE])
    assert list(pulled.found) == pool.checksums(TARGET)
    await service.close()


async def test_a_killed_holder_leaves_the_receiver_whole(holder: CudaHolder, service: KVService) -> None:
    """It is unmapped and found gone; the device computes on, and a restarted holder is mapped anew."""
    everything = list(range(BLOCKS))
    assert (await service.pull(holder.peer, everything, everything, holder.sums, 60)).bad == ()
    holder.kill()
    with pytest.raises(TransferError):
        await service.pull(holder.peer, everything, everything, holder.sums, 10)
    assert torch.equal(memory_of(service).cpu(), holder.data)
    with CudaHolder("cuda_ipc", "tcp", seed=2) as restarted:
        pulled = await service.pull(restarted.peer, everything, everything, restarted.sums, 60)
        assert (pulled.backend, pulled.bad) == ("cuda_ipc", ())
        assert torch.equal(memory_of(service).cpu(), restarted.data)


async def test_segments_that_grow_leave_the_next_backend(service: KVService, caplog: pytest.LogCaptureFixture) -> None:
    growing = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with CudaHolder("cuda_ipc", "tcp", environment=growing) as holder:
        pulled = await service.pull(holder.peer, SOURCE, TARGET, [holder.sums[i] for i in SOURCE], 60)
    assert (pulled.backend, pulled.bad) == ("tcp", ())
    assert "cannot share expandable_segments" in caplog.text


async def test_two_services_of_one_process_share_too(service: KVService) -> None:
    pool = make_pool()
    pool.memory.random_(0, 256)
    giver = KVService(pool, TransferConfig(backends=("cuda_ipc",)), "giver", 1)
    await giver.start()
    peer = Peer("giver", 1, giver.secret, giver.addresses, (0, LAYOUT.kv_heads))
    pulled = await service.pull(peer, SOURCE, TARGET, pool.checksums(SOURCE), 60)
    assert (pulled.backend, pulled.bad) == ("cuda_ipc", ())
    assert torch.equal(memory_of(service)[TARGET], pool.memory[SOURCE])
    await giver.close()


async def test_copies_do_not_wait_for_the_engine() -> None:
    """The default stream is busy for seconds; sums, packing and unpacking are done long before."""
    pool = DevicePool(8, 4096, "cuda:0")
    slot = torch.empty(1 << 16, dtype=torch.uint8, device="cuda:0")

    def work() -> None:
        pool.pack([1, 2], slot)
        pool.unpack(slot, [3, 4])
        pool.checksums([1])

    await asyncio.to_thread(work)  # compiles and loads
    torch.cuda.synchronize()
    torch.cuda._sleep(int(5e9))
    busy = torch.cuda.Event()
    busy.record()
    await asyncio.to_thread(work)
    assert not busy.query()
    torch.cuda.synchronize()


def nccl_refusal() -> str:
    """Why two ranks cannot be had; empty where they can."""
    if not dist.is_nccl_available():
        return "torch was built without NCCL"
    if torch.cuda.device_count() > 1:
        return ""
    version = torch.cuda.nccl.version()
    if version < NEW_NCCL or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return f"two ranks on one GPU need NCCL 2.30 (it is {version}) and NCCL_MULTI_RANK_GPU_ENABLE=1"
    return ""


async def test_an_nccl_pair() -> None:
    reason = nccl_refusal()
    if reason:
        pytest.skip(reason)
    pool = make_pool(device=f"cuda:{torch.cuda.device_count() - 1}")
    service = KVService(pool, TransferConfig(backends=("nccl",)), "receiver", 1)
    with CudaHolder("nccl") as holder:
        for _ in range(3):
            pulled = await service.pull(holder.peer, SOURCE, TARGET, [holder.sums[i] for i in SOURCE], 60)
            assert (pulled.backend, pulled.bad) == ("nccl", ())
        assert torch.equal(pool.memory[TARGET].cpu(), holder.data[SOURCE])
        holder.kill()
        with pytest.raises(TransferError):
            await service.pull(holder.peer, SOURCE, TARGET, [0] * len(SOURCE), 20)
    with CudaHolder("nccl", seed=2) as restarted:
        pulled = await service.pull(restarted.peer, SOURCE, TARGET, [restarted.sums[i] for i in SOURCE], 60)
        assert pulled.bad == ()
        assert torch.equal(pool.memory[TARGET].cpu(), restarted.data[SOURCE])
    await service.close()
