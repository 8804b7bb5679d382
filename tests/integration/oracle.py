"""Three judges of tokens: transformers, the project's own sampler on its logits, and this engine in one process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import torch
from tests.integration.client import Prompt
from tests.integration.corpus import Case

from twinpool.cost import StepCost
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import Tokenizer, embedded_model, load_tokenizer
from twinpool.workers.blocks import BlockPool
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import load_model
from twinpool.workers.sampler import Sampler
from twinpool.workers.scheduler import Mode, Scheduler
from twinpool.workers.scheduler import Sequence as Scheduled

MARGIN = 1e-3  # of the best two scores: closer ones may swap
BLOCK = 16
CHUNK = 512
BLOCKS = 256
FREE = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)


class Words:
    """Prompts as ids, sampling parameters as the workers see them."""

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the embedded model."""
        return load_tokenizer()

    def ids(self, prompt: Prompt) -> list[int]:
        """What the router should make of a prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt[0], tuple):
            pairs: Any = prompt
            return self.tokenizer.chat([{"role": role, "content": content} for role, content in pairs])
        ids: Any = prompt
        return list(ids)

    def state(self, case: Case, tokens: Sequence[int], prompt_len: int) -> SampleState:
        """What the next token of ``tokens`` depends on."""
        params = msgspec.convert(case.sampling, SamplingParams)
        eos = () if params.ignore_eos else tuple(self.tokenizer.eos_ids)
        return SampleState(params, tokens, prompt_len, eos)


def _from_gguf() -> Any:
    """The embedded model as transformers itself reads the file: in pure Python, half a minute."""
    import transformers

    path = embedded_model()
    return transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)


def _from_our_weights() -> Any:
    """The same model without reading the file again; the full tier shows that the weights are the same."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(load_model(None, "float32", "cpu").weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected
    return model


class Oracle:
    """transformers in float32 on the CPU, asked once for each (prompt, tokens)."""

    def __init__(self, words: Words, from_gguf: bool) -> None:
        self._model = (_from_gguf() if from_gguf else _from_our_weights()).eval()
        self._words = words
        self._sampler = Sampler(self._model.config.vocab_size, "cpu")
        self._known: dict[tuple[str, tuple[int, ...]], list[str]] = {}

    def faults(self, case: Case, ids: Sequence[int]) -> list[str]:
        """Where ``ids`` are not what transformers would have said after the same tokens; empty if nowhere."""
        key = (case.name, tuple(ids))
        if key not in self._known:
            self._known[key] = self._judge(case, list(ids))
        return self._known[key]

    def _judge(self, case: Case, ids: list[int]) -> list[str]:
        prompt = self._words.ids(case.prompt)
        with torch.inference_mode():
            forced = torch.tensor([prompt + ids[:-1]])
            logits = self._model(forced, logits_to_keep=len(ids)).logits[0]
        faults = []
        for position, token in enumerate(ids):
            state = self._words.state(case, prompt + ids[:position], len(prompt))
            choice = self._choice(logits[position], state)
            if choice != token and self._choice(self._nudged(logits[position], choice, token, state), state) != token:
                faults.append(f"{case.name}: token {position} is {token}, transformers says {choice}")
        return faults

    def _choice(self, row: torch.Tensor, state: SampleState) -> int:
        return self._sampler.sample(row.unsqueeze(0), [state])[0].token

    @staticmethod
    def _nudged(row: torch.Tensor, choice: int, token: int, state: SampleState) -> torch.Tensor:
        """The logits with the two tokens moved by half a margin towards each other: what is drawn is over T."""
        nudge = MARGIN / 2 * (state.params.temperature or 1.0)
        row = row.clone()
        row[choice] -= nudge
        row[token] += nudge
        return row


class OneProcess:
    """The torch engine under the scheduler, without router, links and transfer: requests one after another."""

    def __init__(self, words: Words) -> None:
        model = load_model(None, "float32", "cpu")
        layout = kv_layout(model.config, model.dtype, BLOCK)
        pool = torch.zeros(BLOCKS, layout.block_bytes, dtype=torch.uint8)
        self._engine = TorchEngine(model, pool, BLOCK, 1, Sampler(model.config.vocab_size, "cpu"))
        self._words = words
        self._known: dict[str, list[int]] = {}

    def close(self) -> None:
        """Give the weights back."""
        self._engine.close()

    def generate(self, case: Case) -> list[int]:
        """Tokens of a case, up to the end token if it may end there; computed once, nothing cached from the others."""
        if case.name not in self._known:
            self._known[case.name] = self._generate(case)
        return self._known[case.name]

    def _generate(self, case: Case) -> list[int]:
        scheduler = Scheduler(BlockPool(BLOCKS, BLOCK), FREE, CHUNK, 1)
        tokens = array("I", self._words.ids(case.prompt))
        prompt_len = len(tokens)
        state = self._words.state(case, tokens, prompt_len)
        sequence = Scheduled(1, prompt_len, list(range(1, prompt_len // BLOCK + 1)), Mode.LOCAL, 1e9)
        assert scheduler.add(sequence, 0.0)
        while len(tokens) - prompt_len < state.params.max_tokens:
            self._step(scheduler, sequence, tokens, state)
            if len(tokens) > prompt_len and tokens[-1] in state.eos_ids:
                break
        return tokens[prompt_len:].tolist()

    def _step(self, scheduler: Scheduler, sequence: Scheduled, tokens: array[int], state: SampleState) -> None:
        step = scheduler.plan(0.0)
        assert step is not None
        if step.chunks:
            chunk = step.chunks[0]
            part = tokens[chunk.start : chunk.start + chunk.count]
            row = Row(part, chunk.start, sequence.table, state if chunk.last else None)
        else:
            row = Row(tokens[-1:], len(tokens) - 1, sequence.table, state)
        drawn = self._engine.step([row])[0]
        scheduler.done(step, 0.0)
        if drawn is not None:
            tokens.append(drawn.token)
