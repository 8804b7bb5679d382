"""Who may open a KV channel, and what becomes of those who may not."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from twinpool.errors import TransferError
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.channel import Channel, Geometry, Halt, Hello, Welcomer, greet
from twinpool.workers.transfer.lane import dial, split_address
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.transfer.server import KvServer
from twinpool.workers.transfer.service import KVService, TransferConfig
from twinpool.workers.transfer.tcp import request_blocks

BOTH = TransferConfig(backends=("shm", "tcp"))


@pytest.fixture
async def holder() -> AsyncIterator[KVService]:
    service = KVService(HostPool(4, 4096), BOTH, "holder", 7)
    await service.start()
    yield service
    await service.close()


@pytest.fixture
async def receiver() -> AsyncIterator[KVService]:
    service = KVService(HostPool(4, 4096), BOTH, "receiver", 1)
    yield service
    await service.close()


def peer_of(service: KVService) -> Peer:
    return Peer(service.worker, service.epoch, service.secret, service.addresses)


def connect(service: KVService, backend: str = "tcp") -> Channel:
    return dial(backend, service.addresses[backend], Halt(), time.monotonic() + 5)


async def works(holder: KVService, receiver: KVService) -> bool:
    """Whether the holder still serves those who may."""
    sums = holder._pool.checksums([1])
    return (await receiver.pull(peer_of(holder), [1], [1], sums, 5)).bad == ()


@pytest.mark.parametrize("backend", ["shm", "tcp"])
async def test_a_wrong_secret_is_refused(backend: str, holder: KVService, receiver: KVService) -> None:
    peer = Peer("holder", 7, bytes(32), {backend: holder.addresses[backend]})
    with pytest.raises(TransferError, match="does not accept our secret"):
        await receiver.pull(peer, [0], [0], [0], 5)
    assert await works(holder, receiver)


async def test_another_incarnation_is_refused(holder: KVService, receiver: KVService) -> None:
    with pytest.raises(TransferError, match="has been restarted"):
        await receiver.pull(peer_of(holder)._replace(epoch=6), [0], [0], [0], 5)
    assert await works(holder, receiver)


async def test_a_backend_that_is_not_offered_is_refused(holder: KVService) -> None:
    channel = connect(holder)
    with pytest.raises(TransferError, match="does not offer"):
        greet(channel, Hello("gloo", 7), holder.secret)
    channel.close()


async def test_an_impostor_at_the_address_is_found_out(holder: KVService, receiver: KVService) -> None:
    """It accepts anybody's proof, but cannot give one: it does not know the secret of the one it plays."""
    listener = socket.create_server(("127.0.0.1", 0))
    impostor = KvServer(holder._pool, Gullible(b"x" * 32, 7, Geometry(4, 4096, "xxh3-64"), ["tcp"]), None)
    impostor.listen(listener)
    peer = peer_of(holder)._replace(addresses={"tcp": f"127.0.0.1:{listener.getsockname()[1]}"})
    with pytest.raises(TransferError, match="somebody else answers"):
        await receiver.pull(peer, [0], [0], [0], 5)
    impostor.close()


class Gullible(Welcomer):
    """Welcomes whoever comes."""

    def welcome(self, channel: Channel, fd: int | None) -> Hello:
        channel.recv(60)
        channel.send(bytes(33))
        channel.recv(32)
        channel.send(struct.pack("<B32sQQ8sHH", 0, b"?" * 32, 4, 4096, b"xxh3-64", 0, 0))
        return Hello("tcp", 7)


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), os.urandom(100_000)])
@pytest.mark.parametrize("backend", ["shm", "tcp"])
async def test_garbage_harms_nobody(backend: str, garbage: bytes, holder: KVService, receiver: KVService) -> None:
    channel = connect(holder, backend)
    try:
        channel.send(garbage)
        channel.sock.shutdown(socket.SHUT_WR)
        while channel.recv(1):
            pass
    except (TransferError, OSError):
        pass  # closed on us, which is right
    channel.close()
    assert await works(holder, receiver)


@pytest.mark.parametrize("blocks", [[4], [0xFFFFFFFF], [0] * 5])
async def test_blocks_outside_the_pool_are_refused_by_the_holder(
    blocks: list[int], holder: KVService, receiver: KVService
) -> None:
    channel = connect(holder)
    geometry, fds = greet(channel, Hello("tcp", 7), holder.secret)
    assert (geometry, fds) == (Geometry(4, 4096, "xxh3-64"), [])
    with pytest.raises(TransferError, match="refuses to send"):
        request_blocks(channel, 1, blocks)
    with pytest.raises(TransferError):  # hung up, with not one byte of the pool sent
        channel.recv(1)
    channel.close()
    assert await works(holder, receiver)


async def test_a_request_for_billions_allocates_nothing(holder: KVService) -> None:
    channel = connect(holder)
    greet(channel, Hello("tcp", 7), holder.secret)
    channel.send(struct.pack("<II", 1, 0xFFFFFFFF))
    assert channel.recv(5) == struct.pack("<IB", 1, 1)
    channel.close()


async def test_only_this_user_can_reach_the_unix_socket(holder: KVService) -> None:
    path = Path(holder.addresses["shm"])
    assert [stat.S_IMODE(name.stat().st_mode) for name in (path, path.parent)] == [0o600, 0o700]
    await holder.close()
    assert not path.parent.exists()


async def test_a_channel_whose_time_is_over_says_so(holder: KVService) -> None:
    channel = connect(holder)
    channel.deadline = time.monotonic()
    with pytest.raises(TransferError) as caught:
        channel.recv(1)
    assert caught.value.reason == "TIMEOUT"
    channel.close()


def test_halt_stops_what_is_watched_later_too() -> None:
    halt = Halt()
    halt.stop()
    ours, theirs = socket.socketpair()
    channel = Channel(ours, halt, time.monotonic() + 5)
    with pytest.raises(TransferError) as caught:
        channel.recv(1)
    assert caught.value.reason == "PEER_GONE"
    channel.close()
    theirs.close()


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:x", "host:99999", "host:-1"])
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(TransferError, match="not host:port"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
