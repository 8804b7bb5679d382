"""Engine speed, one thread: prefill and decode of the embedded model against a plain torch loop and transformers.

    python benchmarks/engine/run.py [--dtype float32 --dtype bfloat16] [--quick]

All contenders run in the one thread of this process, taking turns. Times are CPU seconds of that thread: on an idle
machine the same as elapsed time, on a shared one without the waits for a core; the best of several rounds counts.
Writes results.md and results.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_loop import PlainLoop

from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.engine.torch_engine import TorchEngine
from twinpool.workers.models.config import DTypeName
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.linear import has_bfloat16_instructions
from twinpool.workers.models.loader import LoadedModel, load_model
from twinpool.workers.sampler import Sampler

BLOCK = 16
PREFILL = (128, 512, 2048)
BATCHES = (1, 4, 16)
CONTEXTS = (256, 1024)
OURS, PLAIN, TRANSFORMERS = "twinpool", "plain loop", "transformers"
HERE = Path(__file__).parent


class Result(NamedTuple):
    """One line: best seconds of a step for each contender; transformers runs a batch one sequence after another."""

    dtype: str
    kind: str  # "prefill" or "decode"
    size: int  # prompt tokens, or batch
    context: int
    seconds: dict[str, float]

    def tokens_per_s(self, who: str) -> float:
        return self.size / self.seconds[who]


class Contenders:
    """The three implementations over the same weights."""

    def __init__(self, model: LoadedModel) -> None:
        config = model.config
        blocks = max(BATCHES) * max(CONTEXTS) // BLOCK + max(PREFILL) // BLOCK
        pool = torch.zeros(blocks, kv_layout(config, model.dtype, BLOCK).block_bytes, dtype=torch.uint8)
        self.engine = TorchEngine(model, pool, BLOCK, 1, Sampler(config.vocab_size, "cpu"))
        self.plain = PlainLoop(config, model.weights, max(BATCHES), max(PREFILL))
        self.oracle = transformers_model(model)
        self.config = config
        self.dtype = getattr(torch, model.dtype)
        # Blocks of a sequence lie scattered over the pool, as they do in a worker that has run for a while.
        self._shuffled = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def prefill(self, tokens: int) -> dict[str, Callable[[], object]]:
        ids = [(7919 * position) % self.config.vocab_size for position in range(tokens)]
        rows = [Row(ids, 0, self._table(0, tokens), self._state(ids))]
        batch = torch.tensor([ids])
        return {
            OURS: lambda: self.engine.step(rows),
            PLAIN: lambda: self.plain.step(batch, 0).argmax(-1).tolist(),
            TRANSFORMERS: lambda: self.oracle(batch, logits_to_keep=1).logits.argmax(-1).tolist(),
        }

    def decode(self, batch: int, context: int) -> dict[str, Callable[[], object]]:
        ids = [(7919 * position) % self.config.vocab_size for position in range(context)]
        rows = [Row(ids[-1:], context - 1, self._table(row, context), self._state(ids)) for row in range(batch)]
        tokens = torch.tensor([ids[-1:]] * batch)
        cache = self._filled_cache(context - 1)

        def one_after_another() -> None:
            for _ in range(batch):
                self.oracle(tokens[:1], past_key_values=cache).logits.argmax(-1).tolist()
                cache.crop(-1)

        return {
            OURS: lambda: self.engine.step(rows),
            PLAIN: lambda: self.plain.step(tokens, context - 1).argmax(-1).tolist(),
            TRANSFORMERS: one_after_another,
        }

    def _table(self, row: int, tokens: int) -> list[int]:
        blocks = -(-tokens // BLOCK)
        return self._shuffled[row * blocks : (row + 1) * blocks]

    def _state(self, ids: list[int]) -> SampleState:
        return SampleState(SamplingParams(max_tokens=1, temperature=0.0), ids, len(ids))

    def _filled_cache(self, tokens: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache()
        kv = torch.zeros(1, self.config.kv_heads, tokens, self.config.head_dim, dtype=self.dtype)
        for layer in range(self.config.layers):
            cache.update(kv.clone(), kv.clone(), layer)
        return cache


def transformers_model(model: LoadedModel) -> Any:
    """transformers' LlamaForCausalLM over the tensors of ``model``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden, intermediate_size=c.ffn, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, rms_norm_eps=c.eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}, tie_word_embeddings=c.tied_head,
            max_position_embeddings=c.max_context, dtype=model.dtype,
        )
    )  # fmt: skip
    oracle.load_state_dict(model.weights, strict=False, assign=True)
    oracle.tie_weights()
    return oracle.eval()


def best_times(contenders: dict[str, Callable[[], object]], rounds: int, warm: bool) -> dict[str, float]:
    """Best seconds of each, taking turns; ``warm`` runs each once before."""
    best = dict.fromkeys(contenders, float("inf"))
    for turn in range(rounds + warm):
        for who, run in contenders.items():
            started = time.thread_time()
            run()
            if turn >= warm:
                best[who] = min(best[who], time.thread_time() - started)
    return best


def memory_bandwidth() -> float:
    """Bytes a second of one thread that reads 256 MiB, best of five."""
    data = torch.zeros(64 << 20)
    return 4 * data.numel() / min(best_times({"sum": data.sum}, 5, True).values())


@torch.inference_mode()
def measure(dtype: DTypeName, quick: bool) -> Iterator[Result]:
    """All lines of one dtype, as they are measured."""
    contenders = Contenders(load_model(None, dtype, "cpu"))
    for tokens in PREFILL[:1] if quick else PREFILL:
        rounds = max(3, 1024 // tokens)
        yield Result(dtype, "prefill", tokens, 0, best_times(contenders.prefill(tokens), rounds, True))
    for context in CONTEXTS[:1] if quick else CONTEXTS:
        for batch in BATCHES:
            seconds = best_times(contenders.decode(batch, context), 3 if batch == 16 else 10, True)
            yield Result(dtype, "decode", batch, context, seconds)
    contenders.engine.close()


def weight_bytes(dtype: DTypeName) -> int:
    """Bytes of weights that a decode step at batch 1 must read at least once."""
    return sum(weight.numel() * weight.element_size() for weight in load_model(None, dtype, "cpu").weights.values())


def report(results: list[Result], machine: dict[str, str], bandwidth: float) -> str:
    """The results as Markdown."""
    lines = ["# Engine speed, one thread", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    lines += ["Tokens per CPU second of the one thread. transformers decodes a batch one sequence after another.", ""]
    lines += [
        "| dtype | step | twinpool | plain loop | transformers | to the better one | memory speed used |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        better = min(result.seconds[PLAIN], result.seconds[TRANSFORMERS])
        name = f"prefill {result.size}" if result.kind == "prefill" else f"decode {result.size} x {result.context}"
        share = "" if name.split()[:2] != ["decode", "1"] else f"{_share(result, bandwidth):.0%}"
        speeds = " | ".join(f"{result.tokens_per_s(who):.0f}" for who in (OURS, PLAIN, TRANSFORMERS))
        lines.append(f"| {result.dtype} | {name} | {speeds} | {better / result.seconds[OURS]:.2f}x | {share} |")
    lines += ["", "decode B x C: B sequences with C tokens of context each, one token a step.", ""]
    return "\n".join(lines)


def _share(result: Result, bandwidth: float) -> float:
    dtype: DTypeName = "float32" if result.dtype == "float32" else "bfloat16"
    return weight_bytes(dtype) / result.seconds[OURS] / bandwidth


def describe_machine(bandwidth: float) -> dict[str, str]:
    """What the numbers depend on, without names of hosts or users."""
    import transformers

    info = Path("/proc/cpuinfo")
    models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    instructions = "with" if has_bfloat16_instructions() else "without"
    cpu = models[0] if models else platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {
        "CPU": f"{cpu}, {os.cpu_count()} cores, {instructions} bfloat16 instructions",
        "memory": f"{bandwidth / 1e9:.1f} GB/s read by one thread, measured in this run",
        "load": f"{os.getloadavg()[0]:.1f} before the run (on a shared machine all contenders lose alike)",
        "software": f"Python {platform.python_version()}, {versions}",
    }


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", action="append", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only, nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bandwidth = memory_bandwidth()
    machine = describe_machine(bandwidth)
    results: list[Result] = []
    for dtype in arguments.dtype or ("float32", "bfloat16"):
        for result in measure(dtype, arguments.quick):
            results.append(result)
            speeds = ", ".join(f"{who} {result.tokens_per_s(who):.0f}" for who in result.seconds)
            print(f"{dtype} {result.kind} {result.size} x {result.context}: {speeds} tokens/s", flush=True)
    text = report(results, machine, bandwidth)
    print(text)
    if not arguments.quick:
        (HERE / "results.md").write_text(text)
        document = {"machine": machine, "results": [result._asdict() for result in results]}
        (HERE / "results.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
