"""A worker that lends cached blocks, one that gets them before it computes; frame by frame (test_worker_live.py)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from msgspec.structs import replace
from tests.workers.test_worker_live import (
    BLOCKS,
    LEASE_S,
    SIZE,
    Rig,
    eventually,
    prefill,
    prompt_of,
    pull,
    reserve,
    running,
)

from twinpool.blockhash import block_hashes, root
from twinpool.proto import frames
from twinpool.tokenizer import Tokenizer, load_tokenizer

PROMPT = prompt_of(6 * SIZE + 1)  # six blocks may be cached
LOAN, ATTEMPT = 7, 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def hashes_of(prompt: Sequence[int]) -> list[int]:
    return block_hashes(root("f", SIZE, "float32", ""), array("I", prompt), SIZE)


def lend(prompt: Sequence[int], count: int, loan: int = LOAN) -> frames.Lend:
    return frames.Lend(attempt=loan, hashes=array("Q", hashes_of(prompt)[:count]).tobytes(), lease_s=LEASE_S)


def room(prompt: list[int] = PROMPT) -> frames.Reserve:
    blocks = -(-(len(prompt) + 1) // SIZE)
    whole = reserve(ATTEMPT, prompt)
    return frames.Reserve(attempt=ATTEMPT, prompt=whole.prompt, salt="", blocks=blocks, lease_s=LEASE_S)


def answer_of(rig: Rig) -> frames.BlocksReady:
    return next(frame for frame in rig.all(frames.BlocksReady) if frame.attempt == LOAN)


async def known_to(rig: Rig, prompt: list[int] = PROMPT) -> list[int]:
    """Let it compute the prompt, as attempt 1; the answer."""
    rig.worker.take(prefill(1, prompt, local=True))
    await rig.until(frames.Tokens, 4)
    await eventually(rig.worker.idle)
    return rig.tokens()


async def borrowed(source: Rig, rig: Rig, count: int = 6) -> frames.BlocksReady:
    """Loan and reservation are there; the pull as far as the gate of ``rig`` lets it."""
    source.worker.take(lend(PROMPT, count))
    rig.worker.take(room())
    assert rig.all(frames.Reserved)[-1].held == 0
    ready = answer_of(source)
    rig.worker.take(pull(frames.BlocksReady(attempt=ATTEMPT, first=0, blocks=ready.blocks, sums=ready.sums), 0))
    return ready


def cached(rig: Rig) -> int:
    """Blocks of ``PROMPT``."""
    return rig.scheduler.pool.match(hashes_of(PROMPT))


def returned(*rigs: Rig) -> None:
    for rig in rigs:
        rig.worker.take(frames.Release(attempt=LOAN))


async def test_the_same_tokens_from_a_fetched_prefix(tokenizer: Tokenizer) -> None:
    source, rig = Rig(tokenizer), Rig(tokenizer)
    rig.transfer.source = source.pool
    rig.transfer.gate.set()
    async with running(source, rig):
        expected = await known_to(source)
        await borrowed(source, rig)
        await rig.until(frames.BlocksVerified)
        returned(source)
        rig.worker.take(prefill(ATTEMPT, PROMPT, local=True))
        await rig.until(frames.Tokens, 4)
        assert rig.tokens() == expected
        assert [(progress.cached, progress.done) for progress in rig.all(frames.Progress)] == [(24, 25)]
        await eventually(lambda: rig.worker.idle() and source.worker.idle())
        rig.check_idle()
        source.check_idle()


async def test_what_was_received_is_lent_on_with_its_sums(tokenizer: Tokenizer) -> None:
    source, rig = Rig(tokenizer), Rig(tokenizer)
    rig.transfer.source = source.pool
    rig.transfer.gate.set()
    async with running(source, rig):
        await known_to(source)
        ready = await borrowed(source, rig)
        await rig.until(frames.BlocksVerified)
        summed: list[int] = []
        checksum = rig.pool.checksum

        def counted(block: int) -> int:
            summed.append(block)
            return checksum(block)

        rig.pool.checksum = counted  # type: ignore[method-assign]
        rig.worker.take(frames.Cancel(attempt=ATTEMPT))
        rig.worker.take(lend(PROMPT, 6))
        assert answer_of(rig).sums == ready.sums
        assert not summed
        returned(source, rig)
        rig.check_idle()


async def test_a_late_pull_is_stopped_before_the_prompt_takes_its_blocks(tokenizer: Tokenizer) -> None:
    """It still writes to the reservation; the prompt begins when it does not any more, and computes all of it."""
    source, rig = Rig(tokenizer), Rig(tokenizer)
    async with running(source, rig):
        expected = await known_to(source)
        await borrowed(source, rig)
        await eventually(lambda: rig.transfer.pulls == 1)
        rig.worker.take(prefill(ATTEMPT, PROMPT, local=True))
        assert rig.scheduler.sequence(ATTEMPT) is None
        assert rig.scheduler.holding(ATTEMPT) is not None
        rig.transfer.let_go.set()
        await rig.until(frames.Tokens, 4)
        assert rig.tokens() == expected
        assert not rig.all(frames.BlocksBad)
        assert rig.all(frames.Progress)[-1].cached == 0
        returned(source)
        await eventually(rig.worker.idle)
        rig.check_idle()
        source.check_idle()


async def test_cancelled_while_a_late_pull_is_stopped(tokenizer: Tokenizer) -> None:
    source, rig = Rig(tokenizer), Rig(tokenizer)
    async with running(source, rig):
        await known_to(source)
        await borrowed(source, rig)
        await eventually(lambda: rig.transfer.pulls == 1)
        rig.worker.take(prefill(ATTEMPT, PROMPT, local=True))
        rig.worker.take(frames.Cancel(attempt=ATTEMPT))
        rig.transfer.let_go.set()
        await eventually(rig.worker.idle)
        assert not rig.all(frames.Tokens)
        rig.check_idle()


async def test_blocks_that_changed_are_not_computed_on(tokenizer: Tokenizer) -> None:
    source, rig = Rig(tokenizer), Rig(tokenizer)
    rig.transfer.source = source.pool
    rig.transfer.gate.set()
    async with running(source, rig):
        expected = await known_to(source)
        source.worker.take(lend(PROMPT, 6))
        blocks = answer_of(source).blocks
        source.pool.data[int.from_bytes(blocks[4:8], "little")] ^= 1
        rig.worker.take(room())
        ready = answer_of(source)
        rig.worker.take(pull(frames.BlocksReady(attempt=ATTEMPT, first=0, blocks=blocks, sums=ready.sums), 0))
        [bad] = await rig.until(frames.BlocksBad)
        assert bad.reason == "CHECKSUM"
        source.worker.take(frames.Cancel(attempt=LOAN, suspect=True))
        assert cached(source) == 1
        rig.worker.take(prefill(ATTEMPT, PROMPT, local=True))
        await rig.until(frames.Tokens, 4)
        assert rig.tokens() == expected
        await eventually(rig.worker.idle)
        rig.check_idle()
        source.check_idle()


async def test_lent_blocks_are_not_evicted(tokenizer: Tokenizer) -> None:
    source = Rig(tokenizer)
    async with running(source):
        await known_to(source)
        source.worker.take(lend(PROMPT, 6))
        assert source.scheduler.pool.free_blocks == BLOCKS - 6
        other = [token + 500 for token in prompt_of((BLOCKS - 8) * SIZE)]
        source.worker.take(prefill(2, other, local=True))
        await source.until(frames.Tokens, 8)
        await eventually(lambda: source.scheduler.sequence(2) is None)
        assert cached(source) == 6
        returned(source)
        source.check_idle()


@pytest.mark.parametrize("asked", [3, 6, 9])
async def test_as_much_as_is_cached_and_asked_for(tokenizer: Tokenizer, asked: int) -> None:
    source = Rig(tokenizer)
    async with running(source):
        await known_to(source)
        source.worker.take(lend([*PROMPT, *range(20)], asked))
        assert len(answer_of(source).blocks) == 4 * min(asked, 6)
        returned(source)
        source.check_idle()


async def test_nothing_cached_is_nothing_held(tokenizer: Tokenizer) -> None:
    source = Rig(tokenizer)
    async with running(source):
        source.worker.take(lend(PROMPT, 6))
        assert answer_of(source).blocks == b""
        source.check_idle()


async def test_a_loan_that_nobody_renews_ends(tokenizer: Tokenizer) -> None:
    source = Rig(tokenizer)
    async with running(source):
        source.worker.take(replace(prefill(1, PROMPT, local=True), lease_s=0.5))
        await eventually(source.worker.idle)
        source.worker.take(replace(lend(PROMPT, 6), lease_s=0.02))
        [failed] = await source.until(frames.Failed)
        assert (failed.attempt, failed.reason) == (LOAN, "LEASE")
        source.check_idle()
