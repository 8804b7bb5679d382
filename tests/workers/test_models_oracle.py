"""The engine's logits against transformers: tiny models of every family, and the embedded model in the full tier."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, Sampled, SampleState
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import LoadedModel, embedded_path, load_model

BLOCK = 4
TINY = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama() -> Any:
    import transformers

    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, rope_theta=10000.0))


def _llama3() -> Any:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TINY, rope_parameters=LLAMA3, tie_word_embeddings=True, attention_bias=True)
    )


def _mistral() -> Any:
    import transformers

    return transformers.MistralForCausalLM(transformers.MistralConfig(**TINY, sliding_window=None))


def _qwen2() -> Any:
    import transformers

    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY, tie_word_embeddings=True))


def _qwen3() -> Any:
    import transformers

    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**TINY, head_dim=16))


class Recorder:
    """A greedy sampler that keeps the logits it saw."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []

    def sample(self, logits: torch.Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        assert len(states) == logits.shape[0]
        self.logits.append(logits.clone())
        return [Sampled(int(token)) for token in logits.argmax(-1)]


def _state(tokens: Sequence[int]) -> SampleState:
    return SampleState(SamplingParams(max_tokens=1, temperature=0.0), tokens, len(tokens))


def _teacher_forced(model: LoadedModel, ids: list[int], first: int, block: int) -> torch.Tensor:
    """Logits after ids[:first], ids[:first + 1], ...: one chunk, then one token a step."""
    recorder = Recorder()
    blocks = -(-len(ids) // block)
    pool = torch.zeros(blocks, kv_layout(model.config, model.dtype, block).block_bytes, dtype=torch.uint8)
    engine = TorchEngine(model, pool, block, 1, recorder)

    async def steps() -> None:
        table = list(reversed(range(blocks)))
        await engine.run([Row(ids[:first], 0, table, _state(ids))])
        for at in range(first, len(ids)):
            await engine.run([Row([ids[at]], at, table, _state(ids))])

    asyncio.run(steps())
    engine.close()
    return torch.cat(recorder.logits)


@pytest.mark.parametrize("make", [_llama, _llama3, _mistral, _qwen2, _qwen3])
def test_logits_equal_transformers(make: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    oracle = make().eval()
    with torch.no_grad():  # fresh biases are zero and fresh norms are one: they would hide a mistake
        for name, weight in oracle.named_parameters():
            if "bias" in name or "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif "proj" in name or "embed" in name:
                weight.normal_(0.0, 0.2)
    oracle.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (90,)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0, 69:]
    ours = _teacher_forced(load_model(str(tmp_path), "float32", "cpu", tmp_path / "cache"), ids, 70, BLOCK)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.full
@pytest.mark.timeout(300)  # transformers reads GGUF in pure Python
def test_embedded_model_equals_transformers() -> None:
    import transformers

    path = embedded_path()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = torch.randint(3, 49152, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = oracle(torch.tensor([ids])).logits[0, 279:]
    ours = _teacher_forced(load_model(None, "float32", "cpu"), ids, 280, 16)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)
