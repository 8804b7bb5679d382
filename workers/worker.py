"""One worker: what the router asks for goes into the scheduler, steps go to the engine, news go back to the router.

All state lives on one event loop. The engine computes in a thread of its own and KV moves in others; they meet this
loop only through awaited results, so nothing here needs a lock, and the whole worker runs on a virtual clock too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twinpool import blockhash
from twinpool.blockhash import tokens_from_bytes
from twinpool.errors import TwinpoolError
from twinpool.proto import frames
from twinpool.tokenizer import Tokenizer
from twinpool.workers.announce import Sums, blocks_ready, lend
from twinpool.workers.engine.base import Engine, Row, Sampled
from twinpool.workers.leases import LeaseTable
from twinpool.workers.outbox import TokenOutbox
from twinpool.workers.output import Output
from twinpool.workers.receiver import MESSAGE_CHARS, Receiver
from twinpool.workers.reporter import Decoded, Reporter
from twinpool.workers.scheduler import Chunk, Mode, Ready, Scheduler, Sequence, Step
from twinpool.workers.step_log import StepLog
from twinpool.workers.transfer.base import KVTransfer

log = logging.getLogger("twinpool.worker")


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is put together from."""

    engine: Engine
    scheduler: Scheduler
    sums: Sums
    transfer: KVTransfer
    tokenizer: Tokenizer


class Worker:
    """See the module's docstring. ``send`` queues a frame, ``flush`` writes what is queued; both never raise."""

    def __init__(
        self,
        parts: Parts,
        send: Callable[[frames.Frame], None],
        flush: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._clock = clock  # not the loop's own: uvloop's has whole milliseconds
        self._scheduler = parts.scheduler
        self._info = parts.engine.info
        self._send = send
        self._flush = flush
        self._loop = asyncio.get_running_loop()
        self._leases = LeaseTable()
        self._lease_timer: asyncio.TimerHandle | None = None
        self._outbox = TokenOutbox(send)
        self._work = asyncio.Event()
        self._receiver = Receiver(parts.scheduler, parts.transfer, send, self._received, self._work.set)
        self._reporter = Reporter(parts.scheduler, send, self.idle, clock)
        self._awaiting: dict[int, Sequence] = {}  # Decode came, blocks are still on their way
        self._misjudged: set[int] = set()  # the router predicted another cached prefix, and has not heard yet
        self._roots: dict[str, bytes] = {}
        self._step_s = 0.0
        self._steps = 0
        self._busy = False
        self._draining = False
        self.step_log: StepLog | None = None  # of whoever starts the worker
        self.roles: tuple[str, ...] = ()  # set by the router; empty: those of the Hello
        self.drained = asyncio.Event()  # set once a Drain was asked for and nothing is left
        self._handlers: dict[type, Callable[[Any], None]] = {
            frames.Welcome: self._welcome, frames.Reserve: self._reserve, frames.Release: self._release,
            frames.Renew: self._renew, frames.Prefill: self._prefill, frames.Pull: self._pull,
            frames.Decode: self._decode, frames.Cancel: self._cancel, frames.Ack: self._ack,
            frames.Lend: self._lend, frames.Drain: self._drain, frames.SetRole: self._set_role,
            frames.Snapshot: self._snapshot, frames.Yield: self._yield,
        }  # fmt: skip

    # --- what the router says ----------

    def take(self, frame: frames.Frame) -> None:
        """A frame from the router. Raises ValueError for one that is not for workers."""
        handler = self._handlers.get(type(frame))
        if handler is None:
            raise ValueError(f"{type(frame).__name__} is not for workers")
        handler(frame)
        self._reporter.soon()

    def reset(self) -> None:
        """The link is gone: what the old router asked for is void, the prefix cache stays."""
        for attempt in self._leases.expired(float("inf")):
            self._forget(attempt)
        self._draining = False
        self._outbox.reset()
        self._reporter.stop()

    def _welcome(self, frame: frames.Welcome) -> None:
        self._reporter.start(frame.heartbeat_s)

    def _key(self, salt: str) -> bytes:
        key = self._roots.get(salt)
        if key is None:
            key = blockhash.root(self._info.fingerprint, self._info.block_size, self._info.dtype, salt)
            if len(self._roots) < 10_000:
                self._roots[salt] = key
        return key

    def _grant(self, attempt: int, lease_s: float) -> None:
        self._leases.grant(attempt, self._clock(), lease_s)
        if self._lease_timer is None:
            self._lease_timer = self._loop.call_later(lease_s, self._reap)

    def _reap(self) -> None:
        """Free what nobody renewed: the router lost interest without saying so."""
        self._lease_timer = None
        for attempt in self._leases.expired(self._clock()):
            log.warning("the lease of attempt %d ran out", attempt)
            self._forget(attempt)
            self._send(frames.Failed(attempt=attempt, reason="LEASE", message="the lease ran out"))
        expiry = self._leases.next_expiry()
        if expiry is not None:
            self._lease_timer = self._loop.call_later(max(0.0, expiry - self._clock()), self._reap)

    def _reserve(self, frame: frames.Reserve) -> None:
        reusable = tokens_from_bytes(frame.prompt)[:-1]  # the last token's block always moves, so it needs a place
        hashes = blockhash.block_hashes(self._key(frame.salt), reusable, self._info.block_size)
        held = self._scheduler.reserve(frame.attempt, hashes, frame.blocks, frame.keep)
        if held is None:
            self._send(frames.NoRoom(attempt=frame.attempt, free=self._scheduler.pool.free_blocks))
            return
        self._grant(frame.attempt, frame.lease_s)
        self._send(frames.Reserved(attempt=frame.attempt, held=held))

    def _lend(self, frame: frames.Lend) -> None:
        answer = lend(frame, self._scheduler, self._parts.sums)
        if answer.blocks:
            self._grant(frame.attempt, frame.lease_s)
        self._send(answer)

    def _renew(self, frame: frames.Renew) -> None:
        now = self._clock()
        for attempt in tokens_from_bytes(frame.attempts):
            self._leases.renew(attempt, now, frame.lease_s)

    def _release(self, frame: frames.Release) -> None:
        self._forget(frame.attempt)

    def _cancel(self, frame: frames.Cancel) -> None:
        if frame.suspect:
            self._distrust(frame.attempt)
        self._forget(frame.attempt)

    def _yield(self, frame: frames.Yield) -> None:
        sequence = self._scheduler.sequence(frame.attempt)
        if sequence is None or sequence.cancelled:
            return  # it has ended: that is on its way
        self._forget(frame.attempt)
        self._send(frames.Preempted(attempt=frame.attempt))

    def _distrust(self, attempt: int) -> None:
        """Take blocks that changed since they were summed out of the cache, else the next attempt meets them again."""
        owner = self._scheduler.holding(attempt) or self._scheduler.sequence(attempt)
        table = owner.table if owner is not None else []
        known = self._scheduler.pool.sums
        summed = [index for index, block in enumerate(table) if known[block] is not None]
        found = self._parts.sums.checksums([table[index] for index in summed]) if summed else []
        for index, value in zip(summed, found, strict=True):
            block = table[index]
            if known[block] != value:
                log.error("KV block %d changed in memory: it and what follows it leave the cache", block)
                self._scheduler.pool.unseal(table[index:])
                return

    def _forget(self, attempt: int) -> None:
        """Free everything of an attempt, as soon as nothing writes to its blocks any more. Idempotent."""
        self._leases.release(attempt)
        self._awaiting.pop(attempt, None)
        self._misjudged.discard(attempt)
        self._outbox.drop(attempt)
        self._receiver.stop(attempt, lambda: self._scheduler.cancel(attempt))
        self._work.set()
        self._reporter.soon()

    def _prefill(self, frame: frames.Prefill) -> None:
        """A fetch for it that still runs is late, and writes to the reservation that is used up now: stop it before."""
        reserved = frame.attempt in self._leases
        self._receiver.stop(frame.attempt, lambda: self._begin(frame, reserved))

    def _begin(self, frame: frames.Prefill, reserved: bool) -> None:
        if reserved and frame.attempt not in self._leases:
            return  # cancelled while a fetch was stopped
        output = self._output(frame.attempt, frame.sequence)
        mode = Mode.LOCAL if frame.decode else Mode.PREFILL
        sequence = self._sequence(output, frame.sequence, mode, frame.transfer)
        if not self._scheduler.add(sequence, self._clock()):
            self._send(frames.NoRoom(attempt=frame.attempt, free=self._scheduler.pool.free_blocks))
            return
        self._grant(frame.attempt, frame.lease_s)
        if sequence.cached != frame.cached:
            self._misjudged.add(frame.attempt)
        ready = self._scheduler.announce(sequence)
        if ready is not None:
            self._announce(ready)
        self._work.set()
        self._reporter.soon()

    def _decode(self, frame: frames.Decode) -> None:
        if frame.attempt not in self._leases:
            return  # it ran out while the frame was under way
        output = self._output(frame.attempt, frame.sequence)
        self._awaiting[frame.attempt] = self._sequence(output, frame.sequence, Mode.DECODE, transfer=False)
        self._received(frame.attempt)

    def _output(self, attempt: int, sequence: frames.Sequence) -> Output:
        return Output(attempt, sequence, self._key(sequence.salt), self._parts.tokenizer, self._info.eos_ids)

    def _sequence(self, output: Output, frame: frames.Sequence, mode: Mode, transfer: bool) -> Sequence:
        return Sequence(
            attempt=output.attempt,
            length=len(output.tokens),
            hashes=output.hashes(self._info.block_size),
            mode=mode,
            itl_s=frame.itl_s,
            rank=frame.rank,
            transfer=transfer,
            payload=output,
            keep=frame.keep,
        )

    def _pull(self, frame: frames.Pull) -> None:
        if frame.attempt in self._leases:  # else its blocks are free, or will be when earlier pulls have stopped
            self._receiver.pull(frame)

    def _received(self, attempt: int) -> None:
        """Blocks came. Start decoding if every one is verified and the router has said how to go on."""
        self._reporter.soon()  # they are in the prefix cache now
        sequence = self._awaiting.get(attempt)
        holding = self._scheduler.holding(attempt)
        if sequence is None or holding is None:
            return
        if holding.received * self._info.block_size >= sequence.length - 1:
            del self._awaiting[attempt]
            self._scheduler.start_decode(sequence, self._clock())
            self._work.set()

    def _ack(self, frame: frames.Ack) -> None:
        self._outbox.acked(frame.step, self._step_s)
        if self._draining:
            self._work.set()  # these may have been the last tokens

    def _drain(self, frame: frames.Drain) -> None:
        self._draining = True
        self._work.set()

    def _set_role(self, frame: frames.SetRole) -> None:
        self.roles = frame.roles
        log.info("this worker now belongs to %s", "+".join(frame.roles))

    def _snapshot(self, frame: frames.Snapshot) -> None:
        self._reporter.snapshot()

    # --- steps ----------

    def idle(self) -> bool:
        """Nothing is computed, held, awaited, moved or still to be sent for anybody."""
        return not (self._leases or self._receiver.active or self._busy or self._outbox.waiting)

    async def run(self) -> None:
        """Plan, compute, report, for ever; ends only by cancellation."""
        while True:
            step = self._scheduler.plan(self._clock())
            if step is None:
                if self._draining and self.idle():
                    self.drained.set()
                if self.step_log is not None:
                    self.step_log.idle()
                self._work.clear()
                await self._work.wait()
                continue
            for sequence in step.preempted:
                self._leases.release(sequence.attempt)
                self._misjudged.discard(sequence.attempt)
                self._send(frames.Preempted(attempt=sequence.attempt))
            for sequence in step.warned:
                self._send(frames.Short(attempt=sequence.attempt))
            await self._compute(step)

    async def _compute(self, step: Step) -> None:
        rows = [self._row(chunk.sequence, chunk.start, chunk.count, chunk.last) for chunk in step.chunks]
        rows += [self._row(s, s.length - 1, 1, True, decode=True) for s in step.decodes]
        self._busy = True
        self._reporter.step(self._steps, busy=True)
        try:
            drawn = await self._run_rows(step, rows)
        finally:
            self._busy = False
            self._steps += 1
            self._reporter.step(self._steps, busy=False)
        self._finish_step(step, drawn)

    async def _run_rows(self, step: Step, rows: list[Row]) -> list[Sampled | None]:
        """Compute the step; if that fails, each row by itself, so that one bad row costs nobody else anything."""
        if not rows:
            return []
        try:
            return await self._parts.engine.run(rows)
        except TwinpoolError as error:
            log.error("a step of %d rows failed, so each runs alone: %s", len(rows), error.message)
        drawn: list[Sampled | None] = []
        for sequence, row in zip(_sequences(step), rows, strict=True):
            try:
                drawn += await self._parts.engine.run([row])
            except TwinpoolError as error:
                drawn.append(None)
                self._fail(sequence, error)
        return drawn

    @staticmethod
    def _row(sequence: Sequence, start: int, count: int, last: bool, *, decode: bool = False) -> Row:
        output = sequence.payload
        assert isinstance(output, Output)
        return Row(output.tokens[start : start + count], start, sequence.table, output.sample if last else None, decode)

    def _fail(self, sequence: Sequence, error: TwinpoolError) -> None:
        """This row cannot be computed: the attempt is lost, the worker goes on."""
        if not sequence.cancelled:
            self._forget(sequence.attempt)
            message = error.message[:MESSAGE_CHARS]
            self._send(frames.Failed(attempt=sequence.attempt, reason=error.reason, message=message))

    def _finish_step(self, step: Step, drawn: list[Sampled | None]) -> None:
        tokens = {s.attempt: token for s, token in zip(_sequences(step), drawn, strict=True) if token is not None}
        context = sum([sequence.length for sequence in step.decodes])
        for sequence in step.decodes:
            self._extend_hashes(sequence)
        outcome = self._scheduler.done(step, self._clock())
        self._step_s = outcome.step_s
        for chunk in step.chunks:
            self._report_progress(chunk, outcome.news)
        for sequence in outcome.sampled:
            self._speak(sequence, tokens[sequence.attempt])
        self._outbox.flush(outcome.step_s)
        self._flush()  # tokens first: sums of the last blocks take a while
        for ready in outcome.ready:
            self._announce(ready)
        if self.step_log is not None:
            chunks = [(chunk.count, chunk.start) for chunk in step.chunks]
            self.step_log.add(chunks, len(step.decodes), context, step.started_s, step.started_s + outcome.step_s)
        alone = bool(step.decodes) and not step.chunks
        self._reporter.changed(outcome.step_s, Decoded(len(step.decodes), context, outcome.step_s) if alone else None)

    def _extend_hashes(self, sequence: Sequence) -> None:
        """After this step the KV of all tokens known now is there: name a block that it fills."""
        size = self._info.block_size
        output = sequence.payload
        assert isinstance(output, Output)
        if len(sequence.hashes) < sequence.length // size:
            sequence.hashes.append(output.next_hash(sequence.hashes, size))

    def _report_progress(self, chunk: Chunk, news: bool) -> None:
        """Progress is news: the router knows what it predicted, so it hears of the end and of what went differently."""
        s = chunk.sequence
        if s.cancelled or not (chunk.last or news or s.attempt in self._misjudged):
            return
        self._misjudged.discard(s.attempt)
        progress = frames.Progress(attempt=s.attempt, done=s.computed, cached=s.cached, step_s=s.step_s, pace=s.pace)
        self._send(progress)

    def _speak(self, sequence: Sequence, drawn: Sampled) -> None:
        """Send a drawn token on; free the sequence if it was the last one."""
        output = sequence.payload
        assert isinstance(output, Output)
        position = output.position
        text, end = output.append(drawn.token)
        self._outbox.add(sequence.attempt, position, drawn.token, text, drawn.logprob)
        if end is not None:
            self._outbox.end(end)
            self._leases.release(sequence.attempt)
            self._scheduler.cancel(sequence.attempt)

    def _announce(self, ready: Ready) -> None:
        pool, sums = self._scheduler.pool, self._parts.sums
        self._send(blocks_ready(ready.sequence.attempt, ready.first, ready.blocks, pool, sums))


def _sequences(step: Step) -> list[Sequence]:
    """Whose rows a step has, in the order of the rows."""
    return [chunk.sequence for chunk in step.chunks] + step.decodes
