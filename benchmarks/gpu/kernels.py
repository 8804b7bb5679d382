"""The kernels against what the device can do: copies as a share of its copy rate, decoding of its memory bandwidth.

    python benchmarks/gpu/kernels.py [--rounds 15] [--quick]

*Copies*: 256 MiB of blocks, chosen at random from a pool of 2 GiB, gathered into one buffer and scattered back, whole
or half the heads of each; checksums included. Ceiling: one contiguous ``copy_`` of as many bytes. Asked: 85 % of it for
whole blocks of 64 KiB and more.

*Decoding*: one layer of Llama 3 8B's shape (32 query heads, 8 KV heads of 128, bfloat16, blocks of 16 tokens at random
places), all rows of one context. The bytes are those of the KV that must be read. Ceiling: the better of that copy rate
(bytes read and written) and of a reduction over 2 GiB (bytes read). Asked: 75 % of it. Beside it torch's own
``scaled_dot_product_attention`` over KV that lies contiguous already, and with the gathering of the blocks first.

Every contender is captured in a CUDA graph and replayed in turns with the others, so that no launch from Python is in
the times; medians count. Writes kernels.md beside this file. Without a CUDA device or triton: status 2.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import lacks_for_gpu

from twinpool.kernels import ops

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK_BYTES = (16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB, MIB)
MOVED, POOL = 256 * MIB, 2 * GIB
HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
BATCHES, CONTEXTS = (32, 64, 128, 256), (1024, 4096, 16384)
COPY_ASKED, DECODE_ASKED, COPY_ASKED_FROM = 0.85, 0.75, 64 * KIB
REPEATS = 4  # calls in a graph: each touches more than the last-level cache holds
Call = Callable[[], object]


class Decoding(NamedTuple):
    """Queries and paged KV of one batch, and the same KV contiguous: [batch, kv_heads, context, dim] each."""

    q: Tensor
    kv: Tensor
    tables: Tensor
    contexts: Tensor
    keys: Tensor
    values: Tensor

    @property
    def kv_bytes(self) -> int:
        """What has to be read."""
        return 2 * self.keys.numel() * self.keys.element_size()


def main() -> int:
    """Measure, print and write the tables; 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    args = parser.parse_args()
    missing = lacks_for_gpu()
    if missing:
        print(f"this benchmark needs {missing}, and there is none", file=sys.stderr)
        return 2
    copy_rate, read_rate = ceilings(args.rounds)
    lines = [*header(args, copy_rate, read_rate), *copy_table(args), "", *decode_table(args, max(copy_rate, read_rate))]
    text = "\n".join(lines) + "\n"
    print(text)
    (Path(__file__).parent / "kernels.md").write_text(text, encoding="utf-8")
    return 0


def header(args: argparse.Namespace, copy_rate: float, read_rate: float) -> Iterator[str]:
    """What was measured with which versions on what."""
    import triton

    yield "# Kernels on a GPU"
    yield ""
    yield f"`python benchmarks/gpu/kernels.py --rounds {args.rounds}{' --quick' * args.quick}`: see there what is what."
    yield f"{torch.cuda.get_device_name()}; Python {platform.python_version()}, torch {torch.__version__},"
    yield f"triton {triton.__version__}, CUDA {torch.version.cuda}."
    yield f"Ceilings: contiguous copy {copy_rate / 1e9:.0f} GB/s both ways, reduction {read_rate / 1e9:.0f} GB/s."
    yield ""


def medians(calls: Sequence[Call], rounds: int) -> list[float]:
    """Seconds of one call of each contender, replayed in turns."""
    graphs = [captured(call) for call in calls]
    seconds: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, into in zip(graphs, seconds, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            into.append(begin.elapsed_time(end) / 1000 / REPEATS)
    return [statistics.median(values) for values in seconds]


def captured(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of ``REPEATS`` calls, made after a first one that compiles what has to be compiled."""
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # a graph allocates in a pool of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def ceilings(rounds: int) -> tuple[float, float]:
    """Bytes a second of a contiguous copy (each byte read and written), and of a reduction (read)."""
    source = torch.ones(POOL // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied, reduced = medians([lambda: target.copy_(source), lambda: source.sum()], rounds)
    return 2 * POOL / copied, POOL / reduced


def copy_table(args: argparse.Namespace) -> Iterator[str]:
    """Gather and scatter by block size, as shares of a contiguous copy timed in turns with them."""
    yield f"| block | copy GB/s | gather | scatter | half the heads: gather | scatter | asked {COPY_ASKED:.0%} |"
    yield "|---|---|---|---|---|---|---|"
    for block_bytes in BLOCK_BYTES[:: 2 if args.quick else 1]:
        whole, half = (copy_seconds(block_bytes, heads, args.rounds) for heads in (8, 4))
        shares = [part[0] / seconds for part in (whole, half) for seconds in part[1:]]
        cells = " | ".join(f"{share:.0%}" for share in shares)
        verdict = ("met" if min(shares[:2]) >= COPY_ASKED else "missed") if block_bytes >= COPY_ASKED_FROM else "-"
        yield f"| {block_bytes // KIB} KiB | {2 * MOVED / whole[0] / 1e9:.0f} | {cells} | {verdict} |"


def copy_seconds(block_bytes: int, heads: int, rounds: int) -> list[float]:
    """Seconds of copy, gather and scatter of ``MOVED`` bytes: ``heads`` of 8 of each block, of 4 layers."""
    pool = torch.randint(0, 256, (POOL // block_bytes, block_bytes), dtype=torch.uint8, device="cuda")
    cut = ops.head_range(block_bytes, 4, 8, 0, heads)
    blocks = torch.randperm(pool.shape[0], device="cuda")[: MOVED // cut.packed_bytes]
    packed = ops.gather_blocks(pool, blocks, cut)
    plain = torch.empty_like(packed.data)
    calls: list[Call] = [
        lambda: plain.copy_(packed.data),
        lambda: ops.gather_blocks(pool, blocks, cut, packed.data),
        lambda: ops.scatter_blocks(packed, pool, blocks, cut),
    ]
    return medians(calls, rounds)


def decode_table(args: argparse.Namespace, ceiling: float) -> Iterator[str]:
    """Decoding by batch and context; times of torch's own attention relative to ours."""
    yield f"| batch | context | us | GB/s | of ceiling | SDPA, contiguous | gather + SDPA | asked {DECODE_ASKED:.0%} |"
    yield "|---|---|---|---|---|---|---|---|"
    for batch, context in itertools.product(BATCHES[:: 2 if args.quick else 1], CONTEXTS):
        kv_bytes = 4 * batch * context * KV_HEADS * DIM
        room = torch.cuda.mem_get_info()[0] / kv_bytes
        if room < 4.2:  # paged, contiguous, and what gathering needs besides its result
            yield f"| {batch} | {context} | does not fit in memory | | | | | - |"
        else:
            yield decode_line(batch, context, args.rounds, ceiling)
        torch.cuda.empty_cache()


def decode_line(batch: int, context: int, rounds: int, ceiling: float) -> str:
    """One line of :func:`decode_table`."""
    case = decoding(batch, context)
    calls: list[Call] = [
        lambda: ops.paged_decode(case.q, case.kv, case.tables, case.contexts),
        lambda: attend(case.q, case.keys, case.values),
        lambda: attend(case.q, *gathered_kv(case)),
    ]
    ours, contiguous, gathered = medians(calls, rounds)
    rate = case.kv_bytes / ours
    share = rate / ceiling
    others = f"{contiguous / ours:.2f}x | {gathered / ours:.2f}x | {'met' if share >= DECODE_ASKED else 'missed'}"
    return f"| {batch} | {context} | {ours * 1e6:.0f} | {rate / 1e9:.0f} | {share:.0%} | {others} |"


def decoding(batch: int, context: int) -> Decoding:
    """A batch of one context, its blocks at random places."""
    blocks = batch * context // BLOCK
    kv = torch.randn(blocks, 2, KV_HEADS, BLOCK, DIM, device="cuda", dtype=torch.bfloat16)
    tables = torch.randperm(blocks, device="cuda", dtype=torch.int32).view(batch, -1)
    q = torch.randn(batch, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    contexts = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    case = Decoding(q, kv, tables, contexts, q, q)
    keys, values = gathered_kv(case)
    case = case._replace(keys=keys, values=values)
    torch.testing.assert_close(ops.paged_decode(q, kv, tables, contexts), attend(q, keys, values), rtol=2e-2, atol=2e-2)
    return case


def gathered_kv(case: Decoding) -> tuple[Tensor, Tensor]:
    """Keys and values of all rows, contiguous: [batch, kv_heads, context, dim] each."""
    blocks = case.kv.index_select(0, case.tables.view(-1)).view(case.q.shape[0], -1, 2, KV_HEADS, BLOCK, DIM)
    keys, values = (blocks[:, :, part].transpose(1, 2).flatten(2, 3) for part in range(2))
    return keys, values


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Torch's own attention of one query a row."""
    return functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, enable_gqa=True).squeeze(2)


if __name__ == "__main__":
    sys.exit(main())
