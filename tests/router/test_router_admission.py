"""The queue: order by deadline, its bound, removal from anywhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.router.fake_worker import request_of

from twinpool.router.admission import Queue
from twinpool.router.request import Request


def waiting(rid: int, deadline: float) -> Request:
    request = request_of(rid)
    request.deadline = deadline
    return request


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
