"""The engine of this project: a Llama-family model in PyTorch on a paged KV pool, on CPU or CUDA.

Steps run in one thread of their own, so that the event loop of the worker goes on while torch computes (torch lets go
of the interpreter lock within its operations). The KV of a step is in the pool before its tokens are reported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from twinpool.cost import StepCost
from twinpool.errors import EngineError
from twinpool.workers.engine.base import ModelInfo, Row, Sampled, SampleState
from twinpool.workers.engine.calibrate import calibrate
from twinpool.workers.models.attention import KvLayout, PagedKv, Span, attention_order
from twinpool.workers.models.attention import kv_layout as layout_of
from twinpool.workers.models.config import DTypeName, LlamaConfig
from twinpool.workers.models.llama import Llama, RankGroup
from twinpool.workers.models.loader import LoadedModel

_DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FAILURES = (RuntimeError, IndexError, ValueError, MemoryError)  # of torch; others are mistakes in this program


class LogitsSampler(Protocol):
    """What draws tokens (workers/sampler.py)."""

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        """One token for each row of float32 ``logits [rows, vocabulary]``."""
        ...


def kv_layout(config: LlamaConfig, dtype: DTypeName, block_size: int) -> KvLayout:
    """Bytes, text form and shape of one KV block of ``block_size`` tokens; ask before allocating the pool."""
    return layout_of(config, _DTYPES[dtype], block_size)


class OtherRanks(Protocol):
    """The ranks that compute every step beside the first one (workers/ranks/crew.py)."""

    def step(self, rows: Sequence[Row]) -> None:
        """Have them begin the same step. Raises EngineError when one is gone."""
        ...

    def out_of_step(self, why: str) -> None:
        """The step that they were told of failed here: nothing can be computed together any more."""
        ...


class TorchEngine:
    """Implements :class:`twinpool.workers.engine.base.Engine`.

    As one rank of a ``group`` it has that rank's share of the model, and ``info`` tells of that share; the first rank
    announces each step to the ``others``.
    """

    def __init__(
        self,
        model: LoadedModel,
        pool: Tensor,
        block_size: int,
        threads: int,
        sampler: LogitsSampler,
        group: RankGroup | None = None,
        others: OtherRanks | None = None,
    ) -> None:
        """Arrange the weights (about a second for 135M parameters) for ``pool`` uint8 [blocks, block_bytes].

        ``pool`` is borrowed, on the device of the weights; ``threads`` is torch's own number of threads a step.
        Raises ValueError where the pool does not fit :func:`kv_layout`.
        """
        config = model.config
        self._group, self._others = group, others
        self._kv = PagedKv(pool, config, _DTYPES[model.dtype], block_size)
        self._device = pool.device
        self._sampler = sampler
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="twinpool-engine", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._model: Llama | None = self._thread.submit(_build, config, model.weights, group).result()
        self.info = ModelInfo(
            name=model.name,
            fingerprint=model.fingerprint,
            dtype=model.dtype,
            layout=self._kv.layout.text,
            block_size=block_size,
            block_bytes=self._kv.layout.block_bytes,
            vocab_size=config.vocab_size,
            max_context=config.max_context,
            eos_ids=config.eos_ids,
        )

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """Compute one step; see :class:`twinpool.workers.engine.base.Engine`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.step, rows)

    async def calibrate(self) -> StepCost:
        """Measure and fit the step cost; overwrites blocks of the pool from the first on, so it must be unused."""
        blocks, size = self._kv.blocks, self.info.block_size
        limit = self.info.max_context
        # On a CPU the thread's own time: other processes that start on the same cores would distort the elapsed one.
        # It has no part in waiting for other ranks, which belongs to a step of several.
        alone_on_cpu = self._device.type == "cpu" and self._group is None
        clock = time.thread_time if alone_on_cpu else time.perf_counter
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, calibrate, self.step, clock, blocks, size, limit, self.info.vocab_size
        )

    def close(self) -> None:
        """Wait for the step in progress, stop the thread and drop the weights. Idempotent."""
        self._thread.shutdown(wait=True)
        self._model = None

    def step(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """:meth:`run` without the thread, for benchmarks and calibration; never while a run is under way."""
        if self._model is None:
            raise EngineError("the engine is closed")
        if not rows:
            return []
        self._check(rows)
        if self._others is not None:
            self._others.step(rows)
        try:
            return self._compute(self._model, rows)
        except _FAILURES as error:
            raise EngineError(f"a step of {len(rows)} rows failed: {error}") from error

    def _check(self, rows: Sequence[Row]) -> None:
        size, blocks, vocabulary = self.info.block_size, self._kv.blocks, self.info.vocab_size
        for row in rows:
            end = row.start + len(row.tokens)
            if not row.tokens or row.start < 0 or end > min(self.info.max_context, len(row.table) * size):
                raise EngineError(
                    f"a row of {len(row.tokens)} tokens from position {row.start} does not fit its "
                    f"{len(row.table)} blocks or the context of {self.info.max_context} tokens"
                )
            if min(row.table) < 0 or max(row.table) >= blocks:
                raise EngineError(f"a block table names a block outside the pool of {blocks}")
            if min(row.tokens) < 0 or max(row.tokens) >= vocabulary:
                raise EngineError(f"a token id is outside the vocabulary of {vocabulary}")

    @torch.inference_mode()
    def _compute(self, model: Llama, rows: Sequence[Row]) -> list[Sampled | None]:
        order = attention_order([len(row.tokens) for row in rows], [row.start for row in rows])
        ordered = [rows[index] for index in order]
        hidden = self._forward(model, ordered)
        results: list[Sampled | None] = [None] * len(rows)
        last_tokens: list[int] = []
        sampled: list[tuple[int, SampleState]] = []
        end = 0
        for index, row in zip(order, ordered, strict=True):
            end += len(row.tokens)
            if row.sample is not None:
                last_tokens.append(end - 1)
                sampled.append((index, row.sample))
        if sampled:
            logits = model.logits(hidden[torch.tensor(last_tokens, device=self._device)])
            drawn = self._sampler.sample(logits, [state for _, state in sampled])
            for (index, _), token in zip(sampled, drawn, strict=True):
                results[index] = token
        elif self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # KV must be in the pool when the step is reported
        return results

    def _forward(self, model: Llama, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all tokens. What fails here fails in the middle of what all ranks compute together."""
        try:
            plan = self._kv.plan([Span(len(row.tokens), row.start, row.table) for row in rows])
            tokens = torch.tensor([token for row in rows for token in row.tokens], dtype=torch.int64)
            return model.forward(tokens.to(self._device), plan, self._kv)
        except _FAILURES as error:
            if self._others is not None:
                self._others.out_of_step(str(error))
            raise


@torch.inference_mode()
def _build(config: LlamaConfig, weights: dict[str, Tensor], group: RankGroup | None) -> Llama:
    return Llama(config, weights, group)
