"""The engine of this project: a Llama-family model in PyTorch on a paged KV pool, on CPU or CUDA.

Steps run in one thread of their own, so that the event loop of the worker goes on while torch computes (torch lets go
of the interpreter lock within its operations). The KV of a step is in the pool before its tokens are reported.

On CUDA a step is put on a stream of the engine's own, without a wait until all of it is there: inputs from pinned
memory, the model (attention by kernels/ops.py, decode steps as graphs: decode.py), the choice of tokens, their copy to
pinned memory. Then the thread waits for two events, that of the tokens and that of the step's KV; transfers, which use
other streams, hear of a step only after that. What other streams wrote to the pool has been waited for by whoever
reported it. Tokens are drawn on the same stream: the next step needs them, so there is nothing beside which to draw.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from twinpool.cost import StepCost
from twinpool.errors import EngineError
from twinpool.workers.engine.base import ModelInfo, Row, Sampled, SampleState
from twinpool.workers.engine.calibrate import calibrate
from twinpool.workers.engine.decode import DecodeSteps, GraphCapture, not_captured
from twinpool.workers.models.attention import KvCache, PagedKv, Span, attention_order
from twinpool.workers.models.kernel_kv import KernelKv
from twinpool.workers.models.kv_layout import KvDTypeName
from twinpool.workers.models.llama import Llama, RankGroup
from twinpool.workers.models.loader import LoadedModel
from twinpool.workers.staging import Fence, upload_list

_FAILURES = (RuntimeError, IndexError, ValueError, MemoryError)  # of torch; others are mistakes in this program


class LogitsSampler(Protocol):
    """What draws tokens (workers/sampler.py)."""

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        """One token for each row of float32 ``logits [rows, vocabulary]``."""
        ...


class OtherRanks(Protocol):
    """The ranks that compute every step beside the first one (workers/ranks/crew.py)."""

    def step(self, rows: Sequence[Row]) -> None:
        """Have them begin the same step. Raises EngineError when one is gone."""
        ...

    def out_of_step(self, why: str) -> None:
        """The step that they were told of failed here: nothing can be computed together any more."""
        ...


class EngineOptions(NamedTuple):
    """How an engine computes, besides what the model says."""

    kv_dtype: KvDTypeName | None = None  # None: that of the weights
    kernels: bool = False  # attention by kernels/ops.py on CPUs too, there by its reference; CUDA and float8: always
    decode_rows: int = 0  # up to so many decoding rows run from static buffers (decode.py), on CUDA in graphs; 0: none


_DEFAULTS = EngineOptions()


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
        options: EngineOptions = _DEFAULTS,
    ) -> None:
        """Arrange the weights (about a second for 135M parameters) for ``pool`` uint8 [blocks, block_bytes].

        ``pool`` is borrowed, on the device of the weights; ``threads`` is torch's own number of threads a step. With
        ``options.decode_rows`` the last block of the pool is the engine's own, and no row may name it.
        Raises ValueError where the pool does not fit ``kv_layout`` (models/kv_layout.py) or options exclude each other.
        """
        config = model.config
        self._group, self._others = group, others
        self._kv = _open_kv(pool, model, block_size, options)
        self._device = pool.device
        self._stream = torch.cuda.Stream(self._device) if pool.is_cuda else None
        self._sampler = sampler
        if options.decode_rows and (group is not None or not isinstance(self._kv, KernelKv)):
            raise ValueError("static decode steps are for kernels, and for engines of one rank")
        self._blocks = self._kv.blocks - (1 if options.decode_rows else 0)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="twinpool-engine", initializer=torch.set_num_threads, initargs=(threads,)
        )
        self._model: Llama | None = None
        self._decode: DecodeSteps | None = None
        self._thread.submit(self._open, model, options.decode_rows).result()
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
        blocks, size = self._blocks, self.info.block_size
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
        self._model = self._decode = None

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
        size, blocks, vocabulary = self.info.block_size, self._blocks, self.info.vocab_size
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
    def _open(self, model: LoadedModel, decode_rows: int) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self._device)  # weights and pool were made on other streams
        with self._on_stream():
            self._model = Llama(model.config, model.weights, self._group)
            if decode_rows and isinstance(self._kv, KernelKv):
                capture = not_captured if self._stream is None else GraphCapture(self._device)
                self._decode = DecodeSteps(self._model, self._kv, decode_rows, capture)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    @torch.inference_mode()
    def _compute(self, model: Llama, rows: Sequence[Row]) -> list[Sampled | None]:
        asked = {index: row.sample for index, row in enumerate(rows) if row.sample is not None}
        results: list[Sampled | None] = [None] * len(rows)
        with self._on_stream():
            logits = self._logits(model, rows, list(asked))
            written = Fence(self._device)
            if asked:
                drawn = self._sampler.sample(logits, list(asked.values()))
                for index, token in zip(asked, drawn, strict=True):
                    results[index] = token
            written.wait()  # KV must be in the pool when the step is reported, whatever the sampler waited for
        return results

    def _logits(self, model: Llama, rows: Sequence[Row], asked: Sequence[int]) -> Tensor:
        """Float32 logits of the rows ``asked``, in their order, valid until the next step."""
        if self._decode is not None and self._decode.can_run(rows):
            logits = self._decode.run(rows)
            return logits if len(asked) == len(rows) else logits[upload_list(asked, torch.int64, self._device)]
        order = attention_order([len(row.tokens) for row in rows], [row.start for row in rows])
        hidden = self._forward(model, [rows[index] for index in order])
        ends = accumulate(len(rows[index].tokens) for index in order)
        last = dict(zip(order, ends, strict=True))
        if not asked:
            return hidden.new_empty(0)
        return model.logits(hidden[upload_list([last[index] - 1 for index in asked], torch.int64, self._device)])

    def _forward(self, model: Llama, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all tokens. What fails here fails in the middle of what all ranks compute together."""
        try:
            attention = self._kv.step([Span(len(row.tokens), row.start, row.table) for row in rows])
            tokens = upload_list([token for row in rows for token in row.tokens], torch.int64, self._device)
            return model.forward(tokens, attention)
        except _FAILURES as error:
            if self._others is not None:
                self._others.out_of_step(str(error))
            raise


def _open_kv(pool: Tensor, model: LoadedModel, block_size: int, options: EngineOptions) -> KvCache:
    dtype = options.kv_dtype or model.dtype
    if pool.is_cuda or options.kernels or dtype == "float8_e4m3":
        return KernelKv(pool, model.config, dtype, block_size)
    return PagedKv(pool, model.config, dtype, block_size)
