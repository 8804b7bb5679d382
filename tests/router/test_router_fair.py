"""Shares of tenants and classes: who was served less goes first, nobody saves anything up, batch fills what is left."""

from __future__ import annotations

from array import array
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from tests.router.core_cell import Cell
from tests.router.fake_worker import request_of, worker_up

from twinpool.classes import BATCH_RANK
from twinpool.router import events as ev
from twinpool.router.admission import QUANTUM, Queue
from twinpool.router.fair import MIN_KEPT, Shares
from twinpool.router.request import Phase, Request
from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace


def waiting(rid: int, deadline: float, tenant: str = "", rank: int = 0) -> Request:
    request = request_of(rid)
    request.deadline, request.tenant, request.rank = deadline, tenant, rank
    return request


def order(queue: Queue, below: int = 99) -> list[int]:
    found = [queue.valid(entry) for entry in queue.order(below)]
    return [request.rid for request in found if request is not None]


def test_who_comes_back_is_lifted_to_the_least_of_those_that_wait() -> None:
    shares = Shares()
    shares.came("a")
    shares.charge("a", 100.0)
    shares.came("b")
    assert shares.had("b") == 100.0
    shares.charge("a", 50.0)
    shares.came("c")
    assert shares.had("c") == 100.0
    shares.left("a")
    shares.came("a")
    assert shares.had("a") == 150.0, "never lowered"


def test_who_comes_into_an_empty_queue_is_lifted_to_who_left_it() -> None:
    shares = Shares()
    shares.came("a")
    shares.charge("a", 100.0)
    shares.left("a")
    shares.came("b")
    assert shares.had("b") == 100.0


def test_counters_of_those_that_went_do_not_pile_up() -> None:
    shares = Shares()
    shares.came("stays")
    shares.charge("stays", 5.0)
    shares.came("ahead")
    shares.charge("ahead", 1e9)
    shares.left("ahead")
    for i in range(5 * MIN_KEPT):
        shares.came(f"t{i}")
        shares.left(f"t{i}")
    assert len(shares) <= 2 * MIN_KEPT
    assert shares.had("ahead") > 1e9, "it has had more than its share, and comes back"
    assert shares.had("stays") == 5.0


def test_a_tenant_far_ahead_comes_after_the_others_whatever_its_deadlines() -> None:
    queue = Queue(10)
    queue.push(waiting(1, 1.0, "greedy"))
    queue.push(waiting(2, 2.0, "greedy"))
    queue.push(waiting(3, 3.0, "modest"))
    queue.push(waiting(4, 4.0, "other"))
    assert order(queue) == [1, 2, 3, 4], "all had the same"
    queue.charge(waiting(9, 0.0, "greedy"), 1.0, 0, round(QUANTUM), 0.0)
    assert queue.mixed
    assert order(queue) == [3, 4, 1, 2]


def test_output_that_did_not_come_is_given_back() -> None:
    queue = Queue(10)
    queue.push(waiting(1, 1.0, "a"))
    queue.push(waiting(2, 2.0, "b"))
    request = waiting(9, 0.0, "a")
    queue.charge(request, 1.0, 0, round(QUANTUM), 0.0)
    assert order(queue) == [2, 1]
    request.emitted = 1
    queue.settle(request)
    assert order(queue) == [1, 2]
    queue.settle(waiting(8, 0.0, "a"))  # never served, never charged
    assert order(queue) == [1, 2]


def test_classes_share_by_weight() -> None:
    queue = Queue(100)
    for rid in range(60):
        queue.push(waiting(rid, float(rid), rank=rid % 2))
    served = [0, 0]
    for _ in range(22):
        request = queue.head()
        assert request is not None
        queue.remove(request)
        queue.charge(request, 1.0, 0, 1, 0.0)
        served[request.rank] += 1
    assert served == [16, 6], "8 : 3"


def test_batch_can_be_left_out() -> None:
    queue = Queue(10)
    queue.push(waiting(1, 1.0, rank=BATCH_RANK))
    assert order(queue) == [1]
    assert order(queue, BATCH_RANK) == []
    queue.push(waiting(2, 2.0))
    assert order(queue, BATCH_RANK) == [2]
    assert order(queue) == [2, 1] or order(queue) == [1, 2]


def test_batch_that_comes_waits_like_the_batch_that_waits() -> None:
    cell = Cell(workers=False)
    for number in range(7):
        cell.on(worker_up(number, "prefill"))
    cell.on(worker_up(7, "decode"))
    busy = [request_of(rid) for rid in range(6)]
    for request in busy:
        cell.on(ev.Submit(request))
    assert len({request.prefill for request in busy}) == 6, "one of seven is idle, but 6/7 is above the limit"
    batch = [request_of(rid) for rid in (6, 7)]
    for request in batch:
        request.rank = BATCH_RANK
        cell.on(ev.Submit(request))
    assert [request.phase for request in batch] == [Phase.QUEUED, Phase.QUEUED]
    assert cell.core.state.queue.order(BATCH_RANK) == []
    cell.on(ev.Reserved(7, busy[0].attempt, 0))
    cell.on(ev.Emitted(busy[0].prefill, busy[0].attempt, 1))
    assert batch[0].phase == Phase.PLACED, "5/7 compute: now there is room to fill, in order"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.floats(0, 100)), max_size=30))
def test_everybody_is_in_the_order_once(what: list[tuple[str, int, float]]) -> None:
    queue = Queue(100)
    for rid, (tenant, rank, deadline) in enumerate(what):
        queue.push(waiting(rid, deadline, tenant, rank))
        queue.charge(waiting(1000 + rid, 0.0, tenant, rank), deadline, 0, round(100 * deadline), 0.0)
    assert sorted(order(queue)) == list(range(len(what)))
    for rid in range(len(what)):
        assert queue.remove(queue.waiting[rid])
    assert order(queue) == []


def traffic(greedy: int) -> Trace:
    """Ten tenants in turn at well under what 1 + 1 workers can do; one of them sends everything so many times."""
    rows = [i for i in range(400) for _ in range(greedy if i % 10 == 0 else 1)]
    n = len(rows)
    return Trace(
        "tenants", 0, array("d", [0.065 * i for i in rows]), array("q", [1500] * n), array("q", [20] * n), array("q"),
        array("q", bytes(8 * (n + 1))), tenant=[f"t{i % 10}" for i in rows],
    )  # fmt: skip


def test_one_tenant_at_ten_times_its_share_costs_the_others_little() -> None:
    settings = Settings(prefill=1, decode=1, parameters={"late": "refuse"})
    calm, crowded = (replay(traffic(greedy), settings).summary() for greedy in (1, 10))
    assert calm["attainment"] > 0.99
    shares = crowded["attainment_by_tenant"]
    assert min(share for tenant, share in shares.items() if tenant != "t0") > 0.97
    blind = replay(replace(traffic(10), tenant=None), settings).columns.attained()
    others = [met for met, tenant in zip(blind, traffic(10).tenant or [], strict=True) if tenant != "t0"]
    assert sum(others) / len(others) < 0.98, "without shares they would have felt it"


def test_batch_fills_what_is_left() -> None:
    trace = traffic(1)
    realtime = replay(trace, Settings(prefill=1, decode=1))
    both = replace(
        trace,
        arrival=array("d", [when for when in trace.arrival for _ in range(3)]),
        prompt=array("q", [1500] * 1200), output=array("q", [20] * 1200), offsets=array("q", bytes(8 * 1201)),
        tenant=None, klass=[name for _ in range(400) for name in ("realtime", "batch", "batch")],
    )  # fmt: skip
    filled = replay(both, Settings(prefill=1, decode=1))
    attained = filled.columns.attained()
    assert filled.summary()["completed"] == 1200
    assert sum(attained[::3]) >= 0.99 * realtime.columns.attained().sum()
    assert sum(attained[1::3]) + sum(attained[2::3]) == 800, "batch has hours"
