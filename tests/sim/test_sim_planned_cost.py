"""Workers that plan by one cost while their steps last as long as another says, as live ones do."""

from __future__ import annotations

from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from tests.sim.search_traffic import traffic

from twinpool.cost import ITL_SHARE, StepCost
from twinpool.router import events as ev
from twinpool.sim.calibrate import Given, fit_steps, make_profile, write_profile
from twinpool.sim.calibrate_logs import read_steps
from twinpool.sim.profiles import load_profile
from twinpool.sim.replay import Cluster, build, replay, run
from twinpool.sim.settings import Settings
from twinpool.workers.step_log import StepLog, WorkerLine

PLANNED = StepCost(c0=0.007, a=6e-5, b=1e-9, d0=0.015, d1=3.5e-5, d2=2.9e-8)
LATE = 0.0012
SETTINGS = Settings(prefill=0, decode=0, both=1, itl_s=0.05, chunk_tokens=2048, max_tokens=1)


def written(folder: Path, late: float, planned: StepCost | None) -> Path:
    """The profile of a worker whose steps are ``late`` seconds longer than PLANNED says."""
    now = 0.0
    line = WorkerLine("p0", "emulated", "m", 20_000, 16, 256, 2048, 256, planned)
    log = StepLog(folder / "steps", line, lambda: 0.0)
    for i in range(1, 200):
        prompt = [(10 * i, 100 * (i % 7))]
        for chunks, batch, context in ((prompt, 0, 0), ([], i % 40 + 1, 700 * i), (prompt, i % 20 + 1, 300 * i)):
            ended = now + late + PLANNED.step(chunks, batch, context)
            log.add(chunks, batch, context, now, ended)
            now = ended
    log.close()
    steps = read_steps([folder / "steps"])
    worker = steps.workers["p0"]
    assert worker.cost == planned
    out = folder / "profile.json"
    write_profile(out, make_profile("late", fit_steps(steps), None, worker, None, Given()))
    return out


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(written(tmp_path_factory.mktemp("late"), LATE, PLANNED))


def test_the_step_log_tells_the_profile_what_is_planned_by(late: str) -> None:
    profile = load_profile(late)
    assert profile.planned == PLANNED
    assert profile.fit.decode(8, 8000) == pytest.approx(PLANNED.decode(8, 8000) + LATE, rel=0.01)
    assert load_profile("h100_sxm/llama-3.1-70b/tp4").planned is None


def test_the_router_hears_the_workers_own_cost_and_steps_take_the_true_one(late: str) -> None:
    cluster = Cluster(replace(SETTINGS, profile=late), traffic(5))
    up = cluster.worker_up(0, ("prefill", "decode"))
    assert up.cost == PLANNED
    assert cluster.cost.decode(8, 8000) == load_profile(late).fit.decode(8, 8000)
    assert cluster.cost.largest_chunk(0.045, 0, 8, 8000) == PLANNED.largest_chunk(0.045, 0, 8, 8000)


def test_full_steps_end_later_than_planned_by_what_comes_on_top(late: str, tmp_path: Path) -> None:
    trace = traffic(150, rate=3.0)
    aware = str(written(tmp_path, LATE, None))  # its workers would know of it
    gaps = {}
    for name, profile in (("late", late), ("aware", aware)):
        summary = replay(trace, replace(SETTINGS, profile=profile)).summary()
        assert summary["completed"] == len(trace)
        gaps[name] = summary["itl_ms"]["p99"] / 1e3
    assert gaps["aware"] == pytest.approx(ITL_SHARE * SETTINGS.itl_s, abs=3e-4)
    assert gaps["late"] == pytest.approx(ITL_SHARE * SETTINGS.itl_s + LATE, abs=3e-4)


def test_planning_by_the_truth_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = written(tmp_path / "a", 0.0, None)
    same = written(tmp_path / "b", 0.0, load_profile(str(plain)).fit)
    trace = traffic(60)
    digests = {replay(trace, replace(SETTINGS, profile=str(file))).digest for file in (plain, same)}
    assert len(digests) == 1


def test_what_comes_on_top_is_news_where_it_is_much(tmp_path: Path) -> None:
    """As live: the worker sees that a step was late, tells the router, and cuts the next chunk by it."""
    profile = str(written(tmp_path, 0.004, PLANNED))
    trace = replace(traffic(30, rate=0.5), prompt=array("q", [4000] * 30), output=array("q", [300] * 30))
    settings = replace(SETTINGS, profile=profile)
    told: list[ev.Progressed] = []
    loop = build(trace, settings)
    heard = loop.core.attempts.progressed
    loop.core._handlers[ev.Progressed] = lambda event, now: (told.append(event), heard(event, now))  # type: ignore[func-returns-value, assignment]
    run(loop)
    assert len(told) > len(trace)  # not only the ends of prompts
    assert max(event.pace for event in told) > 1.1
    gaps = replay(trace, settings).summary()["itl_ms"]
    assert gaps["p99"] / 1e3 < ITL_SHARE * SETTINGS.itl_s + 0.002
