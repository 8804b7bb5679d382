"""The chunk budget: block boundaries, the ITL of who decodes, and the floor of one block."""

from __future__ import annotations

import math

import pytest

from twinpool.cost import ITL_SHARE, LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, StepCost
from twinpool.workers.chunks import plan_chunks
from twinpool.workers.sequence import Mode, Sequence

SIZE = 4
COST = StepCost(c0=0.0, a=1e-3, b=0.0, d0=2e-3, d1=1e-4, d2=0.0)  # a token a millisecond, from two on


def prompt(length: int, computed: int = 0, pace: float = 1.0) -> Sequence:
    sequence = Sequence(0, length, [], Mode.PREFILL, 1.0)
    sequence.computed = computed
    sequence.pace = pace
    return sequence


def decoding(itl_s: float, length: int = 100) -> Sequence:
    return Sequence(0, length, [], Mode.DECODE, itl_s)


def chunks(
    prompts: list[Sequence], decodes: list[Sequence], tokens: int = 64, cost: StepCost = COST
) -> list[tuple[int, int, bool]]:
    """(start, count, last) of each chunk."""
    counts = plan_chunks(prompts, *load(decodes), cost, tokens, SIZE)
    return [(p.computed, n, p.computed + n == p.prompt_len) for p, n in zip(prompts, counts, strict=False)]


def load(decodes: list[Sequence]) -> tuple[float, int, int]:
    """Limit in seconds, batch and context of what decodes."""
    limit_s = ITL_SHARE * min((s.itl_s for s in decodes), default=math.inf)
    return limit_s, len(decodes), sum(s.length for s in decodes)


def test_alone_prompts_take_the_whole_budget_in_order() -> None:
    assert chunks([prompt(6), prompt(5), prompt(9), prompt(2)], [], 16) == [(0, 6, True), (0, 5, True), (0, 4, False)]


def test_a_prompt_goes_on_where_it_stopped() -> None:
    assert chunks([prompt(30, computed=8)], [], 16) == [(8, 16, False)]
    assert chunks([prompt(30, computed=24)], [], 16) == [(24, 6, True)]


def test_a_budget_below_a_block_still_computes_one() -> None:
    assert chunks([prompt(6), prompt(3)], [], 2) == [(0, 4, False)]


def test_chunks_leave_the_tightest_itl() -> None:
    assert chunks([prompt(40)], [decoding(0.020), decoding(0.040)]) == [(0, 16, False)]  # 18 ms, 2 for the batch


def test_later_chunks_get_what_the_earlier_leave() -> None:
    assert chunks([prompt(7), prompt(20)], [decoding(0.020)]) == [(0, 7, True), (0, 8, False)]  # of 17 tokens


def test_one_block_is_always_computed() -> None:
    late = [decoding(0.001)]
    assert chunks([prompt(6), prompt(2)], late) == [(0, 4, False)]
    assert chunks([prompt(6, computed=4), prompt(2)], late) == [(4, 2, True)]


def test_no_itl_slo_bounds_nothing() -> None:
    assert chunks([prompt(20)], [decoding(math.inf)], 16) == [(0, 16, False)]


@pytest.mark.parametrize("cost", [LLAMA_70B_H100_TP4, LLAMA_8B_H100_TP1])
@pytest.mark.parametrize("computed", [0, 50_000])
def test_on_a_real_profile_a_step_fills_its_share_and_no_more(cost: StepCost, computed: int) -> None:
    decodes = [decoding(0.050, 2_000) for _ in range(24)]
    prompts = [prompt(computed + 200, computed), prompt(computed + 100_000, computed)]
    planned = plan_chunks(prompts, *load(decodes), cost, 1 << 20, SIZE)
    assert len(planned) == 2

    def seconds(more: int) -> float:
        return cost.step([(200, computed), (planned[1] + more, computed)], 24, 48_000)

    assert seconds(0) <= ITL_SHARE * 0.050 < seconds(SIZE)


@pytest.mark.parametrize("pace", [0.8, 1.25])
@pytest.mark.parametrize("cost", [LLAMA_70B_H100_TP4, LLAMA_8B_H100_TP1])
def test_a_prompt_that_was_off_fills_the_step_by_what_it_really_takes(cost: StepCost, pace: float) -> None:
    decodes = [decoding(0.050, 2_000) for _ in range(24)]
    alone = cost.decode(24, 48_000)
    (count,) = plan_chunks([prompt(100_000, pace=pace)], *load(decodes), cost, 1 << 20, SIZE)

    def seconds(more: int) -> float:
        return alone + pace * (cost.step([(count + more, 0)], 24, 48_000) - alone)

    assert seconds(0) <= ITL_SHARE * 0.050 < seconds(SIZE)


def test_who_comes_after_it_gets_what_it_really_leaves() -> None:
    late = [decoding(0.040)]  # 36 ms, 2 of them for the decode
    assert chunks([prompt(8), prompt(40)], late) == [(0, 8, True), (0, 24, False)]
    assert chunks([prompt(8, pace=2.0), prompt(40)], late) == [(0, 8, True), (0, 20, False)]  # 7 ms less
    assert chunks([prompt(8, pace=0.5), prompt(40)], late) == [(0, 8, True), (0, 28, False)]


def test_where_nothing_decodes_a_pace_changes_nothing() -> None:
    assert chunks([prompt(40, pace=1.5)], [], 16) == [(0, 16, False)]
