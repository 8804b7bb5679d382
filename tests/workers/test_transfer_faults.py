"""Peers that die, hang, restart or are dropped in the middle of a pull, callers that give up, and what is left."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from tests.workers.kv_holder import Holder, Holders

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.transfer.service import KVService, TransferConfig

BLOCKS, BLOCK_BYTES = 64, 1 << 19
BACKENDS = ("shm", "tcp", "gloo")
ALL = list(range(BLOCKS))
STREAMS = ["tcp", pytest.param("gloo", marks=pytest.mark.full)]


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
async def service() -> AsyncIterator[KVService]:
    service = KVService(HostPool(BLOCKS, BLOCK_BYTES), TransferConfig(backends=BACKENDS), "receiver", 1)
    await service.start()
    yield service
    await service.close()


async def first_block(own: torch.Tensor) -> None:
    """Returns as soon as bytes have arrived."""
    while not own[0].any():  # noqa: ASYNC110 - memory sets no event
        await asyncio.sleep(0)


async def pull_and_stop_midway(
    service: KVService, holder: Holder, backend: str, timeout_s: float
) -> asyncio.Task[Pulled]:
    """A pull of everything whose peer was stopped after the first and before the last block."""
    own = service._pool.data
    for _ in range(20):
        own.zero_()
        task = asyncio.create_task(service.pull(holder.by(backend), ALL, ALL, holder.sums, timeout_s))
        await first_block(own)
        holder.signal(signal.SIGSTOP)
        await asyncio.wait([task], timeout=0.2)
        if not task.done():
            return task
        holder.signal(signal.SIGCONT)
        await task
    raise AssertionError("every pull was over before its peer could be stopped")


@pytest.mark.parametrize("backend", STREAMS)
async def test_a_peer_killed_in_mid_transfer_fails_the_pull_at_once(
    backend: str, holders: Holders, holder: Holder, service: KVService
) -> None:
    task = await pull_and_stop_midway(service, holder, backend, timeout_s=60)
    holder.kill()
    with pytest.raises(TransferError) as caught:
        await asyncio.wait_for(task, 2)  # well before any timeout of gloo or ours
    assert caught.value.reason == "PEER_GONE"
    restarted = holders.start(BLOCKS, BLOCK_BYTES, BACKENDS, epoch=2, seed=2)
    pulled = await service.pull(restarted.by(backend), ALL, ALL, restarted.sums, 10)
    assert pulled.bad == ()
    assert torch.equal(service._pool.data, restarted.data)
    restarted.kill()


@pytest.mark.parametrize("backend", STREAMS)
async def test_a_peer_that_hangs_in_mid_transfer_fails_the_pull_in_time(
    backend: str, holder: Holder, service: KVService
) -> None:
    task = await pull_and_stop_midway(service, holder, backend, timeout_s=1)
    with pytest.raises(TransferError) as caught:
        await asyncio.wait_for(task, 3)
    assert caught.value.reason == "TIMEOUT"
    holder.signal(signal.SIGCONT)
    assert (await service.pull(holder.by(backend), ALL, ALL, holder.sums, 10)).bad == ()


async def test_a_peer_that_hangs_before_the_handshake_fails_the_pull_in_time(
    holder: Holder, service: KVService
) -> None:
    holder.signal(signal.SIGSTOP)
    with pytest.raises(TransferError, match="did not answer in time"):
        await asyncio.wait_for(service.pull(holder.peer, ALL, ALL, holder.sums, 0.5), 3)


async def test_mapped_memory_outlives_a_peer_that_hangs_but_not_one_that_is_gone(
    holder: Holder, service: KVService
) -> None:
    peer = holder.by("shm")
    await service.pull(peer, [0], [0], holder.sums[:1], 5)
    holder.signal(signal.SIGSTOP)
    assert (await service.pull(peer, ALL, ALL, holder.sums, 5)).bad == ()
    holder.kill()
    with pytest.raises(TransferError, match="cannot connect"):
        await service.pull(peer, ALL, ALL, holder.sums, 5)


async def test_a_dropped_peer_fails_running_and_waiting_pulls(holder: Holder, service: KVService) -> None:
    running = await pull_and_stop_midway(service, holder, "tcp", timeout_s=60)
    waiting = asyncio.create_task(service.pull(holder.by("tcp"), [0], [0], holder.sums[:1], 60))
    await asyncio.sleep(0)
    service.drop("holder")
    service.drop("holder")
    for task in (running, waiting):
        with pytest.raises(TransferError) as caught:
            await asyncio.wait_for(task, 2)
        assert caught.value.reason in ("PEER_GONE", "NO_CHANNEL")
    holder.signal(signal.SIGCONT)
    assert (await service.pull(holder.peer, [0], [0], holder.sums[:1], 5)).bad == ()


async def test_a_pull_whose_turn_does_not_come_times_out(holder: Holder, service: KVService) -> None:
    running = await pull_and_stop_midway(service, holder, "tcp", timeout_s=60)
    with pytest.raises(TransferError, match="turn"):
        await service.pull(holder.by("tcp"), [0], [0], holder.sums[:1], 0.1)
    service.drop("holder")
    with pytest.raises(TransferError):
        await running


async def test_a_cancelled_pull_has_ended_when_its_await_returns(holder: Holder, service: KVService) -> None:
    own = service._pool.data
    for backend in BACKENDS:
        own.zero_()
        task = asyncio.create_task(service.pull(holder.by(backend), ALL, ALL, holder.sums, 10))
        await first_block(own)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        own.fill_(5)
        await asyncio.sleep(0.05)
        assert (own == 5).all(), "bytes arrived after the await had returned"
    assert (await service.pull(holder.peer, ALL, ALL, holder.sums, 10)).bad == ()


async def test_the_loop_runs_on_while_blocks_move(holder: Holder, service: KVService) -> None:
    sums = [sum_ ^ (i in (3, 60)) for i, sum_ in enumerate(holder.sums)]
    task = asyncio.create_task(service.pull(holder.by("shm"), ALL, ALL, sums, 10))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 8  # the copying threads let go of the interpreter while they copy
    assert (await task).bad == (3, 60)


async def test_a_closed_service_pulls_no_more(holder: Holder, service: KVService) -> None:
    await service.close()
    await service.close()
    with pytest.raises(TransferError, match="shut down"):
        await service.pull(holder.peer, [0], [0], [0], 5)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


async def settled(count: int) -> bool:
    """Whether the descriptors go back to ``count`` once both ends have noticed."""
    for _ in range(100):
        if open_descriptors() <= count:
            return True
        await asyncio.sleep(0.02)
    return False


@pytest.mark.parametrize("backend", ["shm", "tcp", pytest.param("gloo", marks=pytest.mark.full)])
async def test_channels_that_come_and_go_leave_nothing_behind(backend: str) -> None:
    config = TransferConfig(backends=(backend,))
    giver, taker = (KVService(HostPool(4, 4096), config, name, 1) for name in ("giver", "taker"))
    await giver.start()
    peer = Peer("giver", 1, giver.secret, giver.addresses)
    sums = giver._pool.checksums([0, 1])
    await taker.pull(peer, [0, 1], [2, 3], sums, 5)
    taker.drop("giver")
    await asyncio.sleep(0.1)
    descriptors, threads = open_descriptors(), threading.active_count()
    for _ in range(200):
        assert (await taker.pull(peer, [0, 1], [2, 3], sums, 5)).bad == ()
        taker.drop("giver")
    assert await settled(descriptors)
    assert threading.active_count() <= threads + 1
    await giver.close()
    await taker.close()


async def test_connections_cut_at_any_byte_leave_nothing_behind() -> None:
    giver = KVService(HostPool(4, 4096), TransferConfig(backends=("shm", "tcp")), "giver", 1)
    await giver.start()
    host, _, port = giver.addresses["tcp"].rpartition(":")
    chosen = random.Random(3)
    before = open_descriptors()
    for _ in range(100):
        unix = socket.socket(socket.AF_UNIX)
        unix.connect(giver.addresses["shm"])
        for sock in (unix, socket.create_connection((host, int(port)))):
            sock.sendall(chosen.randbytes(chosen.randrange(60)))
            sock.close()
    assert await settled(before)
    await giver.close()


async def test_closing_does_not_wait_for_silent_connections() -> None:
    giver = KVService(HostPool(4, 4096), TransferConfig(backends=("tcp",)), "giver", 1)
    await giver.start()
    host, _, port = giver.addresses["tcp"].rpartition(":")
    with socket.create_connection((host, int(port))):
        await asyncio.sleep(0.05)
        start = time.monotonic()
        await giver.close()
        assert time.monotonic() - start < 1.5  # the handshake alone would wait for 2 s
