"""Tables in place of the formula: for workers whose steps do not follow it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twinpool.cli import sim, sim_calibrate  # noqa: F401  # the second adds its command to the first
from twinpool.cost import StepCost
from twinpool.cost_grid import GridCost
from twinpool.sim.calibrate import fit_steps
from twinpool.sim.calibrate_grid import ENOUGH, measured_grids
from twinpool.sim.calibrate_logs import Steps
from twinpool.sim.fit import sample
from twinpool.sim.profiles import load_profile

FORMULA = StepCost(c0=0.007, a=6e-5, b=1e-9, d0=0.015, d1=3.5e-5, d2=2.9e-8)


def of_cpu(tokens: int, batch: int, context: int) -> float:
    """Seconds as the embedded model's were seen: one sequence by itself is cheaper than a line through the others."""
    if tokens:
        return 0.040 + 0.0036 * (tokens + batch) + 1e-5 * context
    return (0.035 if batch == 1 else 0.040 + 0.0066 * batch) + 1e-5 * context


def logged(seed: int, count: int, batches: int = 5) -> Steps:
    rng = random.Random(seed)
    steps = Steps()
    for _ in range(count):
        noise = 1.0 + 0.02 * rng.random()
        tokens = rng.randint(8, 512)
        steps.add(sample([(tokens, 0)], 0, 0, noise * of_cpu(tokens, 0, 0)))
        batch = rng.randint(1, batches)
        context = sum(rng.randint(20, 600) for _ in range(batch))
        steps.add(sample([], batch, context, noise * of_cpu(0, batch, context)))
    return steps


def test_tables_take_what_the_formula_cannot() -> None:
    steps = logged(1, 400)
    found = fit_steps(steps)
    assert found.mean_error > 0.03
    made = measured_grids(steps, found.cost, found.mean_error)
    assert made is not None
    grids, error = made
    assert error < 0.015
    cost = GridCost(grids)
    for batch in range(1, 6):
        assert cost.decode(batch, 300 * batch) == pytest.approx(of_cpu(0, batch, 300 * batch), rel=0.03)
    for tokens in (100, 333, 512):
        assert cost.step([(tokens, 0)], 0, 0) == pytest.approx(of_cpu(tokens, 0, 0), rel=0.03)
    assert cost.step([(200, 0)], 3, 900) == pytest.approx(of_cpu(200, 3, 900), rel=0.03)


def test_beyond_what_was_seen_they_go_on() -> None:
    steps = logged(2, 400)
    made = measured_grids(steps, *_formula(steps))
    assert made is not None
    cost = GridCost(made[0])
    assert cost.decode(40, 12_000) > cost.decode(20, 6_000) > cost.decode(5, 1_500)
    assert cost.step([(4096, 0)], 0, 0) == pytest.approx(of_cpu(4096, 0, 0), rel=0.05)
    assert cost.largest_chunk(1.0, 0, 0, 0) == pytest.approx(267, abs=8)


def _formula(steps: Steps) -> tuple[StepCost, float]:
    found = fit_steps(steps)
    return found.cost, found.mean_error


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_where_the_formula_holds_there_are_none(noise: float) -> None:
    """Also where all its error is noise."""
    rng = random.Random(3)
    steps = Steps()
    for _ in range(300):
        chunk = (rng.randint(16, 2048), rng.randint(0, 8192))
        batch = rng.randint(1, 8)
        context = rng.randint(100, 4000) * batch
        more = 1.0 + noise * rng.random()
        steps.add(sample([chunk], 0, 0, more * FORMULA.step([chunk], 0, 0)))
        steps.add(sample([], batch, context, more * FORMULA.decode(batch, context)))
    assert measured_grids(steps, *_formula(steps)) is None


def test_few_steps_make_none() -> None:
    steps = logged(4, ENOUGH - 1)
    assert measured_grids(steps, FORMULA, 0.5) is None


def test_the_command_puts_them_into_the_profile(tmp_path: Path) -> None:
    log, out = tmp_path / "steps.csv", tmp_path / "cpu.json"
    steps = logged(5, 300)
    rows = [f"{t},0,{b},{k},{s}" for t, b, k, s in
            zip(steps.tokens, steps.batch, steps.context, steps.seconds, strict=True)]  # fmt: skip
    log.write_text("\n".join(["tokens,cached,batch,context,seconds", *rows]) + "\n", "utf-8")
    asked = ["calibrate", "--table", str(log), "-o", str(out), "--kv-tokens", "10000", "--kv-bytes-per-token", "46080"]
    result = CliRunner().invoke(sim.app, [*asked, "--json", "-"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["tables_mean_error"] < 0.02
    profile = load_profile(str(out))
    assert profile.cost is not profile.fit
    assert profile.cost.decode(1, 300) == pytest.approx(of_cpu(0, 1, 300), rel=0.03)
