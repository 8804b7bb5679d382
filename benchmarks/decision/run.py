"""Decision time in the live router, with 1,000 requests waiting, beside the edge's own cost of a request.

    python benchmarks/decision/run.py [--workers 100,1000] [--queued 1000] [--warm 8] [--seconds 4] [--block 64]

fleet.py says what is real: all of the router from the bytes of a link to the bytes of a link, its workers emulated in
the same process on a virtual clock. Two thirds prefill, one third decodes, Llama-3.1-70B on 4 H100 each; long chats
with shared prefixes come twice a second a worker, more than can be served, so the queue stays full. ``in time``: the
TTFT SLO is 60 s, so all that wait can still be in time: up to 24 are asked about and passed over; ``late``: it is 1 s,
as usual, and nearly all stand behind. Adds one form's tables to results.md: the interpreted, or that of a compiled copy
whose ``src`` is PYTHONPATH (benchmarks/sim/run.py says how one is made). Exit status 1 where a decision takes longer
than asked, or KV events were dropped.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from edge import EdgeCost, measure
from fleet import LiveRouter, OverError, fleet, traffic
from machine import describe

from twinpool.sim.replay import FORM
from twinpool.sim.settings import Settings

HERE = Path(__file__).parent
RATE = 2.0  # requests a second a worker
TTFT_S = {"in time": 60.0, "late": 1.0}
LIMITS_MS = {100: 1.0, 1000: 3.0}
DECISIONS = ("Submit", "Tick", "Emitted", "Ended", "BlocksVerified", "Progressed", "Reserved", "NoRoom", "BlocksReady")
TEXT = """
*Decision*: one call of the core, which takes one event in and returns actions; milliseconds of CPU time of the thread
(in brackets by the clock on the wall, which has in it whoever else used these cores). *All decisions* are those of the
rows below it but KV events, of which there are many and which decide nothing; the limit is for this row. *Whole*: the
same from the bytes of the frame, or the submission with its token ids (block hashes), to the bytes of all frames that
it sends. Submissions refused because the queue was full are not counted.

*KV events*: a prefill worker stores the blocks that it computes, a decode worker those it receives and, once they are
full, those it decodes; so a fleet makes about 2 x prompt tokens a second / block size, and as many removals once the
caches are full. The profile's prefill step says {most:,.0f} tokens a second a worker with nothing cached, which is
{blocks:,.0f} blocks of {block} tokens a second for 100 workers; what came in the run is in the table. *A core* is what
one core ingests if it does nothing else: CPU from the frame's bytes to the index.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """What one run showed."""

    title: str
    rows: list[str]
    misses: list[str]


def ran(workers: int, ttft_s: float, args: argparse.Namespace) -> LiveRouter:
    """One fleet, for a while."""
    rate = RATE * workers
    waiting = args.queued + workers
    trace = traffic(int(rate * (args.warm + args.seconds)) + waiting, rate, waiting, args.block, 0)
    prefill = workers * 2 // 3
    settings = Settings(prefill=prefill, decode=workers - prefill, closed_form=True, block_size=args.block,
                        max_tokens=2000, max_queue=args.queued, ttft_s=ttft_s, max_queue_s=1e9)  # fmt: skip
    loop, router = fleet(trace, settings)
    router.span = (args.warm, args.warm + args.seconds)
    gc.collect()
    gc.freeze()
    gc.disable()  # it would go through the emulated workers, which a router does not have
    try:
        loop.run()
    except OverError:
        pass
    finally:
        gc.enable()
        gc.unfreeze()
    return router


def figures(name: str, router: LiveRouter, kinds: list[str]) -> tuple[str, float]:
    """A row of the table, and the p99 of CPU in ms."""
    times = [router.times[kind] for kind in kinds if kind in router.times]
    cpu = 1e3 * np.concatenate([each.cpu for each in times])
    wall = 1e3 * np.concatenate([each.wall for each in times])
    whole = 1e3 * np.concatenate([each.whole for each in times])
    p50, p99 = np.quantile(cpu, (0.5, 0.99))
    row = f"| {name} | {len(cpu):,} | {cpu.mean():.3f} | {p50:.3f} ({np.quantile(wall, 0.5):.3f}) | {p99:.3f} "
    row += f"({np.quantile(wall, 0.99):.3f}) | {cpu.max():.2f} | {whole.mean():.3f} | {np.quantile(whole, 0.99):.3f} |"
    return row, float(p99)


def section(workers: int, which: str, args: argparse.Namespace) -> Section:
    """One run and its table."""
    router = ran(workers, TTFT_S[which], args)
    limit = LIMITS_MS.get(workers, 0.0)
    kinds = [kind for kind in DECISIONS if kind in router.times]
    rows, misses = ["| event | calls | mean | p50 | p99 | max | whole mean | whole p99 |", "|---" * 8 + "|"], []
    for name, of in (("all decisions", kinds), *((kind, [kind]) for kind in [*kinds, "KvChanged"])):
        row, p99 = figures(name, router, of)
        rows.append(row)
        if limit and name == "all decisions" and p99 > limit:
            misses.append(f"{workers} workers, {which}, {name}: p99 {p99:.2f} ms, {limit:g} asked")
    if router.kv_dropped():
        misses.append(f"{workers} workers, {which}: {router.kv_dropped()} frames with KV events were dropped")
    return Section(f"{workers} workers, {min(router.depths)} to {max(router.depths)} waiting, {which}",
                   [*rows, "", *about(router, args)], misses)  # fmt: skip


def about(router: LiveRouter, args: argparse.Namespace) -> Iterator[str]:
    """Sentences about a run."""
    started = len(router.times["Submit"].cpu)
    busy = sum(sum(each.whole) for each in router.times.values())
    per_core = router.kv_blocks / router.kv_cpu_s
    yield (
        f"{busy / started * 1e3:.2f} ms of CPU a request taken in, all of its events together; "
        f"{busy / args.seconds:.2f} cores would keep up with this fleet, tokens after the first not counted."
    )
    yield (
        f"KV events: {router.kv_frames / args.seconds:,.0f} frames and {router.kv_blocks / args.seconds:,.0f} blocks a "
        f"second; a core ingests {per_core:,.0f} blocks a second; {router.kv_dropped()} dropped."
    )


def edge_rows(costs: list[EdgeCost]) -> Iterator[str]:
    """The table of the edge."""
    yield "| prompt, token ids | messages with tokens | CPU of the edge, ms | round trip p50 | p99 |"
    yield "|---" * 5 + "|"
    for each in costs:
        times = f"{1e3 * each.cpu_s:.2f} | {1e3 * each.p50_s:.2f} | {1e3 * each.p99_s:.2f}"
        yield f"| {each.prompt:,} | {each.messages} | {times} |"


def main() -> int:
    """Measure, write, and say whether it is as quick as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=lambda text: [int(part) for part in text.split(",")], default=[100, 1000])
    parser.add_argument("--queued", type=int, default=1000)
    parser.add_argument("--warm", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200, help="of each kind to the edge")
    args = parser.parse_args()
    costs = measure([(64, 1), (12_000, 1), (12_000, 65)], args.requests)
    text = [f"## {FORM.capitalize()} core", "", *edge_rows(costs), ""]
    misses: list[str] = []
    for workers in args.workers:
        for which in TTFT_S:
            made = section(workers, which, args)
            text += [f"### {made.title}", "", *made.rows, ""]
            misses += made.misses
            print("\n".join(text[-len(made.rows) - 3 :]), flush=True)
    verdict = ["All decisions are as quick as asked."] if not misses else ["Slower than asked:", ""]
    text += [*verdict, *(f"- {miss}" for miss in misses), f"\nLoad of the machine meanwhile: {os.getloadavg()[2]:.1f}."]
    write(text, args.block)
    print("\n".join(misses))
    return 1 if misses else 0


def write(text: list[str], block: int) -> None:
    """This form's part of results.md; that of the other form stays."""
    kept = HERE / "results.json"
    parts: dict[str, str] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    parts[FORM] = "\n".join(text)
    kept.write_text(json.dumps(parts, indent=1) + "\n", encoding="utf-8")
    most = 1 / (6.0524e-5 + 9.948e-10 * 6000)
    about_all = TEXT.format(most=most, blocks=2 * most * 67 / block, block=block)
    whole = [
        "# Decision time",
        "",
        describe(),
        about_all,
        *(parts[form] + "\n" for form in sorted(parts, reverse=True)),
    ]
    (HERE / "results.md").write_text("\n".join(whole), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
