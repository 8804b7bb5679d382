"""How many times as long as predicted a prompt takes: seen in one of its steps, believed for the next ones.

The cost model is of a device; what a prompt adds to a step may still be off by a factor of its own. A step of
``alone_s`` seconds by its decodes and ``predicted_s`` with its chunks that took ``actual_s`` says of these::

    pace = (actual_s - alone_s) / (predicted_s - alone_s)

Of all prompts in a step only the last goes on, so it is of no use to tell them apart. The next chunk is cut, and the
router predicts what is left, by that pace. It is news: what is as predicted by the pace known so far is told to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

NEWS_S: Final = 0.002  # a step that is off its prediction by more than both is news
NEWS_SHARE: Final = 0.02
MOST: Final = 1.5  # a step that was held up by something else says little of the next one


def mean_pace(chunks: Iterable[tuple[int, float]]) -> float:
    """Of a step with chunks of (tokens, pace), by tokens; exactly 1 where all are."""
    tokens, total = 0, 0.0
    for count, pace in chunks:
        tokens += count
        total += count * pace
    return total / tokens if total != tokens else 1.0


def pace_seen(actual_s: float, predicted_s: float, alone_s: float, pace: float) -> float:
    """The pace that a step shows, within a factor ``MOST`` of 1; 0 where it went as expected: at ``pace``."""
    added_s = predicted_s - alone_s
    expected_s = predicted_s if pace == 1.0 else alone_s + pace * added_s
    if abs(actual_s - expected_s) <= max(NEWS_S, NEWS_SHARE * expected_s):
        return 0.0
    seen = (actual_s - alone_s) / added_s if added_s > 0.0 else 1.0
    return min(MOST, max(1.0 / MOST, seen))
