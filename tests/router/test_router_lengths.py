"""What the next answer's length is predicted to be."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.router.lengths import FIRST_GUESS, LARGEST_UNIT, MOST_GROUPS, PRIOR, WINDOW, Lengths, OutputLengths


def seen(*lengths: int, tenant: str = "acme", rank: int = 0) -> OutputLengths:
    """After answers of these lengths."""
    outputs = OutputLengths()
    for tokens in lengths:
        outputs.add(tenant, rank, tokens)
    return outputs


def test_before_any_answer() -> None:
    outputs = OutputLengths()
    assert outputs.mean == outputs.left("acme", 0, 0) == outputs.left("acme", 0, 50) == FIRST_GUESS


def test_a_tenant_is_predicted_by_itself_and_a_new_one_by_its_class() -> None:
    outputs = seen(*[1000] * 400)
    for _ in range(400):
        outputs.add("brief", 0, 10)
        outputs.add("night", 2, 400)
    assert outputs.left("acme", 0, 0) == pytest.approx(1000, rel=0.1)  # drawn to its class a little
    assert outputs.left("brief", 0, 0) == pytest.approx(10, abs=15)
    assert outputs.left("brief", 0, 0) < outputs.left("new", 0, 0) < outputs.left("acme", 0, 0)
    assert outputs.left("new", 2, 0) == pytest.approx(400, rel=0.05)


def test_of_a_long_one_only_longer_ones_tell() -> None:
    outputs = seen(*[10, 1000] * 400)
    assert outputs.left("acme", 0, 0) == pytest.approx(505, rel=0.05)
    assert outputs.left("acme", 0, 100) == pytest.approx(900, rel=0.05)


def test_what_is_long_ago_is_forgotten() -> None:
    outputs = seen(*[1000] * 1000, *[20] * int(8 * WINDOW))
    assert outputs.left("acme", 0, 0) == pytest.approx(20, rel=0.05)


def test_tenants_are_not_kept_for_ever() -> None:
    outputs = OutputLengths()
    for i in range(MOST_GROUPS + 1):
        outputs.add(f"tenant{i}", 0, 100)
    late = f"tenant{MOST_GROUPS}"
    before = outputs.left(late, 0, 0)
    outputs.add(late, 0, 10_000)
    assert outputs.left(late, 0, 0) == outputs.left("nobody", 0, 0) > before


@given(st.lists(st.integers(0, 100_000), max_size=60), st.floats(0, 1e5))
def test_it_is_the_weighted_mean(lengths: list[int], wider: float) -> None:
    histogram = Lengths()
    for tokens in lengths:
        histogram.add(tokens)
    weights = [math.exp((i + 1 - len(lengths)) / WINDOW) for i in range(len(lengths))]
    total = sum([weight * length for weight, length in zip(weights, lengths, strict=True)])
    expected = (total + PRIOR * wider) / (sum(weights) + PRIOR)
    assert histogram.left(0, wider) == pytest.approx(expected)


def test_growing_weights_stay_finite() -> None:
    histogram = Lengths()
    for i in range(int(2.5 * WINDOW * math.log(LARGEST_UNIT))):
        histogram.add(100 if i % 2 else 300)
    assert histogram.left(0, 200.0) == pytest.approx(200, rel=0.01)
    assert histogram.left(150, 100.0) == pytest.approx((128 * 150 + PRIOR * 100) / (128 + PRIOR), rel=0.02)
