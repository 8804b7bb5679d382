"""The other ranks of a worker, as its first one has them: child processes, each at the end of a socket pair.

They do nothing by themselves: steps, checksums and pulls are told them. A rank that ends, for whatever reason, ends the
worker: ``lost`` says which. When the first rank ends the sockets close, and the others end by that.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from itertools import count
from typing import NoReturn, TypeVar

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, EngineError, TransferError, TwinpoolError
from twinpool.workers.engine.base import Row
from twinpool.workers.ranks import messages
from twinpool.workers.ranks.kv import Identity, RankPulled
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.folder import PrivateFolder

SUM_SHARE = 0.8  # of the time in which the router hears that a worker lives: no wait for checksums may take longer
END_S = 5.0  # for a rank to end by itself
SEND_S = 5  # for a rank to take in more of a message
LATE_S = 5.0  # for a rank to say that the time of a pull ran out: it waits for what is being written
CAUSE_S = 2.0  # a rank that ends breaks the steps of all others: it is heard of within so long, and named
_MODULE = "twinpool.workers.ranks.main"

Answer = messages.FromRank
AnswerT = TypeVar("AnswerT", bound=messages.Message)


class RankLost(EngineError):
    """A rank has ended, and the worker ends with it."""

    default_reason = "RANK_LOST"


class _Member:
    """One other rank: its process, and the thread that hears it."""

    def __init__(self, rank: int, hear: Callable[[int, Answer], None], gone: Callable[[int, str], None]) -> None:
        self.rank = rank
        self._hear, self._gone = hear, gone
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair()
        # Of sends only: the thread below hears the same socket, and waits as long as there is nothing to hear.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_S, 0))
        # Blocked signals stay blocked in the child: it ends with the first rank, which gets the same signals.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            command = [sys.executable, "-m", _MODULE, str(theirs.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._thread = threading.Thread(target=self._listen, name=f"rank-{rank}", daemon=True)
        self._thread.start()

    def send(self, message: messages.ToRank) -> None:
        """Raises RankLost when it is gone, or hangs: it is then ended, for it has but a part of the message."""
        try:
            with self._lock:
                self._socket.sendall(messages.encode(message))
        except BlockingIOError as error:
            self.kill()
            raise RankLost(f"rank {self.rank} of this worker hangs: it takes in no messages") from error
        except OSError as error:
            raise RankLost(f"rank {self.rank} of this worker is gone") from error

    def _listen(self) -> None:
        with suppress(ValueError):
            while (message := messages.receive(self._socket)) is not None:
                self._hear(self.rank, message)
        self._gone(self.rank, self._ending())

    def _ending(self) -> str:
        try:
            status = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "does not answer"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def kill(self) -> None:
        """End the process at once: it hangs, and must not write to KV again if it ever goes on (SIGCONT)."""
        self.process.kill()

    def close(self) -> None:
        """End the process. Idempotent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._thread.join()
        self._socket.close()


class Crew:
    """Starts the other ranks at once; implements ``OtherRanks`` of the engine. Belongs to the loop it is made in."""

    def __init__(self, config: ClusterConfig, ranks: int) -> None:
        loop = asyncio.get_running_loop()
        self.others = range(1, ranks)
        self.lost: asyncio.Future[NoReturn] = loop.create_future()  # RankLost or ConfigError, once a rank has ended
        self.addresses: list[dict[str, str]] = []
        self._loop = loop
        self._sum_s = (config.link.dead_after_ms - config.link.heartbeat_ms) / 1000 * SUM_SHARE
        self._folder = PrivateFolder(None)
        self.meeting = self._folder.path / "ranks"
        self._why: TwinpoolError | None = None
        self._is_lost = threading.Event()
        self._closing = False
        self._ids = count()
        self._lock = threading.Lock()
        self._answers: dict[int, Future[Answer]] = {}
        self._phases = {rank: asyncio.Queue[Answer]() for rank in self.others}
        self._members = [_Member(rank, self._hear, self._gone) for rank in self.others]
        text = config.model_dump_json(by_alias=True).encode()
        for member in self._members:
            member.send(messages.Load(config=text, rank=member.rank, ranks=ranks))

    # --- start ----------

    async def loaded(self) -> int:
        """The blocks that all ranks have room for, once all have their share of the model."""
        return min(answer.blocks for answer in await self._phase(messages.Loaded))

    async def open(self, blocks: int, identity: Identity) -> None:
        """Have them allocate and serve so many blocks; then they wait for the first rank at ``meeting``."""
        for member in self._members:
            member.send(messages.Open(blocks=blocks, file=str(self.meeting), **identity._asdict()))
        self.addresses = [answer.addresses for answer in await self._phase(messages.Opened)]

    async def ready(self) -> None:
        """All have met and arranged their weights."""
        await self._phase(messages.Ready)  # the meeting's file stays: NCCL goes back to it at the first all-reduce

    async def _phase(self, kind: type[AnswerT]) -> list[AnswerT]:
        """One answer of this kind from each rank, in order. Raises what ``lost`` has."""
        answers = asyncio.gather(*(queue.get() for queue in self._phases.values()))
        await asyncio.wait((answers, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            answers.cancel()
            self.lost.result()
        said: list[AnswerT] = []
        for answer in answers.result():
            assert isinstance(answer, kind), f"a rank says {answer}"
            said.append(answer)
        return said

    # --- work ----------

    def step(self, rows: Sequence[Row]) -> None:
        """See ``OtherRanks``."""
        tokens = [messages.column("I", row.tokens) for row in rows]
        tables = [messages.column("I", row.table) for row in rows]
        self._tell(messages.Step(tokens=tokens, starts=[row.start for row in rows], tables=tables))

    def out_of_step(self, why: str) -> None:
        """See ``OtherRanks``."""
        self._lose_unless_known(RankLost(f"the ranks of this worker are out of step, because a step failed: {why}"))

    def ask_sums(self, blocks: Sequence[int], ranks: Sequence[int]) -> dict[int, Future[Answer]]:
        """Have ``ranks`` sum the heads that they hold of each block. Raises RankLost."""
        column = messages.column("I", blocks)
        return {rank: self._ask(rank, messages.Sum(id=next(self._ids), blocks=column)) for rank in ranks}

    def sums(self, asked: dict[int, Future[Answer]]) -> list[list[int]]:
        """What :meth:`ask_sums` asked for, waited for: the worker says no word meanwhile. Raises RankLost."""
        found, end = [], time.monotonic() + self._sum_s
        for rank, future in asked.items():
            try:
                answer = future.result(max(0.0, end - time.monotonic()))
            except FutureTimeout:
                raise self._hangs(rank, f"no checksums after {self._sum_s:g} s") from None
            assert isinstance(answer, messages.Sums)
            found.append(messages.values("Q", answer.sums))
        return found

    async def pull(
        self, rank: int, peer: Peer, source: Sequence[int], target: Sequence[int], timeout_s: float
    ) -> RankPulled:
        """Have one rank pull; see ``RankKv.pull``."""
        fetch = messages.Fetch(
            id=next(self._ids), worker=peer.worker, epoch=peer.epoch, secret=peer.secret, addresses=peer.addresses,
            source=messages.column("I", source), target=messages.column("I", target), timeout_s=timeout_s,
        )  # fmt: skip
        try:
            answer = await self._answer(rank, fetch)
        except RankLost as error:
            raise TransferError(error.message, reason=error.reason) from error
        if isinstance(answer, messages.NotFetched):
            raise TransferError(answer.message, reason=answer.reason)
        assert isinstance(answer, messages.Fetched)
        return RankPulled(answer.backend, answer.moved, answer.seconds, messages.values("Q", answer.sums))

    async def _answer(self, rank: int, fetch: messages.Fetch) -> Answer:
        """Raises RankLost. When cancelled it returns once the rank writes no more: it has ended, or is made to."""
        done = asyncio.wrap_future(self._ask(rank, fetch))
        limit_s = fetch.timeout_s + LATE_S
        late = self._loop.call_later(limit_s, self._hangs, rank, f"no answer to a pull after {limit_s:g} s")
        done.add_done_callback(lambda _: late.cancel())
        try:
            await asyncio.wait((done,))
        except asyncio.CancelledError:
            with suppress(RankLost):
                self._members[rank - 1].send(messages.Stop(id=fetch.id))
            await _settled(done)
            raise
        return done.result()

    def drop(self, worker: str) -> None:
        """See ``KVTransfer``."""
        with suppress(RankLost):
            self._tell(messages.Forget(worker=worker))

    def close(self) -> None:
        """End all ranks; whatever waits for them fails. Idempotent."""
        self._closing = True
        for member in self._members:
            member.close()
        self._folder.remove()
        if self.lost.done():
            self.lost.exception()  # seen: nothing to warn of

    def _tell(self, message: messages.ToRank) -> None:
        if self._why is not None:
            raise self._why
        for member in self._members:
            member.send(message)

    def _ask(self, rank: int, question: messages.Sum | messages.Fetch) -> Future[Answer]:
        future: Future[Answer] = Future()
        with self._lock:
            if self._why is not None:
                raise self._why
            self._answers[question.id] = future
        self._members[rank - 1].send(question)
        return future

    # --- what they say (in their threads) ----------

    def _hear(self, rank: int, message: Answer) -> None:
        if isinstance(message, messages.Broken):
            kind = ConfigError if message.config else RankLost
            self._lose_unless_known(kind(f"rank {rank} of this worker: {message.message}"))
        elif isinstance(message, messages.Sums | messages.Fetched | messages.NotFetched):
            with self._lock:
                future = self._answers.pop(message.id, None)
            if future is not None:
                future.set_result(message)
        else:
            self._loop.call_soon_threadsafe(self._phases[rank].put_nowait, message)

    def _gone(self, rank: int, how: str) -> None:
        self._lose(RankLost(f"rank {rank} of this worker {how}; the worker ends with it"))

    def _hangs(self, rank: int, what: str) -> RankLost:
        """Lose a rank that does not answer."""
        self._members[rank - 1].kill()
        why = RankLost(f"rank {rank} of this worker hangs: {what}; the worker ends with it")
        self._lose(why)
        return why

    def _lose_unless_known(self, why: TwinpoolError) -> None:
        if not self._is_lost.wait(CAUSE_S):
            self._lose(why)

    def _lose(self, why: TwinpoolError) -> None:
        with self._lock:
            if self._why is None:
                self._why = why
            self._is_lost.set()
            waiting, self._answers = self._answers, {}
        for future in waiting.values():
            future.set_exception(self._why)
        if not self._closing:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._report_loss)

    def _report_loss(self) -> None:
        if not self.lost.done() and self._why is not None:
            self.lost.set_exception(self._why)


async def _settled(done: asyncio.Future[Answer]) -> None:
    """Return when the rank writes no more, however often we are cancelled meanwhile."""
    while not done.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait((done,))
    if not done.cancelled():
        done.exception()  # seen: nothing to warn of
