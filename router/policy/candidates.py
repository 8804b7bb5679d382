"""What a search among workers finds."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from twinpool.router.policy.fetch import Offer
from twinpool.router.request import NOBODY
from twinpool.router.worker import Worker


class Candidate(NamedTuple):
    """A worker that could compute the prompt."""

    finish: float  # predicted time of the first token
    worker: int
    cached: int  # by then
    seconds: float  # from its being free to the first token
    source: int = NOBODY  # of a fetch
    fetched: int = 0  # of the cached tokens
    fetch_s: float = 0.0
    error_s: float = 0.0  # by how much a prompt of such seconds usually is off its prediction


class Outlook(NamedTuple):
    """What the prefill workers promise a request: predicted times of its first token, infinity for never."""

    split: Candidate | None  # the earliest of those with room now
    soonest: float  # of those that are busy beyond the commit horizon
    least: float  # of all that it could ever fit
    surest: float  # ... with the usual error in hand
    least_s: float  # seconds of the prompt at the one that is to be ``least``
    somebody: bool  # one may take prompts now, though perhaps not this one


NO_OUTLOOK: Final = Outlook(None, math.inf, math.inf, math.inf, 0.0, False)


def with_fetch(plain: Candidate, worker: Worker, offer: Offer, free_at: float, now: float) -> Candidate:
    """The same with the offer's prefix; its finish is that already."""
    seconds, fetch_s = plain.finish - free_at, offer.ready(worker, plain.cached) - now
    fetched = offer.tokens - plain.cached
    return Candidate(plain.finish, plain.worker, offer.tokens, seconds, offer.source, fetched, fetch_s, plain.error_s)
