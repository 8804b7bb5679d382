"""A rank of a worker, other than the first: does what that tells it over the socket it was started with, and no more.

``python -m twinpool.workers.ranks.main DESCRIPTOR``. It ends when the socket closes, whatever it is doing: the first
rank is then gone, or has closed it to stop us.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, TransferError, TwinpoolError
from twinpool.workers.engine.base import Row
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.ranks import messages
from twinpool.workers.ranks.kv import Identity, RankKv
from twinpool.workers.ranks.share import NoSampler, RankModel, load_rank, open_rank_pool, start_engine
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.service import transfer_config

CLOSE_S = 3.0

log = logging.getLogger("twinpool.rank")


class Rank:
    """Handles messages as they come, each in a task of its own; steps run in their order."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._tasks: set[asyncio.Task[None]] = set()
        self._fetches: dict[int, asyncio.Task[None]] = {}
        self._kv: RankKv | None = None
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, message: messages.ToRank) -> None:
        """Start what a message asks for."""
        match message:
            case messages.Step():
                self._spawn(self._step(message))
            case messages.Sum():
                self._spawn(self._sum(message))
            case messages.Fetch():
                self._fetches[message.id] = self._spawn(self._fetch(message))
            case messages.Stop():
                if message.id in self._fetches:
                    self._fetches[message.id].cancel()
            case messages.Forget():
                self._opened.drop(message.worker)
            case messages.Load():
                self._spawn(self._load(message))
            case messages.Open():
                self._spawn(self._open(message))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None or self.broken.done():
            return
        error = task.exception()
        message = error.message if isinstance(error, TwinpoolError) else f"{type(error).__name__}: {error}"
        self._send(messages.Broken(message=message, config=isinstance(error, ConfigError)))
        self.broken.set_result(None)

    def _send(self, message: messages.FromRank) -> None:
        self._writer.write(messages.encode(message))

    async def _load(self, message: messages.Load) -> None:
        self._config = ClusterConfig.model_validate_json(message.config)
        level = self._config.log_level.upper()
        logging.basicConfig(level=level, format=f"%(asctime)s %(levelname)s rank {message.rank} %(name)s: %(message)s")
        self._model: RankModel = await asyncio.to_thread(load_rank, self._config, message.rank, message.ranks)
        self._send(messages.Loaded(blocks=self._model.room))

    async def _open(self, message: messages.Open) -> None:
        model = self._model
        pool: HeadPool = await asyncio.to_thread(open_rank_pool, model, message.blocks)
        identity = Identity(message.worker, message.epoch, message.secret)
        self._kv = RankKv(pool, model.rank, model.ranks, transfer_config(self._config), identity)
        self._send(messages.Opened(addresses=await self._kv.start()))
        self._engine: TorchEngine = await asyncio.to_thread(
            start_engine, self._config, model, pool, Path(message.file), NoSampler()
        )
        self._send(messages.Ready())

    @property
    def _opened(self) -> RankKv:
        assert self._kv is not None, "blocks are asked for once they are open"
        return self._kv

    async def _step(self, message: messages.Step) -> None:
        columns = zip(message.tokens, message.starts, message.tables, strict=True)
        rows = [
            Row(messages.values("I", tokens), start, messages.values("I", table), None)
            for tokens, start, table in columns
        ]
        await self._engine.run(rows)

    async def _sum(self, message: messages.Sum) -> None:
        sums = await asyncio.to_thread(self._opened.checksums, messages.values("I", message.blocks))
        self._send(messages.Sums(id=message.id, sums=messages.column("Q", sums)))

    async def _fetch(self, message: messages.Fetch) -> None:
        peer = Peer(message.worker, message.epoch, message.secret, message.addresses)
        source, target = messages.values("I", message.source), messages.values("I", message.target)
        answer: messages.FromRank
        try:
            pulled = await self._opened.pull(peer, source, target, message.timeout_s)
            answer = messages.Fetched(
                id=message.id, backend=pulled.backend, moved=pulled.bytes, seconds=pulled.seconds,
                sums=messages.column("Q", pulled.sums),
            )  # fmt: skip
        except TransferError as error:
            answer = messages.NotFetched(id=message.id, reason=error.reason, message=error.message)
        except asyncio.CancelledError:
            answer = messages.NotFetched(id=message.id, reason="CANCELLED", message="nobody wants it any more")
        del self._fetches[message.id]
        self._send(answer)

    async def close(self) -> None:
        """Say what is still to be said, and leave no socket behind."""
        with suppress(ConnectionError):
            await self._writer.drain()
        if self._kv is not None:
            await self._kv.close()


async def serve(sock: socket.socket) -> None:
    """Do what the first rank says until it is gone, or this one broke."""
    reader, writer = await asyncio.open_connection(sock=sock)
    rank = Rank(writer)
    while not rank.broken.done():
        reading = asyncio.create_task(messages.read(reader))
        await asyncio.wait((reading, rank.broken), return_when=asyncio.FIRST_COMPLETED)
        message = reading.result() if reading.done() else None
        if message is None:
            break
        rank.take(message)
    await asyncio.wait_for(rank.close(), CLOSE_S)


async def _main() -> None:
    """Ends without waiting for threads: one may be in an all-reduce that nobody joins any more."""
    try:
        await serve(socket.socket(fileno=int(sys.argv[1])))
    except Exception:
        log.exception("this rank ended")
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(_main())
