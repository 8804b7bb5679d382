"""How many prompt tokens go into a step, and whose.

Where nothing decodes: ``chunk_tokens``. Else the most that keep the step within 0.9 of the tightest ITL SLO of the
decoding sequences, and no more than that. Of several chunks each gets what the earlier ones leave: their tokens count
as batch, the time of their attention is taken off. One block is always taken, or a slow worker would starve its
prompts. Chunks end at block boundaries, but for the last of a prompt; nobody overtakes a prompt that is not done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from twinpool.cost import StepCost
from twinpool.workers.sequence import Chunk, Sequence

ITL_SHARE = 0.9  # of the tightest ITL SLO that a step may take


def plan_chunks(
    prompts: Iterable[Sequence], decodes: Seq[Sequence], cost: StepCost, chunk_tokens: int, block_size: int
) -> list[Chunk]:
    """Chunks for one step with ``decodes``, of ``prompts`` in their order. Changes nothing."""
    limit_s = math.inf
    context = 0
    for sequence in decodes:
        limit_s = min(limit_s, ITL_SHARE * sequence.itl_s)
        context += sequence.length
    batch = len(decodes)
    left = chunk_tokens
    chunks: list[Chunk] = []
    for sequence in prompts:
        start = sequence.computed
        room = left
        if limit_s < math.inf:
            room = min(left, cost.largest_chunk(limit_s, start, batch, context))
        if not chunks:
            room = max(room, block_size)
        rest = sequence.prompt_len - start
        count = rest if rest <= room else room - room % block_size
        if count <= 0:
            break
        chunks.append(Chunk(sequence, start, count, count == rest))
        if count < rest:
            break
        batch += count
        left -= count
        limit_s -= cost.b * count * (start + count / 2)
    return chunks
