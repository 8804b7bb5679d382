"""The process group of a tensor-parallel worker: gloo on CPUs, NCCL on GPUs, met over a file in a private folder.

gloo's and NCCL's all-reduce compute each element in one place and pass the result on, so all ranks have equal bits. The
NCCL half follows torch's documentation and has not been run on several GPUs by the authors.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch import Tensor

# A rank that does not take part in an all-reduce for so long hangs. Shorter than the router waits for a step (hang_s,
# 60 s in router/links.py): the worker then says itself what is wrong, before it is fenced without a reason.
STEP_S = 45.0
MEET_S = 60.0


class ProcessGroup:
    """Implements :class:`twinpool.workers.models.llama.RankGroup`. All ranks make theirs at once.

    Raises RuntimeError when they do not meet within ``MEET_S``.
    """

    def __init__(self, file: Path, rank: int, ranks: int, device: str) -> None:
        """``file``: the same new path for all ranks, in a folder that nobody else can write to."""
        self.rank = rank
        self._store = c10d.FileStore(str(file), ranks)  # kept: the group knows only its C++ half
        self._store.set_timeout(timedelta(seconds=MEET_S))
        self._group = _nccl(self._store, rank, ranks) if device.startswith("cuda") else _gloo(self._store, rank, ranks)

    def all_reduce(self, part: Tensor) -> None:
        """See ``RankGroup``. On GPUs the sum is there for what the stream does next.

        Raises RuntimeError when a rank is gone, or hangs for ``STEP_S``.
        """
        try:
            self._group.allreduce([part]).wait()
        except RuntimeError as error:
            advice = f"look whether another rank's process is stopped (state T), stuck or gone; all have {STEP_S:g} s"
            raise RuntimeError(f"rank {self.rank} could not add up with the other ranks: {advice}: {error}") from error


def _gloo(store: c10d.Store, rank: int, ranks: int) -> Any:
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs lack half of it
    options = gloo._Options()
    options._timeout = timedelta(seconds=STEP_S)
    options._threads = 1
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    return gloo(store, rank, ranks, options)


def _nccl(store: c10d.Store, rank: int, ranks: int) -> Any:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=STEP_S)
    return nccl(store, rank, ranks, options)
