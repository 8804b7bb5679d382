"""What computes on a worker: engine, KV memory and step cost, from the config."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, replace
from typing import NamedTuple

from twinpool.config import ClusterConfig
from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, StepCost
from twinpool.tokenizer import Tokenizer
from twinpool.workers.announce import Sums
from twinpool.workers.engine.base import Engine, ModelInfo
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.engine.torch_engine import EngineOptions, TorchEngine
from twinpool.workers.kv_room import block_count, room
from twinpool.workers.models.kv_layout import kv_layout
from twinpool.workers.models.loader import load_model
from twinpool.workers.ranks.crew import Crew
from twinpool.workers.ranks.kv import Identity, RankKv
from twinpool.workers.ranks.share import load_rank, open_rank_pool, start_engine
from twinpool.workers.ranks.transfer import RankedTransfer
from twinpool.workers.sampler import Sampler
from twinpool.workers.transfer.pool import KvPool, open_pool
from twinpool.workers.transfer.service import KVService, transfer_config

log = logging.getLogger("twinpool.worker")


class Profile(NamedTuple):
    """What an emulated worker imitates."""

    cost: StepCost
    kv_tokens: int


NO_TIME = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)
PROFILES = {
    "llama-70b-h100-tp4": Profile(LLAMA_70B_H100_TP4, 418_000),
    "llama-8b-h100-tp1": Profile(LLAMA_8B_H100_TP1, 407_000),
    "zero": Profile(NO_TIME, 100_000),
}


class Place(NamedTuple):
    """Which worker of which pool is built."""

    role: str
    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes: engine, its KV memory and the transfers to and from it, its step cost."""

    engine: Engine
    blocks: int
    sums: Sums
    transfer: KVService | RankedTransfer
    cost: StepCost
    crew: Crew | None = None  # the other ranks

    async def close(self) -> None:
        """Stop transfers, other ranks and engine, in this order: a step waits for ranks that are there. Idempotent."""
        await self.transfer.close()
        if self.crew is not None:
            await asyncio.to_thread(self.crew.close)
        self.engine.close()


async def build(config: ClusterConfig, tokenizer: Tokenizer, place: Place) -> Machine:
    """Load the model or emulate one; the step cost is measured here, before the pool is used.

    Raises ConfigError for a model that cannot be loaded or memory that cannot be had.
    """
    if config.pools.by_heads:
        machine = await _build_ranks(config, place)
    else:
        make = _build_torch if config.worker.engine == "torch" else _build_emulated
        machine = await asyncio.to_thread(make, config, tokenizer, place)
    cost = await machine.engine.calibrate()
    info = machine.engine.info
    log.info("%s %s: %d KV blocks of %d tokens", info.name, info.dtype, machine.blocks, info.block_size)
    return replace(machine, cost=cost)


def _build_torch(config: ClusterConfig, tokenizer: Tokenizer, place: Place) -> Machine:
    device, size = config.worker.device, config.worker.block_size
    model = load_model(None if config.model.path is None else str(config.model.path), config.model.dtype, device)
    kv_dtype = config.model.kv_dtype or config.model.dtype
    block_bytes = kv_layout(model.config, kv_dtype, size).block_bytes
    blocks = block_count(config, block_bytes, room(config, block_bytes, model.config.max_context, device))
    graph_rows = 0 if device == "cpu" else config.worker.max_batch
    pool = open_pool(blocks + (1 if graph_rows else 0), block_bytes, device)  # the last one is the engine's own
    sampler = Sampler(model.config.vocab_size, device)
    options = EngineOptions(kv_dtype, decode_rows=graph_rows)
    engine = TorchEngine(model, pool.data, size, config.worker.threads, sampler, options=options)
    return Machine(engine, blocks, pool, _service(config, pool, place), NO_TIME)


def _service(config: ClusterConfig, pool: KvPool, place: Place) -> KVService:
    return KVService(pool, transfer_config(config), place.worker, place.epoch)


async def _build_ranks(config: ClusterConfig, place: Place) -> Machine:
    """The first rank of a worker, and the processes of the others."""
    ranks = config.pools.ranks(place.role)
    crew = Crew(config, ranks) if ranks > 1 else None
    try:
        return await _join_ranks(config, place, ranks, crew)
    except BaseException:
        if crew is not None:
            await asyncio.to_thread(crew.close)
        raise


async def _join_ranks(config: ClusterConfig, place: Place, ranks: int, crew: Crew | None) -> Machine:
    identity = Identity(place.worker, place.epoch, secrets.token_bytes(32))
    model = await asyncio.to_thread(load_rank, config, 0, ranks)
    wanted = model.room if crew is None else min(model.room, await crew.loaded())
    blocks = block_count(config, model.whole.block_bytes, wanted)
    pool = await asyncio.to_thread(open_rank_pool, model, blocks)
    if crew is not None:
        await crew.open(blocks, identity)
    sampler = Sampler(model.part.config.vocab_size, model.device)
    meeting = None if crew is None else crew.meeting
    engine = await asyncio.to_thread(start_engine, config, model, pool, meeting, sampler, crew)
    if crew is not None:
        await crew.ready()
    kv = RankKv(pool, 0, ranks, transfer_config(config), identity)
    transfer = RankedTransfer(kv, crew, model.layout.kv_heads, identity.secret)
    return Machine(engine, blocks, transfer, transfer, NO_TIME, crew)


def _build_emulated(config: ClusterConfig, tokenizer: Tokenizer, place: Place) -> Machine:
    emulated, size = config.worker.emulated, config.worker.block_size
    profile = PROFILES[emulated.profile]
    blocks = block_count(config, emulated.block_bytes, profile.kv_tokens // size)
    pool = open_pool(blocks, emulated.block_bytes)
    info = ModelInfo(
        name=config.model.name or f"emulated-{emulated.profile}",
        fingerprint=f"emulated-{tokenizer.vocab_size}",
        dtype=config.model.dtype,
        layout=f"stand-in/{emulated.block_bytes}",
        block_size=size,
        block_bytes=emulated.block_bytes,
        vocab_size=tokenizer.vocab_size,
        max_context=emulated.max_context,
        eos_ids=tuple(tokenizer.eos_ids),
    )
    engine = EmulatedEngine(info, pool.data, profile.cost, emulated.speed)
    return Machine(engine, blocks, pool, _service(config, pool, place), profile.cost)
