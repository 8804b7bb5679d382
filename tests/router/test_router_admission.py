"""The queue: order by slack and deadline, its bound, removal from anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.router.fake_worker import request_of

from twinpool.router.admission import LEAST_PRESSURE, PRESSURE_STEP, Queue
from twinpool.router.request import Request


def waiting(rid: int, deadline: float, work_s: float = 0.0) -> Request:
    request = request_of(rid)
    request.deadline = deadline
    request.work_s = work_s
    return request


def served(queue: Queue, share: float, times: int = 1) -> None:
    """Requests leave for workers that have used up that share of their slack, of 8 s."""
    for _ in range(times):
        request = waiting(999, 10.0, 2.0)
        queue.push(request)
        queue.remove(request)
        queue.charge(request, 2.0, 0, 0, 8.0 * share)


def drain(queue: Queue) -> list[int]:
    order = []
    while (head := queue.head()) is not None:
        assert queue.head() is head
        order.append(head.rid)
        assert queue.remove(head)
    return order


def test_the_earliest_deadline_is_first_and_ties_go_to_the_older() -> None:
    queue = Queue(10)
    for rid, deadline in [(3, 1.0), (1, 2.0), (2, 1.0), (4, 0.5)]:
        queue.push(waiting(rid, deadline))
    assert drain(queue) == [4, 2, 3, 1]
    assert queue.head() is None


def test_while_nobody_waits_long_who_has_to_begin_first_is_first() -> None:
    queue = Queue(10)
    for request in (waiting(1, 3.0, 0.1), waiting(2, 9.0, 8.0), waiting(3, 4.0, 3.5)):
        queue.push(request)
    assert drain(queue) == [3, 2, 1]


def test_under_pressure_deadlines_count_and_the_longest_is_last() -> None:
    queue = Queue(10)
    requests = [waiting(1, 3.0, 0.1), waiting(2, 9.0, 8.0), waiting(3, 4.0, 3.5)]
    for request in requests[:2]:
        queue.push(request)
    served(queue, 1.0, 200)
    queue.push(requests[2])
    assert drain(queue) == [1, 3, 2]


def test_pressure_goes_down_again_and_late_ones_do_not_count() -> None:
    queue = Queue(10)
    served(queue, 1.0, 200)
    served(queue, 0.0, 200)
    late = waiting(7, 10.0, 2.0)
    late.late = True
    for _ in range(200):
        queue.charge(late, 2.0, 0, 0, 99.0)
    for request in (waiting(1, 3.0, 0.1), waiting(2, 9.0, 8.0)):
        queue.push(request)
    assert drain(queue) == [2, 1]


def test_without_slack_the_order_is_that_of_deadlines() -> None:
    queue = Queue(10, by_deadline=True)
    for request in (waiting(1, 3.0, 0.1), waiting(2, 9.0, 8.0)):
        queue.push(request)
    assert drain(queue) == [1, 2]


def test_each_class_has_a_pressure_of_its_own() -> None:
    queue = Queue(10)
    served(queue, 1.0, 200)
    for rid, deadline, work_s in ((1, 3.0, 0.1), (2, 9.0, 8.0)):
        request = waiting(rid, deadline, work_s)
        request.rank = 1
        queue.push(request)
    assert drain(queue) == [2, 1]


@given(
    st.lists(st.tuples(st.floats(0.0, 9.0), st.floats(0.0, 9.0)), max_size=9),
    st.lists(st.floats(0.0, 2.0), max_size=60),
)
def test_who_waits_is_put_in_order_again(requests: list[tuple[float, float]], shares: list[float]) -> None:
    queue = Queue(10)
    for rid, (deadline, work_s) in enumerate(requests):
        queue.push(waiting(rid, deadline, work_s))
    mean = 0.0
    for share in shares:
        served(queue, share)
        mean += 0.05 * (min(1.0, share) - mean)
        turns = [request.turn for request in map(queue.valid, queue.order()) if request is not None]
        assert turns == sorted(turns)
        for (deadline, work_s), request in zip(requests, queue.waiting.values(), strict=True):
            if work_s > 1e-3:
                level = 1.0 - (deadline - request.turn) / work_s
                assert 1 / PRESSURE_STEP - 1e-6 <= level / max(LEAST_PRESSURE, mean) <= PRESSURE_STEP + 1e-6


def test_full() -> None:
    queue = Queue(2)
    first = waiting(1, 1.0)
    queue.push(first)
    assert not queue.full
    queue.push(waiting(2, 2.0))
    assert queue.full
    queue.push(waiting(3, 0.0))  # a lost attempt always comes back in
    assert len(queue) == 3
    assert queue.remove(first)
    assert not queue.remove(first)
    assert sorted(request.rid for request in queue) == [2, 3]


def test_one_that_waits_cannot_come_again() -> None:
    queue = Queue(10)
    queue.push(waiting(1, 1.0))
    with pytest.raises(AssertionError, match="waits already"):
        queue.push(waiting(1, 2.0))


def test_one_that_comes_back_with_another_deadline() -> None:
    queue = Queue(10)
    request = waiting(1, 1.0)
    queue.push(request)
    queue.push(waiting(2, 2.0))
    queue.remove(request)
    request.deadline = 3.0
    queue.push(request)
    assert drain(queue) == [2, 1]


def test_late_ones_are_last_and_shortest_first() -> None:
    queue = Queue(10)
    requests = [waiting(rid, float(rid)) for rid in range(4)]
    for request in requests:
        queue.push(request)
    queue.postpone(requests[0], 2.0)
    queue.postpone(requests[2], 1.0)
    assert [queue.valid(entry) for entry in queue.order()] == [requests[1], None, requests[3]]
    assert queue.late() is requests[2]
    assert queue.remove(requests[2])
    assert queue.late() is requests[0]
    assert drain(queue) == [1, 3]
    assert len(queue) == 1


def test_a_late_one_that_comes_back_is_judged_anew() -> None:
    queue = Queue(10)
    request = waiting(1, 1.0)
    queue.push(request)
    queue.postpone(request, 1.0)
    assert queue.remove(request)
    queue.push(request)
    assert queue.head() is request
    assert queue.late() is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.booleans()), max_size=60))
def test_against_a_sorted_list(steps: list[tuple[int, int, bool]]) -> None:
    queue = Queue(5)
    model: dict[int, Request] = {}
    for rid, deadline, push in steps:
        if push and rid not in model:
            model[rid] = waiting(rid, float(deadline))
            queue.push(model[rid])
        elif not push:
            assert queue.remove(model.get(rid) or waiting(rid, 0.0)) == (model.pop(rid, None) is not None)
        assert len(queue) == len(model)
        assert queue.full == (len(model) >= 5)
        assert queue.head() is min(model.values(), key=lambda r: (r.deadline, r.rid), default=None)
