"""In a large cell workers are kept in order: whatever is asked, the answer is that of asking each of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tests.router.fake_worker import request_of, worker_up

from twinpool.cost import StepCost
from twinpool.router import state
from twinpool.router.demand import Demand
from twinpool.router.kv_index import KvIndex
from twinpool.router.policy import View
from twinpool.router.policy.least_seconds import LeastSeconds
from twinpool.router.policy.orders import Orders
from twinpool.router.pool import Pool
from twinpool.router.request import Request
from twinpool.router.worker import Worker
from twinpool.sim.generate import generate
from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings
from twinpool.sim.trace import speed

NOW = 100.0
PROMPTS = 6


class Crowd:
    """A cell in a random state, and what happens in it."""

    def __init__(self, seed: int, roles: tuple[tuple[str, ...], ...], workers: int = 40) -> None:
        self.rng = random.Random(seed)
        self.pool, self.index = Pool(), KvIndex()
        for number in range(workers):
            up = worker_up(number, *self.rng.choice(roles), blocks=self.rng.choice((600, 1000)), chunk_tokens=512,
                           max_batch=12)  # fmt: skip
            up.device = self.rng.choice(("one", "other"))
            up.cost = StepCost(0.01, 1e-4, 1e-8, 0.012, 5e-5, 1e-7)
            self.pool.add(Worker(up))
        self.orders = Orders(self.pool)
        self.attempt = 1
        self.now = NOW

    def happen(self) -> None:
        """Something changes at one worker."""
        rng, worker = self.rng, self.rng.choice(list(self.pool.workers.values()))
        self.now += rng.random() * 0.02
        kind = rng.randrange(8)
        if kind < 3:
            self.attempt += 1
            worker.book(self.attempt, self.attempt, rng.randrange(1, 900))
            if kind == 0:
                worker.join_decode(self.attempt, rng.randrange(1, 500), rng.choice((0.05, 0.1)))
            else:
                tokens = rng.randrange(1, 400)
                worker.commit_prefill(self.attempt, tokens / 1000, tokens, 0, self.now, rng.random() < 0.1)
        elif kind == 3 and worker.prefills:
            worker.progress(rng.choice(list(worker.prefills)), rng.randrange(200), 0, rng.choice((1.0, 1.2)), self.now)
        elif kind < 6 and worker.attempts:
            worker.forget(rng.choice(list(worker.attempts)), self.now)
        elif kind == 6:
            prompt = rng.randrange(PROMPTS)
            depth = rng.randrange(1, 200)
            self.index.change(worker.id, [hash_of(prompt, i) for i in range(depth)], [], True)
        elif kind == 7 and rng.random() < 0.3:
            worker.returns.add(rng.random(), self.now)
        elif kind == 7 and rng.random() < 0.5:
            worker.pace.saw_request(rng.choice((0.9, 1.1, 1.3)))
        elif rng.random() < 0.4:
            worker.full = not worker.full

    def request(self) -> Request:
        """One that waits; some are known to be late, some have a decode deadline of their own."""
        rng = self.rng
        prompt, length = rng.randrange(PROMPTS), rng.randrange(8, 900)
        hashes = [hash_of(prompt, i) for i in range(length // 4)]
        request = request_of(rng.randrange(50), length, rng.choice((1, 20, 200)), hashes=hashes,
                             itl_s=rng.choice((0.05, 0.1)))  # fmt: skip
        request.arrival = self.now - rng.random()
        request.deadline = request.arrival + rng.choice((0.3, 1.0, 3.0))
        request.late = rng.random() < 0.2
        request.rank = rng.choice((0, 0, 0, 2))
        return request

    def views(self) -> tuple[View, View]:
        """One that asks each worker, one that has orders."""
        demand = Demand(range(self.rng.choice((1, 5, 400))))
        for rate in (demand.placed, demand.prefilled):
            rate.add(50.0, self.now)
        each = View(self.pool, self.index, 0.001, 60, demand=demand)
        return each, View(self.pool, self.index, 0.001, 60, orders=self.orders, demand=demand)


def hash_of(prompt: int, block: int) -> int:
    """Of a block: the first 50 of every two prompts are the same."""
    return 10_000 * (prompt // 2 if block < 50 else 100 + prompt) + block


@pytest.mark.parametrize("paths", ["auto", "split", "local"])
@pytest.mark.parametrize("roles", [(("prefill",), ("decode",)), (("prefill",), ("decode",), ("prefill", "decode"))])
def test_answers_are_those_of_asking_each(paths: str, roles: tuple[tuple[str, ...], ...]) -> None:
    kinds = set()
    for seed in range(6):
        crowd = Crowd(seed, roles)
        policy = LeastSeconds(paths, "refuse", "off")
        for _ in range(300):
            for _ in range(crowd.rng.randrange(6)):
                crowd.happen()
            each, ordered = crowd.views()
            request = crowd.request()
            answer = policy.on_room(request, each, crowd.now)
            assert policy.on_room(request, ordered, crowd.now) == answer
            assert policy.decode_for(request, ordered, crowd.now) == policy.decode_for(request, each, crowd.now)
            assert policy.next_room(ordered, crowd.now) == policy.next_room(each, crowd.now)
            assert crowd.orders.prefill_share() == crowd.pool.prefill_share
            kinds.add(type(answer).__name__)
        crowd.orders.check_integrity()
    assert kinds >= ({"Placement"} if paths == "local" else {"Placement", "Passed"})


def test_a_worker_that_goes_or_drains_is_in_no_order() -> None:
    crowd = Crowd(1, (("prefill",), ("decode",)))
    for _ in range(200):
        crowd.happen()
    crowd.orders.check_integrity()
    crowd.pool.remove(3)
    crowd.pool.workers[4].draining = True
    crowd.pool.sort()
    crowd.orders.check_integrity()
    assert not (crowd.orders.prefill | crowd.orders.decode) >> 3 & 3


def test_stairs_hold_until_a_block_changes() -> None:
    index, hashes = KvIndex(), list(range(10))
    index.change(0, hashes[:6], [], False)
    index.change(1, hashes[:3], [], False)
    stairs = index.stairs(hashes)
    assert index.still(stairs, hashes)
    assert not index.still([], hashes)
    assert index.still([], [77])
    index.change(1, [3], [], False)
    assert not index.still(stairs, hashes)
    index.change(1, [], [3], False)
    assert index.still(stairs, hashes)
    index.change(0, [6], [], False)
    assert not index.still(stairs, hashes)


@pytest.mark.parametrize("late", ["serve", "refuse"])
@pytest.mark.parametrize("settings", [Settings(prefill=4, decode=3), Settings(prefill=2, decode=2, both=2)])
def test_a_simulated_cell_decides_alike(monkeypatch: pytest.MonkeyPatch, settings: Settings, late: str) -> None:
    settings = replace(settings, parameters={"late": late, "fetch": "off"})
    for kind, factor in (("long", 1.6), ("agentic", 4.0)):
        trace = speed(generate(kind, requests=250, rate=3.0, seed=3), factor)
        monkeypatch.setattr(state, "LARGE_POOL", 1 << 30)
        asked = replay(trace, settings)
        monkeypatch.setattr(state, "LARGE_POOL", 1)
        assert replay(trace, settings).digest == asked.digest


def test_a_large_cell_fetches_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only for who would be chosen without, so not as often; nothing gets lost by it."""
    trace = speed(generate("agentic", requests=250, rate=3.0, seed=3), 4.0)
    monkeypatch.setattr(state, "LARGE_POOL", 1)
    own, without = (replay(trace, Settings(prefill=4, decode=3, parameters={"fetch": say})) for say in ("on", "off"))
    assert own.digest != without.digest
    assert own.summary()["completed"] == without.summary()["completed"] == len(trace)
    assert own.summary()["cached_token_share"] >= without.summary()["cached_token_share"]
