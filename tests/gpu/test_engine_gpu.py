"""The engine on a device: the words of the CPU, launched one by one or as graphs, and nothing waits on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tests.workers.tiny_engine import tiny_engine, words

from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.torch_engine import EngineOptions
from twinpool.workers.models.kernel_kv import KernelKv
from twinpool.workers.models.kv_layout import KvDTypeName

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # ends what hangs; the first of a shape compiles
QUIET = pytest.mark.filterwarnings("ignore:Synchronization debug mode")

EAGER = EngineOptions()
GRAPHS = EngineOptions(decode_rows=5)
SEEDS = [seed if seed < 6 else pytest.param(seed, marks=pytest.mark.full) for seed in range(60)]


@pytest.fixture(autouse=True)
def _triton() -> None:
    pytest.importorskip("triton", reason="triton is not installed (Linux only; extra: gpu)")


@contextmanager
def no_waits() -> Iterator[None]:
    """Whatever makes the host wait for the device fails, but waits for an event."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_those_of_the_cpu(seed: int) -> None:
    expected = tiny_engine(EAGER)
    eager, graphs = tiny_engine(EAGER, "cuda"), tiny_engine(GRAPHS, "cuda")
    wanted = words(expected, seed)
    assert words(eager, seed) == wanted
    assert words(graphs, seed) == wanted
    for engine in (expected, eager, graphs):
        engine.close()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3"])
def test_graphs_say_what_single_launches_say(kv_dtype: KvDTypeName) -> None:
    """In bfloat16, where sums in another order may round another way: nearly all tokens, not all."""
    engines = [tiny_engine(options._replace(kv_dtype=kv_dtype), "cuda", "bfloat16") for options in (EAGER, GRAPHS)]
    one, other = (words(engine, 3) for engine in engines)
    for engine in engines:
        engine.close()
    first = [ours[: len(ours) - 1] == theirs[: len(ours) - 1] for ours, theirs in zip(one, other, strict=True)]
    assert sum(first) >= len(first) // 2


def test_float8_is_that_of_the_cpu() -> None:
    options = EngineOptions(kv_dtype="float8_e4m3", decode_rows=2)
    ids = [(7 * token) % 61 for token in range(31)]
    state = SampleState(SamplingParams(max_tokens=9, temperature=0.0, logprobs=5), ids, len(ids))
    found = []
    for device in ("cpu", "cuda"):
        engine = tiny_engine(options, device)
        engine.step([Row(ids[:30], 0, list(range(8)), None)])
        (drawn,) = engine.step([Row(ids[30:], 30, list(range(8)), state)])
        assert drawn is not None
        assert drawn.logprob is not None
        found.append(drawn.logprob.top_logprobs)
        engine.close()
    assert found[1] == pytest.approx(found[0], abs=0.05)


@QUIET
@pytest.mark.parametrize("options", [EAGER, GRAPHS, EngineOptions("float8_e4m3", decode_rows=5)])
def test_a_step_waits_for_events_alone(options: EngineOptions) -> None:
    """Chunks, mixed steps and decode steps, with every kind of sampling, after a first round that compiles."""
    engine = tiny_engine(options, "cuda")
    words(engine, 1)
    with no_waits():
        words(engine, 1)
    engine.close()


@QUIET
def test_waits_would_be_noticed() -> None:
    value = torch.ones(1, device="cuda")
    with no_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


def test_kv_is_there_when_a_step_is_reported() -> None:
    """Read on another stream, as transfers do, without a wait for the engine's."""
    engine = tiny_engine(GRAPHS, "cuda")
    other = torch.cuda.Stream()
    assert isinstance(engine._kv, KernelKv)
    layer = engine._kv._layers[1]
    for at in range(200):
        state = SampleState(SamplingParams(max_tokens=9, temperature=0.0), [at % 61], 1)
        engine.step([Row([at % 61], 0, [at % 100], state if at % 2 else None)])
        with torch.cuda.stream(other):
            assert bool((layer[at % 100, :, :, 0] != 0).any())
            layer[at % 100].zero_()
            other.synchronize()
    engine.close()
