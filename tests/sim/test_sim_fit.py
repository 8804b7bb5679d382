"""The fit of the closed form finds coefficients that are there, and says how far off it is where they are not."""

from __future__ import annotations

import random

import pytest

from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, StepCost
from twinpool.errors import ConfigError
from twinpool.sim.fit import StepSample, fit_step_cost, sample

ONE_LINE = StepCost(c0=4e-3, a=2e-4, b=1e-9, d0=4e-3, d1=2e-4, d2=5e-8)
SHAPES: list[tuple[list[tuple[int, int]], int, int]] = [
    *(([(tokens, cached)], 0, 0) for tokens in (32, 128, 512, 2048, 8192) for cached in (0, 4096, 32768)),
    *(([], batch, batch * context) for batch in (1, 8, 64, 200) for context in (64, 1024, 4096)),
    *(([(tokens, 0), (tokens, 900)], 32, 32_000) for tokens in (64, 256, 1024)),
]


def log(cost: StepCost, noise: float = 0.0) -> list[StepSample]:
    rng = random.Random(7)
    return [
        sample(chunks, batch, context, cost.step(chunks, batch, context) * (1.0 + rng.uniform(-noise, noise)))
        for chunks, batch, context in SHAPES
    ]


@pytest.mark.parametrize("cost", [LLAMA_70B_H100_TP4, LLAMA_8B_H100_TP1, ONE_LINE])
def test_exact_steps_give_their_cost_back(cost: StepCost) -> None:
    fit = fit_step_cost(log(cost))
    assert fit.worst_error < 1e-6
    for chunks, batch, context in SHAPES:
        assert fit.cost.step(chunks, batch, context) == pytest.approx(cost.step(chunks, batch, context), rel=1e-6)


def test_noise_is_not_fitted() -> None:
    fit = fit_step_cost(log(LLAMA_70B_H100_TP4, noise=0.05))
    assert 0.005 < fit.mean_error < 0.04
    assert fit.worst_error < 0.1
    assert fit.cost.prefill(4096, 0, 2048) == pytest.approx(LLAMA_70B_H100_TP4.prefill(4096, 0, 2048), rel=0.04)


def test_a_log_of_one_kind_of_step_is_fitted_without_negative_coefficients() -> None:
    decodes = [one for one in log(LLAMA_70B_H100_TP4) if one.tokens == 0]
    fit = fit_step_cost(decodes)
    assert fit.worst_error < 1e-6
    assert min(fit.cost.c0, fit.cost.a, fit.cost.b, fit.cost.d0, fit.cost.d1, fit.cost.d2) >= 0.0
    assert fit_step_cost([StepSample(0, 0.0, 1, 100, 0.02)]).cost.decode(1, 100) == pytest.approx(0.02)


@pytest.mark.parametrize("samples", [[], [StepSample(1, 0.5, 0, 0, 0.0)], [StepSample(1, 0.5, 0, 0, float("nan"))]])
def test_steps_that_say_nothing_are_refused(samples: list[StepSample]) -> None:
    with pytest.raises(ConfigError, match="step"):
        fit_step_cost(samples)
