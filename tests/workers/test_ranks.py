"""Workers of one and of two ranks, as processes, on a tiny model: same tokens, KV moves on, lost ranks are named."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import save_file

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, EngineError, TransferError
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import Tokenizer, load_tokenizer
from twinpool.workers.build import Machine, Place, build
from twinpool.workers.engine.base import Row, SampleState
from twinpool.workers.models.config import from_hf, tensor_shapes
from twinpool.workers.ranks.crew import Crew
from twinpool.workers.transfer.base import Peer

HF = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 40, "intermediate_size": 50, "num_hidden_layers": 2,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
PROMPT = [(7 * i + i * i) % 61 for i in range(50)]
HERE, THERE = list(range(4)), [9, 3, 4, 7]
pytestmark = pytest.mark.timeout(240)


class Two(NamedTuple):
    """A prefill worker of one rank and a decode worker of two."""

    one: Machine
    two: Machine

    def peer(self) -> Peer:
        """The worker of one rank, as the other reaches it."""
        return Peer("p", 1, self.one.transfer.secret, self.one.transfer.addresses)


def write_model(folder: Path, **fields: int) -> Path:
    """A tiny random model as a Hugging Face folder."""
    text = json.dumps(HF | fields).encode()
    (folder / "config.json").write_bytes(text)
    generator = torch.Generator().manual_seed(3)
    shapes = tensor_shapes(from_hf(text, "tiny"))
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def config_of(model: Path, ranks: int) -> ClusterConfig:
    pools = {"prefill": {"tensor_parallel": 1}, "decode": {"tensor_parallel": ranks}}
    return ClusterConfig.model_validate(
        {"model": {"path": model}, "pools": pools, "worker": {"kv_memory_mib": 1}, "log_level": "warning"}
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
async def workers(model: Path, tokenizer: Tokenizer) -> AsyncIterator[Two]:
    config = config_of(model, 2)
    two = await build(config, tokenizer, Place("decode", "d", 2))
    one = await build(config, tokenizer, Place("prefill", "p", 1))
    for machine in (one, two):
        await machine.transfer.start()
    yield Two(one, two)
    for machine in (one, two):
        await machine.close()


def ask(tokens: list[int], start: int, table: list[int]) -> Row:
    state = SampleState(SamplingParams(max_tokens=8, temperature=0.0), tokens, len(tokens))
    return Row(tokens[start:], start, table, state)


async def test_kv_of_one_rank_is_decoded_from_by_two(workers: Two) -> None:
    one, two = workers
    assert one.engine.info == two.engine.info
    assert one.blocks == two.blocks
    assert two.crew is not None
    assert two.crew.meeting.exists(), "NCCL goes back to it at the first all-reduce"
    expected = await one.engine.run([ask(PROMPT, 0, HERE)])
    sums = one.sums.checksums(HERE)
    pulled = await two.transfer.pull(workers.peer(), HERE, THERE, sums, 20.0)
    assert pulled.bad == ()
    assert pulled.bytes == 4 * two.engine.info.block_bytes
    assert two.sums.checksums(THERE) == sums
    assert await two.engine.run([ask(PROMPT, 49, THERE)]) == expected
    assert await two.engine.run([ask(PROMPT, 0, [10, 11, 12, 13])]) == expected

    back = Peer("d", 2, two.transfer.secret, two.transfer.addresses)
    own = two.sums.checksums([10, 11, 12, 13])
    own[2] ^= 1
    assert (await one.transfer.pull(back, [10, 11, 12, 13], [20, 21, 22, 23], own, 20.0)).bad == (2,)
    assert await one.engine.run([ask(PROMPT, 49, [20, 21, 22, 23])]) == expected


async def test_a_pull_of_two_ranks_that_is_cancelled_ends_before_it_returns(workers: Two) -> None:
    one, two = workers
    await one.engine.run([ask(PROMPT, 0, HERE)])
    sums = one.sums.checksums(HERE)
    pulling = asyncio.create_task(two.transfer.pull(workers.peer(), HERE, THERE, sums, 20.0))
    await asyncio.sleep(0)
    pulling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pulling
    assert (await two.transfer.pull(workers.peer(), HERE, THERE, sums, 20.0)).bad == ()


async def test_a_lost_rank_is_named_and_nothing_hangs(workers: Two) -> None:
    crew = workers.two.crew
    assert crew is not None
    (rank,) = crew._members
    rank.process.send_signal(signal.SIGKILL)
    with pytest.raises(EngineError, match="rank 1 of this worker was killed by signal 9; the worker ends with it"):
        await asyncio.wait_for(asyncio.shield(crew.lost), 30.0)
    with pytest.raises(EngineError):
        await workers.two.engine.run([ask(PROMPT, 0, HERE)])
    with pytest.raises(EngineError):
        workers.two.sums.checksums(HERE)
    with pytest.raises(TransferError, match="rank 1"):
        await workers.two.transfer.pull(workers.peer(), HERE, THERE, [0] * 4, 20.0)


async def frozen(workers: Two) -> Crew:
    """The crew of the worker of two ranks, whose second one stands still."""
    crew = workers.two.crew
    assert crew is not None
    (rank,) = crew._members
    rank.process.send_signal(signal.SIGSTOP)
    await asyncio.to_thread(os.waitid, os.P_PID, rank.process.pid, os.WSTOPPED | os.WNOWAIT)
    return crew


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_pull_of_a_frozen_rank_ends(workers: Two, cancelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twinpool.workers.ranks.crew.LATE_S", 0.5)
    crew = await frozen(workers)
    pulling = asyncio.create_task(workers.two.transfer.pull(workers.peer(), HERE, THERE, [0] * 4, 0.5))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert crew._answers, "the rank is asked by now"
    if cancelled:
        pulling.cancel()
    with pytest.raises(asyncio.CancelledError if cancelled else TransferError):
        await asyncio.wait_for(asyncio.shield(pulling), 30.0)
    with pytest.raises(EngineError, match="rank 1 of this worker hangs: no answer to a pull"):
        await asyncio.wait_for(asyncio.shield(crew.lost), 30.0)
    assert crew._members[0].process.wait(30.0) == -signal.SIGKILL


async def test_sums_of_a_frozen_rank_lose_it(workers: Two) -> None:
    crew = await frozen(workers)
    crew._sum_s = 0.2
    with pytest.raises(EngineError, match="rank 1 of this worker hangs: no checksums"):
        workers.two.sums.checksums(HERE)
    with pytest.raises(EngineError, match="rank 1 of this worker hangs: no checksums"):
        await asyncio.wait_for(asyncio.shield(crew.lost), 30.0)
    assert crew._members[0].process.wait(30.0) == -signal.SIGKILL


async def test_a_frozen_rank_does_not_hold_up_who_tells_it(workers: Two) -> None:
    crew = await frozen(workers)
    crew._members[0]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, 200_000))
    with pytest.raises(EngineError, match="rank 1 of this worker hangs: it takes in no messages"):
        await asyncio.to_thread(crew.step, [ask(list(range(1 << 22)), 0, HERE)])
    with pytest.raises(EngineError, match="rank 1 of this worker"):
        await asyncio.wait_for(asyncio.shield(crew.lost), 30.0)


async def test_more_ranks_than_heads_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one_head = write_model(tmp_path, num_attention_heads=1, num_key_value_heads=1)
    before = psutil.Process().children()  # of fixtures of other tests of this session
    with pytest.raises(ConfigError, match="2 ranks cannot share 1 attention heads; lower it to 1"):
        await build(config_of(one_head, 2), tokenizer, Place("decode", "d", 1))
    assert psutil.Process().children() == before


def test_emulated_workers_have_no_ranks() -> None:
    pools = {"decode": {"tensor_parallel": 2}}
    with pytest.raises(ValueError, match=r"tensor_parallel needs worker\.engine torch"):
        ClusterConfig.model_validate({"pools": pools, "worker": {"engine": "emulated"}})
