"""The fit through the simulator (benchmarks/sim/vllm_run.py): on an engine that is known, and on the real run."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from array import array
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from tests.sim.real_traces import real_trace

from twinpool.cost import StepCost
from twinpool.errors import ConfigError
from twinpool.sim.profiles import load_profile
from twinpool.sim.trace import Trace, no_hashes

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "sim" / "vllm_run.py"
TRUE = StepCost(c0=0.007, a=4.5e-5, b=1.2e-9, d0=0.012, d1=2.5e-5, d2=9e-8)


@pytest.fixture(scope="module")
def vllm_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["vllm_run"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def traffic(count: int, rate: float) -> Trace:
    draw = random.Random(5)
    arrival, now = array("d"), 0.0
    for _ in range(count):
        arrival.append(now)
        now += draw.expovariate(rate)
    prompt = array("q", [draw.randint(200, 3000) for _ in range(count)])
    output = array("q", [draw.randint(20, 120) for _ in range(count)])
    return Trace("t", 0, arrival, prompt, output, array("q"), no_hashes(count))


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_engine_that_is_known_is_found_from_its_first_requests(vllm_run: ModuleType, tmp_path: Path) -> None:
    trace, setup = traffic(90, 8.0), vllm_run.SETUPS[0]
    exact = vllm_run.Simulated(trace, setup, tmp_path)(TRUE)
    run = vllm_run.Run(trace, vllm_run.Times(exact.ttft + 0.02, exact.decode), np.zeros(len(trace)))
    start = StepCost(c0=0.004, a=7e-5, b=6e-10, d0=0.02, d1=4e-5, d2=5e-8)
    found = vllm_run.fit(run, setup, tmp_path, 40, [start])
    assert found.edge_s == pytest.approx(0.02, abs=0.005)
    assert found.decode_rms < 0.02
    for chunks, batch, context in (([(2000, 0)], 0, 0), ([(600, 0)], 20, 40_000), ([], 20, 40_000)):
        assert found.cost.step(chunks, batch, context) == pytest.approx(TRUE.step(chunks, batch, context), rel=0.08)
    rest = vllm_run.compare(run, vllm_run.predict(run, setup, found, tmp_path), slice(40, 90))
    assert abs(vllm_run.error(rest.ttft["mean"])) < 0.05
    assert abs(vllm_run.error(rest.tpot["mean"])) < 0.02


def test_the_engine_gives_out_its_seats_in_order_of_arrival(
    vllm_run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_run, "SEATS", 4)
    trace = traffic(60, 20.0)
    times = vllm_run.Simulated(trace, vllm_run.SETUPS[0], tmp_path)(TRUE)
    first = np.asarray(trace.arrival) + times.ttft
    ended = first + times.decode
    assert (np.diff(first) >= -1e-9).all()
    for moment in first:
        assert ((first <= moment + 1e-9) & (ended > moment + 1e-9)).sum() <= 4
    assert times.ttft.max() > 1.0, "nobody had to wait for a seat"
    assert (times.decode / np.asarray(trace.output)).max() < 0.1, "nobody waits once it has one"


def test_a_run_is_read_with_its_clocks_laid_together(vllm_run: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    rows = [
        {"input_toks": 9, "output_toks": 5, "arrival_time": 1e9 + i, "queued_ts": 50.0 + i + 0.01 * (2 - i),
         "first_token_ts": 50.5 + i, "last_token_ts": 51.5 + i}
        for i in range(3)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(row) for row in rows))
    run = vllm_run.load_run(path, 2)  # the quickest of the first two took 10 ms less than it seems
    assert run.trace.arrival.tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert run.queued == pytest.approx([0.01, 0.0, -0.01], abs=1e-6)
    assert run.times.ttft == pytest.approx([0.49] * 3, abs=1e-6)
    assert run.tpot(run.times) == pytest.approx([0.25] * 3)
    with pytest.raises(ConfigError, match="--fitted 4"):
        vllm_run.load_run(path, 4)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not usable as a run"):
        vllm_run.load_run(path, 1)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_real_run_is_predicted_from_its_first_hundred(vllm_run: ModuleType, tmp_path: Path) -> None:
    run = vllm_run.load_run(real_trace("vllm_rtxpro6000_llama8b_requests.jsonl"), 100)
    setup, starts = vllm_run.SETUPS[0], [load_profile(name).fit for name in vllm_run.STARTS]
    found = vllm_run.fit(run, setup, tmp_path, 100, starts)
    whole = vllm_run.compare(run, vllm_run.predict(run, setup, found, tmp_path), slice(0, 300))
    assert whole.ttft["mean"][0] == pytest.approx(7120.0, abs=1.0)
    assert whole.tpot["mean"][0] == pytest.approx(32.46, abs=0.01)
    assert abs(vllm_run.error(whole.ttft["mean"])) < 0.05
    assert abs(vllm_run.error(whole.tpot["mean"])) < 0.02
