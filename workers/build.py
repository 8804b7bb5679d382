"""What computes on a worker: engine, KV memory and step cost, from the config."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch

from twinpool.config import ClusterConfig
from twinpool.cost import LLAMA_8B_H100_TP1, LLAMA_70B_H100_TP4, StepCost
from twinpool.errors import ConfigError
from twinpool.tokenizer import Tokenizer
from twinpool.workers.engine.base import Engine, ModelInfo
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.engine.torch_engine import TorchEngine, kv_layout
from twinpool.workers.models.loader import load_model
from twinpool.workers.sampler import Sampler
from twinpool.workers.transfer.pool import DevicePool, HostPool, open_pool

log = logging.getLogger("twinpool.worker")

CPU_CONTEXTS = 1.25  # full contexts of the model that KV memory has room for, where the config does not say
CPU_MAX_TOKENS = 16_384
GPU_SHARE = 0.85  # of the memory that is free with the weights loaded


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


@dataclass(frozen=True, slots=True)
class Machine:
    """What computes: engine, its KV memory, its step cost."""

    engine: Engine
    pool: HostPool | DevicePool
    cost: StepCost


async def build(config: ClusterConfig, tokenizer: Tokenizer) -> Machine:
    """Load the model or emulate one; the step cost is measured here, before the pool is used.

    Raises ConfigError for a model that cannot be loaded or memory that cannot be had.
    """
    make = _build_torch if config.worker.engine == "torch" else _build_emulated
    machine = await asyncio.to_thread(make, config, tokenizer)
    cost = await machine.engine.calibrate()
    info = machine.engine.info
    log.info("%s %s: %d KV blocks of %d tokens", info.name, info.dtype, machine.pool.blocks, info.block_size)
    return Machine(machine.engine, machine.pool, cost)


def _build_torch(config: ClusterConfig, tokenizer: Tokenizer) -> Machine:
    device, size = config.worker.device, config.worker.block_size
    model = load_model(None if config.model.path is None else str(config.model.path), config.model.dtype, device)
    block_bytes = kv_layout(model.config, config.model.dtype, size).block_bytes
    if device == "cpu":
        wanted = block_bytes * -(-min(CPU_MAX_TOKENS, int(CPU_CONTEXTS * model.config.max_context)) // size)
    else:
        wanted = int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    pool = open_pool(_block_count(config, block_bytes, wanted), block_bytes, device)
    sampler = Sampler(model.config.vocab_size, device)
    return Machine(TorchEngine(model, pool.data, size, config.worker.threads, sampler), pool, NO_TIME)


def _build_emulated(config: ClusterConfig, tokenizer: Tokenizer) -> Machine:
    emulated, size = config.worker.emulated, config.worker.block_size
    profile = PROFILES[emulated.profile]
    wanted = emulated.block_bytes * (profile.kv_tokens // size)
    pool = open_pool(_block_count(config, emulated.block_bytes, wanted), emulated.block_bytes)
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
    return Machine(EmulatedEngine(info, pool.data, profile.cost, emulated.speed), pool, profile.cost)


def _block_count(config: ClusterConfig, block_bytes: int, wanted: int) -> int:
    """Blocks in the KV memory of the config, or in ``wanted`` bytes where it does not say."""
    mib = config.worker.kv_memory_mib
    blocks = (wanted if mib is None else mib << 20) // block_bytes
    if blocks < 2:
        raise ConfigError(
            f"worker.kv_memory_mib: {blocks * block_bytes / 2**20:.2f} MiB of KV memory are not enough. A block of "
            f"{config.worker.block_size} tokens takes {block_bytes / 2**20:.2f} MiB and a worker needs two; "
            "raise kv_memory_mib or lower block_size"
        )
    return blocks
