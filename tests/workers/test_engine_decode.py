"""Decode steps from static buffers: the tokens of the eager path, whoever joins and leaves, and no KV but their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from tests.workers.tiny_engine import BLOCK, BLOCKS, CONFIG, tiny_engine, words

from twinpool.errors import EngineError
from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.decode import DecodeSteps, buckets, widths
from twinpool.workers.engine.torch_engine import EngineOptions, TorchEngine
from twinpool.workers.models.kernel_kv import KernelKv

STATIC = EngineOptions(kernels=True, decode_rows=5)  # of up to seven sequences: larger batches go the eager way
SEEDS = [seed if seed < 4 else pytest.param(seed, marks=pytest.mark.full) for seed in range(60)]


class Counted:
    """Decode steps that are counted by their rows."""

    def __init__(self, steps: DecodeSteps) -> None:
        self._steps = steps
        self.can_run = steps.can_run
        self.ran: list[int] = []

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        self.ran.append(len(rows))
        return self._steps.run(rows)


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, TorchEngine]]:
    made = {
        "cpu": tiny_engine(EngineOptions()),
        "kernels": tiny_engine(EngineOptions(kernels=True)),
        "static": tiny_engine(STATIC),
    }
    yield made
    for engine in made.values():
        engine.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_static_buffers_give_the_same_tokens(
    seed: int, engines: dict[str, TorchEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    static = engines["static"]
    assert static._decode is not None
    counted = Counted(static._decode)
    monkeypatch.setattr(static, "_decode", counted)
    expected = words(engines["cpu"], seed)
    assert words(engines["kernels"], seed) == expected
    assert words(static, seed) == expected
    assert 3 in counted.ran or 5 in counted.ran  # steps that leave rows of their bucket unused, or fill the largest
    assert max(counted.ran) <= 5


def decoding(token: int, at: int, table: list[int]) -> Row:
    return Row([token], at, table, SampleState(SamplingParams(max_tokens=9, temperature=0.0), [token], 1))


def test_rows_that_fill_a_bucket_write_to_the_last_block_alone() -> None:
    engine = tiny_engine(EngineOptions(kernels=True, decode_rows=8))
    assert isinstance(engine._kv, KernelKv)
    pool = engine._kv._layers[0]
    before = pool.clone()
    engine.step([decoding(5, 6, [3, 9]), decoding(6, 0, [7]), decoding(7, 11, [1, 4, 8])])
    changed = (pool != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == [7, 8, 9, BLOCKS - 1]
    touched = (pool[9] != before[9]).flatten(2).any(2)
    assert (pool[9] != before[9]).any(-1).any(0).any(0).tolist() == [False, False, True, False]
    assert touched.all()
    engine.close()


def test_the_last_block_is_nobodys(engines: dict[str, TorchEngine]) -> None:
    with pytest.raises(EngineError, match=f"outside the pool of {BLOCKS - 1}"):
        engines["static"].step([decoding(1, 0, [BLOCKS - 1])])
    assert engines["kernels"].step([decoding(1, 0, [BLOCKS - 1])])[0] is not None


def test_only_rows_that_are_asked_are_drawn(engines: dict[str, TorchEngine]) -> None:
    rows = [decoding(token, 0, [token]) for token in (4, 5, 6)]
    expected = engines["cpu"].step(rows)
    rows[1] = rows[1]._replace(sample=None)
    assert engines["static"].step(rows) == [expected[0], None, expected[2]]


def test_long_contexts_take_wider_tables(engines: dict[str, TorchEngine]) -> None:
    """Beyond 2,048 tokens; all in the same few blocks, whose KV repeats."""
    table = [block % 50 for block in range(700)]
    rows = [decoding(3, 2500, table), decoding(9, 40, list(range(60, 80)))]
    for name in ("cpu", "static"):
        engines[name].step([Row([token % 61 for token in range(200)], 0, list(range(50)), None)])
        engines[name].step([Row([token % 61 for token in range(40)], 0, list(range(60, 80)), None)])
    assert engines["static"].step(rows) == engines["cpu"].step(rows)


def test_buckets_and_widths() -> None:
    assert buckets(1) == [1]
    assert buckets(6) == [1, 2, 4, 6]
    assert buckets(64) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]
    assert widths(1024, 16) == [64]
    assert widths(8192, 16) == [128, 512]
    assert widths(CONFIG.max_context, BLOCK) == [512, 1024]


def test_static_steps_need_kernels() -> None:
    with pytest.raises(ValueError, match="static decode steps"):
        tiny_engine(EngineOptions(decode_rows=4))
