"""Profiles: every file is whole and says where it is from; names that do not exist."""

from __future__ import annotations

from importlib.resources import files

import msgspec
import pytest

from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4
from twinpool.errors import ConfigError
from twinpool.sim.profiles import DEFAULT_PROFILE, decoded, load_profile, name_of, profile_names

DEVICES = ("a100_sxm", "b200_sxm", "h100_sxm", "h200_sxm")
MODELS = {"llama-3.1-70b/tp4": (4, 327_680), "llama-3.1-8b/tp1": (1, 131_072), "qwen3-32b/tp2": (2, 262_144)}
LLAMAS = {"llama-3.1-70b/tp4": LLAMA_70B_H100_TP4, "llama-3.1-8b/tp1": LLAMA_8B_H100_TP1}


def test_every_device_has_every_model() -> None:
    assert profile_names() == [f"{device}/{model}" for device in DEVICES for model in MODELS]
    assert DEFAULT_PROFILE in profile_names()


@pytest.mark.parametrize("name", profile_names())
def test_a_profile_is_whole(name: str) -> None:
    profile = load_profile(name)
    gpus, kv_bytes = MODELS[name.split("/", 1)[1]]
    assert (profile.name, profile.gpus, profile.kv_bytes_per_token) == (name, gpus, kv_bytes)
    assert profile.link_bytes_per_s == 25e9
    assert profile.price_per_gpu_hour is None or profile.price_per_gpu_hour > 0.5
    assert profile.idle_watts_per_gpu is not None
    assert profile.busy_watts_per_gpu is not None
    assert 50 <= profile.idle_watts_per_gpu < profile.busy_watts_per_gpu
    assert set(profile.source) == {
        "grids",
        "kv_tokens",
        "link_bytes_per_s",
        "price_per_gpu_hour",
        "watts_per_gpu",
        "fit",
    }
    assert "aiconfigurator 0.12.0" in profile.source["grids"]
    assert len(files("twinpool.sim").joinpath("profiles", f"{name.replace('/', '-')}.json").read_bytes()) < 60_000


def test_memory_is_what_a_worker_really_has() -> None:
    assert load_profile("h100_sxm/llama-3.1-70b/tp4").kv_tokens == 418_000
    assert load_profile("h100_sxm/llama-3.1-8b/tp1").kv_tokens == 407_000
    for model in MODELS:
        tokens = [load_profile(f"{device}/{model}").kv_tokens for device in ("a100_sxm", "h200_sxm", "b200_sxm")]
        assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("name", profile_names())
def test_the_closed_form_is_as_near_to_the_grids_as_it_says(name: str) -> None:
    profile = load_profile(name)
    allowed = profile.fit_worst_error + 0.04  # the grids' own distance from what was fitted
    assert profile.fit_mean_error < 0.07
    for batch, context in ((1, 2048), (16, 2048), (64, 1024), (128, 512)):
        near = profile.fit.decode(batch, batch * context) / profile.cost.decode(batch, batch * context)
        assert near == pytest.approx(1.0, abs=allowed)
    for tokens, cached in ((512, 0), (2048, 0), (2048, 32768), (8192, 8192)):
        chunk = [(tokens, cached)]
        assert profile.fit.step(chunk, 0, 0) / profile.cost.step(chunk, 0, 0) == pytest.approx(1.0, abs=allowed)


@pytest.mark.parametrize("model", LLAMAS)
def test_the_grids_agree_with_the_coefficients_fitted_before(model: str) -> None:
    before = LLAMAS[model]
    cost = load_profile(f"h100_sxm/{model}").cost
    assert cost.prefill(12_000, 0, 2048) == pytest.approx(before.prefill(12_000, 0, 2048), rel=0.06)
    assert cost.decode(64, 64 * 2000) == pytest.approx(before.decode(64, 64 * 2000), rel=0.1)
    assert cost.largest_chunk(0.045, 0, 64, 64 * 1000) == pytest.approx(
        before.largest_chunk(0.045, 0, 64, 64 * 1000), rel=0.2
    )


def test_a_newer_device_is_faster() -> None:
    for model in MODELS:
        costs = [load_profile(f"{device}/{model}").cost for device in ("a100_sxm", "h100_sxm", "b200_sxm")]
        for seconds in (
            [cost.prefill(8192, 0, 2048) for cost in costs],
            [cost.decode(32, 32 * 2000) for cost in costs],
        ):
            assert seconds == sorted(seconds, reverse=True)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"tp2.*did you mean") as caught:
        load_profile("h100_sxm/llama-3.1-8b/tp2")
    for name in profile_names():
        assert name in str(caught.value)


def test_a_name_is_that_of_its_file() -> None:
    assert name_of("h100_sxm-llama-3.1-8b-tp1") == "h100_sxm/llama-3.1-8b/tp1"


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"gpus": "four"}, "gpus"), ({"colour": 1}, "colour"), ({"grids": {}}, "missing required field")],
)
def test_a_file_that_is_no_profile_is_refused(change: dict[str, object], problem: str) -> None:
    name = DEFAULT_PROFILE.replace("/", "-")
    content = msgspec.json.decode(files("twinpool.sim").joinpath("profiles", f"{name}.json").read_bytes())
    with pytest.raises(ConfigError, match=problem):
        decoded(msgspec.json.encode(content | change))
    with pytest.raises(ConfigError, match="not JSON"):
        decoded(b"{")
