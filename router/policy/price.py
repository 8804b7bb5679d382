"""What it costs the others when a worker computes a prompt: seconds that they wait longer, all together. Pure.

A prompt of ``s`` seconds keeps a worker from what else would go there. With ``r`` such prompts a second, ``W`` others
waiting and ``R`` placed a second, ``r W / R`` of those that wait now want this worker and wait ``s`` longer; ``r s``
come while it computes and wait ``s / 2`` longer on average::

    price = s r (W / R + s / 2)

To a prefill worker goes what any of them computes, in equal parts; to a decode worker what comes for the prefix that it
has cached, since all else could go elsewhere.
"""

from __future__ import annotations

from twinpool.router.policy.base import View
from twinpool.router.worker import Worker


def prefill_price_s(seconds: float, view: View, now: float) -> float:
    """Of a prompt that takes a prefill worker so long."""
    workers = len(view.pool.prefill)
    return _price_s(seconds, view.demand.prefilled.per_s(now) / workers, view, now) if workers else 0.0


def local_price_s(worker: Worker, seconds: float, view: View, now: float) -> float:
    """Of a prompt that takes this decode worker so long."""
    return _price_s(seconds, worker.returns.per_s(now), view, now)


def _price_s(seconds: float, per_s: float, view: View, now: float) -> float:
    return seconds * per_s * (view.demand.wait_s(now) + seconds / 2.0)
