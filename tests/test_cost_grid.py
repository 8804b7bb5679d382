"""Both forms of the step cost: rows, monotony, sums of chunks and the exact inverse."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpool.cost import LLAMA_70B_H100_TP4, UNBOUNDED_CHUNK, Cost
from twinpool.cost_grid import GridCost, Grids
from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile

GRIDS = Grids(
    work_tokens=[0, 1, 8, 64, 65, 512, 4096],
    work_ms=[5.0, 5.0, 5.0, 6.0, 6.5, 12.0, 90.0],
    attention_tokens=[0, 1, 64, 512, 4096],
    attention_cached=[0, 128, 4096, 65536],
    attention_ms=[
        [0.0, 0.0, 0.0, 0.0],
        [0.5, 0.4, 0.5, 1.0],
        [0.6, 0.5, 0.7, 3.0],
        [1.0, 1.0, 3.0, 20.0],
        [9.0, 9.5, 25.0, 170.0],
    ],
    decode_batch=[0, 1, 4, 16, 64],
    decode_context=[0, 64, 1024, 16384],
    decode_ms=[
        [0.0, 0.0, 0.0, 0.0],
        [0.3, 0.3, 0.4, 1.0],
        [0.3, 0.4, 0.6, 3.0],
        [0.2, 0.3, 1.4, 12.0],
        [0.3, 0.5, 5.0, 50.0],
    ],
)
COSTS: dict[str, Cost] = {
    "small": GridCost(GRIDS),
    "h100-70b": load_profile("h100_sxm/llama-3.1-70b/tp4").cost,
    "b200-8b": load_profile("b200_sxm/llama-3.1-8b/tp1").cost,
    "a100-8b": load_profile("a100_sxm/llama-3.1-8b/tp1").cost,
}
CLOSED: dict[str, Cost] = COSTS | {"closed": LLAMA_70B_H100_TP4}

names = st.sampled_from(sorted(COSTS))
all_names = st.sampled_from(sorted(CLOSED))
tokens = st.integers(1, 200_000) | st.integers(1, 3000)
prefixes = st.integers(0, 300_000) | st.integers(0, 5000)
batches = st.integers(0, 1500) | st.integers(0, 80)
contexts = st.integers(0, 3_000_000) | st.integers(0, 20_000)
seconds = st.floats(-1.0, 5.0) | st.floats(0.0, 0.1)


def test_at_the_knots_a_step_is_what_was_measured() -> None:
    cost = GridCost(GRIDS)
    assert cost.step([(512, 4096)], 0, 0) == pytest.approx(15e-3, rel=1e-12)
    assert cost.decode(16, 16 * 1024) == pytest.approx((5.0 + 1.0 / 56 * 8 + 1.4) * 1e-3, rel=1e-12)
    assert cost.step([(64, 128)], 4, 4 * 64) == pytest.approx((6.5 + 5.5 / 447 * 3 + 0.5 + 0.4) * 1e-3, rel=1e-12)


def test_between_knots_it_is_linear_and_beyond_the_last_the_last_piece_goes_on() -> None:
    cost = GridCost(GRIDS)
    assert cost.step([(288, 64)], 0, 0) == pytest.approx((6.5 + 5.5 * 223 / 447 + (0.55 + 1.0) / 2) * 1e-3)
    assert cost.decode(10, 10 * 544) == pytest.approx((5.0 + 2 / 56 + (0.5 + 0.85) / 2) * 1e-3)
    slope = (90.0 - 12.0) / (4096 - 512)
    assert cost.step([(9000, 0)], 0, 0) == pytest.approx((90.0 + slope * 4904 + 9.0 + 8.0 / 3584 * 4904) * 1e-3)
    assert cost.decode(128, 128 * 64) - cost.decode(128, 0) == pytest.approx(0.4e-3)


def test_several_chunks_pay_the_start_of_attention_once() -> None:
    cost = GridCost(GRIDS)
    assert cost.step([(64, 0)] * 8, 0, 0) == pytest.approx((12.0 + 0.6) * 1e-3)
    assert cost.step([(512, 0), (512, 4096)], 0, 0) == pytest.approx(
        (12.0 + 78.0 / 7 + 0.6 + (1.0 - 0.6) + (3.0 - 0.5)) * 1e-3
    )
    assert cost.attention(512, 4096) == pytest.approx(2.5e-3)
    assert cost.attention(8, 0) == 0.0


@given(all_names, batches, contexts)
def test_decode_is_its_row_to_the_last_bit(name: str, batch: int, context: int) -> None:
    cost = CLOSED[name]
    row = cost.row(batch)
    assert cost.decode(batch, context) == row.seconds(context) == cost.step([], batch, context)
    piece = max(index for index, first in enumerate(row.breaks) if first <= context)
    assert row.seconds(context) == row.alpha[piece] + row.beta[piece] * context


@given(all_names, batches)
def test_a_row_is_a_rising_line_without_jumps(name: str, batch: int) -> None:
    row = CLOSED[name].row(batch)
    assert row.breaks[0] == 0
    assert all(before < after for before, after in pairwise(row.breaks))
    assert len(row.breaks) == len(row.alpha) == len(row.beta)
    assert all(beta >= 0.0 for beta in row.beta)
    for piece, at in enumerate(row.breaks[1:]):
        assert row.alpha[piece] + row.beta[piece] * at == pytest.approx(row.seconds(at), rel=1e-12)


@given(all_names, tokens, tokens, prefixes, batches, contexts, contexts)
def test_a_step_never_gets_cheaper_by_tokens_or_context(
    name: str, more: int, count: int, cached: int, batch: int, context: int, further: int
) -> None:
    cost = CLOSED[name]
    step = cost.step([(count, cached)], batch, context)
    slack = 1e-12 * step
    assert cost.step([(count + more, cached)], batch, context) >= step - slack
    assert cost.step([(count, cached)], batch, context + further) >= step - slack
    assert cost.step([(count, cached), (more, 0)], batch, context) >= step - slack
    assert step >= cost.decode(batch, context) - slack
    assert cost.attention(count + more, cached) >= cost.attention(count, cached) - slack >= -slack


@given(all_names, st.integers(1, 60_000), st.integers(0, 60_000), st.sampled_from([64, 512, 2048, 1 << 30]))
def test_a_prefill_is_the_sum_of_its_steps(name: str, uncached: int, cached: int, chunk: int) -> None:
    cost = CLOSED[name]
    starts = range(cached, cached + uncached, chunk)
    steps = [cost.step([(min(chunk, cached + uncached - start), start)], 0, 0) for start in starts]
    assert cost.prefill(uncached, cached, chunk) == pytest.approx(math.fsum(steps), rel=1e-9)
    assert cost.prefill(0, cached, chunk) == 0.0


def test_what_was_asked_before_changes_no_bit() -> None:
    asked = [
        (uncached, cached, chunk) for uncached in (1, 700, 9000) for cached in (0, 80, 5000) for chunk in (64, 512)
    ]
    fresh = [GridCost(GRIDS).prefill(*one) for one in asked]
    used = GridCost(GRIDS)
    assert [used.prefill(*one) for one in reversed(asked)] == fresh[::-1]
    assert [used.prefill(*one) for one in asked] == fresh
    assert [GridCost(GRIDS).decode(batch, 999) for batch in range(99)] == [used.decode(b, 999) for b in range(99)]


def test_sums_of_attention_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpool.cost_grid.MAX_SUMS", 500)
    cost = GridCost(GRIDS)
    for cached in range(64):
        assert cost.prefill(6400, cached, 64) == GridCost(GRIDS).prefill(6400, cached, 64)
        assert sum(len(sums) for sums in cost._sums.values()) <= 500 + 2 * 101


@settings(max_examples=400)
@given(names, seconds, prefixes, batches, contexts)
def test_the_largest_chunk_fits_and_one_token_more_does_not(
    name: str, limit: float, cached: int, batch: int, context: int
) -> None:
    cost = COSTS[name]
    count = cost.largest_chunk(limit, cached, batch, context)
    if count:
        assert cost.step([(count, cached)], batch, context) <= limit
    assert cost.step([(count + 1, cached)], batch, context) > limit


@given(names, tokens, prefixes, batches, contexts)
def test_the_largest_chunk_of_a_steps_own_time_is_not_smaller(
    name: str, count: int, cached: int, batch: int, context: int
) -> None:
    cost = COSTS[name]
    assert cost.largest_chunk(cost.step([(count, cached)], batch, context), cached, batch, context) >= count


@settings(max_examples=300)
@given(all_names, st.floats(0.01, 0.2), st.integers(1, 2000), prefixes, st.integers(0, 200), st.integers(0, 200_000))
def test_a_second_chunk_gets_what_the_first_leaves(
    name: str, limit: float, first: int, cached: int, batch: int, context: int
) -> None:
    cost = CLOSED[name]
    left = limit - cost.attention(first, cached)
    count = cost.largest_chunk(left, cached, batch, context, first)
    if count:
        assert cost.step([(first, cached), (count, cached)], batch, context) <= limit + 1e-12
    if cost.attention(count + 1, cached) > 0.0 < cost.attention(first, cached):
        assert cost.step([(first, cached), (count + 1, cached)], batch, context) > limit - 1e-12


@pytest.mark.parametrize("name", sorted(CLOSED))
def test_limits_without_end_or_hope(name: str) -> None:
    cost = CLOSED[name]
    assert cost.largest_chunk(0.0, 0, 8, 8000) == 0
    assert cost.largest_chunk(-math.inf, 0, 8, 8000) == 0
    assert COSTS["small"].largest_chunk(math.inf, 0, 8, 8000) == UNBOUNDED_CHUNK


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"work_ms": [5.0, 5.0, 4.0, 6.0, 6.5, 12.0, 90.0]}, "work table.*fall"),
        ({"work_ms": [5.0, 5.0, 5.0, 6.0, 6.5, 12.0, 12.0]}, "must rise at its end"),
        ({"work_tokens": [0, 1, 8, 64, 65, 512]}, "one value for each"),
        ({"work_tokens": [1, 2, 8, 64, 65, 512, 4096]}, "start at 0"),
        ({"attention_cached": [0, 128, 128, 65536]}, "attention table.*rise"),
        ({"decode_ms": [[0.0] * 4, *([1.0, 2.0, 3.0, math.nan] for _ in range(4))]}, "decode table.*numbers"),
        ({"decode_ms": [[0.0] * 4, *([1.0, 2.0, 1.9, 4.0] for _ in range(4))]}, "decode table.*fall"),
        ({"decode_ms": [[1.0, 2.0, 3.0, 4.0] for _ in range(5)]}, "of nothing"),
        ({"decode_batch": [], "decode_ms": []}, "start at 0"),
        ({"attention_ms": []}, "attention table"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(change: dict[str, list[float]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        GridCost(replace(GRIDS, **change))  # type: ignore[arg-type]  # that is the point
