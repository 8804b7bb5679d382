"""The emulated worker against the real scheduler, step by step, on random scripts."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest
from tests.sim.scripts import Script, Shape
from tests.sim.stepped import SteppedWorker

from twinpool.cost import LLAMA_8B_H100_TP1, Cost, StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.router import events as ev
from twinpool.sim.gaps import Runs
from twinpool.sim.worker import SimWorker
from twinpool.workers.eviction import RULES

EXACT_S = 1e-9
SMALL = StepCost(c0=1e-3, a=2e-4, b=3e-6, d0=4e-3, d1=1e-4, d2=1e-6)
GRID = GridCost(
    Grids(
        work_tokens=[0, 4, 16, 64],
        work_ms=[4.0, 4.1, 4.9, 9.0],
        attention_tokens=[0, 8, 64],
        attention_cached=[0, 32, 128],
        attention_ms=[[0.0, 0.0, 0.0], [0.02, 0.1, 0.3], [0.4, 1.0, 3.0]],
        decode_batch=[0, 1, 4, 16, 64],
        decode_context=[0, 20, 40, 80, 200, 1000],
        decode_ms=[[0.0] * 6, *([k * (1.0 + b / 50) for k in (0.0, 0.1, 0.2, 0.7, 3.0, 10.0)] for b in (1, 4, 16, 64))],
    )
)


def shape_of(seed: int) -> Shape:
    """One of many kinds of small clusters."""
    rng = random.Random(seed * 7919)
    costs: list[Cost] = [SMALL, LLAMA_8B_H100_TP1, GRID, GRID]
    return Shape(
        seed,
        rng.choice(costs),
        workers=rng.randint(1, 3),
        requests=rng.choice([6, 20, 40]),
        seconds=rng.choice([0.3, 1.0, 4.0]),
        blocks=rng.choice([24, 40, 120, 300, 1000]),
        unit_tokens=rng.choice([4, 4, 4, 0]),
        chunk_tokens=rng.choice([3, 8, 16, 64]),
        max_batch=rng.choice([2, 3, 8, 64]),
        outputs=rng.choice([(1, 4), (1, 60), (50, 200), (200, 800)]),
        slack=rng.choice([(1, 2), (1, 30), (100, 200)]),
        itls=rng.choice([(0.02, 0.05, math.inf), (0.005,), (math.inf,)]),
        faults=rng.choice([0.0, 0.3]),
        deaths=rng.choice([0, 1]),
        eviction=rng.choice(list(RULES)),
        returning=rng.choice([0, 1, 2, 3]),
    )


def same(a: object, b: object) -> bool:
    """Equal events, times and seconds to 1e-9."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or abs(a - b) <= EXACT_S  # type: ignore[operator]
    if isinstance(a, ev.Record):
        return all(same(getattr(a, name), getattr(b, name)) for name in ev.fields(type(a)))
    return a == b


def compare(fast: Script, slow: Script) -> None:
    """Told events and their times, changes of the caches, gaps, and blocks at the end."""
    for worker in fast.all_workers:  # what two workers say at the very same time has no order
        said, expected = fast.said_by(worker), slow.said_by(worker)
        for (t1, e1), (t2, e2) in zip(said, expected, strict=False):
            assert abs(t1 - t2) <= EXACT_S, f"{t1!r} {e1}\n{t2!r} {e2}"
            assert same(e1, e2), f"{t1!r} {e1}\n{t2!r} {e2}"
        assert len(said) == len(expected)
    assert sorted(fast.kv_log) == sorted(slow.kv_log)
    compare_gaps(fast, slow)
    for worker, one in fast.workers.items():
        other = slow.workers[worker]
        assert (one.free_blocks, one.cached_units) == (other.free_blocks, other.cached_units)


def compare_gaps(fast: Script, slow: Script) -> None:
    for rid in range(len(fast.outputs)):
        a, b = fast.gaps(rid), slow.gaps(rid)
        assert len(a) == len(b), f"request {rid}: {len(a)} gaps, {len(b)}"
        assert all(abs(x - y) <= EXACT_S for x, y in zip(a, b, strict=True)), f"request {rid}"
    for worker, one in fast.all_workers.items():  # all are felt by as many, or percentiles over all would be off
        assert felt(one.runs) == felt(slow.all_workers[worker].runs)


def felt(runs: Runs) -> int:
    return sum(count * batch for count, batch in zip(runs.count, runs.batch, strict=True))


@pytest.mark.parametrize(
    "seed", [seed if seed < 60 else pytest.param(seed, marks=pytest.mark.full) for seed in range(200)]
)
def test_jumping_is_stepping(seed: int) -> None:
    shape = shape_of(seed)
    compare(Script(shape, SimWorker).run(), Script(shape, SteppedWorker).run())


@pytest.mark.parametrize(
    "seed", [seed if seed < 20 else pytest.param(seed, marks=pytest.mark.full) for seed in range(60)]
)
def test_jumping_is_stepping_where_prompts_take_longer_than_planned(seed: int) -> None:
    shape = dataclasses.replace(shape_of(seed), error=0.3)
    compare(Script(shape, SimWorker).run(), Script(shape, SteppedWorker).run())


def test_scripts_try_everything() -> None:
    """The comparison is worth something only if every kind of event is in it, and jumps save wakes."""
    told: Counter[str] = Counter()
    removed = fast_wakes = slow_wakes = 0
    for seed in range(12):
        fast = Script(shape_of(seed), SimWorker).run()
        told.update(type(event).__name__ for _, event in fast.log)
        removed += sum(len(gone) for _, _, _, gone in fast.kv_log)
        fast_wakes += fast.woken
        slow_wakes += Script(shape_of(seed), SteppedWorker).run().woken
    for kind in (ev.Reserved, ev.NoRoom, ev.Progressed, ev.BlocksReady, ev.BlocksVerified, ev.Emitted, ev.Ended,
                 ev.AttemptLost, ev.Short):  # fmt: skip
        assert told[kind.__name__] > 20, kind
    assert told["Reported"] > 5  # only where there is room again for what was refused
    assert removed > 100
    assert fast_wakes < 0.7 * slow_wakes


@pytest.mark.parametrize("seed", range(10))
def test_units_of_several_blocks_change_no_time(seed: int) -> None:
    """Where nobody shares a prefix and memory is ample, what a hash stands for does not matter."""
    shape = dataclasses.replace(shape_of(seed), faults=0.0, deaths=0, blocks=100_000, families=10_000, unit_tokens=12)
    fast = Script(shape, SimWorker).run()
    slow = Script(dataclasses.replace(shape, unit_tokens=0), SteppedWorker).run()
    assert [(round(t, 8), type(e)) for t, e in fast.log] == [(round(t, 8), type(e)) for t, e in slow.log]
    compare_gaps(fast, slow)
    assert all(worker.free_blocks == 100_000 for worker in fast.workers.values())


@pytest.mark.parametrize("seed", range(30))
def test_units_of_several_blocks_come_back(seed: int) -> None:
    shape = dataclasses.replace(shape_of(seed), unit_tokens=12)
    script = Script(shape, SimWorker).run()
    assert all(worker.free_blocks == shape.blocks for worker in script.workers.values())
    for worker in script.workers:
        index: set[int] = set()
        for _, _, stored, removed in sorted(news for news in script.kv_log if news[0] == worker):
            assert index.isdisjoint(stored)
            assert index.issuperset(removed)
            index = index.union(stored).difference(removed)
        assert len(index) == script.workers[worker].cached_units


def alone(seconds: float = 0.0) -> tuple[Script, SimWorker]:
    """A worker that only does what a test tells it, in a cluster that does nothing by itself."""
    script = Script(Shape(0, SMALL, workers=1, requests=1, faults=0.0, deaths=0, prompts=(8, 8)), SimWorker)
    script.heap.clear()
    script.outputs[0] = 100
    worker = script.workers[0]
    assert isinstance(worker, SimWorker)
    return script, worker


def test_a_stall_moves_all_later_tokens() -> None:
    script, worker = alone()
    request = script.requests[0]
    request.begin_attempt(1)
    script.push(0.0, worker.take, ev.SendPrefill(0, request, 1, True, False), 0.0)
    script.push(0.1, worker.stall, 0.1, 0.5)
    script.push(0.3, worker.stall, 0.3, 0.1)  # within the first
    script.run()
    (end,) = [when for when, event in script.log if isinstance(event, ev.Ended)]
    lengths = range(9, 108)
    expected = SMALL.prefill(8, 0, 16) + sum(SMALL.decode(1, length) for length in lengths) + 0.5
    assert end == pytest.approx(expected, abs=EXACT_S)
    gaps = script.gaps(0)
    assert len(gaps) == 99
    assert max(gaps) == pytest.approx(0.5 + SMALL.decode(1, 20), abs=1e-4)


def test_the_dead_say_what_they_had_said() -> None:
    script, worker = alone()
    request = script.requests[0]
    request.begin_attempt(1)
    script.push(0.0, worker.take, ev.SendPrefill(0, request, 1, True, False), 0.0)
    step = SMALL.decode(1, 0)
    script.push(0.0905, script._die, 0)
    script.run()
    tokens = sum(event.count for _, event in script.log if isinstance(event, ev.Emitted))
    assert tokens == 1 + int((0.0905 - SMALL.prefill(8, 0, 16)) / (step + 30e-6))
    assert len(script.gaps(0)) == tokens - 1


def test_a_unit_is_made_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match="units of whole blocks"):
        SimWorker(0, alone()[0], SMALL, blocks=4, block_size=16, unit_tokens=24, block_bytes=1, chunk_tokens=1,
                  max_batch=1)  # fmt: skip
