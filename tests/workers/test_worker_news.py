"""When a worker speaks of prompts that are not done: only where its router could not know. On a virtual clock."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest
from tests.parity.virtual import virtual_loop

from twinpool.blockhash import token_bytes
from twinpool.cost import StepCost
from twinpool.proto import frames
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import Tokenizer, load_tokenizer
from twinpool.workers.blocks import BlockPool
from twinpool.workers.engine.base import ModelInfo
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.scheduler import Scheduler
from twinpool.workers.transfer.base import Peer, Pulled
from twinpool.workers.transfer.pool import HostPool
from twinpool.workers.worker import Parts, Worker

SIZE, BLOCKS, CHUNK = 4, 64, 16
COST = StepCost(c0=0.005, a=0.001, b=0.0, d0=0.010, d1=0.0, d2=1e-6)  # 21 ms a full chunk


class NoTransfer:
    """Nothing is pulled here."""

    def __init__(self) -> None:
        self.addresses: dict[str, str] = {}
        self.secret = b""

    async def pull(
        self, peer: Peer, source: Sequence[int], target: Sequence[int], sums: Sequence[int], timeout_s: float
    ) -> Pulled:
        raise AssertionError

    def drop(self, worker: str) -> None:
        """No channels here."""

    async def close(self) -> None:
        """Nothing to close."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def said_by_worker(tokenizer: Tokenizer, asked: list[frames.Prefill], speed: float = 1.0) -> list[frames.Frame]:
    """All that a worker says; it is asked for the next prompt a second after the one before."""
    loop = virtual_loop()
    said: list[frames.Frame] = []

    async def play() -> None:
        pool = HostPool(BLOCKS, 8 * SIZE)
        info = ModelInfo("m", "f", "float32", "l", SIZE, 8 * SIZE, tokenizer.vocab_size, 1024, ())
        engine = EmulatedEngine(info, pool.data, COST, speed, loop.time, loop.sleep_until)
        scheduler = Scheduler(BlockPool(BLOCKS, SIZE), COST, CHUNK, 8)
        worker = Worker(Parts(engine, scheduler, pool, NoTransfer(), tokenizer), said.append, lambda: None, loop.time)
        loop.create_task(worker.run())
        worker.take(frames.Welcome(router="r", heartbeat_s=10.0, lease_s=60.0))
        for prefill in asked:
            worker.take(prefill)
            await loop.sleep_until(loop.time() + 1.0)
            worker.take(frames.Cancel(attempt=prefill.attempt))
        assert worker.idle()
        assert not worker._misjudged
        scheduler.check_integrity()
        pool.close()

    loop.run(play())
    return said


def prefill(attempt: int, length: int, cached: int = 0, *, local: bool = False, max_tokens: int = 2) -> frames.Prefill:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    tokens = token_bytes(array("I", range(300, 300 + length)))
    sequence = frames.Sequence(tokens=tokens, prompt_len=length, sampling=sampling, salt="", itl_s=1.0)
    return frames.Prefill(attempt=attempt, sequence=sequence, decode=local, transfer=False, lease_s=60.0, cached=cached)


def progress(said: list[frames.Frame]) -> list[tuple[int, int, int]]:
    """(attempt, done, cached) of each Progress."""
    return [(f.attempt, f.done, f.cached) for f in said if isinstance(f, frames.Progress)]


def test_an_exact_engine_is_silent_until_the_prompt_is_done(tokenizer: Tokenizer) -> None:
    assert progress(said_by_worker(tokenizer, [prefill(1, 50)])) == [(1, 50, 0)]


@pytest.mark.parametrize(("speed", "silent"), [(0.4, False), (2.0, False), (0.95, True), (1.05, True)])
def test_a_step_that_is_off_by_more_than_2_ms_and_2_percent_is_news(
    tokenizer: Tokenizer, speed: float, silent: bool
) -> None:
    chunks = [(1, 50, 0)] if silent else [(1, 16, 0), (1, 32, 0), (1, 48, 0), (1, 50, 0)]
    assert progress(said_by_worker(tokenizer, [prefill(1, 50)], speed)) == chunks


@pytest.mark.parametrize("speed", [0.7, 0.85, 1.4])
def test_a_prompt_that_goes_on_as_it_went_is_no_news(tokenizer: Tokenizer, speed: float) -> None:
    said = said_by_worker(tokenizer, [prefill(1, 50)], speed)
    assert progress(said) == [(1, 16, 0), (1, 50, 0)]
    first, last = (f.pace for f in said if isinstance(f, frames.Progress))
    assert first == pytest.approx(1 / speed)
    assert last == pytest.approx(1 / speed)  # two tokens by themselves, in 10 ms: that is no news either


def test_a_cached_prefix_that_was_not_predicted_is_news_once(tokenizer: Tokenizer) -> None:
    """Predicted too little, predicted too much, and predicted as it was."""
    said = said_by_worker(tokenizer, [prefill(1, 12), prefill(2, 50), prefill(3, 80, 64), prefill(4, 80, 76)])
    assert progress(said) == [(1, 12, 0), (2, 28, 12), (2, 50, 12), (3, 64, 48), (3, 80, 48), (4, 80, 76)]


def test_reports_tell_of_steps_that_had_decodes_only(tokenizer: Tokenizer) -> None:
    said = said_by_worker(tokenizer, [prefill(1, 20, local=True, max_tokens=8)])
    told = [f for f in said if isinstance(f, frames.Report) and f.decode_batch]
    assert told
    for report in told:
        assert report.decode_batch == 1
        assert 21 <= report.decode_context <= 27
        assert report.decode_s == pytest.approx(COST.decode(1, report.decode_context))
