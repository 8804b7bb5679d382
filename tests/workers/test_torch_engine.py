"""The torch engine on the embedded model and on a tiny one: same tokens however a prompt is cut and batched."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from twinpool.errors import EngineError
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import load_tokenizer
from twinpool.workers.engine.base import Row, Sampled, SampleState
from twinpool.workers.engine.calibrate import Measured, fit
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.attention import PagedKv, attention_order
from twinpool.workers.models.config import DTypeName, LlamaConfig, tensor_shapes
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import LoadedModel, load_model
from twinpool.workers.sampler import Sampler

CONFIG = LlamaConfig(
    family="llama", vocab_size=61, hidden=32, ffn=48, layers=3, heads=4, kv_heads=2, head_dim=8, eps=1e-5,
    rope_theta=10000.0, max_context=512, tied_head=False, eos_ids=(2,),
)  # fmt: skip
BLOCK = 4
BLOCKS = 300


class Recorder:
    """A greedy sampler that keeps the last logits it saw."""

    def __init__(self) -> None:
        self.logits = torch.empty(0)

    def sample(self, logits: torch.Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        assert len(states) == logits.shape[0]
        self.logits = logits.clone()
        return [Sampled(int(token)) for token in logits.argmax(-1)]


def tiny_model(dtype: DTypeName = "float32") -> LoadedModel:
    generator = torch.Generator().manual_seed(11)
    weights = {
        name: (torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)).to(getattr(torch, dtype))
        for name, shape in tensor_shapes(CONFIG).items()
    }
    return LoadedModel("tiny", "f" * 32, CONFIG, dtype, weights)


def make_engine(dtype: DTypeName = "float32") -> tuple[TorchEngine, Recorder, torch.Tensor]:
    recorder = Recorder()
    pool = torch.zeros(BLOCKS, kv_layout(CONFIG, dtype, BLOCK).block_bytes, dtype=torch.uint8)
    return TorchEngine(tiny_model(dtype), pool, BLOCK, 1, recorder), recorder, pool


@pytest.fixture
def engine() -> Iterator[tuple[TorchEngine, Recorder]]:
    made, recorder, _ = make_engine()
    yield made, recorder
    made.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def state(tokens: Sequence[int]) -> SampleState:
    return SampleState(SamplingParams(max_tokens=8, temperature=0.0), tokens, len(tokens))


def table(first: int, tokens: int) -> list[int]:
    """Blocks in no particular order, none shared between different ``first``."""
    blocks = -(-tokens // BLOCK)
    return [first + (7 * block) % blocks if blocks % 7 else first + block for block in range(blocks)]


async def whole(engine: TorchEngine, recorder: Recorder, ids: list[int]) -> torch.Tensor:
    await engine.run([Row(ids, 0, table(0, len(ids)), state(ids))])
    return recorder.logits[0]


@pytest.mark.parametrize("cuts", [[1], [4], [5, 6], [64, 128, 131], [1, 2, 3], [199]])
async def test_chunks_give_the_same_logits(engine: tuple[TorchEngine, Recorder], cuts: list[int]) -> None:
    made, recorder = engine
    ids = prompt(200)
    expected = await whole(made, recorder, ids)
    edges = [0, *cuts, len(ids)]
    for start, stop in itertools.pairwise(edges):
        last = state(ids) if stop == len(ids) else None
        result = await made.run([Row(ids[start:stop], start, table(100, len(ids)), last)])
        assert (result == [None]) == (last is None)
    torch.testing.assert_close(recorder.logits[0], expected, rtol=1e-4, atol=1e-4)


async def test_mixed_step_gives_each_row_its_own_logits(engine: tuple[TorchEngine, Recorder]) -> None:
    made, recorder = engine
    lengths = [3, 9, 40, 41, 130, 17]
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    expected = [await whole(made, recorder, ids) for ids in prompts]
    first = [0, 10, 20, 40, 60, 100]
    tables = [table(start, length) for start, length in zip(first, lengths, strict=True)]
    done = [2, 8, 39, 40, 77, 0]  # four decode, one goes on with its prompt, one begins
    await made.run([Row(ids[:n], 0, t, None) for ids, n, t in zip(prompts, done, tables, strict=True) if n])
    rows = [Row(ids[n:], n, t, state(ids)) for ids, n, t in zip(prompts, done, tables, strict=True)]
    rows.insert(3, Row(prompt(30), 0, table(200, 30), None))
    result = await made.run(rows)
    assert result[3] is None
    drawn = [entry.token for entry in result if entry is not None]
    assert drawn == [int(logits.argmax()) for logits in expected]
    # Logits come in the engine's own order: compare as sets of rows.
    distances = torch.cdist(recorder.logits, torch.stack(expected)).min(1).values
    assert float(distances.max()) < 1e-3


async def test_batch_of_sixteen_equals_one_by_one(engine: tuple[TorchEngine, Recorder]) -> None:
    made, recorder = engine
    prompts = [prompt(30 + 3 * (seed % 4), seed) for seed in range(16)]
    tables = [table(12 * seed, len(ids)) for seed, ids in enumerate(prompts)]
    alone = [int((await whole(made, recorder, ids)).argmax()) for ids in prompts]
    for ids, own in zip(prompts, tables, strict=True):
        await made.run([Row(ids[:-1], 0, own, None)])
    result = await made.run(
        [Row(ids[-1:], len(ids) - 1, own, state(ids)) for ids, own in zip(prompts, tables, strict=True)]
    )
    assert [entry.token for entry in result if entry is not None] == alone


async def test_a_cached_prefix_is_read_from_shared_blocks(engine: tuple[TorchEngine, Recorder]) -> None:
    made, recorder = engine
    ids = prompt(50)
    expected = await whole(made, recorder, ids)
    shared = table(0, 50)[:9]  # 36 tokens computed by another request
    await made.run([Row(ids[36:], 36, [*shared, 200, 201, 202, 203], state(ids))])
    torch.testing.assert_close(recorder.logits[0], expected, rtol=1e-4, atol=1e-4)


async def test_blocks_mean_the_same_in_another_pool() -> None:
    one, recorder, pool = make_engine()
    two, other, elsewhere = make_engine()
    ids = prompt(33)
    expected = await whole(one, recorder, ids)
    await one.run([Row(ids[:-1], 0, table(50, 33), None)])
    moved = [170, 3, 99, 42, 7, 8, 200, 120, 5]
    elsewhere[torch.tensor(moved)] = pool[torch.tensor(table(50, 33))]
    await two.run([Row(ids[-1:], 32, moved, state(ids))])
    torch.testing.assert_close(other.logits[0], expected, rtol=1e-4, atol=1e-4)
    one.close()
    two.close()


async def test_long_prompt_takes_the_causal_path_and_agrees(engine: tuple[TorchEngine, Recorder]) -> None:
    made, recorder = engine
    assert isinstance(made._kv, PagedKv)
    made._kv._causal_from = 100
    ids = prompt(200)
    causal = await whole(made, recorder, ids)
    made._kv._causal_from = 1000
    torch.testing.assert_close(await whole(made, recorder, ids), causal, rtol=1e-4, atol=1e-4)


async def test_bfloat16_stays_close_to_float32(engine: tuple[TorchEngine, Recorder]) -> None:
    made, recorder = engine
    half, half_recorder, _ = make_engine("bfloat16")
    ids = prompt(60)
    expected = await whole(made, recorder, ids)
    got = await whole(half, half_recorder, ids)
    half.close()
    assert torch.nn.functional.cosine_similarity(got, expected, dim=0) > 0.99


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (Row([], 0, [0], None), "a row of 0 tokens"),
        (Row([1] * 5, 0, [0], None), "does not fit its 1 blocks"),
        (Row([1], 512, list(range(200)), None), "context of 512"),
        (Row([1], 0, [BLOCKS], None), "outside the pool"),
        (Row([61], 0, [0], None), "outside the vocabulary"),
        (Row([1], -1, [0], None), "does not fit"),
    ],
)
async def test_impossible_rows_are_refused(engine: tuple[TorchEngine, Recorder], row: Row, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        await engine[0].run([row])
    assert len(await engine[0].run([Row([1], 0, [0], state([1]))])) == 1  # and the engine goes on


async def test_the_event_loop_goes_on_while_a_step_runs(engine: tuple[TorchEngine, Recorder]) -> None:
    made, _ = engine
    running = asyncio.ensure_future(made.run([Row(prompt(500), 0, list(range(125)), None)]))
    turns = 0
    while not running.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 1


async def test_close_is_final_and_idempotent() -> None:
    made, _, _ = make_engine()
    made.close()
    made.close()
    with pytest.raises((EngineError, RuntimeError)):
        await made.run([Row([1], 0, [0], None)])


def test_pool_must_fit_the_layout() -> None:
    layout = kv_layout(CONFIG, "float32", BLOCK)
    assert layout.shape == (3, 2, 2, BLOCK, 8)
    assert layout.block_bytes == 4 * 3 * 2 * 2 * BLOCK * 8
    assert layout.text == "block-major/3x2x2x4x8/rope-pairs/float32"
    with pytest.raises(ValueError, match="not uint8"):
        TorchEngine(tiny_model(), torch.zeros(4, 8, dtype=torch.uint8), BLOCK, 1, Recorder())


def test_info_names_the_model() -> None:
    made, _, _ = make_engine("bfloat16")
    assert (made.info.name, made.info.dtype, made.info.block_size) == ("tiny", "bfloat16", BLOCK)
    assert (made.info.vocab_size, made.info.max_context, made.info.eos_ids) == (61, 512, (2,))
    made.close()


def test_attention_order_puts_decodes_first_by_context() -> None:
    assert attention_order([1, 5, 1, 3, 1], [4, 0, 9, 2, 6]) == [2, 4, 0, 1, 3]


# ---- calibration -----------------------------------------------------------------------------------------------------


async def test_calibrate_measures_the_tiny_model(engine: tuple[TorchEngine, Recorder]) -> None:
    cost = await engine[0].calibrate()
    values = [cost.c0, cost.a, cost.b, cost.d0, cost.d1, cost.d2]
    assert all(0.0 <= value < 1.0 for value in values)
    assert cost.prefill(300, 0, 300) > 0.0
    assert cost.decode(4, 1000) > 0.0


def test_fit_finds_the_coefficients_behind_exact_times() -> None:
    chunks = [Measured(n, c, 0, 0, 0.01 + 2e-3 * n + 1e-6 * n * (c + n / 2)) for n, c in ((32, 0), (300, 0), (90, 900))]
    decodes = [Measured(0, 0, n, n * k, 0.05 + 1e-3 * n + 1e-5 * n * k) for n in (1, 4, 12) for k in (64, 1024)]
    cost = fit(chunks, decodes)
    assert (cost.c0, cost.a, cost.b) == pytest.approx((0.01, 2e-3, 1e-6))
    assert (cost.d0, cost.d1, cost.d2) == pytest.approx((0.05, 1e-3, 1e-5))


def test_fit_never_goes_below_zero() -> None:
    falling = [Measured(0, 0, n, n * 64, 0.1 - 0.001 * n) for n in (1, 4, 12)]
    cost = fit([Measured(n, 0, 0, 0, 0.001) for n in (32, 64, 128)], falling)
    assert min(cost.c0, cost.a, cost.b, cost.d0, cost.d1, cost.d2) >= 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_cuda_agrees_with_cpu(dtype: DTypeName, engine: tuple[TorchEngine, Recorder]) -> None:
    model = tiny_model(dtype)
    weights = {name: weight.cuda() for name, weight in model.weights.items()}
    pool = torch.zeros(BLOCKS, kv_layout(CONFIG, dtype, BLOCK).block_bytes, dtype=torch.uint8, device="cuda")
    recorder = Recorder()
    made = TorchEngine(replace(model, weights=weights), pool, BLOCK, 1, recorder)
    ids = prompt(120)
    expected = await whole(engine[0], engine[1], ids)
    await made.run([Row(ids[:70], 0, table(0, 120), None)])
    await made.run([Row(ids[70:119], 70, table(0, 120), None)])
    await made.run([Row(ids[119:], 119, table(0, 120), state(ids))])
    made.close()
    assert torch.nn.functional.cosine_similarity(recorder.logits[0].cpu(), expected, dim=0) > 0.99


# ---- the embedded model --------------------------------------------------------------------------------------------


async def test_embedded_model_continues_a_known_fact() -> None:
    model = load_model(None, "float32", "cpu")
    layout = kv_layout(model.config, "float32", 16)
    pool = torch.zeros(4, layout.block_bytes, dtype=torch.uint8)
    made = TorchEngine(model, pool, 16, 1, Sampler(model.config.vocab_size, "cpu"))
    tokenizer = load_tokenizer()
    ids = tokenizer.encode("The capital of France is")
    done = 0
    for _ in range(2):
        (drawn,) = await made.run([Row(ids[done:], done, [2, 0], state(ids))])
        assert drawn is not None
        done = len(ids)
        ids = [*ids, drawn.token]
    made.close()
    assert "Paris" in tokenizer.decode(ids)


class Others:
    """Other ranks that only take down what they are told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def step(self, rows: Sequence[Row]) -> None:
        self.told.append("step")

    def out_of_step(self, why: str) -> None:
        self.told.append(why)


async def test_only_a_failure_in_what_ranks_share_sets_them_out_of_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("too hot")

    others, recorder = Others(), Recorder()
    pool = torch.zeros(BLOCKS, kv_layout(CONFIG, "float32", BLOCK).block_bytes, dtype=torch.uint8)
    engine = TorchEngine(tiny_model(), pool, BLOCK, 1, recorder, others=others)
    row = Row(prompt(8), 0, table(0, 8), state(prompt(8)))
    for owner, name in ((recorder, "sample"), (engine._model, "logits"), (engine._kv, "plan")):
        others.told.clear()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(EngineError, match="too hot"):
                await engine.run([row])
        assert others.told == (["step", "too hot"] if name == "plan" else ["step"])
    assert (await engine.run([row]))[0] is not None
    engine.close()
