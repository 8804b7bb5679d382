"""When KV that waits for a decode worker is predicted to find room. Pure.

Sequences end as often as those that run write the mean output (Little's law): a batch of B sequences with K tokens of
KV gives back B places and K tokens of memory in ``mean output x step`` seconds. Where memory is what is short tokens
count, where it is the batch or its ITL places do: the shorter wait is told.
"""

from __future__ import annotations

from twinpool.router.policy.base import View
from twinpool.router.request import Request


def decode_wait_s(request: Request, view: View) -> float:
    """Seconds until those that wait before the request and itself have room; 0 where nothing decodes to tell by."""
    places = tokens = 0.0  # a second
    for worker in view.pool.decode:
        batch = worker.batch
        if batch:
            seconds = view.mean_output * worker.decode_s(batch, worker.context)
            places += batch / seconds
            tokens += worker.context / seconds
    if not places:
        return 0.0
    wanted = request.length + sum([other.length for other in view.unhomed.values()])
    return min((1 + len(view.unhomed)) / places, wanted / tokens)
