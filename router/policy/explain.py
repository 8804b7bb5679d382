"""Why a request goes where it goes: the facts that policies decide by, a row for each worker. Pure.

All figures are predictions of ``pool.Worker`` for one moment. For ``LeastSeconds`` they are those that it compares, and
its rules say why a worker was no candidate; a property test holds them together. For other policies the rows have the
same facts, and the rule is theirs. Nothing here runs when a router decides: ``router/witness.py`` asks for it later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from twinpool.classes import BATCH_RANK
from twinpool.cost import ITL_SHARE
from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import Passed, Placement, Policy, Refusal, View, cached_tokens
from twinpool.router.policy.baselines.at_arrival import AtArrival
from twinpool.router.policy.fetch import MIN_GAIN_S, Offer, best_offer
from twinpool.router.policy.least_seconds import (
    CLOCK_ERROR,
    LOCAL_MARGIN,
    MAX_COMMIT_S,
    MIN_COMMIT_S,
    MIN_LOCAL_CHUNK,
    LeastSeconds,
)
from twinpool.router.policy.price import local_price_s, prefill_price_s
from twinpool.router.request import Request
from twinpool.router.worker import Worker

SPLIT: Final = "split"
LOCAL: Final = "local"
DRAINS: Final = "drains"
TOO_SMALL: Final = "too small"
SAID_FULL: Final = "said it is full"
NO_MEMORY: Final = "no memory now"
BATCH_FULL: Final = "batch is full"
NO_DECODER: Final = "no decode worker"
BUSY: Final = "busy over {:.0f} ms"
PROMPTS: Final = "has a prompt"
SMALL_CHUNK: Final = f"under {MIN_LOCAL_CHUNK} tokens a step"
MARGIN: Final = f"under {100 * (LOCAL_MARGIN - 1.0):.0f} % in hand"
IN_LINE: Final = "KV waits for it"
BREAKS_ITL: Final = "breaks the ITL SLO"
OUT: Final = "not of this policy"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A worker that may compute the prompt. Seconds from the moment of the look; ``why_not`` is "" for a candidate."""

    worker: int
    name: str
    path: str  # split: it only computes the prompt; local: it decodes, too
    cached: int  # prompt tokens predicted to be cached there, after a fetch
    free_s: float  # until it could begin
    prompt_s: float  # of the prompt, beside what decodes there, and of waiting for a fetch
    first_s: float  # until the first token: the sum
    slack_s: float  # from then to the request's deadline; negative: late
    error_s: float  # by which prompts of such seconds usually are off: what must be in hand
    memory: float  # share of the KV tokens that may be booked, with this request
    why_not: str
    fetched: int = 0  # of the cached tokens, those that come from another worker
    fetch_s: float = 0.0  # until they are there
    source: str = ""  # its name


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """A worker that may decode the answer; ``LeastSeconds`` takes the least ``score`` of the candidates."""

    worker: int
    name: str
    batch: int  # sequences that decode there or are booked to
    step_s: float  # predicted step with this request in it
    itl: float  # that step, of the share of the tightest ITL SLO there that steps may fill
    memory: float  # share of the KV tokens that may be booked, with this request
    why_not: str

    @property
    def score(self) -> float:
        """The larger of the two ratios."""
        return max(self.itl, self.memory)


# --- prompt ----------


def prompt_rows(policy: Policy, request: Request, view: View, now: float) -> list[PromptRow]:
    """All workers that could compute the prompt for this policy: candidates first, earliest first token first."""
    stairs = view.index.stairs(request.hashes) if request.hashes else []
    workers = [worker for _, worker in sorted(view.pool.workers.items())]
    if isinstance(policy, LeastSeconds):
        rows = _least_seconds_rows(policy, request, workers, stairs, view, now)
    else:
        rows = _other_rows(policy, request, workers, stairs, view, now)
    rows.sort(key=lambda row: (row.why_not != "", row.first_s, row.worker, row.path))
    return rows


def _least_seconds_rows(
    policy: LeastSeconds, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float
) -> list[PromptRow]:
    rows: list[PromptRow] = []
    offer = best_offer(request, stairs, view, now) if policy.fetches else None
    for worker in workers:
        if policy.paths != "local" and "prefill" in worker.roles:
            wait_s = worker.free_at(now) - now
            why_not = _why_no_split(request, worker, view, now)
            row = _row(SPLIT, request, worker, stairs, now, wait_s, request.length, why_not)
            rows.append(row if offer is None else _with_fetch(row, request, worker, offer, view, now))
    splits = [row for row in rows if row.why_not not in (DRAINS, TOO_SMALL, NO_DECODER)]
    for worker in workers:
        if policy.paths != "split" and "decode" in worker.roles:
            rows.append(_local_row(request, worker, stairs, splits, view, now))
    return rows


def _with_fetch(row: PromptRow, request: Request, worker: Worker, offer: Offer, view: View, now: float) -> PromptRow:
    """The row of a worker that fetches, if that is earlier by what it must be."""
    first_s = offer.finish(worker, request, row.cached, now + row.free_s) - now
    if first_s + MIN_GAIN_S >= row.first_s:
        return row
    later_s = first_s - row.first_s
    return replace(
        row,
        cached=offer.tokens,
        prompt_s=row.prompt_s + later_s,
        first_s=first_s,
        slack_s=row.slack_s - later_s,
        fetched=offer.tokens - row.cached,
        fetch_s=offer.ready(worker, row.cached) - now,
        source=view.pool.workers[offer.source].name,
    )


def _why_no_split(request: Request, worker: Worker, view: View, now: float) -> str:
    horizon_s = _horizon_s(view)
    rules = (
        (worker.draining, DRAINS),
        (request.left > 1 and not view.pool.decode, NO_DECODER),
        (request.length > worker.limit, TOO_SMALL),
        (not _begins(request, worker, view, now), BUSY.format(1000.0 * horizon_s)),
        (worker.full, SAID_FULL),
        (worker.booked + request.length > worker.limit, NO_MEMORY),
    )
    return next((why for broken, why in rules if broken), "")


def _begins(request: Request, worker: Worker, view: View, now: float) -> bool:
    """Whether the prompt could begin within the commit horizon."""
    cached = cached_tokens(worker, request.length, view.index.stairs(request.hashes) if request.hashes else [])
    limit = now + _horizon_s(view) + CLOCK_ERROR
    return worker.begins_by(limit, now, request.length - cached, request.itl_s)


def _horizon_s(view: View) -> float:
    return min(MAX_COMMIT_S, max(MIN_COMMIT_S, 2.0 * view.commit_round_trip_s))


def _local_row(
    request: Request, worker: Worker, stairs: list[Stair], splits: list[PromptRow], view: View, now: float
) -> PromptRow:
    """``splits``: the rows of prefill workers that will be able to serve the request, if not now."""
    need, horizon_s = request.length + request.output_to_come, _horizon_s(view)
    beside = worker.beside(request.itl_s) if worker.decodes else None
    wait_s = worker.free_at(now) - now
    if beside is not None and not worker.prefills:
        wait_s = beside.load_s / 2  # of the step that runs
    rules = (
        (worker.draining, DRAINS),
        (not worker.could_fit(need), TOO_SMALL),
        (bool(worker.fills), PROMPTS),
        (not _begins(request, worker, view, now), BUSY.format(1000.0 * horizon_s)),
        (worker.full, SAID_FULL),
        (not worker.fits(need), NO_MEMORY),
        (worker.batch >= worker.max_batch, BATCH_FULL),
        (beside is not None and beside.tokens < MIN_LOCAL_CHUNK, SMALL_CHUNK),
    )
    why_not = next((why for broken, why in rules if broken), "")
    row = _row(LOCAL, request, worker, stairs, now, wait_s, need, why_not)
    return replace(row, why_not=MARGIN) if not why_not and _lacks_margin(row, splits, request, view, now) else row


def _lacks_margin(row: PromptRow, splits: list[PromptRow], request: Request, view: View, now: float) -> bool:
    """Whether a local candidate that would be taken before all splits is not, for it may come too late."""
    able = [split for split in splits if not split.why_not]
    best = min(able, key=lambda split: (split.first_s, split.worker), default=None)
    if not splits or (best is not None and best.worker == row.worker):
        return False
    if best is None:
        earliest = min(splits, key=lambda split: (split.first_s, split.prompt_s))
        before_s = earliest.first_s + _worth_s(row, earliest, request, view, now)
    else:
        before_s = best.first_s
    return row.first_s < before_s and now + LOCAL_MARGIN * row.first_s + row.error_s > request.deadline


def _worth_s(row: PromptRow, split: PromptRow, request: Request, view: View, now: float) -> float:
    """How much later than at a busy prefill worker the first token may come, for the sake of others."""
    if request.rank >= BATCH_RANK:
        return 0.0
    price_s = local_price_s(view.pool.workers[row.worker], row.prompt_s, view, now)
    return max(0.0, prefill_price_s(split.prompt_s, view, now) - price_s)


def _other_rows(
    policy: Policy, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float
) -> list[PromptRow]:
    """Facts only: what counts, and how much, is the policy's own."""
    theirs = {worker.id for worker in policy.candidates(request, view)} if isinstance(policy, AtArrival) else None
    rows: list[PromptRow] = []
    for worker in workers:
        local = policy.goes_on(request, worker) if isinstance(policy, AtArrival) else "decode" in worker.roles
        need = request.length + (request.output_to_come if local else 0)
        rules = (
            (worker.draining, DRAINS),
            (request.left > 1 and not view.pool.decode, NO_DECODER),
            (not worker.could_fit(request.length), TOO_SMALL),
            (theirs is not None and worker.id not in theirs, OUT),
        )
        why_not = next((why for broken, why in rules if broken), "")
        wait_s = worker.free_at(now) - now + worker.bound_s
        rows.append(_row(LOCAL if local else SPLIT, request, worker, stairs, now, wait_s, need, why_not))
    return rows


def _row(
    path: str, request: Request, worker: Worker, stairs: list[Stair], now: float, wait_s: float, need: int, why_not: str
) -> PromptRow:
    cached = cached_tokens(worker, request.length, stairs)
    prompt_s = worker.prompt_s(request.length - cached, cached, request.itl_s)
    first_s = wait_s + prompt_s
    memory = (worker.booked + need) / worker.limit
    slack_s = request.deadline - now - first_s
    error_s = worker.pace.spread * prompt_s
    return PromptRow(worker.id, worker.name, path, cached, wait_s, prompt_s, first_s, slack_s, error_s, memory, why_not)


def row_of(rows: list[PromptRow], placement: Placement) -> PromptRow | None:
    """The row that a placement took. A worker of both pools has two: the policy takes the earlier candidate."""
    own = [row for row in rows if row.worker == placement.prefill]
    return min(
        own, key=lambda row: (row.why_not != "", abs(row.prompt_s - placement.seconds), row.first_s), default=None
    )


# --- decode ----------


def decode_rows(policy: Policy, request: Request, view: View) -> list[DecodeRow]:
    """All workers of the decode pool: candidates first, least score first."""
    why = _why_no_decode if isinstance(policy, LeastSeconds) else _why_no_room
    workers = [worker for _, worker in sorted(view.pool.workers.items()) if "decode" in worker.roles]
    passes = isinstance(policy, LeastSeconds) and view.unhomed and request.rid not in view.unhomed
    rows = [_decode_row(request, worker, view, why, IN_LINE if passes else "") for worker in workers]
    rows.sort(key=lambda row: (row.why_not != "", row.score, row.worker))
    return rows


def _decode_row(
    request: Request, worker: Worker, view: View, why: Callable[[Request, Worker, float, float], str], line: str
) -> DecodeRow:
    """The formula of ``LeastSeconds.decode_for``. What the worker holds of the request already is counted once.

    ``line``: why not, where the worker itself is no reason.
    """
    need = request.length + request.output_to_come
    memory = (worker.booked + need - worker.held.get(request.attempt, 0)) / worker.limit
    batch = worker.batch
    step_s = worker.decode_s(batch + 1, worker.context + request.length)
    itl = step_s / (ITL_SHARE * worker.tightest_itl(request.itl_s))
    why_not = why(request, worker, itl, memory) or line
    return DecodeRow(worker.id, worker.name, batch, step_s, itl, memory, why_not)


def _why_no_decode(request: Request, worker: Worker, itl: float, memory: float) -> str:
    breaks = itl > memory and itl > 1.0 and worker.batch > 0
    return _why_no_room(request, worker, itl, memory) or (BREAKS_ITL if breaks else "")


def _why_no_room(request: Request, worker: Worker, itl: float, memory: float) -> str:
    rules = (
        (worker.draining, DRAINS),
        (worker.full, SAID_FULL),
        (memory > 1.0, NO_MEMORY),
        (worker.batch >= worker.max_batch, BATCH_FULL),
    )
    return next((why for broken, why in rules if broken), "")


# --- in words ----------


def why_waits(policy: Policy, request: Request, rows: list[PromptRow], answer: Refusal | Passed | None) -> str:
    """Why the policy did not place the request, in a sentence. ``rows``: those of that moment."""
    if isinstance(answer, Refusal):
        return answer.message
    if isinstance(answer, Passed) and answer.late_s > 0.0:
        return f"late by {_ms(answer.late_s)} at least: it goes behind all that can be in time"
    able = [row for row in rows if not row.why_not]
    if not able:
        rest = "" if answer is None else ": others may go before it"
        return f"no worker has room for it{rest}"
    if not isinstance(policy, LeastSeconds):
        return "the policy found no place for it"
    return _why_not_first(request, rows, able[0])


def _why_not_first(request: Request, rows: list[PromptRow], best: PromptRow) -> str:
    """A candidate was there, and ``LeastSeconds`` did not take it."""
    has_deadline = not request.late and request.first_at < 0.0
    busy = [row for row in rows if row.why_not.startswith(BUSY[:5]) and row.first_s < best.first_s]
    if busy and has_deadline:
        return f"{busy[0].name} is busy and still earlier: {_ms(busy[0].first_s)}, {_ms(best.first_s)} at {best.name}"
    if best.slack_s < 0.0 and has_deadline:
        return f"{best.name} has room and would be {_ms(-best.slack_s)} late: it waits for another"
    if best.slack_s < best.error_s and has_deadline:
        spare, usual = _ms(best.slack_s), _ms(best.error_s)
        return f"{best.name} has room and {spare} in hand, such prompts are usually off by {usual}: it waits"
    return "no decode worker will have room soon enough, or too much KV waits for one already"


def _ms(seconds: float) -> str:
    return "never" if seconds == math.inf else f"{1000.0 * seconds:,.0f} ms"
