"""The emulated worker against the real scheduler, step by step, on random scripts."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from tests.sim.scripts import Script, Shape
from tests.sim.stepped import SteppedWorker
from twinpool.cost import LLAMA_8B_H100_TP1, StepCost
from twinpool.cost_grid import GridCost, Grids
from twinpool.sim.worker import SimWorker

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
    return Shape(
        seed,
        rng.choice([SMALL, LLAMA_8B_H100_TP1, GRID, GRID]),
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
    )


def same(a: object, b: object) -> bool:
    """Equal events, times and seconds to 1e-9."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or abs(a - b) <= EXACT_S  # type: ignore[operator]
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return a == b


def compare(fast: Script, slow: Script) -> None:
    for worker in fast.all_workers:  # what two workers say at the very same time has no order
        a, b = fast.said_by(worker), slow.said_by(worker)
        for (t1, e1), (t2, e2) in zip(a, b, strict=False):
            assert abs(t1 - t2) <= EXACT_S and same(e1, e2), f"{t1!r} {e1}\n{t2!r} {e2}"
        assert len(a) == len(b)
    assert sorted(fast.kv_log) == sorted(slow.kv_log)
    for rid in range(len(fast.outputs)):
        a, b = fast.gaps(rid), slow.gaps(rid)
        assert len(a) == len(b), f"request {rid}: {len(a)} gaps, {len(b)}"
        assert all(abs(x - y) <= EXACT_S for x, y in zip(a, b, strict=True)), f"request {rid}"
    for worker, one in fast.workers.items():
        other = slow.workers[worker]
        assert (one.free_blocks, one.cached_units) == (other.free_blocks, other.cached_units)


@pytest.mark.parametrize("seed", range(200))
def test_jumping_is_stepping(seed: int) -> None:
    shape = shape_of(seed)
    compare(Script(shape, SimWorker).run(), Script(shape, SteppedWorker).run())
