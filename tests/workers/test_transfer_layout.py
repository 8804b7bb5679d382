"""The reshard plan: every KV head of every block arrives exactly once at each rank that holds it, from its original."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpool.workers.transfer.layout import BlockLayout, Move, held_heads, originals, reshard

RANKS = (1, 2, 4, 8)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("source", RANKS)
@pytest.mark.parametrize("target", RANKS)
def test_every_head_arrives_exactly_once(kv_heads: int, source: int, target: int) -> None:
    _check(kv_heads, source, target)


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 24))
def test_every_head_arrives_exactly_once_whatever_the_sizes(kv_heads: int, source: int, target: int) -> None:
    _check(kv_heads, source, target)


def _check(kv_heads: int, source: int, target: int) -> None:
    arrived: dict[int, list[int]] = {rank: [] for rank in range(target)}
    senders = set(originals(kv_heads, source))
    for move in reshard(kv_heads, source, target):
        assert move.source in senders
        assert set(move.heads) <= set(held_heads(kv_heads, move.source, source))
        arrived[move.target] += move.heads
    for rank, heads in arrived.items():
        assert sorted(heads) == list(held_heads(kv_heads, rank, target))


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 24))
def test_ranges_are_equal_or_disjoint_and_originals_cover_all(kv_heads: int, ranks: int) -> None:
    held = [held_heads(kv_heads, rank, ranks) for rank in range(ranks)]
    assert all(held)
    assert all(one == other or not set(one) & set(other) for one in held for other in held)
    assert [head for rank in originals(kv_heads, ranks) for head in held[rank]] == list(range(kv_heads))
    sizes = [len(heads) for heads in held]
    assert max(sizes) - min(sizes) <= 1


def test_between_equal_ranks_each_sends_to_its_own_number() -> None:
    assert reshard(8, 4, 4) == [Move(rank, rank, range(2 * rank, 2 * rank + 2)) for rank in range(4)]


def test_three_heads_over_two_and_four_ranks() -> None:
    assert [held_heads(3, rank, 2) for rank in range(2)] == [range(1), range(1, 3)]
    assert [held_heads(3, rank, 4) for rank in range(4)] == [range(1), range(1), range(1, 2), range(2, 3)]
    assert originals(3, 4) == [0, 2, 3]
    moves = [Move(0, 0, range(1)), Move(2, 1, range(1, 2)), Move(3, 1, range(2, 3))]
    assert reshard(3, 4, 2) == moves


def test_a_block_is_lines_of_heads() -> None:
    assert BlockLayout(lines=60, kv_heads=3, line_bytes=4096).block_bytes(2) == 60 * 2 * 4096
