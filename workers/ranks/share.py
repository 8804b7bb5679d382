"""What one rank computes with: its share of the model, its pool by heads, its engine. The same for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, EngineError
from twinpool.workers.engine.base import Sampled, SampleState
from twinpool.workers.engine.torch_engine import EngineOptions, LogitsSampler, OtherRanks, TorchEngine
from twinpool.workers.kv_room import room
from twinpool.workers.models.kv_layout import KvLayout, kv_layout
from twinpool.workers.models.loader import LoadedModel, load_model
from twinpool.workers.models.tensor_parallel import share, share_config, share_weights
from twinpool.workers.ranks.group import ProcessGroup
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import BlockLayout
from twinpool.workers.transfer.pool import open_pool


class RankModel(NamedTuple):
    """A rank's share of the model, in memory."""

    rank: int
    ranks: int
    device: str
    part: LoadedModel
    held: range  # KV heads
    whole: KvLayout  # of a block with all heads
    layout: BlockLayout
    room: int  # blocks that there is memory for beside it


class NoSampler:
    """Of the ranks that draw no tokens."""

    def sample(self, logits: Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        """Raises EngineError: logits are where the first rank is."""
        raise EngineError("only the first rank draws tokens")


def load_rank(config: ClusterConfig, rank: int, ranks: int) -> RankModel:
    """Load the share of ``rank``; files are mapped, so that no rank holds the whole model.

    Raises ConfigError for a model that cannot be loaded or shared by so many.
    """
    device, size = rank_device(config.worker.device, rank), config.worker.block_size
    model = load_model(None if config.model.path is None else str(config.model.path), config.model.dtype, "cpu")
    own = share(model.config, rank, ranks)
    weights = share_weights(model.config, own, rank == 0, model.weights)
    weights = {name: weight.to(device) for name, weight in weights.items()}
    part = LoadedModel(model.name, model.fingerprint, share_config(model.config, own), model.dtype, weights)
    whole = kv_layout(model.config, config.model.kv_dtype or model.dtype, size)
    lines = 2 * model.config.layers
    layout = BlockLayout(lines, model.config.kv_heads, whole.block_bytes // (lines * model.config.kv_heads))
    blocks = room(config, layout.block_bytes(len(own.kv_heads)), model.config.max_context, device)
    return RankModel(rank, ranks, device, part, own.kv_heads, whole, layout, blocks)


def rank_device(device: str, rank: int) -> str:
    """Device of a rank: ranks of a GPU worker take consecutive GPUs, from the configured one on."""
    kind, _, first = device.partition(":")
    return device if kind == "cpu" else f"{kind}:{int(first or 0) + rank}"


def open_rank_pool(model: RankModel, blocks: int) -> HeadPool:
    """The rank's own KV memory. Raises ConfigError when there is not so much."""
    pool = open_pool(blocks, model.layout.block_bytes(len(model.held)), model.device)
    return HeadPool(pool, model.layout, model.held, model.held)


def start_engine(
    config: ClusterConfig,
    model: RankModel,
    pool: HeadPool,
    meeting: Path | None,
    sampler: LogitsSampler,
    others: OtherRanks | None = None,
) -> TorchEngine:
    """Meet the other ranks at the file ``meeting``, if there are any, and arrange the weights.

    ``info`` of the result tells of the whole model: what is named there is equal for workers of any number of ranks.
    Raises ConfigError when they cannot meet: on GPUs, each needs one of its own.
    """
    try:
        group = None if meeting is None else ProcessGroup(meeting, model.rank, model.ranks, model.device)
    except RuntimeError as error:
        raise ConfigError(f"rank {model.rank} of {model.ranks} cannot join the others: {error}") from error
    if model.device != "cpu":
        torch.cuda.set_device(model.device)
    size, threads = config.worker.block_size, config.worker.threads
    # No decode graphs: NCCL's all-reduce within a graph is not tried, and the pool has no block for them.
    options = EngineOptions(config.model.kv_dtype)
    engine = TorchEngine(model.part, pool.memory, size, threads, sampler, group, others, options)
    layout = f"{model.whole.text}/by-heads"
    engine.info = replace(engine.info, layout=layout, block_bytes=model.whole.block_bytes)
    return engine
