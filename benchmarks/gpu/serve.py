"""A Llama 8B on one GPU: a prefill and a decode process against one process that does both, and against the device.

    python benchmarks/gpu/serve.py [--shape 8b|small|tiny] [--layers N] [--model DIR] [--chunk 512] [--kv-dtype NAME]
    python benchmarks/gpu/serve.py --device cpu      # the same with a tiny model, to see that it runs; writes no file

The model has Llama 3.1 8B's shape and seeded random weights, written to a temporary folder first: 16 GB, a minute or
more. With ``--model DIR`` they go to that folder, and from then on are read from there. Both clusters get the same
requests: long prompts one after another, greedy and sampled with a seed, then many short ones at once.

*Tokens* of the requests one after another must be equal in both, or this ends with status 1: each step then has the
same rows in both, and KV that moved has the same bytes. Many at once share steps with whoever came at that moment, so
that sums in bfloat16 may round another way: of those it is said how many are equal, and not asked.

*Prefill*: steps of one full chunk, as the worker's own log has them; arithmetic of the matrices and of attention, as a
share of one large matrix product of that dtype. *Decode*: steps without chunks; bytes of weights and KV that must be
read, as a share of what a contiguous copy reads and writes. Both ceilings are measured here, before and after.

*Hidden*: KV bytes that the decode worker had verified before the router had the first token, by the decision log; and
the time from that token to the last block, and to the decode worker's first token (which takes a step of its own). Two
processes without MPS take turns on the GPU, so what overlaps on two GPUs does not quite here.

Writes serve.md beside this file. Without a CUDA device or triton: status 2.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import StatisticsError, median
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe, lacks_for_gpu
from random_model import SHAPES, prepare
from serve_cluster import LOADS, Load, Model, Run, served

GIB = 1 << 30
CALLS = 4  # of a ceiling, timed together


class Ceilings(NamedTuple):
    """What the device does by itself."""

    flops: float
    copy: float  # bytes a second, read and written


def main() -> int:
    """Measure, print and write the table; 2 where there is nothing to measure on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu")
    parser.add_argument("--shape", choices=SHAPES, help="8b on GPUs, tiny on CPUs")
    parser.add_argument("--layers", type=int, help="fewer or more of them")
    parser.add_argument("--model", type=Path, metavar="DIR", help="written there, or read where it is there already")
    parser.add_argument("--chunk", type=int, help="prompt tokens in one step")
    parser.add_argument("--kv-dtype", choices=("bfloat16", "float8_e4m3"))
    args = parser.parse_args()
    if args.model and (args.model / "config.json").is_file() and (args.shape or args.layers):
        parser.error(f"{args.model} holds a model, which has its own shape: leave --shape and --layers out")
    cpu = args.device == "cpu"
    missing = "" if cpu else lacks_for_gpu()
    if missing:
        print(f"this benchmark needs {missing}, and there is none (--device cpu tries it out)", file=sys.stderr)
        return 2
    load = LOADS["cpu" if cpu else "cuda"]
    load = load._replace(chunk=args.chunk or load.chunk)
    with tempfile.TemporaryDirectory() as folder:
        model = made(args, args.model or Path(folder) / "model", cpu)
        problem = "" if cpu else too_small(model, load, args.device)
        if problem:
            print(problem, file=sys.stderr)
            return 2
        text = "\n".join(report(args, model, load, Path(folder))) + "\n"
    print(text)
    if not cpu:
        (Path(__file__).parent / "serve.md").write_text(text, encoding="utf-8")
    return 0


def made(args: argparse.Namespace, folder: Path, cpu: bool) -> Model:
    """The model in its folder, written where it is not there. On CPUs float32, as bfloat16 is slow on most."""
    dtype = "float32" if cpu else "bfloat16"
    torch_dtype = torch.float32 if cpu else torch.bfloat16
    config = prepare(folder, args.shape or ("tiny" if cpu else "8b"), args.layers, torch_dtype, args.device)
    return Model(folder, config, dtype, args.kv_dtype or dtype)


def too_small(model: Model, load: Load, device: str) -> str:
    """Why two workers do not fit the device; empty where they do."""
    torch.cuda.empty_cache()
    weights = (model.weights(head=True) + model.config.vocab_size * model.config.hidden) * 2
    wanted = 2 * (1.25 * weights + load.kv_tokens * model.kv_token_bytes + 3 * GIB)  # 3: context, graphs, activations
    free = torch.cuda.mem_get_info(device)[0]
    if free >= wanted:
        return ""
    asked = f"two workers with weights of {weights / GIB:.0f} GiB need {wanted / GIB:.0f} GiB of GPU memory"
    return f"{asked}, and {free / GIB:.0f} GiB are free: take --shape small, or --layers"


def report(args: argparse.Namespace, model: Model, load: Load, folder: Path) -> Iterator[str]:
    """Run everything; the lines of the table. Raises SystemExit where tokens differ."""
    before = ceilings(args.device)
    split = served(args.device, model, load, folder / "split", "split")
    single = served(args.device, model, load, folder / "local", "local")
    ceiling = Ceilings(*map(max, before, ceilings(args.device)))
    equal = compare(split, single)
    yield from header(args, model, load, ceiling)
    yield "| | 1 prefill + 1 decode | one process |"
    yield "|---|---|---|"
    for name, figure in rows(model, load, ceiling):
        try:
            yield f"| {name} | {figure(split)} | {figure(single)} |"
        except StatisticsError:
            raise SystemExit(f"{name}: the logs have nothing of that kind; was --chunk too large?") from None
    yield ""
    asked = f"{load.requests} greedy and as many seeded"
    yield f"Tokens one after another: all of {2 * load.requests} answers are the same, {asked}."
    yield f"At once: {equal} of {load.streams} answers are the same."
    moved = [seen for name, seen in split.answers.items() if alone(name)]
    size = median(seen.kv_bytes for seen in moved) / 2**20
    yield f"KV moved by {', '.join(sorted({seen.backend for seen in moved}))}: {size:.2f} MiB a request."


def header(args: argparse.Namespace, model: Model, load: Load, ceiling: Ceilings) -> Iterator[str]:
    """What was measured with which versions on what."""
    config = model.config
    given = {name: value for name, value in vars(args).items() if name != "model" and value is not None}
    flags = "".join(f" --{name.replace('_', '-')} {value}" for name, value in given.items())
    yield "# Serving on one device"
    yield ""
    yield f"`python benchmarks/gpu/serve.py{flags}`: see there what is what."
    if args.device == "cpu":
        yield f"{describe()}."
    else:
        import triton

        yield f"{torch.cuda.get_device_name(args.device)}; Python {platform.python_version()},"
        yield f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}."
    yield f"{config.layers} layers of {config.hidden}, {config.heads} heads, {config.kv_heads} of KV; {model.dtype},"
    yield f"KV {model.kv_dtype}. Prompts of {load.prompt} tokens one after another, {load.streams} of"
    yield f"{load.short_prompt} at once; {load.chunk} prompt tokens a step."
    yield f"Ceilings: matrix product {ceiling.flops / 1e12:.2f} TFLOP/s, copy {ceiling.copy / 1e9:.0f} GB/s both ways."
    yield ""


# ---- the device -----------------------------------------------------------------------------------------------------


def ceilings(device: str, rounds: int = 9) -> Ceilings:
    """The best of some large matrix products, and of some copies."""
    torch.set_num_threads(1)  # as workers on CPUs have
    cpu = device == "cpu"
    found = Ceilings(
        matrix_flops(device, 1024 if cpu else 8192, rounds), copy_rate(device, 1 << (28 if cpu else 31), rounds)
    )
    if not cpu:
        torch.cuda.empty_cache()  # the workers need it
    return found


def matrix_flops(device: str, size: int, rounds: int) -> float:
    """Of a square product, in the dtype that is served."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    one, other = torch.randn(2, size, size, device=device, dtype=dtype)
    out = torch.empty_like(one)
    return 2 * size**3 / best_seconds(lambda: torch.mm(one, other, out=out), device, rounds)


def copy_rate(device: str, size: int, rounds: int) -> float:
    """Bytes read and written a second."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source), device, rounds)


def best_seconds(call: Callable[[], object], device: str, rounds: int) -> float:
    """Of one call; the first round is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - begin) / CALLS)
    return min(seconds[1:])


# ---- figures --------------------------------------------------------------------------------------------------------


def alone(name: str) -> bool:
    """Whether it is one of those that are measured one after another."""
    return name.startswith(("greedy", "seeded"))


def compare(split: Run, single: Run) -> int:
    """How many answers to those at once are equal. Raises SystemExit where others differ."""
    same = {name for name, seen in split.answers.items() if seen.ids == single.answers[name].ids}
    differ = sorted(name for name in split.answers if alone(name) and name not in same)
    if differ:
        raise SystemExit(f"two processes say other tokens than one: {', '.join(differ)}")
    return sum(not alone(name) for name in same)


def rows(model: Model, load: Load, ceiling: Ceilings) -> Iterator[tuple[str, Callable[[Run], str]]]:
    """Names of the figures, and how each is got."""

    def prefill(run: Run) -> str:
        steps = [step for step in run.steps if not step["batch"] and [n for n, _ in step["chunks"]] == [load.chunk]]
        tokens = median(load.chunk / step["seconds"] for step in steps)
        share = median(model.chunk_flops(*step["chunks"][0]) / step["seconds"] for step in steps) / ceiling.flops
        return f"{tokens:,.0f} tokens/s, {share:.1%}"

    def decode(least: int, most: int, context: int) -> Callable[[Run], str]:
        def figure(run: Run) -> str:
            steps = [
                s for s in run.steps if not s["chunks"] and least <= s["batch"] <= most and s["context"] >= context
            ]
            share = median(model.decode_bytes(s["context"]) / s["seconds"] for s in steps) / ceiling.copy
            return f"{1000 * median(s['seconds'] for s in steps):.2f} ms a step, {share:.1%}"

        return figure

    yield "prefill, of the matrix ceiling", prefill
    yield "decode of one, of the memory ceiling", decode(1, 1, load.prompt)
    yield f"decode of {load.streams // 2} and more, of the same", decode(load.streams // 2, load.streams, 0)
    yield "TTFT, router's clock", lambda run: f"{median(s.ttft for n, s in run.answers.items() if alone(n)):.1f} ms"
    yield (
        "gap between tokens, the same",
        lambda run: f"{median(s.gap for n, s in run.answers.items() if alone(n)):.2f} ms",
    )
    yield "KV verified before the first token", early
    yield "first token to all KV verified", lambda run: after_first(run, "transferred")
    yield "first token to the decode worker's first", lambda run: after_first(run, "decoding")


def early(run: Run) -> str:
    """Median share, where anything moved."""
    shares = [share for name, share in run.early.items() if alone(name)]
    return f"{median(shares):.0%} of the bytes" if shares else "-"


def after_first(run: Run, edge: str) -> str:
    """Median milliseconds from a request's first token to an edge of its life (router/request.py)."""
    if not run.early:
        return "-"
    waits = [edges[edge] - edges["first"] for name, edges in run.edges.items() if alone(name)]
    return f"{1000 * max(0.0, median(waits)):.1f} ms"


if __name__ == "__main__":
    sys.exit(main())
