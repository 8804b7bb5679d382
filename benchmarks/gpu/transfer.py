"""KV between two processes on one GPU, as a share of what the device copies by itself in the same run.

    python benchmarks/gpu/transfer.py [--rounds 15]

A holder process has a pool of 2 GiB; 256 MiB of its blocks, chosen at random, are brought into other such blocks
here. *Kernel* is what the backend ``cuda_ipc`` does: one kernel reads the peer's mapped memory, writes and sums.
*Copies* asks the device for one copy a run of neighbouring blocks, and sums afterwards; *copies, no sums* only copies.
*Pull* is the whole transfer as a worker awaits it. Everything is timed by the clock from call to result, in turns with
the plain copy, one contiguous ``copy_`` of as many bytes; medians count. What arrives is compared byte for byte. Asked:
70 % of the plain copy for the better of kernel and copies, for blocks of 64 KiB and more.

NCCL between two ranks needs two GPUs, or NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1; without, one rank packs, passes a
slot through a communicator of its own and unpacks, which is all of a transfer but the way.

Writes transfer.md beside this file. Without a CUDA device or triton: status 2.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._C._distributed_c10d as c10d
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import lacks_for_gpu

from twinpool.workers.transfer import moves
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.collective import SLOT_BYTES
from twinpool.workers.transfer.pool import DevicePool
from twinpool.workers.transfer.runs import coalesce
from twinpool.workers.transfer.service import KVService, TransferConfig
from twinpool.workers.transfer.share import SHARES

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_BYTES = (16 * KIB, 64 * KIB, 256 * KIB, MIB)
MOVED, POOL = 256 * MIB, 2 * GIB
ASKED, ASKED_FROM = 0.7, 64 * KIB
NEW_NCCL = (2, 30)
Call = Callable[[], object]


class Choice(NamedTuple):
    """Which blocks go where."""

    source: list[int]
    target: list[int]


class Held(NamedTuple):
    """What a holder says."""

    secret: bytes
    addresses: dict[str, str]
    said: bytes  # its pool, shared
    sums: list[int]


async def _hold(block_bytes: int, backends: tuple[str, ...], pipe: Connection) -> None:
    pool = filled(block_bytes, "cuda:0")
    service = KVService(pool, TransferConfig(backends=backends), "holder", 1)
    await service.start()
    said = SHARES["cuda"].export(pool.memory)
    pipe.send(Held(service.secret, service.addresses, said, pool.checksums(range(pool.blocks))))
    await asyncio.to_thread(pipe.recv)
    await service.close()


def hold(block_bytes: int, backends: tuple[str, ...], pipe: Connection) -> None:
    """Body of the process that holds the blocks."""
    asyncio.run(_hold(block_bytes, backends, pipe))


def filled(block_bytes: int, device: str) -> DevicePool:
    """A pool of bytes that both processes can make."""
    pool = DevicePool(POOL // block_bytes, block_bytes, device)
    generator = torch.Generator(device).manual_seed(7)
    words = pool.data.view(-1).view(torch.int64)
    torch.randint(-(1 << 62), 1 << 62, words.shape, generator=generator, out=words)
    torch.cuda.synchronize(device)
    return pool


def main() -> int:
    """Measure, print and write the tables; 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    missing = lacks_for_gpu()
    if missing:
        print(f"this benchmark needs {missing}, and there is none", file=sys.stderr)
        return 2
    lines = [*header(args.rounds), *ipc_table(args.rounds), "", *nccl_lines(args.rounds)]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "transfer.md").write_text(text, encoding="utf-8")
    return 0


def header(rounds: int) -> Iterator[str]:
    """What was measured with which versions on what."""
    import triton

    yield "# KV between two processes on a GPU"
    yield ""
    yield f"`python benchmarks/gpu/transfer.py --rounds {rounds}`: see there what is what."
    yield f"{torch.cuda.get_device_name()}; Python {platform.python_version()}, torch {torch.__version__},"
    yield f"triton {triton.__version__}, CUDA {torch.version.cuda}."
    yield ""


def ipc_table(rounds: int) -> Iterator[str]:
    """CUDA IPC by block size."""
    yield f"| block | plain copy GB/s | kernel | copies | copies, no sums | pull | asked {ASKED:.0%} |"
    yield "|---|---|---|---|---|---|---|"
    for block_bytes in BLOCK_BYTES:
        plain, *others = holding(block_bytes, ("cuda_ipc",), 0, lambda held, pool: ipc_seconds(held, pool, rounds))
        shares = [plain / seconds for seconds in others]
        cells = " | ".join(f"{share:.0%}" for share in shares)
        verdict = ("met" if max(shares[:2]) >= ASKED else "missed") if block_bytes >= ASKED_FROM else "-"
        yield f"| {block_bytes // KIB} KiB | {MOVED / plain / 1e9:.0f} | {cells} | {verdict} |"


def holding(block_bytes: int, backends: tuple[str, ...], index: int, measure: Callable[[Held, DevicePool], Any]) -> Any:
    """``measure`` with a holder process beside it, and an empty pool on GPU ``index`` here."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    holder = spawn.Process(target=hold, args=(block_bytes, backends, theirs))
    holder.start()
    theirs.close()
    try:
        return measure(ours.recv(), DevicePool(POOL // block_bytes, block_bytes, f"cuda:{index}"))
    except EOFError:
        raise SystemExit("the holder process failed: see above") from None
    finally:
        holder.kill()
        holder.join()
        torch.cuda.empty_cache()


def ipc_seconds(held: Held, pool: DevicePool, rounds: int) -> list[float]:
    """Plain copy, kernel, copies, copies without sums, pull."""
    mapped = SHARES["cuda"].open(held.said, POOL, pool.memory.device)
    peer = mapped.memory.view(pool.blocks, pool.block_bytes)
    choice = chosen(pool.blocks, pool.block_bytes)
    expected = [held.sums[i] for i in choice.source]
    plain = torch.empty(2, MOVED, dtype=torch.uint8, device=pool.memory.device)
    seconds = medians(
        [
            lambda: copied(lambda: plain[0].copy_(plain[1])),
            lambda: check(moves.gather(pool, peer, pool.cut, *choice), expected),
            lambda: check(copies(pool, peer, choice, sums=True), expected),
            lambda: copies(pool, peer, choice, sums=False),
        ],
        rounds,
    )
    ways: list[Call] = [
        lambda: moves.gather(pool, peer, pool.cut, *choice),
        lambda: copies(pool, peer, choice, sums=False),
    ]
    for way in ways:
        pool.memory.zero_()
        torch.cuda.synchronize()
        way()
        if not torch.equal(pool.memory[choice.target], peer[choice.source]):
            raise SystemExit("what arrived is not what was held")
    seconds.append(asyncio.run(pull_seconds(held, pool, choice, "cuda_ipc", rounds)))
    torch.cuda.synchronize()
    mapped.close()
    return seconds


async def pull_seconds(held: Held, pool: DevicePool, choice: Choice, backend: str, rounds: int) -> float:
    """Median of pulls as a worker awaits them, the first, which connects, left out."""
    service = KVService(pool, TransferConfig(backends=(backend,)), "receiver", 1)
    peer = Peer("holder", 1, held.secret, held.addresses)
    sums = [held.sums[i] for i in choice.source]
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        pulled = await service.pull(peer, choice.source, choice.target, sums, 60)
        times.append(time.perf_counter() - start)
        if pulled.bad or pulled.backend != backend:
            raise SystemExit(f"{pulled.backend} moved blocks that do not verify: {len(pulled.bad)}")
    await service.close()
    return statistics.median(times[1:])


def chosen(blocks: int, block_bytes: int) -> Choice:
    """Random blocks for random places."""
    dice, count = random.Random(1), MOVED // block_bytes
    return Choice(dice.sample(range(blocks), count), dice.sample(range(blocks), count))


def copies(pool: DevicePool, peer: torch.Tensor, choice: Choice, sums: bool) -> list[int]:
    """One copy for each run of neighbours, then the sums, if wanted; returns when they are done."""

    def copy() -> None:
        for run in coalesce(*choice, longest=pool.blocks):
            pool.memory[run.target : run.target + run.length].copy_(peer[run.source : run.source + run.length], True)

    copied(copy)
    return pool.checksums(choice.target) if sums else []


def copied(call: Call) -> None:
    """``call`` on a stream of its own, waited for."""
    with moves.side_stream(torch.device("cuda", torch.cuda.current_device())):
        call()
        torch.cuda.current_stream().synchronize()


def check(found: Sequence[int], expected: Sequence[int]) -> None:
    """What was brought is what was meant."""
    if list(found) != list(expected):
        raise SystemExit("blocks arrived that do not verify")


def medians(calls: Sequence[Call], rounds: int) -> list[float]:
    """Seconds of one call of each contender, in turns, after a first one that compiles what has to be compiled."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, into in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            into.append(time.perf_counter() - start)
    return [statistics.median(values[1:]) for values in seconds]


def nccl_lines(rounds: int) -> Iterator[str]:
    """NCCL between two ranks where that is allowed, else one rank and the reason."""
    reason = nccl_refusal()
    size, index = 256 * KIB, torch.cuda.device_count() - 1
    if reason:
        yield f"NCCL: {reason}."
        if dist.is_nccl_available():
            seconds = one_rank_seconds(size, rounds)
            yield f"One rank, packing, passing and unpacking {MOVED >> 20} MiB: {MOVED / seconds / 1e9:.0f} GB/s."
        return
    seconds = holding(
        size, ("nccl", "cuda_ipc"), index,
        lambda held, pool: asyncio.run(pull_seconds(held, pool, chosen(pool.blocks, size), "nccl", rounds)),
    )  # fmt: skip
    version = ".".join(str(part) for part in torch.cuda.nccl.version())
    where = "two GPUs" if index else "one GPU"
    yield f"NCCL {version}, two ranks on {where}, blocks of 256 KiB: {MOVED / seconds / 1e9:.1f} GB/s."


def nccl_refusal() -> str:
    """Why two ranks cannot be had; empty where they can."""
    if not dist.is_nccl_available():
        return "torch was built without it"
    if torch.cuda.device_count() > 1:
        return ""
    version = torch.cuda.nccl.version()
    if version < NEW_NCCL or os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return f"two ranks on one GPU need NCCL 2.30 (it is {version}) and NCCL_MULTI_RANK_GPU_ENABLE=1"
    return ""


def one_rank_seconds(block_bytes: int, rounds: int) -> float:
    """All slots of a transfer packed, passed through a communicator of one rank, and unpacked."""
    nccl: Any = dist.ProcessGroupNCCL
    group = nccl(c10d.HashStore(), 0, 1, nccl.Options())
    pool, choice = filled(block_bytes, "cuda:0"), chosen(POOL // block_bytes, block_bytes)
    slot = torch.empty(SLOT_BYTES, dtype=torch.uint8, device="cuda:0")
    step = SLOT_BYTES // block_bytes

    def transfer() -> None:
        with moves.side_stream(slot.device):
            for first in range(0, len(choice.source), step):
                pool.pack(choice.source[first : first + step], slot)
                group.broadcast([slot]).wait()
                pool.unpack(slot, choice.target[first : first + step])

    (seconds,) = medians([transfer], rounds)
    group.abort()
    return seconds


if __name__ == "__main__":
    sys.exit(main())
