"""Shared memory: the receiver maps the peer's whole pool once and copies blocks out of it; the peer takes no part.

The peer's process is not needed while blocks move, so a stopped or dying peer cannot hold a pull up: its memory stays
valid for as long as we map it, and the checksums say whether the blocks are the ones that were meant.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from twinpool.errors import TransferError
from twinpool.workers.transfer.channel import Channel, Geometry, close_fds
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.order import Order
from twinpool.workers.transfer.pool import HostPool, KvPool, attach
from twinpool.workers.transfer.runs import Run

Rows = npt.NDArray[np.uint8]  # [blocks, ...]

RUN_BYTES = 512 << 10  # small blocks are copied so many at a time, to be verified while in the L2 cache
BYTES_PER_THREAD = 4 << 20  # less is not worth waking another thread
THREADS = min(4, len(os.sched_getaffinity(0)))  # memory bandwidth is used up by few


class ShmSource:
    """The receiver's end. Takes ``fds`` over; raises ``TransferError`` unless it is one sealed pool of that shape."""

    def __init__(self, channel: Channel, geometry: Geometry, fds: list[int], pool: KvPool) -> None:
        self.channel = channel
        if not isinstance(pool, HostPool | HeadPool) or pool.fd is None or len(fds) != 1:
            close_fds(fds)
            raise TransferError("shared memory needs a pool in host memory at both ends", reason="REFUSED")
        try:
            rows: Rows = attach(fds[0], geometry.blocks, geometry.block_bytes)
        except (ValueError, OSError) as error:
            raise TransferError(f"cannot map the peer's KV memory: {error}", reason="REFUSED") from error
        self._rows: Rows | None = pool.rows_of(rows, range(*geometry.held)) if isinstance(pool, HeadPool) else rows
        self._own: Rows = pool.rows
        self._helpers = ThreadPoolExecutor(THREADS, thread_name_prefix="kv-copy")  # starts a thread only when used

    def fetch(self, order: Order) -> None:
        """Copy run by run, each verified before the next; large orders by several threads."""
        peer = self._rows
        if peer is None:
            raise TransferError("the KV peer was dropped", reason="PEER_GONE")
        order.check_source(len(peer))
        runs = order.runs(RUN_BYTES)
        helpers = min(THREADS, sum(run.length for run in runs) * order.pool.block_bytes // BYTES_PER_THREAD) - 1
        rest = iter(runs)  # shared: whoever is free takes the next run
        futures = [self._helpers.submit(self._copy, order, peer, rest) for _ in range(helpers)]
        try:
            self._copy(order, peer, rest)
        finally:
            wait(futures)  # nobody may write to the target once we have returned
        for future in futures:
            future.result()

    def close(self) -> None:
        """Unmap and hang up."""
        self._rows = None
        self._helpers.shutdown()
        self.channel.close()

    def _copy(self, order: Order, peer: Rows, runs: Iterator[Run]) -> None:
        for run in runs:
            if order.abandoned:
                return
            order.check_time()
            # numpy copies in this thread with the GIL released; torch would start its own threads beside the engine's
            np.copyto(self._own[run.target : run.target + run.length], peer[run.source : run.source + run.length])
            order.verify(run.offset, run.targets)


def serve_shm(channel: Channel, pool: KvPool) -> None:
    """Holder's end: the descriptor went with the welcome; the connection stays open as a sign of life."""
    channel.wait_for_request()
