"""What goes first when a worker's KV memory is full: LRU, segments, frequency with aging, and what a hint is worth.

    python benchmarks/policy/eviction.py [--traces FOLDER] [--capacity] [--requests 4000] [--prefill 8] [--decode 4]

FOLDER holds mooncake_conversation.jsonl.gz (public); without it only generated traffic is run. (The Azure trace has no
block hashes, so nothing of it can be found again, whatever is evicted.) Fixed speeds near the capacity of the cluster:
profile Llama-3.1-70B on 4 H100 (TP4), policy ``least_seconds``, TTFT SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms.
``--capacity`` searches the largest speed-up for three of the rules on the Mooncake trace too: some minutes more.
Writes benchmarks/policy/eviction.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, replay
from twinpool.sim.returns import with_returns
from twinpool.sim.search import capacity, runner
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, speed

HERE = Path(__file__).parent
MOONCAKE = "mooncake_conversation.jsonl.gz"
TARGET = 0.99
GENERATED = {"agentic": 12.0, "long": 8.0, "chat": 60.0, "mixed": 25.0}  # kind: requests a second


class Variant(NamedTuple):
    """A line of the table."""

    name: str
    rule: str
    hint: str = ""
    wrong: float = 0.0

    def trace(self, trace: Trace) -> Trace:
        """With the hints that its requests give."""
        return with_returns(trace, self.hint, self.wrong) if self.hint else trace


LRU, SEGMENTED = Variant("LRU", "lru"), Variant("segmented LRU", "segmented")
HINTED = Variant("LRU, hint: the truth", "lru", "oracle")
VARIANTS = [
    LRU, SEGMENTED, Variant("frequency with aging", "frequency"), HINTED,
    Variant("LRU, hint: a fifth of it wrong", "lru", "oracle", 0.2),
    Variant("LRU, hint: follow-ups come back", "lru", "follow_ups"),
    Variant("frequency with aging, hint: the truth", "frequency", "oracle"),
]  # fmt: skip
HEAD = (
    "| rule | says it will come back | found in the cache | missed an SLO | TTFT mean, ms | p99 |\n" + "|---" * 6 + "|"
)


def row(variant: Variant, trace: Trace, settings: Settings) -> str:
    """One run, as a line of the table."""
    hinted = variant.trace(trace)
    figures = replay(hinted, settings).summary()
    missed = round((1 - figures["attainment"]) * len(trace))
    says = f"{sum(hinted.returns) / len(trace):.0%}" if hinted.returns else "-"
    found, ttft = f"{figures['cached_token_share']:.2%}", figures["ttft_ms"]
    return f"| {variant.name} | {says} | {found} | {missed} | {ttft['mean']:.0f} | {ttft['p99']:.0f} |"


def table(name: str, trace: Trace, args: argparse.Namespace) -> Iterator[str]:
    """A section of the file."""
    text = f"## {name}: {len(trace):,} requests, {len(trace) / trace.duration_s:.1f} a second\n\n{HEAD}"
    print(text, flush=True)
    yield text
    for variant in VARIANTS:
        line = row(variant, trace, Settings(prefill=args.prefill, decode=args.decode, eviction=variant.rule))
        print(line, flush=True)
        yield line
    yield ""


def capacities(trace: Trace, args: argparse.Namespace) -> Iterator[str]:
    """The largest speed-up at which 99 % meet both SLOs."""
    yield "## Capacity, Mooncake spread\n\n| rule | speed-up at which 99 % meet both SLOs |\n|---|---|"
    for variant in (LRU, SEGMENTED, HINTED):
        settings = Settings(prefill=args.prefill, decode=args.decode, eviction=variant.rule)
        with runner(variant.trace(trace), args.processes) as made:
            line = f"| {variant.name} | {capacity(made, settings, TARGET, start=2.7).speed:.3f} |"
        print(line, flush=True)
        yield line
    yield ""


def sections(args: argparse.Namespace) -> Iterator[str]:
    """All tables."""
    if args.traces is not None:
        spread, _ = read_trace(args.traces / MOONCAKE, spread_seed=0)
        yield from table("Mooncake conversation, stamps spread, 2.7 times as fast", speed(spread, 2.7), args)
        as_is, _ = read_trace(args.traces / MOONCAKE)
        yield from table("Mooncake conversation as it is, 2.1 times as fast", speed(as_is, 2.1), args)
        if args.capacity:
            yield from capacities(spread, args)
    for kind, rate in GENERATED.items():
        yield from table(f"Generated, {kind}", generate(kind, requests=args.requests, rate=rate), args)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path)
    parser.add_argument("--capacity", action="store_true")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--prefill", type=int, default=8)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    text = [f"# Eviction\n\n{describe()}; {FORM} core; {args.prefill}P+{args.decode}D\n", *sections(args)]
    text.append(f"Took {(time.perf_counter() - started) / 60:.0f} minutes.")
    (HERE / "eviction.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
