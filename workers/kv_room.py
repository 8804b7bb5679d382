"""How many KV blocks a worker has, where the config says and where it does not."""

from __future__ import annotations

import torch

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError

CPU_CONTEXTS = 1.25  # full contexts of the model that KV memory has room for, where the config does not say
CPU_MAX_TOKENS = 16_384
GPU_SHARE = 0.85  # of the memory that is free with the weights loaded


def room(config: ClusterConfig, block_bytes: int, max_context: int, device: str) -> int:
    """Blocks for a ``device`` on which each takes ``block_bytes``, where the config does not say."""
    if device == "cpu":
        return -(-min(CPU_MAX_TOKENS, int(CPU_CONTEXTS * max_context)) // config.worker.block_size)
    return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0]) // block_bytes


def block_count(config: ClusterConfig, block_bytes: int, wanted: int) -> int:
    """Blocks of ``block_bytes`` in the KV memory of the config, or ``wanted`` ones where it does not say.

    Raises ConfigError where that is less than two.
    """
    mib = config.worker.kv_memory_mib
    blocks = wanted if mib is None else (mib << 20) // block_bytes
    if blocks < 2:
        raise ConfigError(
            f"worker.kv_memory_mib: {blocks * block_bytes / 2**20:.2f} MiB of KV memory are not enough. A block of "
            f"{config.worker.block_size} tokens takes {block_bytes / 2**20:.2f} MiB and a worker needs two; "
            "raise kv_memory_mib or lower block_size"
        )
    return blocks
