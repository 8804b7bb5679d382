"""A tiny model, and traffic for any engine of it: sequences that join, grow over block borders, and leave."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, Sampled, SampleState
from twinpool.workers.engine.torch_engine import EngineOptions, TorchEngine
from twinpool.workers.models.config import DTypeName, LlamaConfig, tensor_shapes
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import LoadedModel
from twinpool.workers.sampler import Sampler

CONFIG = LlamaConfig(
    family="llama", vocab_size=61, hidden=32, ffn=48, layers=2, heads=4, kv_heads=2, head_dim=16, eps=1e-5,
    rope_theta=10000.0, max_context=4096, tied_head=False, eos_ids=(2,),
)  # fmt: skip
BLOCK = 4
BLOCKS = 120
ROWS = 7  # sequences at once
_KINDS = (
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 0.0, "logprobs": 3, "logit_bias": {5: 2.0}, "min_tokens": 2},
    {"temperature": 0.9},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
)


def tiny_model(dtype: DTypeName = "float32", device: str = "cpu") -> LoadedModel:
    """The same weights in each dtype, rounded to it."""
    generator = torch.Generator().manual_seed(11)
    weights = {
        name: (torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)).to(getattr(torch, dtype))
        for name, shape in tensor_shapes(CONFIG).items()
    }
    return LoadedModel("tiny", "f" * 32, CONFIG, dtype, {name: weight.to(device) for name, weight in weights.items()})


def tiny_engine(options: EngineOptions, device: str = "cpu", dtype: DTypeName = "float32") -> TorchEngine:
    """An engine with a pool of ``BLOCKS`` blocks, the last of which is its own where it decodes from static buffers."""
    layout = kv_layout(CONFIG, options.kv_dtype or dtype, BLOCK)
    pool = torch.zeros(BLOCKS, layout.block_bytes, dtype=torch.uint8, device=device)
    sampler = Sampler(CONFIG.vocab_size, device)
    return TorchEngine(tiny_model(dtype, device), pool, BLOCK, 1, sampler, options=options)


@dataclass
class Life:
    """One sequence of the traffic."""

    begins: int  # step in which its prompt is computed
    length: int  # tokens in the end
    table: list[int]
    state: SampleState
    done: int = 0  # computed tokens


def traffic(seed: int) -> list[Life]:
    """``ROWS`` sequences, all their blocks their own and in no order."""
    rng = random.Random(seed)
    blocks = rng.sample(range(BLOCKS - 1), BLOCKS - 1)
    lives = []
    for number in range(ROWS):
        prompt = [rng.randrange(61) for _ in range(rng.choice((1, 3, 4, 9, 17, 30)))]
        length = len(prompt) + rng.randint(2, 20)
        table = [blocks.pop() for _ in range(-(-length // BLOCK))]
        params = SamplingParams(max_tokens=99, seed=seed + number, **rng.choice(_KINDS))
        lives.append(Life(rng.randint(0, 12), length, table, SampleState(params, prompt, len(prompt))))
    return lives


def words(engine: TorchEngine, seed: int) -> list[list[int]]:
    """All tokens of the traffic of ``seed``. Prompts are computed in two chunks, in steps that others decode in."""
    lives = traffic(seed)
    step = 0
    while any(len(life.state.tokens) < life.length for life in lives):
        rows = [(life, _next(life)) for life in lives if step >= life.begins and len(life.state.tokens) < life.length]
        _take(rows, engine.step([_row(life, tokens) for life, tokens in rows]))
        step += 1
    return [list(life.state.tokens) for life in lives]


def _next(life: Life) -> Sequence[int]:
    """What of a sequence is computed next: half of its prompt, the rest of it, or its last token."""
    prompt = life.state.prompt_len
    if life.done == 0 and prompt > 1:
        return life.state.tokens[: prompt // 2]
    return life.state.tokens[life.done :]


def _row(life: Life, tokens: Sequence[int]) -> Row:
    return Row(tokens, life.done, life.table, life.state if life.done + len(tokens) == len(life.state.tokens) else None)


def _take(rows: list[tuple[Life, Sequence[int]]], drawn: Sequence[Sampled | None]) -> None:
    for (life, tokens), token in zip(rows, drawn, strict=True):
        life.done += len(tokens)
        if token is not None:
            life.state = replace(life.state, tokens=[*life.state.tokens, token.token])
