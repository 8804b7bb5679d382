"""A worker frame by frame: real scheduler, outbox and emulated engine; KV transfer and link are stand-ins."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec.structs
import pytest

from twinpool.blockhash import token_bytes, tokens_from_bytes
from twinpool.cost import StepCost
from twinpool.errors import EngineError, TransferError
from twinpool.proto import frames
from twinpool.sampling import SamplingParams, TokenLogprob
from twinpool.tokenizer import Tokenizer, load_tokenizer
from twinpool.workers.blocks import BlockPool
from twinpool.workers.engine.base import ModelInfo, Row, Sampled
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.outbox import CREDIT, MAX_TOKENS, TokenOutbox
from twinpool.workers.scheduler import Scheduler
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.worker import Parts, Worker

SIZE = 4  # tokens in a block
BLOCK_BYTES = 64
BLOCKS = 32
ZERO = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)
LEASE_S = 60.0

F = TypeVar("F", bound=frames.Frame)


class GatedTransfer:
    """Copies from another pool once ``gate`` is open; a cancelled pull ends only after ``let_go``, as real ones may."""

    def __init__(self, pool: HostPool) -> None:
        self.addresses: dict[str, str] = {}
        self.secret = b""
        self.source: HostPool | None = None
        self.error: Exception | None = None
        self.pulls = 0
        self.gate = asyncio.Event()
        self.let_go = asyncio.Event()
        self._pool = pool

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int], timeout_s: float
    ) -> Pulled:
        self.pulls += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            await self.let_go.wait()
            raise
        if self.error is not None:
            raise self.error
        assert self.source is not None
        self._pool.data[list(target)] = self.source.data[list(source)]
        bad = tuple(i for i, block in enumerate(target) if self._pool.checksum(block) != sums[i])
        return Pulled("gated", len(source) * BLOCK_BYTES, 0.001, bad)

    def drop(self, worker: str) -> None:
        """No channels here."""

    async def close(self) -> None:
        """Nothing to close."""


class Rig:
    """A worker and what it has said; its router acknowledges at once, or never."""

    def __init__(self, tokenizer: Tokenizer, engine: type[EmulatedEngine] = EmulatedEngine, acks: bool = True) -> None:
        info = ModelInfo("m", "f", "float32", "stand-in", SIZE, BLOCK_BYTES, tokenizer.vocab_size, 1024, (0,))
        self.pool = HostPool(BLOCKS, BLOCK_BYTES)
        self.engine = engine(info, self.pool.data, ZERO, 1.0)
        self.scheduler = Scheduler(BlockPool(BLOCKS, SIZE), ZERO, 64, 8)
        self.transfer = GatedTransfer(self.pool)
        self.said: list[frames.Frame] = []
        parts = Parts(self.engine, self.scheduler, self.pool, self.transfer, tokenizer)
        self.worker = Worker(parts, self._hear, lambda: None)
        self._acks = acks

    def _hear(self, frame: frames.Frame) -> None:
        self.said.append(frame)
        if isinstance(frame, frames.Tokens) and self._acks:
            asyncio.get_running_loop().call_soon(self.worker.take, frames.Ack(step=frame.step))

    async def until(self, kind: type[F], count: int = 1) -> list[F]:
        """The frames of a kind once there are ``count``."""
        await eventually(lambda: len(self.all(kind)) >= count)
        return self.all(kind)

    def all(self, kind: type[F]) -> list[F]:
        """The frames of a kind."""
        return [frame for frame in self.said if isinstance(frame, kind)]

    def tokens(self) -> list[int]:
        return [token for frame in self.all(frames.Tokens) for token in tokens_from_bytes(frame.ids)]

    def check_idle(self) -> None:
        assert self.worker.idle()
        assert self.scheduler.pool.free_blocks == BLOCKS
        self.scheduler.check_integrity()


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@asynccontextmanager
async def running(*rigs: Rig) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(rig.worker.run()) for rig in rigs]
    try:
        yield
    finally:
        for task, rig in zip(tasks, rigs, strict=True):
            assert not task.done(), task
            task.cancel()
            rig.engine.close()
        await asyncio.gather(*tasks, return_exceptions=True)


def sequence(tokens: Sequence[int], prompt_len: int, max_tokens: int = 4) -> frames.Sequence:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return frames.Sequence(
        tokens=token_bytes(array("I", tokens)), prompt_len=prompt_len, sampling=sampling, salt="", itl_s=1.0
    )


def prompt_of(count: int) -> list[int]:
    return list(range(300, 300 + count))


def prefill(attempt: int, prompt: list[int], *, local: bool, max_tokens: int = 4) -> frames.Prefill:
    asked = sequence(prompt, len(prompt), max_tokens)
    return frames.Prefill(attempt=attempt, sequence=asked, decode=local, transfer=not local, lease_s=LEASE_S)


def reserve(attempt: int, prompt: list[int], lease_s: float = LEASE_S) -> frames.Reserve:
    blocks = -(-(len(prompt) + 4) // SIZE)
    return frames.Reserve(
        attempt=attempt, prompt=token_bytes(array("I", prompt)), salt="", blocks=blocks, lease_s=lease_s
    )


def pull(ready: frames.BlocksReady, first: int) -> frames.Pull:
    """The announced blocks from index ``first`` on."""
    skip = first - ready.first
    return frames.Pull(
        attempt=ready.attempt,
        first=first,
        blocks=ready.blocks[4 * skip :],
        sums=ready.sums[8 * skip :],
        peer="p",
        peer_epoch=1,
        addresses={},
        secret=b"",
        timeout_s=5.0,
    )


async def test_a_prompt_of_whole_blocks_that_is_cached_where_it_decodes(tokenizer: Tokenizer) -> None:
    """The router always moves the last block, so a reservation must not have it shared from the cache."""
    prompt = prompt_of(3 * SIZE)
    sender, receiver = Rig(tokenizer), Rig(tokenizer)
    receiver.transfer.source = sender.pool
    receiver.transfer.gate.set()
    async with running(sender, receiver):
        receiver.worker.take(prefill(1, prompt, local=True))
        await receiver.until(frames.Tokens, 4)
        expected = receiver.tokens()
        sender.worker.take(prefill(2, prompt, local=False))
        [ready] = await sender.until(frames.BlocksReady)
        receiver.worker.take(reserve(2, prompt))
        [reserved] = receiver.all(frames.Reserved)
        assert reserved.held == 2
        receiver.worker.take(pull(ready, reserved.held))
        receiver.worker.take(frames.Decode(attempt=2, sequence=sequence([*prompt, expected[0]], len(prompt))))
        await receiver.until(frames.Tokens, 7)
        assert receiver.tokens()[4:] == expected[1:]
        await eventually(receiver.worker.idle)
        receiver.check_idle()


async def test_a_pull_that_comes_after_the_lease_ran_out_touches_nothing(tokenizer: Tokenizer) -> None:
    """An earlier pull is being stopped: its end frees the blocks, and a second pull would write into free ones."""
    rig = Rig(tokenizer)
    prompt = prompt_of(10)
    announced = frames.BlocksReady(attempt=1, first=0, blocks=bytes(8), sums=bytes(16))
    rig.worker.take(reserve(1, prompt, lease_s=0.005))
    rig.worker.take(pull(announced, 0))
    await rig.until(frames.Failed)
    free = rig.scheduler.pool.free_blocks
    rig.worker.take(pull(frames.BlocksReady(attempt=1, first=2, blocks=bytes(4), sums=bytes(8)), 2))
    rig.worker.take(frames.Decode(attempt=1, sequence=sequence([*prompt, 7], len(prompt))))
    await asyncio.sleep(0.005)
    assert rig.scheduler.pool.free_blocks == free, "freed while a pull may write"
    rig.transfer.let_go.set()
    await eventually(rig.worker.idle)
    assert rig.transfer.pulls == 1
    rig.check_idle()
    rig.engine.close()


async def test_a_pull_that_breaks_is_reported(tokenizer: Tokenizer) -> None:
    """Whatever broke: without a word the router would wait for ever."""
    seen: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
    rig = Rig(tokenizer)
    rig.transfer.gate.set()
    announced = frames.BlocksReady(attempt=1, first=0, blocks=bytes(8), sums=bytes(16))
    for attempt, error in ((1, TransferError("x" * 9000)), (2, KeyError("bug"))):
        rig.transfer.error = error
        rig.worker.take(reserve(attempt, prompt_of(10)))
        rig.worker.take(msgspec.structs.replace(pull(announced, 0), attempt=attempt))
        bad = (await rig.until(frames.BlocksBad, attempt))[-1]
        assert frames.from_worker.decode(frames.encode(bad)[4:]) == bad
    assert len(seen) == 1
    rig.engine.close()


class BrokenEngine(EmulatedEngine):
    """As torch fails: with pages of text."""

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        raise EngineError("CUDA error\n" * 1000)


async def test_a_failed_step_is_said_in_a_frame_that_the_router_takes(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer, BrokenEngine)
    async with running(rig):
        rig.worker.take(prefill(1, prompt_of(5), local=True))
        [failed] = await rig.until(frames.Failed)
        assert frames.from_worker.decode(frames.encode(failed)[4:]) == failed
        rig.check_idle()


async def test_a_pull_that_does_not_fit_its_reservation_costs_that_attempt_only(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer)
    async with running(rig):
        rig.worker.take(reserve(1, prompt_of(10)))
        ready = frames.BlocksReady(attempt=1, first=0, blocks=bytes(8), sums=bytes(16))
        rig.worker.take(msgspec.structs.replace(pull(ready, 0), first=50))
        [bad] = await rig.until(frames.BlocksBad)
        assert (bad.attempt, bad.reason) == (1, "RANGE")


class PoisonedEngine(EmulatedEngine):
    """Cannot compute whatever starts with token 7, nor any step that has such a row."""

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        if any(row.sample is not None and row.sample.tokens[0] == 7 for row in rows):
            raise EngineError("not a number", reason="NAN")
        return await super().run(rows)


async def test_a_bad_row_costs_nobody_else_anything(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer, PoisonedEngine)
    async with running(rig):
        rig.worker.take(prefill(1, prompt_of(5), local=True, max_tokens=6))
        rig.worker.take(prefill(2, [7, 8, 9], local=True, max_tokens=6))
        [failed] = await rig.until(frames.Failed)
        assert (failed.attempt, failed.reason) == (2, "NAN")
        await eventually(lambda: len(rig.tokens()) == 6)
        await eventually(rig.worker.idle)
        rig.check_idle()


async def test_a_block_that_changed_in_memory_leaves_the_cache(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer)
    async with running(rig):
        rig.worker.take(prefill(1, prompt_of(13), local=False))
        [ready] = await rig.until(frames.BlocksReady)
        blocks = tokens_from_bytes(ready.blocks)
        rig.pool.data[blocks[1]] += 1
        rig.worker.take(frames.Cancel(attempt=1, suspect=True))
        rig.check_idle()
        rig.worker.take(prefill(2, prompt_of(13), local=False))
        progress = (await rig.until(frames.Progress, 2))[-1]
        assert progress.cached == SIZE  # the block before the changed one


async def test_a_draining_worker_waits_until_its_last_tokens_could_leave(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer, acks=False)
    async with running(rig):
        rig.worker.take(prefill(1, prompt_of(5), local=True, max_tokens=CREDIT + 3))
        await eventually(lambda: not rig.scheduler.load().running and len(rig.all(frames.Tokens)) == CREDIT)
        rig.worker.take(frames.Drain())
        await asyncio.sleep(0.005)
        assert not rig.worker.drained.is_set()
        rig.worker.take(frames.Ack(step=1))
        await asyncio.wait_for(rig.worker.drained.wait(), 5.0)
    assert len(rig.tokens()) == CREDIT + 3
    assert rig.all(frames.Tokens)[-1].ends


async def test_reset_frees_everything_also_in_the_middle_of_a_pull_and_a_step(tokenizer: Tokenizer) -> None:
    rig = Rig(tokenizer)
    async with running(rig):
        rig.worker.take(prefill(1, prompt_of(9), local=True, max_tokens=500))
        rig.worker.take(reserve(2, prompt_of(10)))
        rig.worker.take(pull(frames.BlocksReady(attempt=2, first=0, blocks=bytes(8), sums=bytes(16)), 0))
        await rig.until(frames.Tokens, 2)
        rig.worker.reset()
        said = len(rig.all(frames.Tokens))
        rig.transfer.let_go.set()
        await eventually(rig.worker.idle)
        await asyncio.sleep(0.005)
        assert len(rig.all(frames.Tokens)) == said
        rig.check_idle()
        rig.worker.take(prefill(3, prompt_of(5), local=True))
        await eventually(lambda: any(end.attempt == 3 for f in rig.all(frames.Tokens) for end in f.ends))


def rows_of(sent: list[frames.Frame]) -> Iterator[tuple[int, int]]:
    """(attempt, tokens) of each row."""
    for frame in sent:
        assert isinstance(frame, frames.Tokens)
        yield from zip(tokens_from_bytes(frame.attempts), tokens_from_bytes(frame.counts), strict=True)


def test_what_gathered_without_credit_leaves_in_frames_that_fit() -> None:
    """A router that stood still for a while must not kill a busy worker with 20 logprobs a token."""
    sent: list[frames.Frame] = []
    outbox = TokenOutbox(sent.append)
    logprob = TokenLogprob(-1.0, 1, tuple(range(100_000, 100_020)), (-math.pi,) * 20)
    for step in range(CREDIT):
        outbox.add(99, step, 5, "", None)
        outbox.flush(0.0)
    sequences, each = 40, MAX_TOKENS // 10
    for attempt in range(sequences):
        for position in range(each):
            outbox.add(attempt, position, 7, " word", logprob)
        outbox.end(frames.End(attempt=attempt, reason="length"))
    outbox.flush(0.0)
    assert len(sent) == CREDIT
    while outbox.waiting:
        outbox.acked(len(sent), 0.0)
    del sent[:CREDIT]
    assert sorted(rows_of(sent)) == [(attempt, each) for attempt in range(sequences)]
    assert len(sent) > 1
    for frame in sent:
        assert len(frames.encode(frame)) < frames.MAX_FRAME
        assert isinstance(frame, frames.Tokens)
        assert [end.attempt for end in frame.ends] == tokens_from_bytes(frame.attempts).tolist()
