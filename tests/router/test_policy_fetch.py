"""Fetch or recompute: whose prefix, to whom, and when it pays."""

from __future__ import annotations

import pytest
from tests.router.fake_worker import BLOCK, BLOCK_BYTES, COST
from tests.router.policy_cells import NOW, ask, cached, cell, placed, prompts

from twinpool.router.policy import LeastSeconds, View
from twinpool.router.policy.explain import prompt_rows, row_of
from twinpool.router.policy.fetch import MIN_GAIN_S, ROUND_TRIPS
from twinpool.router.request import NOBODY

SPLIT = LeastSeconds("split")
TOKENS = 320  # of 400 are cached at worker 1, which is busy
SETUP_S = ROUND_TRIPS * 0.001


def one_has_it(bytes_per_s: float = 1e9, *roles: str) -> View:
    view = cell(*(roles or ("prefill", "prefill", "decode")))
    view.bytes_per_s = bytes_per_s
    cached(view, 1, TOKENS // BLOCK)
    prompts(view, 1, 3, seconds=0.2)
    return view


def test_a_prefix_is_fetched_where_that_is_earlier() -> None:
    placement = placed(SPLIT, ask(), one_has_it())
    way = SETUP_S + TOKENS // BLOCK * BLOCK_BYTES / 1e9
    assert (placement.prefill, placement.source, placement.fetched, placement.cached) == (0, 1, TOKENS, TOKENS)
    assert placement.fetch_s == pytest.approx(way)
    assert placement.seconds == pytest.approx(way + COST.prefill(80, TOKENS, 512)), "it is idle until they are there"


def test_it_comes_while_the_worker_computes_for_others() -> None:
    view = one_has_it()
    prompts(view, 0, 1, seconds=0.015)  # within the commit horizon
    placement = placed(SPLIT, ask(), view)
    assert (placement.prefill, placement.fetched) == (0, TOKENS)
    assert placement.seconds == pytest.approx(COST.prefill(80, TOKENS, 512))


@pytest.mark.parametrize("rate", [1e5, 3e6])
def test_a_slow_link_is_left_alone(rate: float) -> None:
    """320 tokens are 82 kB, and worth 37 ms."""
    placement = placed(SPLIT, ask(), one_has_it(rate))
    fetches = SETUP_S + TOKENS // BLOCK * BLOCK_BYTES / rate + MIN_GAIN_S < COST.prefill(400, 0, 512) - COST.prefill(
        80, TOKENS, 512
    )
    assert (placement.source != NOBODY) is fetches
    assert placement.prefill == 0


@pytest.mark.parametrize("end", [0, 1])
def test_a_link_that_is_busy(end: int) -> None:
    view = one_has_it()
    view.pool.workers[end].carry(0.5, NOW)
    placement = placed(SPLIT, ask(), view)
    assert (placement.source, placement.fetched, placement.cached) == (NOBODY, 0, 0)


def test_a_gain_too_small_for_the_links() -> None:
    view = one_has_it()
    view.index.change(1, list(range(10)), [], True)  # 40 tokens: 4 ms
    assert placed(SPLIT, ask(), view).source == NOBODY


def test_of_two_holders_the_one_whose_link_is_free() -> None:
    view = one_has_it(1e9, "prefill", "prefill", "decode", "decode")
    cached(view, 3, TOKENS // BLOCK)
    view.pool.workers[1].carry(0.5, NOW)
    placement = placed(SPLIT, ask(), view)
    assert (placement.prefill, placement.source) == (0, 3), "a decode worker counts as well"


def test_a_holder_without_memory_to_keep_it_does_not_lend() -> None:
    view = one_has_it()
    view.pool.workers[1].book(7, 7, 3_600)
    assert placed(SPLIT, ask(), view).source == NOBODY


def test_off() -> None:
    assert placed(LeastSeconds("split", fetch="off"), ask(), one_has_it()).source == NOBODY


def test_only_what_is_missing() -> None:
    view = one_has_it()
    cached(view, 0, 20)
    placement = placed(SPLIT, ask(), view)
    assert (placement.prefill, placement.cached, placement.fetched) == (0, TOKENS, TOKENS - 80)


def test_explained() -> None:
    view, request = one_has_it(), ask()
    placement = placed(SPLIT, request, view)
    assert "320 tokens from w1 in 2 ms" in placement.reason
    row = row_of(prompt_rows(SPLIT, request, view, NOW), placement)
    assert row is not None
    assert (row.cached, row.fetched, row.source, row.why_not) == (TOKENS, TOKENS, "w1", "")
    assert row.fetch_s == pytest.approx(placement.fetch_s)
    assert row.prompt_s == pytest.approx(placement.seconds)
    assert row.first_s == pytest.approx(row.free_s + row.prompt_s)
    assert row.slack_s == pytest.approx(1.0 - row.first_s)
