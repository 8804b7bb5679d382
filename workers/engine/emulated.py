"""An engine that computes nothing: times from a cost model, tokens from a hash, real blocks with stand-in bytes.

Each position of each block gets 8 bytes, (token, position), where a model would write KV. Before a token is drawn, the
stand-ins of *all* positions before it are read back through the block table and compared with what the sequence says:
KV that was lost, overwritten, moved to the wrong place or answered from a freed block is an ``EngineError``, never a
plausible token. A token is a pure function of the prompt and its own position, so any worker continues any stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from twinpool.cost import StepCost
from twinpool.errors import ConfigError, EngineError
from twinpool.workers.engine.base import ModelInfo, Row, Sampled, SampleState

SLOT = np.dtype("<u8")  # token, and position in the upper half
POSITION_BITS = 32
EOS_EVERY = 512  # mean length of outputs that may end by themselves
FIRST_ORDINARY = 256  # ids below may be special

Clock = Callable[[], float]
SleepUntil = Callable[[float], Awaitable[None]]  # until this time of the clock


def check_block_bytes(block_bytes: int, block_size: int) -> None:
    """Raises ConfigError unless a stand-in for every token fits into a block."""
    if block_bytes < SLOT.itemsize * block_size or block_bytes % SLOT.itemsize:
        raise ConfigError(
            f"worker.emulated.block_bytes is {block_bytes}: it must be a multiple of {SLOT.itemsize} and at least "
            f"{SLOT.itemsize * block_size} for blocks of {block_size} tokens"
        )


class ThreadSleeper:
    """Sleeps in a thread of its own: event loop timers are whole milliseconds, too coarse for a step."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="emulated-engine")

    async def __call__(self, until: float) -> None:
        """Return at ``until`` on the monotonic clock."""
        loop = asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()
        self._thread.submit(_sleep, until, loop, woken)  # not run_in_executor: its chain of futures costs a step 20 us
        await woken

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _sleep(until: float, loop: asyncio.AbstractEventLoop, woken: asyncio.Future[None]) -> None:
    time.sleep(max(0.0, until - time.monotonic()))
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
        loop.call_soon_threadsafe(_wake, woken)


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():  # else the worker was cancelled
        woken.set_result(None)


def _stand_ins(tokens: Sequence[int], start: int) -> npt.NDArray[np.uint64]:
    """What a block has for ``tokens`` at positions ``start``.. ."""
    positions = np.arange(start, start + len(tokens), dtype=np.uint64)
    return np.asarray(tokens, dtype=np.uint64) | positions << np.uint64(POSITION_BITS)


class _Expected:
    """What one sequence's blocks should hold. Kept from step to step: both lists grow at their end, almost always."""

    __slots__ = ("_blocks", "_count", "_stand_ins", "_table")

    def __init__(self) -> None:
        self._stand_ins = np.empty(0, dtype=SLOT)
        self._count = 0
        self._table: list[int] = []
        self._blocks = np.empty(0, dtype=np.int64)

    def stand_ins(self, tokens: Sequence[int], end: int) -> npt.NDArray[np.uint64]:
        """Those of ``tokens[:end]``, of a list that only grows."""
        if end > len(self._stand_ins):
            room = np.empty(2 * end, dtype=SLOT)
            room[: self._count] = self._stand_ins[: self._count]
            self._stand_ins = room
        first = self._count
        if end == first + 1:  # a decode: no need of arrays
            self._stand_ins[first] = tokens[first] | first << POSITION_BITS
        elif end > first:
            self._stand_ins[first:end] = _stand_ins(tokens[first:end], first)
        self._count = max(first, end)
        return self._stand_ins[:end]

    def blocks(self, table: Sequence[int], count: int) -> npt.NDArray[np.int64]:
        """``table[:count]`` as an array. A block of it may be replaced by an equal one at any time."""
        if table != self._table:
            self._table = list(table)
            self._blocks = np.asarray(table, dtype=np.int64)
        return self._blocks[:count]


class EmulatedEngine:
    """See the module's docstring. ``pool`` is uint8 [blocks, block_bytes]; a step lasts ``cost.step(...) / speed``."""

    def __init__(
        self,
        info: ModelInfo,
        pool: torch.Tensor,
        cost: StepCost,
        speed: float,
        clock: Clock = time.monotonic,
        sleep_until: SleepUntil | None = None,
    ) -> None:
        check_block_bytes(info.block_bytes, info.block_size)
        self.info = info
        self._cost = cost
        self._speed = speed
        self._clock = clock
        self._sleep_until: SleepUntil = sleep_until or ThreadSleeper()
        self._slots: npt.NDArray[np.uint64] = pool.numpy().view(SLOT)[:, : info.block_size]

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """See ``Engine``."""
        chunks = [(len(row.tokens), row.start) for row in rows if not row.decode]
        decodes = [row for row in rows if row.decode]
        seconds = self._cost.step(chunks, len(decodes), sum(row.start + 1 for row in decodes)) / self._speed
        start = self._clock()
        drawn = [self._compute(row) for row in rows]
        if seconds > 0.0:
            await self._sleep_until(start + seconds)
        return drawn

    async def calibrate(self) -> StepCost:
        """The model's own coefficients, at its speed."""
        c, s = self._cost, self._speed
        return StepCost(c0=c.c0 / s, a=c.a / s, b=c.b / s, d0=c.d0 / s, d1=c.d1 / s, d2=c.d2 / s)

    def close(self) -> None:
        """End the sleeper's thread, if it has one."""
        if isinstance(self._sleep_until, ThreadSleeper):
            self._sleep_until.close()

    def _compute(self, row: Row) -> Sampled | None:
        size = self.info.block_size
        if len(row.tokens) == 1:  # a decode: no need of arrays
            self._slots[row.table[row.start // size], row.start % size] = row.tokens[0] | row.start << POSITION_BITS
        else:
            positions = np.arange(row.start, row.start + len(row.tokens))
            table = np.asarray(row.table, dtype=np.int64)
            self._slots[table[positions // size], positions % size] = _stand_ins(row.tokens, row.start)
        if row.sample is None:
            return None
        self._verify(row, row.sample)
        return Sampled(self._draw(row.sample))

    def _verify(self, row: Row, sample: SampleState) -> None:
        """All stand-ins up to the row's end are what the sequence says."""
        end = row.start + len(row.tokens)
        expected = sample.cache.get("expected")
        if not isinstance(expected, _Expected):
            expected = sample.cache["expected"] = _Expected()
        slots = self._slots[expected.blocks(row.table, -(-end // self.info.block_size))]
        wrong = slots.reshape(-1)[:end] != expected.stand_ins(sample.tokens, end)
        if np.count_nonzero(wrong):
            where = int(wrong.argmax())
            raise EngineError(f"KV at position {where} of {end} is not this sequence's", reason="WRONG_KV")

    def _draw(self, sample: SampleState) -> int:
        """xxh3 of the prompt, seeded with the position, among the tokens that end nothing by themselves."""
        prompt = sample.cache.get("prompt")
        if not isinstance(prompt, bytes):
            prompt = np.asarray(sample.tokens[: sample.prompt_len], dtype="<u4").tobytes()
            prompt = sample.cache["prompt"] = xxhash.xxh3_128_digest(prompt)
        value = xxhash.xxh3_64_intdigest(prompt, seed=sample.position)
        if sample.eos_ids and value % EOS_EVERY == 0 and sample.position >= sample.params.min_tokens:
            return sample.eos_ids[0]
        return FIRST_ORDINARY + value % (self.info.vocab_size - FIRST_ORDINARY)
