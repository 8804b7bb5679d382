"""What is booked at a worker, and when it is predicted to be free."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from tests.router.fake_worker import COST, worker_up

from twinpool.cost import StepCost
from twinpool.router.pace import Pace
from twinpool.router.pool import Pool
from twinpool.router.worker import MEMORY_LIMIT, Worker


def worker() -> Worker:
    """256 tokens of KV, chunks of 16."""
    return Worker(worker_up(0))


def test_free_at_counts_down_and_does_not_go_below_what_waits() -> None:
    w = worker()
    assert w.free_at(5.0) == 5.0
    w.book(1, 1, 10)
    w.book(2, 2, 10)
    w.commit_prefill(1, 1.0, 10, 0, now=5.0)
    w.commit_prefill(2, 0.5, 10, 0, now=5.5)
    assert w.free_at(5.5) == pytest.approx(6.5)
    assert w.free_at(6.0) == pytest.approx(6.5)
    assert w.free_at(7.0) == pytest.approx(7.5)  # the first is late: the second still takes its time
    w.end_prefill(1, 7.0)
    assert w.free_at(7.2) == pytest.approx(7.5)
    w.end_prefill(2, 7.4)
    assert w.free_at(7.4) == 7.4


def test_progress_replaces_the_prediction() -> None:
    w = worker()
    w.book(1, 1, 100)
    w.commit_prefill(1, 9.0, 100, 0, now=0.0)
    w.progress(1, 40, 60, 1.0, now=2.0)
    assert w.free_at(2.0) == pytest.approx(2.0 + COST.prefill(40, 60, 16))
    assert w.free_at(2.01) == pytest.approx(2.0 + COST.prefill(40, 60, 16))
    w.progress(7, 1, 1, 1.0, now=2.0)  # not here


def test_what_is_left_of_a_prompt_goes_on_as_it_went() -> None:
    w = worker()
    w.book(1, 1, 100)
    w.commit_prefill(1, 9.0, 100, 0, now=0.0)
    w.pace.prefill = 1.1  # of others: this one was seen
    w.progress(1, 40, 60, 1.3, now=2.0)
    assert w.free_at(2.0) == pytest.approx(2.0 + 1.3 * COST.prefill(40, 60, 16))
    w.progress(1, 40, 60, 1.0, now=2.0)
    assert w.free_at(2.0) == pytest.approx(2.0 + 1.1 * COST.prefill(40, 60, 16))


def test_the_spread_is_how_far_prompts_are_off() -> None:
    pace = Pace()
    for _ in range(100):
        pace.saw_request(1.0)
    assert pace.spread == 0.0
    for i in range(1000):
        pace.saw_request((0.9, 1.1)[i % 2])
    assert pace.spread == pytest.approx(0.1, rel=1e-3)
    for _ in range(1000):
        pace.saw_request(1.0)
    assert pace.spread < 1e-3


def test_news_of_those_behind_leave_the_first_ones_time_alone() -> None:
    w = worker()
    for attempt in (1, 2, 3):
        w.book(attempt, attempt, 10)
        w.commit_prefill(attempt, 1.0, 10, 0, now=0.0)
    w.end_prefill(3, 0.8)
    assert w.free_at(0.8) == pytest.approx(2.0)
    w.progress(2, 0, 10, 1.0, now=0.9)
    assert w.free_at(0.9) == pytest.approx(1.0)


def test_free_within() -> None:
    w = worker()
    assert w.free_within(0.1) == math.inf
    w.book(1, 1, 10)
    w.commit_prefill(1, 1.0, 10, 0, now=2.0)
    assert w.free_within(0.1) == pytest.approx(2.9)
    w.commit_prefill(2, 0.05, 10, 0, now=2.0)
    assert w.free_within(0.1) == pytest.approx(2.9), "the step after the first has room"
    w.commit_prefill(3, 0.02, 16, 0, now=2.0)
    assert w.free_within(0.1) == pytest.approx(2.97)
    w.commit_prefill(4, 0.06, 10, 0, now=2.0)
    assert w.free_within(0.1) == math.inf  # however long the first takes: 0.13 s follow it


def test_room() -> None:
    w = worker()
    limit = int(MEMORY_LIMIT * w.capacity)
    assert w.could_fit(limit)
    assert not w.could_fit(limit + 1)
    w.book(1, 1, limit - 50)
    left = limit - w.booked
    assert w.booked % w.block_size == 0
    assert 50 - w.block_size < left <= 50
    assert w.fits(left)
    assert not w.fits(left + 1)
    w.book(1, 1, 5)
    assert w.booked == 2 * w.block_size
    w.full = True
    assert not w.fits(1)
    w.forget(1, 0.0)
    assert w.fits(limit)


def test_a_worker_gone_full_is_asked_again_once_something_ends() -> None:
    w = worker()
    w.book(1, 1, 1)
    w.refused(9)
    assert not w.forget(2, 0.0)
    assert not w.fits(1)
    assert w.forget(1, 0.0)
    assert w.fits(1)


def test_a_worker_gone_full_is_asked_again_once_it_has_what_was_refused() -> None:
    w = worker()
    w.refused(2 * w.block_size + 1)
    assert not w.reported(2)
    assert w.full
    assert w.reported(3)
    assert w.fits(1)
    assert not w.reported(3)  # that is no news


def test_the_tightest_itl() -> None:
    w = worker()
    assert w.tightest_itl(0.05) == 0.05
    w.book(1, 1, 10)
    w.join_decode(1, 10, 0.02)
    assert w.tightest_itl(0.05) == 0.02
    assert w.tightest_itl(0.01) == 0.01


def test_pools_leave_out_who_drains() -> None:
    pool = Pool()
    for number, roles in enumerate([("prefill",), ("decode",), ("prefill", "decode")]):
        pool.add(Worker(worker_up(number, *roles, blocks=10 * (number + 1))))
    assert [w.id for w in pool.of("prefill")] == [0, 2]
    assert pool.largest("decode") == 30 * 4
    pool.workers[2].draining = True
    pool.sort()
    assert [w.id for w in pool.of("decode")] == [1]
    assert pool.largest("decode") == 20 * 4
    pool.workers[1].draining = True
    pool.sort()
    assert not pool.has("decode")
    assert pool.largest("decode") == 0


def test_equal_devices_share_the_fastest_measurement() -> None:
    slow = StepCost(c0=6e-3, a=2e-4, b=1e-8, d0=8e-3, d1=1e-4, d2=1e-7)
    pool = Pool()
    for number, (device, cost) in enumerate([("cpu", slow), ("other", slow), ("cpu", COST), ("cpu", slow)]):
        pool.add(Worker(worker_up(number, device=device, cost=cost)))
    assert [w.cost for w in pool.workers.values()] == [COST, slow, COST, COST]


ATTEMPTS = st.integers(1, 6)


class WorkerMachine(RuleBasedStateMachine):
    """Bookings in any order; sums must match parts and times must not run backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.worker = worker()
        self.now = 0.0

    @rule(attempt=ATTEMPTS, tokens=st.integers(0, 100))
    def book(self, attempt: int, tokens: int) -> None:
        self.worker.book(attempt, 10 * attempt, tokens)

    @rule(attempt=ATTEMPTS, tokens=st.integers(1, 100))
    def commit(self, attempt: int, tokens: int) -> None:
        w = self.worker
        if attempt in w.attempts and attempt not in w.prefills:
            before = w.free_at(self.now)
            w.commit_prefill(attempt, COST.prefill(tokens, 0, 16), tokens, 0, self.now)
            assert w.free_at(self.now) == pytest.approx(before + COST.prefill(tokens, 0, 16))

    @rule(attempt=ATTEMPTS, left=st.integers(0, 100), pace=st.sampled_from((1.0, 1.0, 0.7, 1.3)))
    def progress(self, attempt: int, left: int, pace: float) -> None:
        self.worker.progress(attempt, left, 10, pace, self.now)

    @rule(attempt=ATTEMPTS, context=st.integers(1, 100))
    def join(self, attempt: int, context: int) -> None:
        if attempt in self.worker.attempts and attempt not in self.worker.decodes:
            self.worker.join_decode(attempt, context, 0.1)

    @rule(attempt=ATTEMPTS)
    def end_prefill(self, attempt: int) -> None:
        before = self.worker.free_at(self.now)
        self.worker.end_prefill(attempt, self.now)
        assert self.worker.free_at(self.now) <= before + 1e-9

    @rule(attempt=ATTEMPTS)
    def forget(self, attempt: int) -> None:
        known = attempt in self.worker.attempts
        assert self.worker.forget(attempt, self.now) == known

    @rule(seconds=st.sampled_from([0.001, 0.01, 0.1]))
    def wait(self, seconds: float) -> None:
        before = self.worker.free_at(self.now)
        self.now += seconds
        assert self.worker.free_at(self.now) >= min(before, self.now) - 1e-9

    @invariant()
    def agrees(self) -> None:
        self.worker.check_integrity()
        assert self.worker.free_at(self.now) >= self.now
        assert self.worker.batch == len(self.worker.decodes)
        if not self.worker.attempts:
            assert (self.worker.booked, self.worker.context) == (0, 0)


TestWorker = WorkerMachine.TestCase
TestWorker.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
