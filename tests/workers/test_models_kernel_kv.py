"""KV by the kernels' way: bytes of a block, float8 within its rounding, the words of the CPU's own way."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from tests.workers.tiny_engine import BLOCK, CONFIG, tiny_engine
from torch import Tensor

from twinpool.cost import StepCost
from twinpool.errors import ConfigError
from twinpool.kernels import reference
from twinpool.proto import frames
from twinpool.router.roster import Roster
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import load_tokenizer
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.torch_engine import EngineOptions, TorchEngine
from twinpool.workers.models.attention import PagedKv, Span
from twinpool.workers.models.kernel_kv import KernelKv
from twinpool.workers.models.kv_layout import KvDTypeName, kv_layout
from twinpool.workers.models.loader import load_model
from twinpool.workers.sampler import Sampler

BYTES: dict[KvDTypeName, int] = {"float32": 16 * 4, "bfloat16": 16 * 2, "float8_e4m3": 16 + 4}


def pool_for(dtype: KvDTypeName, blocks: int) -> torch.Tensor:
    return torch.zeros(blocks, kv_layout(CONFIG, dtype, BLOCK).block_bytes, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", BYTES)
def test_bytes_of_a_block(dtype: KvDTypeName) -> None:
    """Layers, k and v, heads, tokens; of each the numbers of its dtype and, in float8, one scale."""
    layout = kv_layout(CONFIG, dtype, BLOCK)
    assert layout.block_bytes == 2 * 2 * 2 * BLOCK * BYTES[dtype]
    assert layout.shape == (2, 2, 2, BLOCK, 16)
    assert dtype in layout.text
    kv = KernelKv(pool_for(dtype, 3), CONFIG, dtype, BLOCK)
    assert kv.blocks == 3
    with pytest.raises(ValueError, match="not uint8"):
        KernelKv(torch.zeros(3, layout.block_bytes - 8, dtype=torch.uint8), CONFIG, dtype, BLOCK)


def test_all_of_a_float8_block_is_used_and_nothing_twice() -> None:
    pool = pool_for("float8_e4m3", 2)
    shape = kv_layout(CONFIG, "float8_e4m3", BLOCK).shape
    for layer in range(2):
        reference.layer_kv(pool, reference.FLOAT8, shape, layer).view(torch.uint8).add_(1)
        reference.layer_scales(pool, shape, layer).view(torch.uint8).add_(1)
    assert pool.unique().tolist() == [1]


def test_scales_must_lie_on_words() -> None:
    narrow = msgspec.structs.replace(CONFIG, head_dim=2)
    assert kv_layout(narrow, "float8_e4m3", 2).block_bytes == 2 * 2 * 2 * 2 * (2 + 4)
    with pytest.raises(ConfigError, match=r"model\.kv_dtype"):
        kv_layout(narrow, "float8_e4m3", 1)


def test_workers_of_other_kv_dtypes_are_refused() -> None:
    """The router compares layouts before it lets KV move between two workers."""

    def hello(dtype: KvDTypeName) -> frames.Model:
        layout = kv_layout(CONFIG, dtype, BLOCK)
        return frames.Model(
            name="m", fingerprint="f", dtype="bfloat16", layout=layout.text, block_size=BLOCK,
            block_bytes=layout.block_bytes, vocab_size=61, max_context=4096, eos_ids=(2,),
        )  # fmt: skip

    ours, theirs = hello("bfloat16"), hello("float8_e4m3")
    roster = Roster({"layout": ours.layout, "dtype": "bfloat16"})
    said = roster.mismatch(_with_model(theirs))
    assert said is not None
    assert ours.layout in said
    assert theirs.layout in said
    assert roster.mismatch(_with_model(ours)) is None


def _with_model(model: frames.Model) -> frames.Hello:
    cost = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)
    return frames.Hello(
        version=frames.VERSION, worker="w", epoch=1, token="t", roles=("decode",), model=model, blocks=4,
        device="d", cost=cost, chunk_tokens=8, max_batch=4, kv_addresses={}, kv_secret=b"s" * 32, pid=1,
    )  # fmt: skip


# ---- float8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 3e4])
def test_float8_rounds_each_token_by_itself(size: float) -> None:
    x = torch.randn(50, 2, 3, 64, generator=torch.Generator().manual_seed(1)) * size
    x[7] = 0.0
    values, scales = reference.quantise(x)
    back = values.float() * scales.unsqueeze(-1)
    bound = torch.maximum(x.abs() / 16, scales.unsqueeze(-1) / 1024) * (1 + 1e-5)
    assert ((back - x).abs() <= bound).all()
    assert back[7].abs().max() == 0.0
    alone, scale = reference.quantise(x[13:14])
    assert torch.equal(alone.view(torch.uint8), values[13:14].view(torch.uint8))
    assert torch.equal(scale, scales[13:14])


def test_float8_attention_is_within_its_rounding() -> None:
    """Scores move by at most ``d`` (the queries times the rounding of keys), so weights by at most exp(2 d)."""
    torch.manual_seed(3)
    spans = [Span(1, 22, [5, 2, 7, 0, 1, 8]), Span(1, 6, [3, 9]), Span(9, 4, [10, 11, 4, 6])]
    past = torch.randn(12 * BLOCK, 2, 2, 16)
    new, q = torch.randn(11, 2, 2, 16), torch.randn(11, 4, 16)
    exact, rounded = (_attended(dtype, spans, past, new, q) for dtype in ("float32", "float8_e4m3"))
    values, scales = reference.quantise(past)
    moved = (values.float() * scales.unsqueeze(-1) - past)[:, 0].norm(dim=-1).max()
    values, scales = reference.quantise(new)
    moved = torch.maximum(moved, (values.float() * scales.unsqueeze(-1) - new)[:, 0].norm(dim=-1).max())
    d = float(moved * q.norm(dim=-1).max()) / math.sqrt(16)
    largest = float(torch.cat((past, new))[:, 1].abs().max())
    bound = largest / 16 + largest * (1 + 1 / 16) * (math.exp(2 * d) - 1)
    error = float((exact - rounded).abs().max())
    assert 0.0 < error <= bound
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.995


def _attended(dtype: KvDTypeName, spans: list[Span], past: Tensor, new: Tensor, q: Tensor) -> Tensor:
    """What a step attends to where every block holds ``past``; exact KV is attended to by the CPU's own way."""
    pool = pool_for(dtype, 12)
    blocks = torch.arange(12).repeat_interleave(BLOCK)
    offsets = torch.arange(BLOCK).repeat(12)
    kernels = KernelKv(pool, CONFIG, dtype, BLOCK)
    reference.write_kv(past, kernels._layers[1], kernels._scales[1], blocks, offsets)
    kv = kernels if dtype == "float8_e4m3" else PagedKv(pool, CONFIG, "float32", BLOCK)
    return kv.step(spans).attend(1, q, new)


@pytest.mark.parametrize("cuts", [[1], [7, 8], [30]])
def test_float8_does_not_depend_on_how_a_prompt_is_cut(cuts: list[int]) -> None:
    options = EngineOptions(kv_dtype="float8_e4m3", decode_rows=2)
    engine = tiny_engine(options)
    ids = [(7 * token) % 61 for token in range(31)]
    state = SampleState(SamplingParams(max_tokens=9, temperature=0.0, logprobs=5), ids, len(ids))
    (whole,) = engine.step([Row(ids, 0, list(range(8)), state)])
    for start, stop in zip([0, *cuts], [*cuts, 31], strict=True):
        last = state if stop == 31 else None
        (found,) = engine.step([Row(ids[start:stop], start, list(range(20, 28)), last)])
    engine.close()
    assert whole is not None
    assert whole.logprob is not None
    assert found is not None
    assert found.logprob is not None
    assert found.token == whole.token
    assert found.logprob.top_ids == whole.logprob.top_ids
    assert found.logprob.top_logprobs == pytest.approx(whole.logprob.top_logprobs, abs=1e-4)


def test_bfloat16_kv_under_float32_weights() -> None:
    ids = [(11 * token) % 61 for token in range(21)]
    found = []
    for options in (EngineOptions("bfloat16"), EngineOptions("bfloat16", kernels=True)):
        engine = tiny_engine(options)
        assert engine.info.layout.endswith("bfloat16")
        assert engine.info.dtype == "float32"
        state = SampleState(SamplingParams(max_tokens=9, temperature=0.0), ids, len(ids))
        found.append(engine.step([Row(ids, 0, list(range(6)), state)]))
        engine.close()
    assert found[0] == found[1]


# ---- the embedded model ----------------------------------------------------------------------------------------------


def _continued(options: EngineOptions, count: int) -> list[int]:
    """Greedy tokens after a prompt of two chunks, by an engine of the embedded model."""
    model = load_model(None, "float32", "cpu")
    pool = torch.zeros(5, kv_layout(model.config, "float32", 16).block_bytes, dtype=torch.uint8)
    engine = TorchEngine(model, pool, 16, 1, Sampler(model.config.vocab_size, "cpu"), options=options)
    prompt = load_tokenizer().encode("A short list of the planets, from the Sun outwards: Mercury, Venus,")
    ids = list(prompt)
    engine.step([Row(ids[:5], 0, [2, 0], None)])
    done = 5
    while len(ids) < len(prompt) + count:
        state = SampleState(SamplingParams(max_tokens=count, temperature=0.0), ids, len(prompt))
        (drawn,) = engine.step([Row(ids[done:], done, [2, 0, 3], state)])
        assert drawn is not None
        done = len(ids)
        ids = [*ids, drawn.token]
    engine.close()
    return ids


def test_the_embedded_model_says_the_same_by_kernels_and_static_buffers() -> None:
    assert _continued(EngineOptions(kernels=True, decode_rows=1), 12) == _continued(EngineOptions(), 12)
