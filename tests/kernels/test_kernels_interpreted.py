"""Each kernel equals its reference for random shapes, in triton's interpreter."""

from __future__ import annotations

import pytest
from tests.kernels.cases import compare_copy, compare_decode, compare_gather, compare_prefill, compare_scatter
from tests.kernels.conftest import Run

pytestmark = pytest.mark.timeout(300)  # ends what hangs; a busy machine may take its time to start the interpreter

SEEDS = [seed if seed < 12 else pytest.param(seed, marks=pytest.mark.full) for seed in range(200)]


@pytest.mark.parametrize("seed", SEEDS)
def test_gather(seed: int, interpreted: Run) -> None:
    interpreted(compare_gather, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_scatter(seed: int, interpreted: Run) -> None:
    interpreted(compare_scatter, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_copy(seed: int, interpreted: Run) -> None:
    interpreted(compare_copy, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_paged_decode(seed: int, interpreted: Run) -> None:
    interpreted(compare_decode, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_paged_prefill(seed: int, interpreted: Run) -> None:
    interpreted(compare_prefill, seed)
