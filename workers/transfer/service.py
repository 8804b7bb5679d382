"""``KVService``: what a worker starts to give and take KV blocks; owns the server, the lanes and every socket."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, TransferError
from twinpool.workers.transfer.base import WHOLE, Peer, Pulled
from twinpool.workers.transfer.channel import Geometry, Welcomer
from twinpool.workers.transfer.folder import PrivateFolder
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.lane import LOCAL, SOURCES, Job, Lane
from twinpool.workers.transfer.order import Order
from twinpool.workers.transfer.pool import HostPool, KvPool
from twinpool.workers.transfer.server import KvServer
from twinpool.workers.transfer.share import SHARES

BACKENDS = {"cpu": ("shm", "tcp", "gloo"), "cuda": ("cuda_ipc", "nccl", "tcp")}
_JOIN_S = 2.0


@dataclass(frozen=True, slots=True)
class TransferConfig:
    """How KV moves. Nothing is offered or used that is not in ``backends``, the most wanted first."""

    backends: tuple[str, ...] = ("shm", "tcp")
    listen: str = "127.0.0.1"  # address of the interface, a private one; of no use to shm and cuda_ipc
    port: int = 0  # 0: the system chooses
    runtime_dir: Path | None = None  # where the Unix socket's private folder goes; None: the system's temporary folder


def transfer_config(config: ClusterConfig) -> TransferConfig:
    """What the cluster's configuration says; by default the best for the device first."""
    device = config.worker.device.partition(":")[0]
    wanted = config.transfer.backend
    backends = BACKENDS[device] if wanted == "auto" else (wanted,)
    return TransferConfig(backends=backends, listen=config.transfer.listen)


class KVService:
    """One worker's :class:`~twinpool.workers.transfer.base.KVTransfer`; borrows the pool.

    Call :meth:`start` once, from the event loop that will use it. The constructor raises ``ConfigError`` for backends
    that are unknown or do not suit the pool.
    """

    def __init__(
        self, pool: KvPool, config: TransferConfig, worker: str, epoch: int, secret: bytes | None = None
    ) -> None:
        """``secret``: that of the worker, where it is not the only rank; empty: a new one."""
        _check_backends(pool, config.backends)
        self.addresses: dict[str, str] = {}
        self.secret = secret or secrets.token_bytes(32)
        self.worker, self.epoch = worker, epoch
        self._pool, self._config = pool, config
        held = (pool.held.start, pool.held.stop) if isinstance(pool, HeadPool) else WHOLE
        geometry = Geometry(pool.blocks, pool.block_bytes, pool.sum_kind, held)
        welcomer = Welcomer(self.secret, epoch, geometry, config.backends)
        self._server = KvServer(pool, welcomer, pool.fd if isinstance(pool, HostPool | HeadPool) else None)
        self._folder: PrivateFolder | None = None
        self._lanes: dict[tuple[str, tuple[int, int]], Lane] = {}  # by worker and heads
        self._ended: list[Lane] = []  # stopped, their threads not yet seen to end
        self._closed = False

    async def start(self) -> None:
        """Listen; ``addresses`` is filled when it returns. Raises ``ConfigError`` when an address cannot be had."""
        try:
            local = [name for name in self._config.backends if name in LOCAL]
            if local:
                self.addresses |= dict.fromkeys(local, self._listen_unix())
            over_ip = [name for name in self._config.backends if name not in LOCAL]
            if over_ip:
                address = self._listen_tcp()
                self.addresses |= dict.fromkeys(over_ip, address)
        except OSError as error:
            await self.close()
            raise ConfigError(f"cannot listen for KV transfers: {error}") from error

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int] | None, timeout_s: float
    ) -> Pulled:
        """See ``KVTransfer``. ``seconds`` of the result is moving and verifying, without connecting or waiting before.

        Raises ValueError when the lists do not fit each other or our pool. ``sums`` is None where the caller verifies.
        """
        order = Order(self._part(peer), source, target, sums, timeout_s)
        if self._closed:
            raise TransferError("KV transfer is shut down", reason="PEER_GONE")
        if not source:
            return Pulled("", 0, 0.0, ())
        job = Job(peer, order, Future())
        self._offer(job)
        done = asyncio.wrap_future(job.future)
        try:
            await asyncio.wait([done], timeout=timeout_s)
        except asyncio.CancelledError:
            job.order.abandoned = True
            await _give_up(job, done)
            raise
        if not done.done():
            await _give_up(job, done)
        if done.cancelled():
            raise TransferError("the time ran out before this KV transfer's turn came", reason="TIMEOUT")
        return done.result()

    def drop(self, worker: str) -> None:
        """Forget a peer that is gone: closes its channel, fails its pulls. Idempotent."""
        for key in [key for key in self._lanes if key[0] == worker]:
            lane = self._lanes.pop(key)
            lane.stop()
            self._ended.append(lane)

    async def close(self) -> None:
        """Stop serving, fail all pulls, close everything. Idempotent."""
        self._closed = True
        for worker in {worker for worker, _ in self._lanes}:
            self.drop(worker)
        await asyncio.to_thread(self._end_threads)
        if self._folder is not None:
            self._folder.remove()

    def _end_threads(self) -> None:
        self._server.close()
        for lane in self._ended:
            lane.join(_JOIN_S)

    def _part(self, peer: Peer) -> KvPool:
        """The blocks to fill: of a pool by heads, those that the peer is to send."""
        return self._pool.part(range(*peer.heads)) if isinstance(self._pool, HeadPool) else self._pool

    def _offer(self, job: Job) -> None:
        key = (job.peer.worker, job.peer.heads)
        lane = self._lanes.get(key)
        if lane is None or not lane.offer(job):
            lane = self._lanes[key] = Lane(job.order.pool, self._config.backends)
            lane.offer(job)
        self._ended = [ended for ended in self._ended if ended.alive]

    def _listen_unix(self) -> str:
        self._folder = PrivateFolder(self._config.runtime_dir)
        path = self._folder.path / "kv.sock"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _bind(sock, str(path))
        path.chmod(0o600)
        self._server.listen(sock)
        return str(path)

    def _listen_tcp(self) -> str:
        version6 = ":" in self._config.listen
        sock = socket.socket(socket.AF_INET6 if version6 else socket.AF_INET, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(sock, (self._config.listen, self._config.port))
        self._server.listen(sock)
        host, port = sock.getsockname()[:2]
        return f"[{host}]:{port}" if version6 else f"{host}:{port}"


async def _give_up(job: Job, done: asyncio.Future[Pulled]) -> None:
    """Returns when the lane will not touch the job's target any more, however often we are cancelled meanwhile."""
    job.future.cancel()
    cancelled = False
    while not done.done():
        try:
            await asyncio.wait([done])
        except asyncio.CancelledError:
            cancelled = True
    if not done.cancelled():
        done.exception()  # seen: nothing to warn of
    if cancelled:
        raise asyncio.CancelledError


def _bind(sock: socket.socket, address: str | tuple[str, int]) -> None:
    try:
        sock.bind(address)
    except OSError:
        sock.close()
        raise


def _check_backends(pool: KvPool, backends: Sequence[str]) -> None:
    unknown = [name for name in backends if name not in SOURCES]
    if unknown or not backends:
        raise ConfigError(f"KV backends {unknown or 'are missing'}: choose among {', '.join(SOURCES)}")
    shares = pool.data.device.type in SHARES and not isinstance(pool, HostPool)
    if "shm" in backends and (not isinstance(pool, HostPool | HeadPool) or pool.fd is None):
        raise ConfigError("the KV backend shm needs KV in host memory")
    if "nccl" in backends and not pool.data.is_cuda:
        raise ConfigError("the KV backend nccl needs KV on a GPU")
    if "cuda_ipc" in backends and not shares:
        raise ConfigError("the KV backend cuda_ipc needs KV on a GPU")
