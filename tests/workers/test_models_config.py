"""Rotary frequencies and their stretching."""

from __future__ import annotations

import pytest

from twinpool.errors import ConfigError
from twinpool.workers.models.config import LlamaConfig, RopeScaling, check


def config_of(scaling: RopeScaling | None) -> LlamaConfig:
    return LlamaConfig(
        family="llama", vocab_size=8, hidden=8, ffn=8, layers=1, heads=1, kv_heads=1, head_dim=8, eps=1e-5,
        rope_theta=16.0, max_context=64, tied_head=True, rope_scaling=scaling,
    )  # fmt: skip


def test_plain_frequencies_fall_geometrically() -> None:
    assert config_of(None).rope_frequencies() == pytest.approx([1.0, 0.5, 0.25, 0.125])


def test_linear_and_factors_divide() -> None:
    assert config_of(RopeScaling("linear", 2.0)).rope_frequencies() == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    factors = RopeScaling("factors", factors=(1.0, 2.0, 4.0, 1.0))
    assert config_of(factors).rope_frequencies() == pytest.approx([1.0, 0.25, 0.0625, 0.125])


def test_llama3_keeps_short_waves_and_divides_long_ones() -> None:
    scaling = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=16)
    frequencies = config_of(scaling).rope_frequencies()
    assert frequencies[-1] == pytest.approx(0.125 / 8.0)  # a third of a turn in the original context
    assert 1.0 / 8.0 < frequencies[0] < 1.0  # 2.5 turns: between the two


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 0.0),
        RopeScaling("factors", factors=(1.0, 2.0)),
        RopeScaling("llama3", factor=8.0, low_freq_factor=4.0, high_freq_factor=4.0),
    ],
)
def test_impossible_scaling_is_refused(scaling: RopeScaling) -> None:
    with pytest.raises(ConfigError, match="rope scaling has impossible values"):
        check(config_of(scaling), "x.gguf")
