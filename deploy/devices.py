"""Which GPUs each worker of one host gets: ``worker.device: cuda`` means one for each rank, in the order of start."""

from __future__ import annotations

from collections.abc import Callable

from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError

ROLES = ("prefill", "decode", "both")


def worker_names(config: ClusterConfig) -> dict[str, str]:
    """Name and role of every worker that ``twinpool up`` starts, in order."""
    return {
        f"{role}-{number}": role for role in ROLES for number in range(getattr(config.pools, role).workers)
    }  # fmt: skip


def deal(config: ClusterConfig, visible: Callable[[], int]) -> dict[str, str]:
    """``worker.device`` of each worker by name; empty where all have that of the config.

    ``visible`` says how many GPUs there are; asked only where that matters. Raises ConfigError where there are too few,
    or where several workers would each take all the free memory of one.
    """
    workers, device = worker_names(config), config.worker.device
    if device.startswith("cuda:") and len(workers) > 1 and config.worker.kv_memory_mib is None:
        raise ConfigError(
            f"worker.device: {len(workers)} workers share {device}, and each would take what is free there: "
            "give each its part with worker.kv_memory_mib, or a GPU of its own with worker.device: cuda"
        )
    if device != "cuda":
        return {}
    ranks = {name: config.pools.ranks(role) for name, role in workers.items()}
    wanted, there = sum(ranks.values()), visible()
    if wanted > there:
        raise ConfigError(
            f"worker.device: cuda gives each rank a GPU of its own: the pools have {wanted}, torch sees {there}. Start "
            "fewer workers (pools.*.workers), or several on one with worker.device: cuda:0 and worker.kv_memory_mib"
        )
    first, dealt = 0, {}
    for name, count in ranks.items():
        dealt[name] = f"cuda:{first}"
        first += count
    return dealt


def visible_gpus() -> int:
    """GPUs that torch sees, without a context on any."""
    import torch  # here: a supervisor on CPUs need not load it

    return torch.cuda.device_count()
