"""Pulls of KV blocks into reservations: one task a pull, and never a freed block that something still writes to."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable

from twinpool.blockhash import tokens_from_bytes
from twinpool.errors import TransferError
from twinpool.proto import frames
from twinpool.workers.scheduler import Scheduler
from twinpool.workers.transfer.base import KVTransfer, Peer

MESSAGE_CHARS = 1000  # of an error: torch's run to pages, and a frame takes 4,096


class Receiver:
    """Runs the pulls of one worker.

    ``received(attempt)`` is called after each verified one, ``quiet()`` when none runs or is being stopped any more.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        transfer: KVTransfer,
        send: Callable[[frames.Frame], None],
        received: Callable[[int], None],
        quiet: Callable[[], None],
    ) -> None:
        self._scheduler = scheduler
        self._transfer = transfer
        self._send = send
        self._received = received
        self._quiet = quiet
        self._pulls: dict[int, set[asyncio.Task[None]]] = {}
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def active(self) -> bool:
        """Whether any pull runs or is being stopped."""
        return bool(self._pulls or self._endings)

    def pull(self, frame: frames.Pull) -> None:
        """Start one; the answer is BlocksVerified or BlocksBad. A pull for nothing reserved is ignored."""
        if self._scheduler.holding(frame.attempt) is None:
            return  # cancelled while the frame was under way
        source = tokens_from_bytes(frame.blocks).tolist()
        sums = array("Q")
        sums.frombytes(frame.sums)
        if len(sums) != len(source):
            raise ValueError("the columns of Pull differ in length")
        try:
            target = self._scheduler.targets(frame.attempt, frame.first, len(source))
        except ValueError as error:  # this attempt is at odds with its router; others need not suffer
            self._send(frames.BlocksBad(attempt=frame.attempt, reason="RANGE", message=str(error)))
            return
        task = asyncio.create_task(self._run(frame, source, target, sums.tolist()))
        self._pulls.setdefault(frame.attempt, set()).add(task)
        task.add_done_callback(lambda done: self._done(frame.attempt, done))

    async def _run(self, frame: frames.Pull, source: list[int], target: list[int], sums: list[int]) -> None:
        peer = Peer(frame.peer, frame.peer_epoch, frame.secret, frame.addresses)
        try:
            pulled = await self._transfer.pull(peer, source, target, sums, frame.timeout_s)
        except TransferError as error:
            message = error.message[:MESSAGE_CHARS]
            self._send(frames.BlocksBad(attempt=frame.attempt, reason=error.reason, message=message))
            return
        if pulled.bad:
            message = f"{len(pulled.bad)} of {len(source)} blocks from {frame.peer} do not match their checksums"
            self._send(frames.BlocksBad(attempt=frame.attempt, reason="CHECKSUM", message=message))
            return
        self._keep_sums(frame, target, sums)
        self._scheduler.seal_received(frame.attempt, frame.first, len(source))
        self._send(
            frames.BlocksVerified(
                attempt=frame.attempt,
                first=frame.first,
                count=len(source),
                bytes=pulled.bytes,
                seconds=pulled.seconds,
                backend=pulled.backend,
            )
        )
        self._received(frame.attempt)

    def _keep_sums(self, frame: frames.Pull, target: list[int], sums: list[int]) -> None:
        """Whoever pulls these from here needs them; the last block of a prompt may still grow."""
        holding = self._scheduler.holding(frame.attempt)
        full = 0 if holding is None else len(holding.hashes) - frame.first
        known = self._scheduler.pool.sums
        for block, value in zip(target[: max(0, full)], sums, strict=False):
            known[block] = value

    def _done(self, attempt: int, task: asyncio.Task[None]) -> None:
        tasks = self._pulls.get(attempt)
        if tasks is not None:
            tasks.discard(task)
            if not tasks:
                del self._pulls[attempt]
        self._settled()
        if not task.cancelled() and task.exception() is not None:
            self._send(frames.BlocksBad(attempt=attempt, reason="INTERNAL", message="see the worker's log"))
            task.result()  # an unexpected error must reach the loop's handler too

    def stop(self, attempt: int, then: Callable[[], object]) -> None:
        """Cancel the attempt's pulls; ``then`` is called once none of them writes any more (now if there are none)."""
        tasks = self._pulls.get(attempt)
        if not tasks:
            then()
            return
        for task in tasks:
            task.cancel()
        ending = asyncio.create_task(self._end(set(tasks), then))
        self._endings.add(ending)
        ending.add_done_callback(self._ended)

    def _ended(self, ending: asyncio.Task[None]) -> None:
        self._endings.discard(ending)
        self._settled()

    def _settled(self) -> None:
        if not self.active:
            self._quiet()

    @staticmethod
    async def _end(tasks: set[asyncio.Task[None]], then: Callable[[], object]) -> None:
        await asyncio.wait(tasks)
        then()
