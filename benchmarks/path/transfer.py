"""KV transfer between two processes against one plain copy of the same bytes.

    python benchmarks/path/transfer.py [--rounds 25]

What moves is the KV of a 2,048-token prompt of SmolLM2-135M, in blocks of 16 tokens chosen at random on both sides;
every block is verified on arrival. The plain copy is one contiguous copy of as many bytes, in one thread, from shared
into private memory, all of it touched before; it runs in turns with the pulls. Target: shm reaches 60 % of it. "First"
is a pull that connects first and meets pages of the peer that this process has not touched. Results go to
benchmarks/path/transfer.md.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.pool import HostPool, attach
from twinpool.workers.transfer.service import KVService, TransferConfig
from twinpool.workers.transfer.shm import THREADS

BACKENDS = ("shm", "tcp", "gloo")
TOKEN_BYTES = {"float32": 46_080, "bfloat16": 23_040}
BLOCK_TOKENS, PROMPT_TOKENS = 16, 2048
MOVED = PROMPT_TOKENS // BLOCK_TOKENS
BLOCKS = 2 * MOVED
TARGET = 0.6


class Line(NamedTuple):
    """One backend with one dtype; seconds."""

    dtype: str
    backend: str
    first: float  # connecting included
    pulls: list[float]  # as the caller awaits them
    copies: list[float]

    @property
    def share(self) -> float:
        """Speed in terms of the plain copy's: median over the rounds, as other load on the machine comes and goes."""
        return statistics.median(copy / pull for copy, pull in zip(self.copies, self.pulls, strict=True))


async def _hold(block_bytes: int, pipe: Connection) -> None:
    pool = HostPool(BLOCKS, block_bytes)
    pool.data.random_(0, 256)
    service = KVService(pool, TransferConfig(backends=BACKENDS), "holder", 1)
    await service.start()
    pipe.send((service.secret, service.addresses, pool.checksums(range(BLOCKS))))
    await asyncio.to_thread(pipe.recv)
    await service.close()


def hold(block_bytes: int, pipe: Connection) -> None:
    """Body of the process that holds the blocks."""
    torch.set_num_threads(1)
    asyncio.run(_hold(block_bytes, pipe))


class PlainCopy:
    """One contiguous copy of a prompt's KV out of a shared pool as large as the holder's, all pages touched before."""

    def __init__(self, block_bytes: int) -> None:
        self._pool = HostPool(BLOCKS, block_bytes)
        self._shared = attach(os.dup(self._pool.fd), BLOCKS, block_bytes)
        self._private = np.ones((MOVED, block_bytes), dtype=np.uint8)
        self._shared.max()

    def seconds(self, first: int) -> float:
        """How long the blocks from ``first`` on take."""
        start = time.perf_counter()
        np.copyto(self._private, self._shared[first : first + MOVED])
        return time.perf_counter() - start


async def measure(dtype: str, backend: str, peer: Peer, sums: list[int], rounds: int) -> Line:
    """Pull random blocks ``rounds`` times, in turns with the plain copy."""
    block_bytes = BLOCK_TOKENS * TOKEN_BYTES[dtype]
    service = KVService(HostPool(BLOCKS, block_bytes), TransferConfig(backends=(backend,)), "receiver", 2)
    chosen = random.Random(1)
    plain = PlainCopy(block_bytes)
    pulls: list[float] = []
    copies: list[float] = []
    for _ in range(rounds + 1):
        source, target = chosen.sample(range(BLOCKS), MOVED), chosen.sample(range(BLOCKS), MOVED)
        start = time.perf_counter()
        pulled = await service.pull(peer, source, target, [sums[i] for i in source], 60)
        pulls.append(time.perf_counter() - start)
        if pulled.bad:
            raise SystemExit(f"{backend} moved blocks that do not verify")
        copies.append(plain.seconds(chosen.randrange(MOVED)))
    await service.close()
    return Line(dtype, backend, pulls[0], pulls[1:], copies[1:])


def run(rounds: int) -> list[Line]:
    """All backends with all dtypes, each dtype with a holder process of its own."""
    spawn = multiprocessing.get_context("spawn")
    lines = []
    for dtype, token_bytes in TOKEN_BYTES.items():
        ours, theirs = spawn.Pipe()
        holder = spawn.Process(target=hold, args=(BLOCK_TOKENS * token_bytes, theirs))
        holder.start()
        secret, addresses, sums = ours.recv()
        peer = Peer("holder", 1, secret, addresses)
        lines += [asyncio.run(measure(dtype, backend, peer, sums, rounds)) for backend in BACKENDS]
        ours.send(None)
        holder.join()
    return lines


def report(lines: list[Line], rounds: int) -> str:
    """The results as Markdown."""
    head = [
        "# KV transfer against a plain copy",
        "",
        f"`python benchmarks/path/transfer.py --rounds {rounds}`: KV of {PROMPT_TOKENS} tokens, {MOVED} random blocks,",
        f"every block verified on arrival; shm copies with {THREADS} threads, the plain copy has one. Times are the",
        "median [quickest, slowest] of the rounds, as the caller awaits it. Each round is followed by a plain copy;",
        "the last column is the median of the rounds' ratios.",
        "",
        f"{describe()}; load {os.getloadavg()[0]:.1f}.",
        "",
        "| dtype | MB | backend | first ms | pull ms | GB/s | plain copy ms | speed / plain copy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = []
    for line in lines:
        size = PROMPT_TOKENS * TOKEN_BYTES[line.dtype]
        speed = size / statistics.median(line.pulls) / 1e9
        rows.append(
            f"| {line.dtype} | {size / 1e6:.0f} | {line.backend} | {line.first * 1e3:.1f} | {spread(line.pulls)} "
            f"| {speed:.1f} | {spread(line.copies)} | {line.share:.0%} |"
        )
    reached = all(line.share >= TARGET for line in lines if line.backend == "shm")
    return "\n".join([*head, *rows, "", f"Target: shm at {TARGET:.0%} or more: {'met' if reached else 'NOT met'}.", ""])


def spread(values: list[float]) -> str:
    """Median, least and most, in milliseconds."""
    low, middle, high = (1e3 * value for value in (min(values), statistics.median(values), max(values)))
    return f"{middle:.1f} [{low:.1f}, {high:.1f}]"


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    text = report(run(rounds), rounds)
    Path(__file__).with_name("transfer.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
