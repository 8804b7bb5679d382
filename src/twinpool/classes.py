"""SLO classes by rank, 0 the most urgent: realtime, streaming, batch, in the order in which a config names them."""

from __future__ import annotations

from typing import Final

BATCH_RANK: Final = 2  # from here on work only fills what is left, and gives way between two chunks
RANKS: Final = {"realtime": 0, "streaming": 1, "batch": BATCH_RANK}  # of the default config; others are realtime
WEIGHTS: Final = (
    8.0,
    3.0,
    1.0,
)  # of predicted prefill seconds where several classes wait, by rank; the last for all after


def weight_of(rank: int) -> float:
    """Of predicted prefill seconds where several classes wait."""
    return WEIGHTS[min(rank, len(WEIGHTS) - 1)]
