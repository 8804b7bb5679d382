"""What it costs others when a worker computes a prompt, and when a decode worker takes it for their sake."""

from __future__ import annotations

import pytest
from tests.router.policy_views import NOW, ask, busy, cell, decoding

from twinpool.classes import BATCH_RANK
from twinpool.router.demand import FADE_S, Demand
from twinpool.router.policy import LeastSeconds, Passed, View
from twinpool.router.policy.base import Placement
from twinpool.router.policy.price import local_price_s, prefill_price_s

PROMPTS = 40  # placed at once: 4 a second
TIGHT_S = 0.02  # ITL SLO: steps with few prompt tokens


def crowd(waiting: int, *roles: str) -> View:
    """A cell in which some wait beside the one in hand, all prefill workers are busy, and all decode workers decode."""
    view = cell(*roles)
    view.demand = Demand(range(waiting + 1))
    for _ in range(PROMPTS):
        view.demand.placed.add(1.0, NOW)
        view.demand.prefilled.add(1.0, NOW)
    for worker in view.pool.prefill:
        busy(view, worker.id, 0.03)
    for worker in view.pool.decode:
        decoding(view, worker.id, 6, itl_s=TIGHT_S)
    return view


def test_the_price_is_what_others_wait_longer() -> None:
    view = crowd(8, "prefill", "prefill", "decode")
    per_s = PROMPTS / FADE_S
    assert view.demand.wait_s(NOW) == pytest.approx(8 / per_s)
    # Of the eight four want each prefill worker, and two come a second.
    assert prefill_price_s(0.5, view, NOW) == pytest.approx(0.5 * 4 + 0.5 * 0.5 * 2 / 2)
    worker = view.pool.workers[2]
    assert local_price_s(worker, 0.5, view, NOW) == 0.0
    worker.returns.add(1.0, NOW)
    assert local_price_s(worker, 0.5, view, NOW) == pytest.approx(0.5 / FADE_S * (8 / per_s + 0.25))
    assert prefill_price_s(0.5, cell("decode"), NOW) == 0.0


def test_a_decode_worker_takes_a_prompt_for_the_sake_of_others() -> None:
    """Chunk by chunk beside decodes it takes longer there than at the prefill worker that is free soon."""
    alone = crowd(0, "prefill", "decode").pool
    later_s = alone.workers[1].prompt_s(400, 0, TIGHT_S) - (0.03 + alone.workers[0].prefill_s(400, 0))
    assert later_s > 0.0
    assert isinstance(LeastSeconds().on_room(ask(itl_s=TIGHT_S), crowd(0, "prefill", "decode"), NOW), Passed)
    view = crowd(20, "prefill", "decode")
    placement = LeastSeconds().on_room(ask(itl_s=TIGHT_S), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.prefill) == ("local", 1)
    assert placement.reason.endswith("ms later than at a busy prefill worker that others need")


@pytest.mark.parametrize("why", ["late", "batch", "returns", "without", "room"])
def test_not_at_any_price(why: str) -> None:
    view, request, policy = crowd(20, "prefill", "decode"), ask(itl_s=TIGHT_S), LeastSeconds()
    if why == "late":
        request.deadline = NOW + 0.095  # the margin of local prompts
    elif why == "batch":
        request.rank = BATCH_RANK
    elif why == "returns":  # many come to the decode worker for what it has cached
        for _ in range(10 * PROMPTS):
            view.pool.workers[1].returns.add(1.0, NOW)
    elif why == "without":
        policy = LeastSeconds(without="price")
    else:
        view.pool.workers[0].forget(50, NOW)
    answer = policy.on_room(request, view, NOW)
    if why == "room":
        assert isinstance(answer, Placement)
        assert answer.path == "split"
    else:
        assert answer is None or isinstance(answer, Passed)
