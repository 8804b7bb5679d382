"""A tiny model shared by several ranks over gloo computes what one rank computes: logits, tokens and every KV head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twinpool.errors import ConfigError
from twinpool.router.links import LinkSettings
from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, Sampled, SampleState
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.config import DTypeName, LlamaConfig, tensor_shapes
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import LoadedModel
from twinpool.workers.models.tensor_parallel import share, share_config, share_weights
from twinpool.workers.ranks import group
from twinpool.workers.ranks.crew import CAUSE_S
from twinpool.workers.ranks.group import ProcessGroup

CONFIG = LlamaConfig(
    family="llama", vocab_size=61, hidden=40, ffn=50, layers=3, heads=9, kv_heads=3, head_dim=8, eps=1e-5,
    rope_theta=10000.0, max_context=512, tied_head=False, eos_ids=(2,), qkv_bias=True, output_bias=True, qk_norm=True,
)  # fmt: skip
EVEN = msgspec.structs.replace(CONFIG, heads=8, kv_heads=4, qkv_bias=False, output_bias=False, qk_norm=False)
BLOCK, BLOCKS = 4, 60


class Recorder:
    """A greedy sampler that keeps the last logits it saw."""

    def __init__(self) -> None:
        self.logits = torch.empty(0)

    def sample(self, logits: torch.Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        self.logits = logits.clone()
        return [Sampled(int(token)) for token in logits.argmax(-1)]


def model(config: LlamaConfig, dtype: DTypeName = "float32") -> LoadedModel:
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: (torch.randn(shape, generator=generator) * 0.3).to(getattr(torch, dtype))
        for name, shape in tensor_shapes(config).items()
    }
    return LoadedModel("tiny", "f" * 32, config, dtype, weights)


def part_of(whole: LoadedModel, rank: int, ranks: int) -> LoadedModel:
    own = share(whole.config, rank, ranks)
    weights = share_weights(whole.config, own, rank == 0, whole.weights)
    return LoadedModel(whole.name, whole.fingerprint, share_config(whole.config, own), whole.dtype, weights)


class Ranks:
    """Engines of all ranks in threads of their own; ``pools`` are theirs."""

    def __init__(self, whole: LoadedModel, ranks: int, folder: Path) -> None:
        self.recorder = Recorder()
        self.pools: list[torch.Tensor] = []
        self._starters = ThreadPoolExecutor(ranks)
        made = [self._starters.submit(self._make, whole, rank, ranks, folder / "ranks") for rank in range(ranks)]
        engines = [future.result() for future in made]
        self.engines = [engine for engine, _ in engines]
        self.pools = [pool for _, pool in engines]

    def _make(self, whole: LoadedModel, rank: int, ranks: int, file: Path) -> tuple[TorchEngine, torch.Tensor]:
        part = part_of(whole, rank, ranks)
        pool = torch.zeros(BLOCKS, kv_layout(part.config, part.dtype, BLOCK).block_bytes, dtype=torch.uint8)
        group = ProcessGroup(file, rank, ranks, "cpu")
        return TorchEngine(part, pool, BLOCK, 1, self.recorder, group), pool

    def step(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """The first rank's result."""
        silent = [row._replace(sample=None) for row in rows]
        running: list[Future[list[Sampled | None]]] = [
            self._starters.submit(engine.step, rows if rank == 0 else silent)
            for rank, engine in enumerate(self.engines)
        ]
        results = [future.result() for future in running]
        return results[0]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        self._starters.shutdown()


@pytest.fixture(params=[1, 2, 4, 8])
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(model(CONFIG), request.param, tmp_path)
    yield made
    made.close()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(tokens: Sequence[int]) -> SampleState:
    return SampleState(SamplingParams(max_tokens=8, temperature=0.0), tokens, len(tokens))


def steps() -> list[list[Row]]:
    """A prompt in two chunks, then a step that mixes its decode with another prompt."""
    one, two = prompt(45, 1), prompt(30, 2)
    first, second = list(range(12)), list(range(20, 28))
    return [
        [Row(one[:20], 0, first, None)],
        [Row(one[20:44], 20, first, None)],
        [Row(one[44:], 44, first, ask(one), True), Row(two, 0, second, ask(two))],
    ]


def alone(whole: LoadedModel) -> tuple[torch.Tensor, list[list[Sampled | None]], torch.Tensor]:
    recorder = Recorder()
    pool = torch.zeros(BLOCKS, kv_layout(whole.config, whole.dtype, BLOCK).block_bytes, dtype=torch.uint8)
    engine = TorchEngine(whole, pool, BLOCK, 1, recorder)
    drawn = [engine.step(rows) for rows in steps()]
    engine.close()
    return recorder.logits, drawn, pool


def test_ranks_compute_what_one_process_computes(ranks: Ranks) -> None:
    logits, drawn, pool = alone(model(CONFIG))
    assert [ranks.step(rows) for rows in steps()] == drawn
    torch.testing.assert_close(ranks.recorder.logits, logits, rtol=1e-4, atol=1e-4)
    whole = _heads(pool, 3)
    for rank, own in enumerate(ranks.pools):
        held = share(CONFIG, rank, len(ranks.pools)).kv_heads
        torch.testing.assert_close(_heads(own, len(held)), whole[:, :, held.start : held.stop], rtol=1e-4, atol=1e-4)


def _heads(pool: torch.Tensor, heads: int) -> torch.Tensor:
    return pool.view(torch.float32).view(BLOCKS, CONFIG.layers * 2, heads, BLOCK * CONFIG.head_dim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_even_split_of_either_dtype(dtype: DTypeName, tmp_path: Path) -> None:
    logits, _, _ = alone(model(EVEN, dtype))
    made = Ranks(model(EVEN, dtype), 2, tmp_path)
    for rows in steps():
        made.step(rows)
    made.close()
    similar = torch.nn.functional.cosine_similarity(made.recorder.logits, logits, dim=1)
    assert float(similar.min()) > (0.9999 if dtype == "float32" else 0.99)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 100), st.integers(1, 16))
def test_shares_cover_every_head_and_column_once(kv_heads: int, group: int, ffn: int, ranks: int) -> None:
    config = msgspec.structs.replace(CONFIG, heads=kv_heads * group, kv_heads=kv_heads, ffn=ffn)
    if ranks > min(config.heads, ffn):
        with pytest.raises(ConfigError, match="cannot share"):
            share(config, 0, ranks)
        return
    shares = [share(config, rank, ranks) for rank in range(ranks)]
    assert [head for own in shares for head in own.heads] == list(range(config.heads))
    assert [column for own in shares for column in own.ffn] == list(range(ffn))
    for own in shares:
        assert {head // group for head in own.heads} == set(own.kv_heads)
        assert len(own.heads) % len(own.kv_heads) == 0
        shapes = {name: tuple(weight.shape) for name, weight in share_weights(config, own, True, empty(config)).items()}
        assert shapes == tensor_shapes(share_config(config, own)) | {"lm_head.weight": (61, 40)}


def empty(config: LlamaConfig) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(config).items()}


def test_only_the_first_rank_has_row_parallel_biases() -> None:
    weights = empty(CONFIG)
    biases = [name for name in weights if name.endswith("o_proj.bias")]
    assert len(biases) == CONFIG.layers
    for rank in (0, 1):
        own = share_weights(CONFIG, share(CONFIG, rank, 2), rank == 0, weights)
        assert all((name in own) == (rank == 0) for name in biases)


def test_a_rank_that_stands_still_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "STEP_S", 0.5)
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(ProcessGroup, tmp_path / "ranks", rank, 2, "cpu") for rank in range(2)]
        first, _ = [future.result() for future in made]
    with pytest.raises(RuntimeError, match="rank 0 could not add up with the other ranks: look whether another rank's"):
        first.all_reduce(torch.ones(4))


def test_ranks_miss_each_other_before_the_router_misses_the_worker() -> None:
    assert LinkSettings("", 1.0, 1.0, 1.0).hang_s > group.STEP_S + CAUSE_S
