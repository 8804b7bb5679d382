"""Runs cover exactly the blocks that were asked for, in order, and are as long as they can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.workers.transfer.runs import Run, coalesce

PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=40)


@given(pairs=PAIRS, longest=st.integers(1, 6))
def test_runs_cover_the_blocks_in_order(pairs: list[tuple[int, int]], longest: int) -> None:
    source, target = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    runs = coalesce(source, target, longest)
    covered = [(run.offset + i, run.source + i, run.target + i) for run in runs for i in range(run.length)]
    assert covered == [(i, *pair) for i, pair in enumerate(pairs)]
    assert all(1 <= run.length <= longest for run in runs)


@given(pairs=PAIRS, longest=st.integers(1, 6))
def test_neighbouring_runs_cannot_be_joined(pairs: list[tuple[int, int]], longest: int) -> None:
    runs = coalesce([pair[0] for pair in pairs], [pair[1] for pair in pairs], longest)
    for run, following in itertools.pairwise(runs):
        after = (run.source + run.length, run.target + run.length)
        assert run.length == longest or after != (following.source, following.target)


@pytest.mark.parametrize(
    ("source", "target", "runs"),
    [
        ([], [], []),
        ([5], [7], [Run(0, 5, 7, 1)]),
        ([1, 2, 3, 9], [4, 5, 6, 7], [Run(0, 1, 4, 3), Run(3, 9, 7, 1)]),
        ([3, 2, 1], [3, 2, 1], [Run(0, 3, 3, 1), Run(1, 2, 2, 1), Run(2, 1, 1, 1)]),
    ],
)
def test_examples(source: list[int], target: list[int], runs: list[Run]) -> None:
    assert coalesce(source, target, 8) == runs


def test_targets_are_the_blocks_a_run_fills() -> None:
    assert list(Run(0, 5, 7, 3).targets) == [7, 8, 9]
