"""A thin asyncio loop around the core: frames and submissions in as events, actions out. Implements ``Cell``.

Everything runs on one loop. Token ids and text stay here, in each request's flow; the core only counts them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable

from twinpool import blockhash
from twinpool.blockhash import tokens_from_bytes
from twinpool.errors import AlreadyExists, InvalidRequest, Unavailable
from twinpool.proto import frames
from twinpool.router import events as ev
from twinpool.router.cell import CellModel, CellStatus, Submission
from twinpool.router.core import Core
from twinpool.router.fanout import Fanout
from twinpool.router.flow import Flow
from twinpool.router.links import ROLES, WorkerLink
from twinpool.router.perform import Performer
from twinpool.router.request import Request
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.stream import OutStream
from twinpool.sampling import TokenLogprob

log = logging.getLogger("twinpool.router")


class Dispatcher:
    """Owns the core, the roster of workers and the running requests of a cell."""

    def __init__(
        self,
        core: Core,
        roster: Roster,
        requests: RequestLog,
        *,
        ranks: dict[str, int],
        transfer_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        decide: Callable[[ev.Event, float], list[ev.Action]] | None = None,
        name: Callable[[str], None] | None = None,
    ) -> None:
        """``ranks``: class name -> rank, 0 = most urgent.

        ``decide``: in place of ``core.on``, and ``name``: is told the id of each request before; see decision_log.py.
        """
        self.core = core
        self._decide = decide or core.on
        self._name = name
        self.roster = roster
        self.router = uuid.uuid4().hex
        self._ranks = ranks
        self._requests = requests
        self._clock = clock  # not the loop's own: uvloop's has whole milliseconds
        self._flows: dict[int, Flow] = {}
        self._by_key: dict[str, int] = {}
        self._counts = {"completed": 0, "refused": 0, "cancelled": 0, "resumed": 0}
        self._next_rid = 1
        self._refusing = ""
        self._loop = asyncio.get_running_loop()
        self._fanout = Fanout()
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = math.inf
        self._performer = Performer(
            roster,
            self._flows,
            self._counts,
            lease_s=core.state.limits.lease_s,
            transfer_timeout_s=transfer_timeout_s,
            clock=clock,
            close=self._close,
        )

    # --- Cell ----------

    @property
    def model(self) -> CellModel | None:
        """See ``cell.Cell``."""
        return self.roster.model

    def refuse_new(self, why: str) -> None:
        """From now on every submission is refused as UNAVAILABLE (the router drains)."""
        self._refusing = why

    def submit(self, submission: Submission) -> OutStream:
        """See ``cell.Cell``."""
        if self._refusing:
            raise Unavailable(self._refusing, reason="DRAINING", retry_s=1.0)
        self._make_way(submission)
        rid = self._next_rid
        self._next_rid += 1
        now = self._clock()
        stream = OutStream(len(submission.resumed), lambda: self._on(ev.Cancel(rid)), self._fanout)
        flow = Flow(submission, stream, now)
        self._flows[rid] = flow
        self._by_key[submission.request_id] = rid
        request = self._request(rid, submission, now)
        if self._name is not None:
            self._name(submission.request_id)
        self._on(ev.Submit(request))
        if flow.stream.error is not None:
            raise flow.stream.error  # at once: a caller may try elsewhere only before it has heard anything
        return flow.stream

    def _make_way(self, submission: Submission) -> None:
        """A client that comes back with its tokens takes its own stream over; nobody else takes a running id."""
        rid = self._by_key.get(submission.request_id)
        if rid is None:
            return
        if not submission.resumed or self._flows[rid].submission.tenant != submission.tenant:
            raise AlreadyExists(f"request id {submission.request_id!r} is running: use another, or none")
        self._on(ev.Cancel(rid))

    def _request(self, rid: int, submission: Submission, now: float) -> Request:
        slo = submission.slo
        return Request(
            rid,
            len(submission.prompt),
            submission.sampling.max_tokens,
            self._hashes(submission),
            ttft_s=slo.ttft_s,
            ttft_factor=slo.ttft_factor,
            itl_s=slo.itl_s,
            rank=self._ranks.get(submission.klass, 0),
            klass=submission.klass,
            tenant=submission.tenant,
            session=submission.session,
            returns=submission.returns,
            give_up=math.inf if submission.deadline_s is None else now + submission.deadline_s,
            queue_until=math.inf if submission.max_queue_s is None else now + submission.max_queue_s,
            resumed=len(submission.resumed),
        )

    def _hashes(self, submission: Submission) -> list[int]:
        model, key = self.roster.model, self.roster.root(submission.salt)
        if model is None or key is None:
            return []  # no worker yet, so no cache to match
        return blockhash.block_hashes(key, submission.prompt + submission.resumed, model.block_size)

    def cancel(self, request_id: str) -> bool:
        """See ``cell.Cell``."""
        rid = self._by_key.get(request_id)
        if rid is not None:
            self._on(ev.Cancel(rid))
        return rid is not None

    def status(self) -> CellStatus:
        """See ``cell.Cell``."""
        state, now = self.core.state, self._clock()
        queued = len(state.queue)
        workers = tuple(member.view(state.pool.workers[worker], now) for worker, member in self.roster)
        active = len(state.requests) - queued
        return CellStatus(self.router, self.roster.model, queued, active, **self._counts, workers=workers)

    def drain_worker(self, worker: str) -> None:
        """See ``cell.Cell``."""
        self._drain(self.roster.named(worker))

    def _drain(self, worker: int) -> None:
        member = self.roster.get(worker)
        assert member is not None
        member.link.send(frames.Drain())
        self._on(ev.WorkerDraining(worker))

    def set_roles(self, worker: str, roles: tuple[str, ...]) -> None:
        """See ``cell.Cell``."""
        number = self.roster.named(worker)
        if not roles or any(role not in ROLES for role in roles):
            raise InvalidRequest(f"roles {list(roles)}: name one or both of {list(ROLES)}", reason="BAD_ROLES")
        member = self.roster.get(number)
        assert member is not None
        member.link.send(frames.SetRole(roles=roles))
        self._on(ev.RolesSet(number, roles))

    def watch(self) -> AsyncIterator[str]:
        """See ``cell.Cell``."""
        return self._requests.watch()

    # --- events ----------

    def _on(self, event: ev.Event) -> None:
        now = self._clock()
        self._take(event, now)
        self._arm(now)

    def _take(self, event: ev.Event, now: float) -> None:
        """All of ``_on`` but the timer, for several events at once."""
        for action in self._decide(event, now):
            self._performer.perform(action)

    def _arm(self, now: float) -> None:
        when = self.core.next_tick()
        if when == self._tick_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._tick_at = when
        if when < math.inf:
            self._timer = self._loop.call_later(max(when - now, 0.0), self._tick)

    def _tick(self) -> None:
        self._timer, self._tick_at = None, math.inf
        self._on(ev.Tick())

    def _close(self, request: Request, outcome: str) -> Flow:
        """The request is over: take its flow out and log it."""
        flow = self._flows.pop(request.rid)
        del self._by_key[flow.submission.request_id]
        block_tokens = self.roster.model.block_size if self.roster.model is not None else 0
        self._requests.write(flow.record(request, outcome, time.time(), self._clock(), block_tokens))
        return flow

    # --- LinkOwner ----------

    def admit(self, hello: frames.Hello) -> tuple[str, str] | None:
        """See ``links.LinkOwner``: model, dtype, layout and block size must be the cell's, the name nobody else's."""
        problem = self.roster.mismatch(hello)
        if problem is not None:
            return "MODEL", problem
        holder = self.roster.holder_of(hello.worker)
        if holder is not None:
            if holder.hello.epoch != hello.epoch:
                return "NAME", f"a worker named {hello.worker} is connected: wait until it is gone, or take another"
            holder.link.abort("it dialled again")
            self.left(holder.link)
        return None

    def joined(self, link: WorkerLink) -> None:
        """See ``links.LinkOwner``."""
        hello = link.hello
        assert hello is not None
        model = hello.model
        link.id = self.roster.add(link, hello)
        roles = "+".join(hello.roles)
        log.info("worker %s joined as %s: %d blocks of %d tokens", link.name, roles, hello.blocks, model.block_size)
        self._on(ev.WorkerUp(link.id, link.name, hello.roles, hello.blocks, model.block_size, model.block_bytes,
                             hello.device, hello.cost, hello.chunk_tokens, hello.max_batch))  # fmt: skip

    def left(self, link: WorkerLink) -> None:
        """See ``links.LinkOwner``."""
        if self.roster.remove(link):
            self._on(ev.WorkerLost(link.id))

    def received(self, link: WorkerLink, frame: frames.Frame) -> None:
        """See ``links.LinkOwner``."""
        match frame:
            case frames.Tokens():
                self._tokens(link, frame)
            case frames.Report():
                self._report(link, frame)
            case frames.KvEvents():
                self._kv_events(link, frame)
            case frames.Reserved():
                self._on(ev.Reserved(link.id, frame.attempt, frame.held))
            case frames.NoRoom():
                self._on(ev.NoRoom(link.id, frame.attempt))
            case frames.Progress():
                self._on(ev.Progressed(link.id, frame.attempt, frame.done, frame.cached, frame.step_s, frame.pace))
            case frames.BlocksReady():
                count = len(frame.blocks) // 4
                self._on(ev.BlocksReady(link.id, frame.attempt, frame.first, count, frame.blocks, frame.sums))
            case frames.BlocksVerified():
                self._on(ev.BlocksVerified(link.id, frame.attempt, frame.first, frame.count, frame.bytes,
                                           frame.seconds, frame.backend))  # fmt: skip
            case frames.BlocksBad():
                log.warning("worker %s: transfer of attempt %d failed: %s", link.name, frame.attempt, frame.message)
                self._on(ev.BlocksBad(link.id, frame.attempt, frame.reason))
            case frames.Preempted():
                self._on(ev.AttemptLost(link.id, frame.attempt, "preempted", False))
            case frames.Short():
                self._on(ev.Short(link.id, frame.attempt))
            case frames.Leaving():
                self._drain(link.id)
            case frames.Failed():
                log.warning("worker %s: attempt %d failed: %s", link.name, frame.attempt, frame.message)
                self._on(ev.AttemptLost(link.id, frame.attempt, frame.reason, True))
            case _:
                raise ValueError(f"{type(frame).__name__} is not for the router")

    def _report(self, link: WorkerLink, frame: frames.Report) -> None:
        member = self.roster.get(link.id)
        if member is not None:
            member.report = frame
            # What runs now need not be what was in the last step, so the worker says what was.
            self._on(ev.Reported(link.id, frame.free, frame.decode_batch, 0, frame.decode_context, frame.decode_s))

    def _kv_events(self, link: WorkerLink, frame: frames.KvEvents) -> None:
        member = self.roster.get(link.id)
        if member is None:
            return
        if frame.sequence != member.kv_sequence + 1 and not frame.reset:
            link.send(frames.Snapshot())  # a gap: what the index says of this worker is not to be trusted
            return
        member.kv_sequence = frame.sequence
        self._on(ev.KvChanged(link.id, _hashes(frame.stored), _hashes(frame.removed), frame.reset))

    def _tokens(self, link: WorkerLink, frame: frames.Tokens) -> None:
        attempts, positions = tokens_from_bytes(frame.attempts), tokens_from_bytes(frame.positions)
        counts, ids = tokens_from_bytes(frame.counts), tokens_from_bytes(frame.ids)
        if not len(attempts) == len(positions) == len(counts) == len(frame.texts) or sum(counts) != len(ids):
            raise ValueError("the columns of Tokens differ in length")
        if frame.step:
            link.send(frames.Ack(step=frame.step))
        now, start, none = self._clock(), 0, [()] * len(attempts)
        rows = zip(attempts, positions, counts, frame.texts, frame.logprobs or none, strict=True)
        for attempt, position, count, text, logprobs in rows:
            self._token_row(link, attempt, position, ids[start : start + count], text, logprobs, now)
            start += count
        for end in frame.ends:
            self._end_row(link, end, now)
        self._arm(now)

    def _token_row(
        self,
        link: WorkerLink,
        attempt: int,
        position: int,
        ids: array[int],
        text: str,
        logprobs: tuple[TokenLogprob, ...],
        now: float,
    ) -> None:
        request = self.core.state.attempt_of(link.id, attempt)
        if request is None:
            return
        flow = self._flows[request.rid]
        if position != len(flow.output):
            reason = f"token at position {position} where {len(flow.output)} was due"
            log.error("worker %s: %s", link.name, reason)
            link.send(frames.Cancel(attempt=attempt))
            self._take(ev.AttemptLost(link.id, attempt, reason, True), now)
            return
        flow.add(ids, text, logprobs, now)
        self._take(ev.Emitted(link.id, attempt, len(ids)), now)

    def _end_row(self, link: WorkerLink, end: frames.End, now: float) -> None:
        request = self.core.state.attempt_of(link.id, end.attempt)
        if request is not None:
            flow = self._flows[request.rid]
            flow.stop, flow.last_text = end.stop, end.text
            self._take(ev.Ended(link.id, end.attempt, end.reason), now)


def _hashes(column: bytes) -> list[int]:
    values = array("Q")
    values.frombytes(column)
    return values.tolist()
