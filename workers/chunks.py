"""How many prompt tokens go into a step, and whose; and when the blocks they filled are announced.

Where nothing decodes: ``chunk_tokens``. Else the most that keep the step within 0.9 of the tightest ITL SLO of the
decoding sequences, and no more than that; what a prompt adds to the step is taken to last as many times as predicted as
it did in its last step (``pace.py``). Of several chunks each gets what the earlier ones leave: their tokens count
as batch, the time of their attention is taken off. One block is always taken, or a slow worker would starve its
prompts. Chunks end at block boundaries, but for the last of a prompt; a prompt waits for all committed before it.

Blocks are announced in parts that halve what is left: as soon as they hold as many tokens as are still to be computed,
and at the end. What matters is that little is left to move when the first token is there. A part for each chunk would
be several times the messages, for the workers and for their router, and move no byte later than half of the prompt's
compute time earlier.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol, TypeVar

from twinpool.cost import Cost

P = TypeVar("P")


class Prompt(Protocol):
    """What the budget needs to know of a prompt."""

    computed: int  # tokens that are in KV
    prompt_len: int
    pace: float  # it takes so many times as long as predicted


def plan_chunks(
    prompts: Iterable[Prompt],
    limit_s: float,
    batch: int,
    context: int,
    cost: Cost,
    chunk_tokens: int,
    block_size: int,
) -> list[int]:
    """Tokens of each of ``prompts``, in their order, in one step; those after the last entry get none.

    ``limit_s`` is ``ITL_SHARE`` of the tightest ITL SLO of the ``batch`` decoding sequences, whose context tokens are
    ``context`` together; infinity without one. Changes nothing.
    """
    taken = 0
    counts: list[int] = []
    parts: list[tuple[int, int]] = []
    for prompt in prompts:
        start, pace = prompt.computed, prompt.pace
        room = chunk_tokens - taken
        if limit_s < math.inf:
            within_s = limit_s
            if pace != 1.0:
                base_s = _without_attention(parts, batch, context, cost)
                within_s = base_s + (limit_s - base_s) / pace
            room = min(room, cost.largest_chunk(within_s, start, batch, context, taken))
        if not counts:
            room = max(room, block_size)
        rest = prompt.prompt_len - start
        count = rest if rest <= room else room - room % block_size
        if count <= 0:
            break
        counts.append(count)
        if count < rest:
            break
        taken += count
        limit_s -= cost.attention(count, start)
        if pace != 1.0 and limit_s < math.inf:
            more = [*parts, (count, start)]
            limit_s -= (pace - 1.0) * (cost.step(more, batch, context) - _seconds(parts, batch, context, cost))
        parts.append((count, start))
    return counts


def _seconds(parts: list[tuple[int, int]], batch: int, context: int, cost: Cost) -> float:
    """Of a step, which may be empty."""
    if parts:
        return cost.step(parts, batch, context)
    return cost.decode(batch, context) if batch else 0.0


def _without_attention(parts: list[tuple[int, int]], batch: int, context: int, cost: Cost) -> float:
    """Seconds of a step, those of its chunks' attention taken off."""
    return _seconds(parts, batch, context, cost) - sum([cost.attention(count, start) for count, start in parts])


def blocks_to_announce(computed: int, prompt_len: int, announced: int, block_size: int) -> int:
    """Leading blocks to have been announced once ``computed`` tokens of a prompt are in KV; ``announced`` if no more.

    The last block is announced when the prompt is done, full or not.
    """
    left = prompt_len - computed
    if left <= 0:
        return -(-computed // block_size)
    full = computed // block_size
    return full if (full - announced) * block_size >= left else announced


def put_in_order(prompts: dict[int, P], attempt: int, prompt: P) -> None:
    """Add a prompt to those that wait, in the order in which the router committed them: attempts are numbered so.

    Messages of one moment may come in another order, and the router's predictions count on its own.
    """
    prompts[attempt] = prompt
    later = [number for number in prompts if number > attempt]
    for number in later:
        prompts[number] = prompts.pop(number)
