"""Who has to go where KV memory runs out, and of whom the router hears before. Pure.

First to go is the youngest sequence of the lowest class. Sequences that decode take a block each every ``block_size``
steps: with fewer blocks free than there are such sequences, memory lasts for less than that many steps more. Then the
router is warned of those of them that would go first, of each once, and of so many that without them every one has a
block: it may find them another worker before (router/move.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Member(Protocol):
    """What is to be known of a sequence."""

    rank: int  # class: 0 is the most urgent
    order: int  # of joining the worker
    warned: bool  # the router has heard that it may have to go


S = TypeVar("S", bound=Member)


def first_to_go(sequences: Iterable[S]) -> S:
    """The youngest of the lowest class. Raises ValueError where there is nobody."""
    return max(sequences, key=_place)


def to_warn(running: Sequence[S], blocks: Sequence[int], free: int) -> list[S]:
    """Of whom the router is to hear now, in the order of going; marks them. ``running``: all that decode.

    ``blocks`` are theirs, ``free`` those that nobody has.
    """
    free += sum([count for sequence, count in zip(running, blocks, strict=True) if sequence.warned])
    others = [(sequence, count) for sequence, count in zip(running, blocks, strict=True) if not sequence.warned]
    others.sort(key=lambda pair: _place(pair[0]), reverse=True)
    warned: list[S] = []
    for sequence, count in others:
        if free >= len(running):
            break
        free += count
        sequence.warned = True
        warned.append(sequence)
    return warned


def _place(sequence: Member) -> tuple[int, int]:
    return sequence.rank, sequence.order
