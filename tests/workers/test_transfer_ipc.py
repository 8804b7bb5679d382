"""``cuda_ipc`` on a host: all but the GPU's handles and its kernel, in whose place are memfds and the reference."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from tests.workers.kv_holder import HEADS, LINES, Holder, Holders, MemfdShare, by_heads

from twinpool.errors import ConfigError, TransferError
from twinpool.workers.transfer import ipc
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.transfer.service import KVService, TransferConfig
from twinpool.workers.transfer.share import MOST_SAID, SHARES, CudaShare

BACKENDS = ("cuda_ipc", "tcp")
BLOCKS, BLOCK_BYTES = 48, 32_768
ALL = list(range(BLOCKS))


@pytest.fixture(scope="module")
def holders() -> Iterator[Holders]:
    with Holders() as holders:
        yield holders


@pytest.fixture
def holder(holders: Holders) -> Iterator[Holder]:
    holder = holders.start(BLOCKS, BLOCK_BYTES, BACKENDS)
    yield holder
    holder.kill()


@pytest.fixture
def share(monkeypatch: pytest.MonkeyPatch) -> MemfdShare:
    share = MemfdShare()
    monkeypatch.setitem(SHARES, "cpu", share)
    return share


@pytest.fixture
async def service(share: MemfdShare) -> AsyncIterator[KVService]:
    pool = by_heads(HostPool(BLOCKS, BLOCK_BYTES))
    service = KVService(pool, TransferConfig(backends=BACKENDS), "receiver", 1)
    yield service
    await service.close()
    assert share.mapped == 0


def memory_of(service: KVService) -> torch.Tensor:
    """All of its pool."""
    assert isinstance(service._pool, HeadPool)
    return service._pool.memory


def whole(peer: Peer, first: int = 0, end: int = HEADS) -> Peer:
    """The peer, asked for these heads."""
    return peer._replace(heads=(first, end))


async def test_blocks_arrive_byte_for_byte(holder: Holder, service: KVService) -> None:
    own = memory_of(service)
    for count in (1, 7, BLOCKS):
        own.zero_()
        chosen = random.Random(count)
        source, target = chosen.sample(ALL, count), chosen.sample(ALL, count)
        pulled = await service.pull(whole(holder.peer), source, target, [holder.sums[i] for i in source], 10)
        assert (pulled.backend, pulled.bytes, pulled.bad) == ("cuda_ipc", count * BLOCK_BYTES, ())
        assert torch.equal(own[target], holder.data[source])
        assert not own[[i for i in ALL if i not in target]].any()


@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 3)])
async def test_some_heads_arrive_byte_for_byte(first: int, end: int, holder: Holder, share: MemfdShare) -> None:
    """A rank that holds fewer heads maps the holder's whole rows and takes its own out of each."""
    pool = by_heads(HostPool(BLOCKS, BLOCK_BYTES * (end - first) // HEADS), first, end)
    service = KVService(pool, TransferConfig(backends=BACKENDS), "receiver", 1)
    pulled = await service.pull(whole(holder.peer, first, end), [5, 6, 40], [1, 0, 7], None, 10)
    lines = holder.data.view(BLOCKS, LINES, HEADS, -1)[:, :, first:end]
    assert pulled.backend == "cuda_ipc"
    assert torch.equal(pool.data[[1, 0, 7]], lines[[5, 6, 40]])
    assert list(pulled.found) == pool.checksums([1, 0, 7])
    await service.close()


async def test_blocks_that_do_not_verify_are_named(holder: Holder, service: KVService) -> None:
    sums = [holder.sums[i] for i in (4, 5, 6, 9)]
    sums[1] ^= 1
    sums[3] = holder.sums[10]
    assert (await service.pull(whole(holder.peer), [4, 5, 6, 9], [0, 1, 2, 3], sums, 10)).bad == (1, 3)
    with pytest.raises(TransferError, match="outside the peer's 48"):
        await service.pull(whole(holder.peer), [0, BLOCKS], [0, 1], [0, 0], 10)


async def test_pulls_run_in_order(holder: Holder, service: KVService) -> None:
    peer = whole(holder.peer)
    pulls = [service.pull(peer, [i], [0], holder.sums[i : i + 1], 10) for i in range(12)]
    assert {pulled.bad for pulled in await asyncio.gather(*pulls)} == {()}
    assert torch.equal(memory_of(service)[0], holder.data[11])


@pytest.mark.parametrize("said", [b"/proc/self/fd/0 1", b"/proc/0/fd/0 1", b"x" * (MOST_SAID + 1)])
async def test_a_handle_that_cannot_be_opened_leaves_the_next_backend(
    said: bytes, service: KVService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    giver_pool = HostPool(BLOCKS, BLOCK_BYTES)
    giver_pool.data.random_(0, 256)
    pool = by_heads(giver_pool)
    giver = KVService(pool, TransferConfig(backends=BACKENDS), "giver", 1)
    await giver.start()
    monkeypatch.setattr(SHARES["cpu"], "export", lambda memory: said)
    peer = whole(Peer("giver", 1, giver.secret, giver.addresses))
    pulled = await service.pull(peer, [3], [4], pool.checksums([3]), 10)
    assert (pulled.backend, pulled.bad) == ("tcp", ())
    assert "no KV channel to giver by cuda_ipc" in caplog.text
    await giver.close()


async def test_a_peer_that_cannot_share_says_why(
    service: KVService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool = by_heads(HostPool(BLOCKS, BLOCK_BYTES))
    giver = KVService(pool, TransferConfig(backends=BACKENDS), "giver", 1)
    await giver.start()

    def refuse(memory: torch.Tensor) -> bytes:
        raise TransferError("it may grow", reason="REFUSED")

    monkeypatch.setattr(SHARES["cpu"], "export", refuse)
    peer = whole(Peer("giver", 1, giver.secret, giver.addresses))
    assert (await service.pull(peer, [3], [4], pool.checksums([3]), 10)).backend == "tcp"
    assert "by cuda_ipc: the KV peer does not share: it may grow" in caplog.text
    await giver.close()


async def test_another_layout_is_refused_by_both_names(holder: Holder, share: MemfdShare) -> None:
    service = KVService(by_heads(HostPool(4, BLOCK_BYTES // 2)), TransferConfig(backends=BACKENDS), "receiver", 1)
    with pytest.raises(TransferError, match=r"blocks are \(32768, 'sum-64', \(0, 4\)\), ours \(16384, "):
        await service.pull(whole(holder.peer), [0], [0], [0], 10)
    await service.close()


async def test_a_holder_killed_in_mid_pull_harms_nobody(
    holder: Holder, service: KVService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is mapped stays: every block either verifies or is named; the next pull finds the peer gone."""
    monkeypatch.setattr(ipc, "PIECE_BYTES", BLOCK_BYTES)
    own = memory_of(service)
    task = asyncio.create_task(service.pull(whole(holder.peer), ALL, ALL, holder.sums, 10))
    while not own[0].any():  # noqa: ASYNC110 - memory sets no event
        await asyncio.sleep(0)
    holder.kill()
    assert (await task).bad == ()
    assert torch.equal(own, holder.data)
    with pytest.raises(TransferError, match="cannot connect"):
        await service.pull(whole(holder.peer), [0], [0], holder.sums[:1], 5)


async def test_a_restarted_holder_is_mapped_anew(holder: Holder, holders: Holders, service: KVService) -> None:
    await service.pull(whole(holder.peer), [0], [0], holder.sums[:1], 5)
    holder.kill()
    restarted = holders.start(BLOCKS, BLOCK_BYTES, BACKENDS, epoch=2, seed=2)
    assert (await service.pull(whole(restarted.peer), ALL, ALL, restarted.sums, 10)).bad == ()
    assert torch.equal(memory_of(service), restarted.data)
    stale = restarted.peer._replace(epoch=1)
    with pytest.raises(TransferError, match="has been restarted"):
        await service.pull(whole(stale), [0], [0], [0], 5)
    restarted.kill()


async def test_a_holder_that_hangs_is_not_needed(holder: Holder, service: KVService) -> None:
    await service.pull(whole(holder.peer), [0], [0], holder.sums[:1], 5)
    holder.signal(signal.SIGSTOP)
    assert (await service.pull(whole(holder.peer), ALL, ALL, holder.sums, 5)).bad == ()


async def test_a_cancelled_pull_has_ended_when_its_await_returns(
    holder: Holder, service: KVService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipc, "PIECE_BYTES", BLOCK_BYTES)
    own = memory_of(service)
    task = asyncio.create_task(service.pull(whole(holder.peer), ALL, ALL, holder.sums, 10))
    while not own[0].any():  # noqa: ASYNC110 - memory sets no event
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    own.fill_(5)
    await asyncio.sleep(0.05)
    assert (own == 5).all()


async def test_heads_of_one_peer_have_lanes_of_their_own(holder: Holder, service: KVService) -> None:
    """Pulls of other heads neither go by another's blocks nor close its channel; dropping the peer ends them all."""
    pulls = [service.pull(whole(holder.peer, *ends), ALL, ALL, None, 10) for ends in ((0, 2), (2, 3), (3, 4))]
    found = [pulled.found for pulled in await asyncio.gather(*pulls)]
    assert torch.equal(memory_of(service), holder.data)
    assert [sum(parts) % 2**64 for parts in zip(*found, strict=True)] == holder.sums
    assert len(service._lanes) == 3
    service.drop("holder")
    assert service._lanes == {}


def test_pools_that_cannot_be_shared_are_refused() -> None:
    for pool in (HostPool(1, 64), by_heads(HostPool(1, 128))):
        with pytest.raises(ConfigError, match="cuda_ipc needs KV on a GPU"):
            KVService(pool, TransferConfig(backends=("cuda_ipc",)), "w", 1)


def test_cuda_shares_of_another_shape_are_refused() -> None:
    with pytest.raises(TransferError, match="a CUDA share of 5 bytes"):
        CudaShare().open(b"short", 64, torch.device("cuda", 0))
