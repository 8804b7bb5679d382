"""Steps of decoding rows only, from buffers that stay in place: so that CUDA replays each as one graph.

A decode step is hundreds of small kernels, and launching them from Python takes longer than they do. Captured once,
they are launched together. A graph knows fixed addresses and shapes, so there is one for each *bucket* of rows (1, 2,
4, 8, then every 8) and each width of the block tables (2,048 tokens, then four times as many, up to the model's
context): attention splits its work by the width, and one width for all would be too coarse for short contexts. A step
takes the smallest that fits; rows that only fill the bucket write to the pool's last block, which is nobody's, and are
ignored. Steps of more rows, and steps with chunks of prompts, are launched kernel by kernel.

All graphs are captured when the engine starts, largest first, from one pool of memory: nothing else runs then, no
step has to wait for a capture, and the memory is known before requests come. Nothing of a graph outlives its replay but
the logits, which go to a buffer outside the pool, so the graphs may share it in whatever order they run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from twinpool.errors import ConfigError
from twinpool.workers.engine.base import Row
from twinpool.workers.models.attention import Span, StepAttention
from twinpool.workers.models.kernel_kv import KernelKv, KernelPlan, PagedRows, fill_tables
from twinpool.workers.models.llama import Llama
from twinpool.workers.staging import put

Launch = Callable[[], None]
Capture = Callable[[Launch], Launch]

_SMALL = (1, 2, 4)
_EVERY = 8  # rows
_NARROWEST = 2048  # tokens
_WIDER = 4  # times
_HEADER = 4  # token, position and two unused: tables begin at a multiple of 16 bytes, as kernels like it


def buckets(most: int) -> list[int]:
    """Sizes of batches, rising, the last of them ``most``."""
    return [*(size for size in _SMALL if size < most), *range(_EVERY, most, _EVERY), most]


def widths(max_context: int, block_size: int) -> list[int]:
    """Widths of block tables in blocks, rising, the last one for ``max_context`` tokens."""
    sizes = []
    tokens = _NARROWEST
    while tokens < max_context:
        sizes.append(-(-tokens // block_size))
        tokens *= _WIDER
    return [*sizes, -(-max_context // block_size)]


def not_captured(launch: Launch) -> Launch:
    """A step that is launched again each time: where there are no graphs."""
    return launch


class GraphCapture:
    """Makes CUDA graphs on the current stream of ``device``, all in one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Launch) -> Launch:
        """Run ``launch`` twice, the second time into a graph; returns what replays it.

        Raises ConfigError when there is no memory for it.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            launch()  # compiles kernels and makes cuBLAS's workspace for this stream: neither may happen in a capture
            # Other threads may use CUDA meanwhile: only what this one does is captured, or forbidden.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                launch()
        except torch.OutOfMemoryError as error:
            message = "no device memory left for CUDA graphs: lower worker.kv_memory_mib or worker.max_batch"
            raise ConfigError(message) from error
        return graph.replay


class DecodeSteps:
    """Runs steps of up to ``most`` decoding rows; the last block of ``kv`` is its own. For one thread."""

    def __init__(self, model: Llama, kv: KernelKv, most: int, capture: Capture) -> None:
        """Capture every bucket and width."""
        config = model.config
        self._model, self._kv = model, kv
        self._spare = kv.blocks - 1
        self._rows = buckets(most)
        self._widths = widths(config.max_context, kv.block_size)
        shapes = {width: (most, _HEADER + width) for width in self._widths}
        self._inputs = {
            width: torch.zeros(shape, dtype=torch.int32, device=kv.device) for width, shape in shapes.items()
        }
        for inputs in self._inputs.values():
            inputs[:, _HEADER] = self._spare
        self._logits = torch.zeros(most, config.vocab_size, dtype=torch.float32, device=kv.device)
        self._launches = {
            (rows, width): capture(partial(self._compute, rows, width))
            for width in reversed(self._widths)
            for rows in reversed(self._rows)
        }

    def can_run(self, rows: Sequence[Row]) -> bool:
        """Whether these are decoding rows, and not too many."""
        return len(rows) <= self._rows[-1] and all(len(row.tokens) == 1 for row in rows)

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Float32 logits ``[rows, vocabulary]``, valid until the next call. Waits for no device."""
        size = self._kv.block_size
        blocks = max(row.start // size for row in rows) + 1
        width = next(width for width in self._widths if width >= blocks)
        count = next(count for count in self._rows if count >= len(rows))
        inputs = torch.zeros(count, _HEADER + width, dtype=torch.int32)
        inputs[:, _HEADER] = self._spare
        own = inputs[: len(rows)]
        own[:, :2] = torch.tensor([(row.tokens[0], row.start) for row in rows], dtype=torch.int32)
        fill_tables(own[:, _HEADER:], [Span(1, row.start, row.table) for row in rows], size)
        put(inputs, self._inputs[width][:count])
        self._launches[count, width]()
        return self._logits[: len(rows)]

    def _compute(self, rows: int, width: int) -> None:
        """From the inputs to the logits, by shapes alone: what a graph holds."""
        inputs = self._inputs[width][:rows]
        positions, tables = inputs[:, 1].long(), inputs[:, _HEADER:]
        size = self._kv.block_size
        plan = KernelPlan(
            positions=positions,
            blocks=tables.gather(1, (positions // size).unsqueeze(1)).squeeze(1).long(),
            offsets=positions % size,
            decodes=PagedRows(tables, (inputs[:, 1] + 1).contiguous()),
        )
        attention = StepAttention(positions, partial(self._kv.attend, plan))
        hidden = self._model.forward(inputs[:, 0].long(), attention)
        self._logits[:rows] = self._model.logits(hidden)
