"""Drawn tokens against a slow reference written from the definitions, against statistics, and against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpool.errors import EngineError
from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Sampled, SampleState
from twinpool.workers.gumbel import draw_keys, gumbel, token_hash
from twinpool.workers.sampler import Sampler

CPU = torch.device("cpu")
EOS = 2


def state(tokens: tuple[int, ...] = (1,), prompt_len: int = 1, **params: Any) -> SampleState:
    return SampleState(SamplingParams(max_tokens=1000, **params), list(tokens), prompt_len, (EOS,))


def at(position: int, **params: Any) -> SampleState:
    return state((1,) + (3,) * position, 1, **params)


def noise(seed: int, position: int, vocab_size: int) -> list[float]:
    ids = torch.arange(vocab_size, dtype=torch.int32).unsqueeze(0)
    row: list[float] = gumbel(draw_keys([(seed, position)], CPU), ids)[0].tolist()
    return row


# --- the noise -------------------------------------------------------------------------------------------------------


def slow_hash(seed: int, position: int, token: int) -> int:
    def mix64(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    key = mix64((mix64((seed + golden) % 2**64) + position * golden) % 2**64)
    x = token ^ (key % 2**32)
    x = ((x ^ (x >> 16)) * 0x7FEB352D + (key >> 32)) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return (x ^ (x >> 16)) % 2**31


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.integers(1, 77))
def test_the_hash_is_plain_integer_arithmetic(seed: int, position: int, count: int) -> None:
    ids = torch.arange(count, dtype=torch.int32).unsqueeze(0)
    found = token_hash(draw_keys([(seed, position)], CPU), ids)[0].tolist()
    assert found == [slow_hash(seed, position, token) for token in range(count)]


def test_the_hash_never_changes() -> None:
    """Workers of two releases may continue each other's streams, so these numbers are part of the protocol."""
    keys = draw_keys([(0, 0), (1, 0), (0, 1), (2**63 - 1, 4096)], CPU)
    ids = torch.tensor([[0, 49151]], dtype=torch.int32)
    assert token_hash(keys, ids).tolist() == GOLDEN


GOLDEN = [[653381902, 1619551048], [1104974178, 1681549758], [2025785380, 1092356949], [1513374246, 1508346261]]


def test_noise_has_the_moments_of_gumbel_and_no_trace_of_its_counters() -> None:
    keys = draw_keys([(seed, position) for seed in range(8) for position in range(8)], CPU)
    values = gumbel(keys, torch.arange(4096, dtype=torch.int32).unsqueeze(0)).double()
    count = values.numel()
    assert abs(values.mean().item() - 0.5772157) < 5 * math.sqrt(math.pi**2 / 6 / count)
    assert abs(values.var().item() - math.pi**2 / 6) < 5 * math.sqrt(4.4 * (math.pi**2 / 6) ** 2 / count)
    centred = (values - values.mean()) / values.std()
    for step in (1, 2, 1024):
        assert abs((centred[:, step:] * centred[:, :-step]).mean().item()) < 5 / math.sqrt(count)
    for step in (1, 8):  # next position, next seed
        assert abs((centred[step:] * centred[:-step]).mean().item()) < 5 / math.sqrt(count)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_device_has_the_same_hash() -> None:
    counters = [(seed, 7) for seed in range(5)]
    ids = torch.arange(50_001, dtype=torch.int32).unsqueeze(0)
    there = token_hash(draw_keys(counters, torch.device("cuda")), ids.cuda()).cpu()
    assert torch.equal(token_hash(draw_keys(counters, CPU), ids), there)


# --- the distribution ------------------------------------------------------------------------------------------------


def deviation(counts: list[int], shares: list[float]) -> float:
    """Chi-square of the counts in standard deviations from its mean."""
    total = sum(counts)
    cells = [(count, share * total) for count, share in zip(counts, shares, strict=True) if share > 0]
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def drawn_counts(logits: torch.Tensor, **params: Any) -> list[int]:
    rows = 500
    sampler = Sampler(len(logits), CPU)
    counts = [0] * len(logits)
    for start in range(0, 4000, rows):
        states = [at(start + row, **params) for row in range(rows)]
        for sampled in sampler.sample(logits.expand(rows, -1), states):
            counts[sampled.token] += 1
    return counts


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_over_many_positions_follow_softmax(temperature: float) -> None:
    logits = torch.linspace(-2.0, 2.0, 24)
    counts = drawn_counts(logits, temperature=temperature, seed=11)
    assert deviation(counts, (logits / temperature).softmax(0).tolist()) < 4


def test_tokens_over_many_seeds_follow_softmax() -> None:
    logits = torch.linspace(-2.0, 2.0, 24)
    states = [at(0, seed=seed) for seed in range(4000)]
    counts = [0] * 24
    for sampled in Sampler(24, CPU).sample(logits.expand(len(states), -1), states):
        counts[sampled.token] += 1
    assert deviation(counts, logits.softmax(0).tolist()) < 4


def test_a_filter_only_renormalises() -> None:
    logits = torch.linspace(-2.0, 2.0, 24)
    counts = drawn_counts(logits, top_k=6, seed=5)
    kept = torch.where(torch.arange(24) >= 18, logits, -torch.inf)
    assert sum(counts[:18]) == 0
    assert deviation(counts, kept.softmax(0).tolist()) < 4


def test_seeds_and_positions_give_different_streams() -> None:
    sampler, logits = Sampler(64, CPU), torch.zeros(40, 64)
    streams = {
        seed: tuple(s.token for s in sampler.sample(logits, [at(position, seed=seed) for position in range(40)]))
        for seed in (0, 1, 2**62)
    }
    assert len(set(streams.values())) == 3
    assert all(len(set(stream)) > 20 for stream in streams.values())


# --- against a slow reference ----------------------------------------------------------------------------------------


def slow_adjust(logits: list[float], its: SampleState) -> list[float]:
    """Penalties by the book, in float32 as the sampler computes."""
    row, params = torch.tensor(logits), its.params
    output = list(its.tokens[its.prompt_len :])
    if len(output) < params.min_tokens:
        for token in (*params.stop_token_ids, *(() if params.ignore_eos else its.eos_ids)):
            row[token] = -torch.inf
    for token, bias in params.logit_bias.items():
        row[token] += max(-100.0, min(100.0, bias))
    for token in set(its.tokens):
        scale = params.repetition_penalty
        row[token] = row[token] / scale if row[token] > 0 else row[token] * scale
    for token in set(output):
        row[token] -= params.frequency_penalty * output.count(token)
        row[token] -= params.presence_penalty
    return [float(value) for value in row.tolist()]


def slow_kept(scaled: list[float], params: SamplingParams) -> list[int]:
    """Ids that the filters leave, by walking down the sorted list; equal logits stay or go together."""
    best = max(scaled)
    kept = sorted((i for i in range(len(scaled)) if scaled[i] > -math.inf), key=lambda i: -scaled[i])
    if params.min_p > 0:
        kept = [i for i in kept if scaled[i] >= best + math.log(params.min_p)]
    if params.top_k > 0:
        kept = [i for i in kept if scaled[i] >= scaled[kept[min(params.top_k, len(kept)) - 1]]]
    if params.top_p < 1.0:
        total = sum(math.exp(scaled[i] - best) for i in kept)
        reached = 0.0
        for edge in kept:
            reached += math.exp(scaled[edge] - best) / total
            if reached >= params.top_p:
                break
        kept = [i for i in kept if scaled[i] >= scaled[edge]]
    return kept


def slow_sample(logits: list[float], its: SampleState) -> int:
    adjusted = torch.tensor(slow_adjust(logits, its))
    if its.params.temperature == 0:
        return int(adjusted.argmax())
    heat = torch.tensor(its.params.temperature, dtype=torch.float32)
    scaled: list[float] = ((adjusted - adjusted.max()) / heat).tolist()
    noisy = (torch.tensor(scaled) + torch.tensor(noise(its.params.seed, its.position, len(scaled)))).tolist()
    return max(slow_kept(scaled, its.params), key=noisy.__getitem__)


VOCAB = 40
token_ids = st.integers(0, VOCAB - 1)
parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, 1, 3, 20, VOCAB, 1000]),
        "top_p": st.sampled_from([1.0, 0.97, 0.6, 0.01]),
        "min_p": st.sampled_from([0.0, 0.013, 0.3, 0.99]),
        "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.77, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.53, -0.4]),
        "logit_bias": st.dictionaries(token_ids, st.floats(-150, 150), max_size=3),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(token_ids, max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    }
)
tokens = st.lists(token_ids, min_size=1, max_size=12)


def random_logits(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(parameters, tokens, tokens), min_size=1, max_size=4), st.integers(0, 2**31))
def test_a_mixed_batch_equals_the_slow_reference(rows: list[tuple[Any, list[int], list[int]]], seed: int) -> None:
    logits = random_logits(len(rows), VOCAB, seed)
    states = [state((*prompt, *output), len(prompt), **params) for params, prompt, output in rows]
    expected = [slow_sample(row, its) for row, its in zip(logits.tolist(), states, strict=True)]
    before = logits.clone()
    assert [sampled.token for sampled in Sampler(VOCAB, CPU).sample(logits, states)] == expected
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 50},
        {"top_k": 1500},
        {"top_p": 0.9},
        {"top_p": 0.99, "temperature": 3.0},
        {"top_p": 0.5, "top_k": 1100},
        {"min_p": 0.001},
        {"min_p": 0.2, "top_p": 0.9},
    ],
)
def test_filters_over_a_large_vocabulary_equal_the_slow_reference(params: dict[str, float]) -> None:
    """Wider than the first look of the sampler: some rows are settled there, some need the whole row."""
    logits = random_logits(4, 4096, 3) * torch.tensor([[0.1], [0.5], [1.0], [2.0]])
    states = [at(row, seed=row, **params) for row in range(4)]
    expected = [slow_sample(row, its) for row, its in zip(logits.tolist(), states, strict=True)]
    assert [sampled.token for sampled in Sampler(4096, CPU).sample(logits, states)] == expected


def test_equal_logits_stay_or_go_together() -> None:
    logits = torch.zeros(1, 4096)
    found = {Sampler(4096, CPU).sample(logits, [at(i, top_k=1)])[0].token for i in range(30)}
    assert len(found) > 20


# --- rows do not know of each other ----------------------------------------------------------------------------------


def assorted_states(count: int) -> list[SampleState]:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"seed": 3},
        {"top_k": 5, "seed": 4, "logprobs": 3},
        {"top_p": 0.8, "seed": 5, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.2, "temperature": 0.0, "logprobs": 0},
    ]
    return [at(row % 7, **kinds[row % len(kinds)]) for row in range(count)]


def test_a_row_alone_and_in_any_batch_is_the_same() -> None:
    sampler, logits = Sampler(2000, CPU), random_logits(12, 2000, 9)
    together = sampler.sample(logits, assorted_states(12))
    alone = [sampler.sample(logits[row : row + 1], [assorted_states(12)[row]])[0] for row in range(12)]
    backwards = sampler.sample(logits.flip(0), assorted_states(12)[::-1])[::-1]
    assert together == alone == backwards


def test_a_resumed_sequence_draws_the_same() -> None:
    """Counts kept step by step equal counts rebuilt from the tokens on another worker."""
    sampler = Sampler(50, CPU)
    params: dict[str, Any] = {"frequency_penalty": 0.4, "presence_penalty": 0.3, "repetition_penalty": 1.1, "seed": 8}
    growing = state((5, 6), 2, **params)
    steps = random_logits(20, 50, 4)
    for step in steps:
        fresh = state(tuple(growing.tokens), 2, **params)
        token = sampler.sample(step.unsqueeze(0), [growing])[0].token
        assert sampler.sample(step.unsqueeze(0), [fresh])[0].token == token
        growing.tokens = [*growing.tokens, token]


def test_counts_survive_a_shorter_sequence() -> None:
    sampler, logits = Sampler(8, CPU), torch.arange(8.0).unsqueeze(0)
    its = state((1, 7, 7), 1, temperature=0.0, frequency_penalty=2.0)
    assert sampler.sample(logits, [its])[0].token == 6
    its.tokens = [1]
    assert sampler.sample(logits, [its])[0].token == 7


# --- single rules ----------------------------------------------------------------------------------------------------


def draw(logits: list[float], its: SampleState) -> Sampled:
    return Sampler(len(logits), CPU).sample(torch.tensor([logits]), [its])[0]


def test_greedy_ties_take_the_lowest_id() -> None:
    assert draw([0.0, 5.0, 5.0, 5.0], at(0, temperature=0.0)).token == 1


def test_no_temperature_is_too_low_or_too_high() -> None:
    assert draw([0.0, 1.0, 3.0], at(0, temperature=1e-300)).token == 2
    assert draw([0.0, 3e38, -3e38], at(0, temperature=1e-4)).token == 1
    assert draw([0.0, 1.0, 3.0], at(0, temperature=100.0)).token in range(3)


def test_min_tokens_forbid_eos_and_stop_ids_until_then() -> None:
    logits = [0.0, 1.0, 9.0, 8.0]
    rules: dict[str, Any] = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (3,)}
    assert [draw(logits, at(position, **rules)).token for position in range(3)] == [1, 1, 2]
    assert draw(logits, at(0, ignore_eos=True, **rules)).token == 2


def test_ids_outside_the_vocabulary_change_nothing() -> None:
    its = at(0, temperature=0.0, logit_bias={99: 50.0}, stop_token_ids=(99,), min_tokens=1, presence_penalty=1.0)
    its.tokens = [*its.tokens, 99]
    assert draw([0.0, 1.0, 0.5], its).token == 1


def test_a_bias_that_is_not_a_number_cannot_spoil_the_step() -> None:
    assert draw([0.0, 1.0, 0.5], at(0, temperature=0.0, logit_bias={1: math.nan})).token == 2


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = [0.0, 2.0, 1.0, 2.0]
    raw = torch.tensor(logits).log_softmax(0).tolist()
    its = at(0, temperature=0.0, logit_bias={0: 50.0}, top_k=1, logprobs=3)
    token, logprob = draw(logits, its)
    assert token == 0
    assert logprob is not None
    assert (logprob.rank, logprob.top_ids) == (4, (1, 3, 2))
    assert logprob.logprob == pytest.approx(raw[0])
    assert logprob.top_logprobs == pytest.approx((raw[1], raw[3], raw[2]))


def test_logprobs_only_as_many_as_asked_for() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]] * 3)
    states = [at(0, temperature=0.0, logprobs=asked) for asked in (-1, 0, 20)]
    none, own, most = (sampled.logprob for sampled in Sampler(3, CPU).sample(logits, states))
    assert none is None
    assert own is not None
    assert (own.rank, own.top_ids) == (1, ())
    assert most is not None
    assert most.top_ids == (1, 2, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_is_as_its_float32(dtype: torch.dtype) -> None:
    logits = random_logits(5, 300, 2).to(dtype)
    sampler = Sampler(300, CPU)
    assert sampler.sample(logits, assorted_states(5)) == sampler.sample(logits.float(), assorted_states(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 2}, {"logit_bias": {0: 1.0}}])
def test_logits_that_are_not_finite_fail_the_step(bad: float, params: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="not finite"):
        draw([0.0, bad, 1.0], at(0, **params))


def test_the_shape_must_fit() -> None:
    sampler = Sampler(3, CPU)
    with pytest.raises(EngineError, match="shape"):
        sampler.sample(torch.zeros(1, 4), [at(0)])
    with pytest.raises(EngineError, match="shape"):
        sampler.sample(torch.zeros(2, 3), [at(0)])
    assert sampler.sample(torch.zeros(0, 3), []) == []
