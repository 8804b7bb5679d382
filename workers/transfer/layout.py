"""Which rank holds which KV heads, and the reshard plan: which head range goes from which rank to which.

Tensor parallelism of N ranks over K KV heads (Shoeybi et al., 2019, section 3, with grouped-query attention):

- N <= K: rank r holds heads ``r K // N`` to ``(r + 1) K // N - 1``; where N does not divide K some hold one more.
- N > K: rank r holds the one head ``r K // N``, which is *replicated*; ranks that share it split its query heads.

So two ranks hold either the same range or disjoint ones. The first rank of a range holds its *original*: only that is
summed, announced and sent, because replicas are computed by products of other shapes and differ in their last bits.
"""

from __future__ import annotations

from typing import NamedTuple


class Move(NamedTuple):
    """The KV of ``heads`` (global numbers, consecutive) of each block goes from rank ``source`` to rank ``target``."""

    source: int
    target: int
    heads: range


class BlockLayout(NamedTuple):
    """A KV block ``[line][kv head][bytes]``: ``lines`` (layers times k and v) of ``line_bytes`` for each head."""

    lines: int
    kv_heads: int  # of the whole model
    line_bytes: int

    def block_bytes(self, heads: int) -> int:
        """Bytes of a block that holds so many heads."""
        return self.lines * heads * self.line_bytes


def held_heads(kv_heads: int, rank: int, ranks: int) -> range:
    """KV heads that ``rank`` of ``ranks`` holds."""
    first = rank * kv_heads // ranks
    return range(first, first + 1 if ranks > kv_heads else (rank + 1) * kv_heads // ranks)


def originals(kv_heads: int, ranks: int) -> list[int]:
    """Ranks whose heads are no replicas: their ranges cover every head once, in order."""
    starts = [held_heads(kv_heads, rank, ranks).start for rank in range(ranks)]
    return [rank for rank, start in enumerate(starts) if start not in starts[:rank]]


def reshard(kv_heads: int, source_ranks: int, target_ranks: int) -> list[Move]:
    """Moves after which every target rank has all of its heads, each from the one rank that holds its original."""
    held = [(source, held_heads(kv_heads, source, source_ranks)) for source in originals(kv_heads, source_ranks)]
    moves = []
    for target in range(target_ranks):
        wanted = held_heads(kv_heads, target, target_ranks)
        for source, has in held:
            both = range(max(has.start, wanted.start), min(has.stop, wanted.stop))
            if both:
                moves.append(Move(source, target, both))
    return moves
