"""Collectives: blocks travel packed in slots through a two-rank process group of torch, gloo on CPUs and NCCL on GPUs.

Each KV channel has one group of its own, for one direction: the holder is rank 0, the receiver rank 1. The group meets
over the channel itself (rendezvous.py), so neither end needs a rendezvous port that anybody could write to. A request
fixes how many slots of which length follow, and both ends post them in that order. The channel tells of a peer's death
at once, when the group itself would only time out; both are then dropped and made anew together. No process has more
than a fixed number of groups (groups.py). On GPUs packing, moving and unpacking go to a stream of their own (moves.py).

The NCCL half follows torch's source and has not been run on GPUs by the authors.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from twinpool.errors import TransferError
from twinpool.workers.transfer.channel import MEET_S, Channel, Geometry, close_fds
from twinpool.workers.transfer.groups import GROUPS
from twinpool.workers.transfer.moves import side_stream
from twinpool.workers.transfer.order import Order
from twinpool.workers.transfer.pool import KvPool
from twinpool.workers.transfer.rendezvous import ChannelStore
from twinpool.workers.transfer.tcp import SERVE_S, receive_request, request_blocks

SLOT_BYTES = 16 << 20
MESSAGE_S = 4.0  # for one slot: a group whose peer hangs is released only after it
HOLDER, RECEIVER = 0, 1

# What torch reads when it makes the first communicator. Left alone its threads end the process when a peer dies, tell
# the other rank by the store, which here is the KV channel, or wait half an hour for a communicator to stand.
_NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": str(int(MEET_S)),
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}
_log = logging.getLogger(__name__)
_LOOK_S = 0.02  # how often a waiting receiver looks whether the peer still lives


class Group(Protocol):
    """Moves one slot between the two ranks."""

    def send(self, slot: torch.Tensor, tag: int, channel: Channel) -> None:
        """Send all of ``slot``; returns when it may be changed again. Raises ``TransferError``."""
        ...

    def recv(self, slot: torch.Tensor, count: int, tag: int, channel: Channel) -> None:
        """Receive ``count`` bytes to the front of ``slot``. After a ``TransferError`` never use ``slot`` again."""
        ...

    def close(self) -> None:
        """Abort what is posted; nobody waits on the group. Idempotent."""
        ...


class GlooGroup:
    """Two ranks over gloo, which listens on the address that this end of the channel has and on no other."""

    def __init__(self, channel: Channel, rank: int) -> None:
        gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack half of it
        options = gloo._Options()
        options._timeout = timedelta(seconds=MESSAGE_S)
        options._threads = 1
        options._devices = [_gloo_device(channel.sock.getsockname()[0])]
        self._store = ChannelStore(channel)  # kept: the group knows only its C++ half
        store = c10d.PrefixStore(channel.session.hex(), self._store)
        self._group = gloo(store, rank, 2, options)
        self._store.seal()

    def send(self, slot: torch.Tensor, tag: int, channel: Channel) -> None:
        """See :class:`Group`."""
        if slot.numel() > SLOT_BYTES:
            raise ValueError(f"{slot.numel()} bytes do not fit a slot: gloo would abort the receiving process")
        self._wait(self._group.send([slot], RECEIVER, tag), slot, channel)

    def recv(self, slot: torch.Tensor, count: int, tag: int, channel: Channel) -> None:
        """See :class:`Group`. All of the slot is posted: a message larger than what is posted aborts the process."""
        self._wait(self._group.recv([slot], HOLDER, tag), slot, channel)

    def close(self) -> None:
        """Nothing to do: an outstanding wait keeps the group until it times out, then it goes by itself."""

    def _wait(self, work: dist.Work, slot: torch.Tensor, channel: Channel) -> None:
        """Wait while the peer lives; gloo's own wait cannot be interrupted, so another thread has it."""
        done = threading.Event()
        errors: list[Exception] = []
        arguments = (work, done, errors, (self._group, slot))
        threading.Thread(target=_wait_for_work, args=arguments, name="kv-gloo", daemon=True).start()
        while not done.wait(_LOOK_S):
            check_peer(channel)
        if errors:
            raise TransferError(f"gloo: {errors[0]}", reason="PEER_GONE") from errors[0]


class NcclGroup:
    """Two ranks over NCCL, with few CTAs: transfers leave the GPU's multiprocessors to the model.

    Nothing blocks: the communicator is made in the background and aborted from here. A first message goes both ways
    before any block does: what cannot work (two ranks on one GPU, say) shows while another backend can be tried.
    """

    def __init__(self, channel: Channel, rank: int, device: torch.device) -> None:
        os.environ.update(_NCCL_SETTINGS)
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=MESSAGE_S)
        options.config.blocking = 0
        options.config.min_ctas, options.config.max_ctas = 1, 4
        self._closed = False
        self._store = ChannelStore(channel)  # kept: the group knows only its C++ half
        store = c10d.PrefixStore(channel.session.hex(), self._store)
        self._group = nccl(store, rank, 2, options)
        try:
            self._group._set_sequence_number_for_group()
            self._group.eager_connect_single_device(device)
            self._store.seal()
            first = torch.zeros(8, dtype=torch.uint8, device=device)
            for sender in (RECEIVER, HOLDER):
                move = self._group.send if sender == rank else self._group.recv
                self._wait(move([first], 1 - rank, 0), channel)
        except BaseException:
            self.close()
            raise

    def send(self, slot: torch.Tensor, tag: int, channel: Channel) -> None:
        """See :class:`Group`; the tag is of no use, NCCL matches by order."""
        try:
            self._wait(self._group.send([slot], RECEIVER, tag), channel)
        except RuntimeError as error:
            raise TransferError(f"NCCL: {error}", reason="PEER_GONE") from error

    def recv(self, slot: torch.Tensor, count: int, tag: int, channel: Channel) -> None:
        """See :class:`Group`; both lengths must be equal."""
        try:
            self._wait(self._group.recv([slot[:count]], HOLDER, tag), channel)
        except RuntimeError as error:
            raise TransferError(f"NCCL: {error}", reason="PEER_GONE") from error

    def close(self) -> None:
        """Abort: destroying a communicator whose peer is gone would wait for it. Takes ``MESSAGE_S`` at most."""
        if not self._closed:
            self._closed = True
            try:
                self._group.abort()
            except RuntimeError as error:
                _log.warning("NCCL: a communicator could not be aborted: %s", error)

    def _wait(self, work: dist.Work, channel: Channel) -> None:
        work.wait()  # makes the stream wait, not this thread
        event = torch.cuda.Event()
        event.record()
        deadline = time.monotonic() + MESSAGE_S
        while not event.query():
            check_peer(channel)
            if time.monotonic() > deadline:
                raise TransferError("NCCL did not deliver in time", reason="TIMEOUT")
            time.sleep(0.0002)


class CollectiveSource:
    """The receiver's end. Raises ``TransferError`` when the group cannot be made."""

    def __init__(self, channel: Channel, geometry: Geometry, fds: list[int], pool: KvPool, backend: str) -> None:
        close_fds(fds)
        self.channel = channel
        self._blocks = geometry.blocks
        self._end = GroupEnd(backend, channel, RECEIVER, pool)
        self._sequence = 0

    def fetch(self, order: Order) -> None:
        """Ask for all blocks; unpack and verify them slot by slot."""
        order.check_source(self._blocks)
        self._sequence += 1
        offset = 0
        with self._end.used():
            request_blocks(self.channel, self._sequence, order.source)
            for tag, part in enumerate(slots(order.target, order.pool.block_bytes)):
                self._end.group.recv(self._end.slot, len(part) * order.pool.block_bytes, tag, self.channel)
                order.found[offset : offset + len(part)] = order.pool.unpack(self._end.slot, part)
                offset += len(part)

    def close(self) -> None:
        """Abort the group and hang up."""
        self.channel.close()
        self._end.close()


def serve_collective(channel: Channel, pool: KvPool, backend: str) -> None:
    """Holder's end: answer requests until the receiver hangs up. Raises ``TransferError`` when it misbehaves."""
    end = GroupEnd(backend, channel, HOLDER, pool)
    try:
        while channel.wait_for_request():
            channel.deadline = time.monotonic() + SERVE_S
            with end.used():
                for tag, part in enumerate(slots(receive_request(channel, pool.blocks), pool.block_bytes)):
                    pool.pack(part, end.slot)
                    end.group.send(end.slot[: len(part) * pool.block_bytes], tag, channel)
    finally:
        end.close()


class GroupEnd:
    """One end of a group: its slot, its seat among the groups of this process, the stream that it works on.

    Raises ``TransferError`` when there is no seat or no group.
    """

    def __init__(self, backend: str, channel: Channel, rank: int, pool: KvPool) -> None:
        self._device = pool.data.device
        self._channel = channel
        self._seat = GROUPS.seat(self._evicted)
        try:
            with self._seat, side_stream(self._device):
                self.slot = make_slot(pool)
                self.group = make_group(backend, channel, rank, pool)
        except BaseException:
            self._seat.leave()
            raise

    @contextmanager
    def used(self) -> Iterator[None]:
        """While slots move. Raises ``TransferError`` when the group has been closed in favour of others."""
        with self._seat, side_stream(self._device):
            yield

    def close(self) -> None:
        """Abort the group. Idempotent."""
        self._seat.leave()
        self.group.close()

    def _evicted(self) -> None:
        self._channel.cut()
        self.group.close()


def slots(blocks: Sequence[int], block_bytes: int) -> Iterator[Sequence[int]]:
    """Which blocks go into which slot: as many as fit, in order. Both ends compute the same."""
    step = SLOT_BYTES // block_bytes
    for start in range(0, len(blocks), step):
        yield blocks[start : start + step]


def make_slot(pool: KvPool) -> torch.Tensor:
    """A slot on the pool's device. Raises ``TransferError`` when not even one block fits."""
    if pool.block_bytes > SLOT_BYTES:
        raise TransferError(f"a block of {pool.block_bytes} bytes does not fit a slot", reason="REFUSED")
    return torch.empty(SLOT_BYTES, dtype=torch.uint8, device=pool.data.device)


def make_group(backend: str, channel: Channel, rank: int, pool: KvPool) -> Group:
    """Meet the peer over the channel. Raises ``TransferError``, whatever went wrong inside torch."""
    try:
        if backend == "gloo":
            return GlooGroup(channel, rank)
        return NcclGroup(channel, rank, pool.data.device)
    except (RuntimeError, AttributeError) as error:  # AttributeError: torch was built without it
        raise TransferError(f"cannot form a {backend} group: {error}", reason="NO_CHANNEL") from error


def check_peer(channel: Channel) -> None:
    """Raises ``TransferError`` when the peer is gone or the time is over."""
    channel.arm()
    if channel.gone():
        raise TransferError("the KV peer closed the connection", reason="PEER_GONE")


@cache
def _gloo_device(address: str) -> object:
    """One gloo device serves all groups of an address."""
    return dist.ProcessGroupGloo.create_device(hostname=address)


def _wait_for_work(work: dist.Work, done: threading.Event, errors: list[Exception], keep: object) -> None:
    """Body of the waiting thread; ``keep`` is what gloo may touch until the wait is over."""
    try:
        work.wait()
    except Exception as error:
        errors.append(error)
    finally:
        done.set()
