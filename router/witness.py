"""A core that watches one request: what its policy saw at each decision, and what came of it. Pure.

It decides as any core does: the policy is asked once for each answer, and looked at afterwards. It is driven by a
decision log (router/decision_explain.py) or by the simulator (sim/explain.py); a live router has a plain core.
"""

from __future__ import annotations

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy.base import NOBODY, Passed, Placement, Policy, Refusal, View
from twinpool.router.policy.explain import SPLIT, decode_rows, prompt_rows, row_of, why_waits
from twinpool.router.request import Fetch, Phase, Request
from twinpool.router.state import Limits
from twinpool.router.story import DECODE, NEVER, PLACED, REFUSED, WAITS, Attempt, Look, Story


class WatchedPolicy:
    """A policy, and what it sees of one request. Rows are made only where they are kept."""

    def __init__(self, policy: Policy, story: Story) -> None:
        self.inner = policy
        self.name = policy.name
        self.early = policy.early
        self.by_deadline = policy.by_deadline
        self.rebalances = policy.rebalances
        self._story = story

    def on_room(self, request: Request, view: View, now: float) -> Placement | Refusal | Passed | None:
        """See ``base.Policy``."""
        answer = self.inner.on_room(request, view, now)
        if request.rid == self._story.rid:
            if isinstance(answer, Placement):
                self._story.looks.append(self._placed(request, answer, view, now))
            elif isinstance(answer, Refusal):
                self.look(REFUSED, request, view, now, answer)
            else:
                self._waits(request, answer, view, now)
        return answer

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """See ``base.Policy``; the core asks it for KV that waits."""
        decode = self.inner.decode_for(request, view, now)
        if request.rid == self._story.rid:
            self._sought(request, decode, view, now)
        return decode

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """See ``base.Policy``."""
        return self.inner.needs(request)

    def next_room(self, view: View, now: float) -> float:
        """See ``base.Policy``."""
        return self.inner.next_room(view, now)

    def look(self, kind: str, request: Request, view: View, now: float, answer: Refusal | Passed | None) -> None:
        """Keep what stands for a request that was not placed."""
        rows = prompt_rows(self.inner, request, view, now)
        reason = why_waits(self.inner, request, rows, answer)
        decoders = decode_rows(self.inner, request, view) if request.left > 1 else []
        self._story.looks.append(Look(now - request.arrival, kind, request.attempts + 1, reason, rows, decoders))

    def _placed(self, request: Request, placement: Placement, view: View, now: float) -> Look:
        rows = prompt_rows(self.inner, request, view, now)
        row = row_of(rows, placement)
        look = Look(now - request.arrival, PLACED, request.attempts + 1, placement.reason, rows)
        look.path, look.prefill, look.decode = placement.path, placement.prefill, placement.decode
        look.cached, look.prompt_s = placement.cached, placement.seconds
        look.first_s = NEVER if row is None else row.first_s
        if placement.path == SPLIT and request.left > 1 and not (self.early and placement.decode == NOBODY):
            look.decoders = decode_rows(self.inner, request, view)
        return look

    def _waits(self, request: Request, answer: Passed | None, view: View, now: float) -> None:
        """Only the first look of each wait is kept, and the one that found it late."""
        story = self._story
        story.asked += 1
        story.passed += isinstance(answer, Passed)
        late = isinstance(answer, Passed) and answer.late_s > 0.0 and story.late_s < 0.0
        if late:
            story.late_s = now - request.arrival
        latest = story.looks[-1] if story.looks else None
        if late or latest is None or latest.attempt != request.attempts + 1:
            self.look(WAITS, request, view, now, answer)

    def _sought(self, request: Request, decode: int, view: View, now: float) -> None:
        latest = self._story.looks[-1] if self._story.looks else None
        if decode == NOBODY and latest is not None and latest.kind == DECODE and latest.decode == NOBODY:
            return
        reason = "no decode worker has room: KV waits" if decode == NOBODY else "a decode worker has room"
        look = Look(now - request.arrival, DECODE, request.attempts, reason, decode=decode)
        look.decoders = decode_rows(self.inner, request, view)
        self._story.looks.append(look)


class WatchedCore(Core):
    """Writes the story of request ``rid``."""

    def __init__(self, rid: int, policy: Policy, limits: Limits | None = None) -> None:
        self.story = Story(policy.name, rid)
        self._watched = WatchedPolicy(policy, self.story)
        self._request: Request | None = None
        self._attempt = 0
        super().__init__(self._watched, limits)

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """See ``Core.on``."""
        if isinstance(event, ev.Submit) and event.request.rid == self.story.rid:
            self._request = event.request
        request = self._request
        if request is None or self.story.over:
            return super().on(event, now)
        if isinstance(event, ev.Progressed) and event.attempt == request.attempt and event.worker == request.prefill:
            self.story.attempts[-1].cached = event.cached
            self.story.attempts[-1].compute_s = event.step_s
        actions = super().on(event, now)
        if isinstance(event, ev.Submit) and event.request is request:
            self._arrived(request)
        self._follow(request, event, now)
        self._heard(request, actions, now)
        return actions

    def stop(self, now: float) -> None:
        """Nothing more is known: what stands for a request that still waits."""
        request = self._request
        if request is not None and request.phase == Phase.QUEUED and request.bound_to == NOBODY:
            self._watched.look(WAITS, request, self.state.view(), now, None)

    def _arrived(self, request: Request) -> None:
        story, queue = self.story, self.state.queue
        story.arrived, story.clock_s = True, request.arrival
        story.prompt_tokens, story.max_tokens, story.resumed = request.prompt_len, request.max_tokens, request.emitted
        story.klass, story.tenant, story.session = request.klass, request.tenant, request.session
        story.ttft_slo_s, story.itl_slo_s = request.deadline - request.arrival, request.itl_s
        if request.rid in queue.waiting:
            before = (request.late, request.turn, request.rid)
            story.ahead = sum((other.late, other.turn, other.rid) < before for other in queue)

    def _follow(self, request: Request, event: ev.Event, now: float) -> None:
        """Attempts that end and begin. ``begin_attempt`` forgets the stamps, so they are taken after each event."""
        attempts = self.story.attempts
        if request.attempt != self._attempt:
            if self._attempt:
                attempts[-1].outcome = _why_lost(event, attempts[-1])
                attempts[-1].ended_s = now - request.arrival
            self._attempt = request.attempt
            if request.attempt:
                attempts.append(Attempt(request.attempts, request.path, request.reason))
                attempts[-1].placed_s = now - request.arrival
        if request.attempt:
            _stamp(attempts[-1], request, now)

    def _heard(self, request: Request, actions: list[ev.Action], now: float) -> None:
        story, at = self.story, now - request.arrival
        story.tokens, story.losses = request.emitted, request.losses
        for action in actions:
            if isinstance(action, ev.Show) and action.rid == request.rid:
                story.shown_s = at
            elif isinstance(action, ev.Finish | ev.Refuse) and action.request is request:
                story.ended_s, story.ended = at, request.ended
                if isinstance(action, ev.Refuse):
                    story.code, story.message = action.code, action.message
                self._closed(request, now)

    def _closed(self, request: Request, now: float) -> None:
        story = self.story
        if request.attempt:
            story.attempts[-1].ended_s = story.ended_s
            story.attempts[-1].outcome = story.message or "finished"
        elif story.code and not (story.looks and story.looks[-1].kind == REFUSED):
            self._watched.look(REFUSED, request, self.state.view(), now, Refusal(story.message, 0.0))


def _stamp(attempt: Attempt, request: Request, now: float) -> None:
    arrival = request.arrival
    attempt.prefill, attempt.decode = request.prefill_name, request.decode_name
    attempt.prefill_id, attempt.decode_id = request.prefill, request.decode
    attempt.kv_bytes, attempt.backend = request.kv_bytes, request.backend
    if request.prefill_done and attempt.first_s < 0.0:
        attempt.first_s = now - arrival
    if request.reserved:
        attempt.reserved_s = _after(request.reserved_at, arrival)
    attempt.prefill_started_s = _after(request.prefill_started_at, arrival)
    attempt.transferred_s = _after(request.transferred_at, arrival)
    if request.fetch is not None:
        _stamp_fetch(attempt, request, request.fetch)
    if request.path == SPLIT:
        attempt.decoding_s = _after(request.decoding_at, arrival)


def _stamp_fetch(attempt: Attempt, request: Request, fetch: Fetch) -> None:
    attempt.source, attempt.fetch_outcome = fetch.source_name, fetch.outcome
    attempt.fetch_predicted_s = fetch.predicted_s
    attempt.fetch_ended_s = _after(fetch.ended_at, request.arrival)
    if fetch.ended_at >= 0.0:
        attempt.fetch_s = fetch.ended_at - fetch.began_at
    attempt.fetched = fetch.tokens - fetch.cached if fetch.blocks else 0


def _after(stamp: float, arrival: float) -> float:
    return stamp - arrival if stamp >= 0.0 else NEVER


def _why_lost(event: ev.Event, attempt: Attempt) -> str:
    """What took an attempt, by the event that did."""
    names = {attempt.prefill_id: attempt.prefill, attempt.decode_id: attempt.decode}
    if isinstance(event, ev.WorkerLost):
        return f"worker {names.get(event.worker, event.worker)} died"
    if isinstance(event, ev.NoRoom):
        return f"worker {names.get(event.worker, event.worker)} had no room"
    if isinstance(event, ev.BlocksBad):
        return f"KV transfer failed ({event.reason})"
    if isinstance(event, ev.AttemptLost):
        return f"worker {names.get(event.worker, event.worker)}: {event.reason}"
    return "the decode worker did not answer a reservation"
