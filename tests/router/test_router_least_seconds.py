"""The default policy: predicted seconds decide, commits are late, bounds hold."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import COST, request_of, worker_up
from tests.router.policy_views import NOW, ask, busy, cell, decoding

from twinpool.router import events as ev
from twinpool.router.policy import LeastSeconds
from twinpool.router.policy.base import Passed, Placement
from twinpool.router.policy.least_seconds import CLOCK_ERROR, PASSED
from twinpool.router.request import NOBODY

# --- late binding ----------


@pytest.mark.parametrize(
    ("round_trip_s", "committed_s", "placed"),
    [(0.001, 0.019, True), (0.001, 0.021, False), (0.03, 0.059, True), (0.03, 0.061, False), (9.0, 0.151, False)],
)
def test_work_is_committed_only_within_the_horizon(round_trip_s: float, committed_s: float, placed: bool) -> None:
    view = cell("prefill", "decode", round_trip_s=round_trip_s)
    busy(view, 0, committed_s)
    assert (LeastSeconds("split").on_room(ask(), view, NOW) is not None) == placed


@given(st.floats(0.02, 9.0), st.floats(0.0, 1e6), st.floats(0.0, 0.02))
def test_the_next_room_is_where_it_is_predicted(first_s: float, since: float, second_s: float) -> None:
    view = cell("prefill", "decode")
    for attempt, seconds in ((1, first_s), (2, second_s)):
        view.pool.workers[0].book(attempt, attempt, 10)
        view.pool.workers[0].commit_prefill(attempt, seconds, 10, 0, since)
    policy = LeastSeconds("split")
    when = policy.next_room(view, since)
    if when == math.inf:
        assert policy.on_room(ask(), view, since) is not None or second_s > 0.02
    else:
        assert policy.on_room(ask(), view, when) is not None
        assert policy.next_room(view, when) == math.inf


def test_late_work_is_not_polled() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.01, attempt=1)
    busy(view, 0, 0.03, attempt=2)
    assert LeastSeconds().next_room(view, NOW) == math.inf
    assert LeastSeconds().next_room(view, NOW + 5.0) == math.inf


def test_the_queue_stays_central() -> None:
    cluster = FakeCluster(LeastSeconds("split"))
    cluster.join(worker_up(0, "prefill", blocks=400))
    cluster.join(worker_up(1, "decode", blocks=400, max_batch=40))
    worker = cluster.core.state.pool.workers[0]
    for rid in range(30):
        cluster.submit(request_of(rid, 40, 2))
    waited = 0
    while len(cluster.ended) < 30:
        for last in list(worker.prefills.values())[-1:]:
            assert worker.free_at(cluster.now) - last.seconds <= cluster.now + 0.02 + CLOCK_ERROR
        waited = max(waited, len(cluster.core.state.queue))
        cluster.run(0.002)
    assert waited >= 28


def test_short_prompts_share_a_step() -> None:
    """They are committed while those before them run, as many as fit: all begin when these end."""
    view = cell("prefill", "decode")
    busy(view, 0, 0.015)
    worker, policy, placed = view.pool.workers[0], LeastSeconds("split"), 0
    while isinstance(placement := policy.on_room(ask(100), view, NOW), Placement):
        placed += 1
        worker.book(placed, placed, 100)
        worker.commit_prefill(placed, placement.seconds, 100, 0, NOW)
    assert placed == 5, "steps of 512 tokens"
    assert worker.free_at(NOW) == pytest.approx(NOW + 0.015 + COST.prefill(500, 0, 512))
    assert worker.free_at(NOW) < NOW + 0.015 + 4.5 * COST.prefill(100, 0, 512)
    assert isinstance(policy.on_room(ask(12), view, NOW), Placement)
    assert worker.free_within(0.02) == pytest.approx(NOW - 0.005)
    assert policy.on_room(ask(100), view, NOW + 0.5) == Passed(0.0), "late work is not believed to be over"


# --- which prefill worker ----------


def test_a_cached_prefix_is_worth_its_seconds() -> None:
    view = cell("prefill", "prefill", "decode")
    view.index.change(1, list(range(50)), [], False)  # 200 of 400 tokens: 20 ms less
    request = ask()
    placement = LeastSeconds().on_room(request, view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.prefill, placement.cached) == (1, 200)
    assert placement.seconds == pytest.approx(COST.prefill(200, 200, 512))
    busy(view, 1, 0.015)
    again = LeastSeconds(fetch="off").on_room(request, view, NOW)
    assert isinstance(again, Placement)
    assert again.prefill == 1


def test_a_cached_prefix_that_saves_less_than_the_wait_is_left() -> None:
    view = cell("prefill", "prefill", "decode")
    view.index.change(1, list(range(10)), [], False)  # 40 tokens: 4 ms less
    busy(view, 1, 0.015)
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.prefill, placement.cached) == (0, 0)


def test_the_last_token_is_always_computed() -> None:
    view = cell("prefill", "decode")
    view.index.change(0, list(range(100)), [], False)
    placement = LeastSeconds("split").on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert placement.cached == 396


def test_a_prefill_worker_without_memory_is_left_out() -> None:
    view = cell("prefill", "prefill", "decode")
    view.pool.workers[0].book(7, 7, 3600)
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert placement.prefill == 1


# --- which decode worker ----------


def test_the_least_loaded_decodes() -> None:
    view = cell("decode", "decode", "decode")
    assert LeastSeconds().decode_for(ask(), view, NOW) == 0
    decoding(view, 0, 3)
    decoding(view, 1, 1)
    decoding(view, 2, 2)
    assert LeastSeconds().decode_for(ask(), view, NOW) == 1
    view.pool.workers[1].book(7, 7, 3000)
    assert LeastSeconds().decode_for(ask(), view, NOW) == 2


def test_decode_bounds() -> None:
    policy = LeastSeconds()
    step = COST.decode(3, 2 * 100 + 400)
    view = cell("decode")
    decoding(view, 0, 2)
    assert policy.decode_for(ask(itl_s=1.01 * step / 0.9), view, NOW) == 0
    assert policy.decode_for(ask(itl_s=0.99 * step / 0.9), view, NOW) == NOBODY
    decoding(view, 0, 0)
    tight = cell("decode")
    decoding(tight, 0, 2, itl_s=0.99 * step / 0.9)  # somebody else's SLO counts too
    assert policy.decode_for(ask(), tight, NOW) == NOBODY
    assert policy.decode_for(ask(itl_s=1e-6), cell("decode"), NOW) == 0  # an SLO nobody could meet stops no service
    full = cell("decode", max_batch=2)
    decoding(full, 0, 2)
    assert policy.decode_for(ask(), full, NOW) == NOBODY
    crowded = cell("decode")
    crowded.pool.workers[0].book(7, 7, 3880 - 456)
    assert policy.decode_for(ask(406, 50), crowded, NOW) == 0
    assert policy.decode_for(ask(407, 50), crowded, NOW) == NOBODY
    assert policy.decode_for(ask(407, 40), crowded, NOW) == 0


def test_kv_that_waits_on_a_worker_is_not_counted_twice_there() -> None:
    view = cell("both")
    request = ask(3000, 500)
    request.attempt = 5
    view.pool.workers[0].book(5, 1, 3000)
    assert LeastSeconds().decode_for(request, view, NOW) == 0


# --- split or local ----------


def test_split_while_it_is_no_later() -> None:
    view = cell("prefill", "decode")
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.prefill, placement.decode) == ("split", 0, 1)
    assert placement.reason == f"split: first token in {1000 * COST.prefill(400, 0, 512):.0f} ms"


def test_local_where_it_is_earlier() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.015)
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.prefill, placement.decode) == ("local", 1, 1)
    assert placement.local
    assert "split 64 ms" in placement.reason
    busy(view, 0, 0.5, attempt=51)
    waiting = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(waiting, Placement)
    assert waiting.local
    assert "no other worker has room" in waiting.reason


def test_local_only_in_time() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.5)
    seconds = COST.prefill(400, 0, 512)
    policy = LeastSeconds()
    assert policy.on_room(ask(deadline=NOW + 1.06 * seconds), view, NOW) is not None
    late = policy.on_room(ask(deadline=NOW + 1.04 * seconds), view, NOW)
    assert late == PASSED, "it can be in time, but not with the margin: somebody else may have the worker"


def test_a_prefill_worker_that_will_be_earlier_is_waited_for() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.03)
    decoding(view, 1, 2)
    assert LeastSeconds().on_room(ask(), view, NOW) == PASSED


@pytest.mark.parametrize("hindrance", ["memory", "prompt", "chunk", "batch"])
def test_a_decode_worker_takes_prompts_only_beside_its_decodes(hindrance: str) -> None:
    view = cell("prefill", "decode", max_batch=4)
    busy(view, 0, 9.0)
    decode = view.pool.workers[1]
    decoding(view, 1, 2)
    assert LeastSeconds().on_room(ask(), view, NOW) is not None
    if hindrance == "memory":
        decode.book(7, 7, 3900)
    elif hindrance == "prompt":
        busy(view, 1, 0.01)
        assert LeastSeconds().on_room(ask(), view, NOW) is not None, "done within the horizon"
        busy(view, 1, 0.06, attempt=52)
    elif hindrance == "chunk":
        decode.forget(1000, NOW)
        decode.book(1000, 1000, 100)
        decode.join_decode(1000, 100, 0.015)
    else:
        decoding(view, 1, 4)
    nobody = LeastSeconds().on_room(ask(), view, NOW)
    assert nobody is None if hindrance in ("memory", "prompt") else isinstance(nobody, Passed)


def test_prefill_workers_too_small_for_a_prompt_are_not_waited_for() -> None:
    view = cell("prefill", "decode")
    view.pool.workers[0].limit = 200
    late = ask(deadline=NOW - 1.0)
    late.late = True
    placement = LeastSeconds().on_room(late, view, NOW)
    assert isinstance(placement, Placement)
    assert placement.local


def test_paths_may_be_fixed() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.015)
    split = LeastSeconds("split").on_room(ask(), view, NOW)
    late = ask(deadline=NOW - 9.0)
    late.late = True
    local = LeastSeconds("local").on_room(late, cell("prefill", "decode"), NOW)
    assert isinstance(split, Placement)
    assert isinstance(local, Placement)
    assert (split.path, split.prefill, split.decode) == ("split", 0, 1)
    assert (local.path, local.prefill, local.decode) == ("local", 1, 1)
    busy(view, 0, 0.5, attempt=51)
    assert LeastSeconds("split").on_room(ask(), view, NOW) is None
    assert LeastSeconds("local").on_room(ask(), cell("prefill"), NOW) is None


def test_one_worker_of_both_pools_moves_nothing_to_itself() -> None:
    view = cell("both")
    busy(view, 0, 0.01)  # busy with a prompt: no candidate for local
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.prefill, placement.decode) == ("local", 0, 0)


def test_one_token_needs_no_decode_worker() -> None:
    placement = LeastSeconds().on_room(ask(max_tokens=1), cell("prefill"), NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.decode) == ("split", NOBODY)
    assert LeastSeconds().on_room(ask(max_tokens=2), cell("prefill"), NOW) is None


def test_kv_may_wait_in_half_of_the_prefill_pool() -> None:
    view = cell("prefill", "decode", max_batch=1)
    decoding(view, 1, 1)
    policy = LeastSeconds("split")
    placement = policy.on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.decode, placement.reason.partition(", ")[2]) == (
        NOBODY,
        "no decode worker has room yet: KV waits",
    )
    view.pool.workers[0].book(7, 7, 1600)
    assert policy.on_room(ask(400), view, NOW) is not None
    assert policy.on_room(ask(404), view, NOW) == PASSED


def test_where_no_decode_worker_has_room_a_request_decodes_where_its_prompt_is_computed() -> None:
    view = cell("prefill", "decode", max_batch=4)
    decoding(view, 1, 4)
    placement = LeastSeconds().on_room(ask(), view, NOW)
    assert isinstance(placement, Placement)
    assert (placement.path, placement.prefill, placement.decode) == ("local", 0, 0)
    assert placement.reason.endswith("no decode worker has room")
    for policy in (LeastSeconds("split"), LeastSeconds(without="home")):
        waits = policy.on_room(ask(), view, NOW)
        assert isinstance(waits, Placement)
        assert (waits.path, waits.decode) == ("split", NOBODY)
    view.pool.workers[0].book(7, 7, 3_480)  # room for the prompt, not for its answer, too
    full = LeastSeconds().on_room(ask(), view, NOW)
    assert not isinstance(full, Placement) or not full.local


def test_needs() -> None:
    many, one = ask(), ask(max_tokens=1)
    assert [LeastSeconds(paths).needs(many) for paths in ("auto", "split", "local")] == [
        (("decode",),),
        (("prefill", "decode"),),
        (("decode",),),
    ]
    assert [LeastSeconds(paths).needs(one) for paths in ("auto", "split", "local")] == [
        (("prefill",), ("decode",)),
        (("prefill",),),
        (("decode",),),
    ]


def test_the_reason_of_a_placement_reaches_the_request() -> None:
    cluster = FakeCluster()
    cluster.join(worker_up(0, "prefill"))
    cluster.join(worker_up(1, "decode"))
    request = cluster.submit(request_of(1))
    assert request.reason.startswith("split: first token in")
    cluster.deliver(ev.Cancel(1))


def test_local_with_as_much_in_hand_as_prompts_are_off() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.5)
    pace, seconds = view.pool.workers[1].pace, COST.prefill(400, 0, 512)
    for _ in range(2000):
        pace.saw_request(1.2)
    assert LeastSeconds().on_room(ask(deadline=NOW + 1.26 * seconds), view, NOW) is not None
    assert LeastSeconds().on_room(ask(deadline=NOW + 1.24 * seconds), view, NOW) == PASSED
