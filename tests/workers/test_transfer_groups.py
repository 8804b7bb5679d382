"""Process groups: bounded, the least recently used closed first; their rendezvous keeps off a channel in use."""

from __future__ import annotations

import gc
import socket
import time
import weakref
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from tests.workers.kv_holder import Holders

from twinpool.errors import TransferError
from twinpool.workers.transfer import collective
from twinpool.workers.transfer.channel import Channel, Halt
from twinpool.workers.transfer.groups import Groups
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.transfer.rendezvous import ChannelStore
from twinpool.workers.transfer.service import KVService, TransferConfig


def test_the_least_recently_used_goes_first() -> None:
    groups, gone = Groups(2), list[str]()
    first, second = (groups.seat(partial(gone.append, name)) for name in ("first", "second"))
    with pytest.raises(TransferError, match="all 2 process groups"):
        groups.seat(lambda: None)
    for seat in (first, second, first):
        with seat:
            pass
    third = groups.seat(lambda: gone.append("third"))
    assert (gone, len(groups)) == (["second"], 2)
    with pytest.raises(TransferError, match="closed in favour of others"), second:
        pass
    with first:
        groups.idle(third)
        groups.seat(lambda: gone.append("fourth"))
    assert gone == ["second", "third"]
    first.leave()
    first.leave()
    assert len(groups) == 1


class Owner:
    """Has a seat that leads back to it, as a group's end does."""

    def __init__(self, groups: Groups) -> None:
        self.seat = groups.seat(self.close)

    def close(self) -> None:
        self.seat.leave()


def test_who_gives_a_seat_back_goes_at_once() -> None:
    """And not when the garbage collector comes: a group holds descriptors."""
    owner = Owner(Groups(2))
    watched = weakref.ref(owner)
    owner.close()
    gc.disable()
    try:
        del owner
        assert watched() is None
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def holders() -> Iterator[Holders]:
    with Holders() as holders:
        yield holders


async def test_more_peers_than_groups_take_turns(holders: Holders, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups(1)
    monkeypatch.setattr(collective, "GROUPS", groups)
    giving = [holders.start(4, 4096, ("gloo",), seed=seed) for seed in (1, 2)]
    pool = HostPool(4, 4096)
    service = KVService(pool, TransferConfig(backends=("gloo",)), "receiver", 1)
    for turn in (0, 1, 0, 1):
        holder = giving[turn]
        peer = holder.peer._replace(worker=f"holder{turn}")
        assert (await service.pull(peer, [1, 3], [0, 2], [holder.sums[1], holder.sums[3]], 20)).bad == ()
        assert torch.equal(pool.data[[0, 2]], holder.data[[1, 3]])
        assert len(groups) == 1
    await service.close()
    assert len(groups) == 0


def test_a_sealed_rendezvous_keeps_off_the_channel() -> None:
    ends = [Channel(sock, Halt(), time.monotonic() + 5) for sock in socket.socketpair()]
    stores = [ChannelStore(end) for end in ends]
    stores[0].set("a", b"\xff\x00")
    assert stores[1].get("a") == b"\xff\x00"
    for store in stores:
        store.seal()
    stores[0].set("b", b"late")
    assert stores[0].get("b") == b"late"
    with pytest.raises(TransferError, match="rendezvous is over"):
        stores[1].get("b")
    ends[0].send(b"request")
    assert ends[1].recv(7) == b"request"
    for end in ends:
        end.close()
