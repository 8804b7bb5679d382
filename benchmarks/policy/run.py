"""Capacity of policies side by side: the largest speed-up at which 99 % of offered requests meet both SLOs.

    python benchmarks/policy/run.py --traces FOLDER [--policies NAME[:KEY=VALUE],...] [--splits 4,6,8,9] [--workers 12]

FOLDER holds mooncake_conversation.jsonl.gz and azure_2023_conv.csv.gz (public). Profile Llama-3.1-70B on 4 H100 (TP4),
TTFT SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms. Splits are prefill workers of ``--workers``; ``colocated`` has all
of them do both. Baselines have their default parameters here. Writes benchmarks/policy/results.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.errors import ConfigError
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM
from twinpool.sim.search import Runner, capacity, runner
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

HERE = Path(__file__).parent
TARGET = 0.99
POLICIES = "least_seconds:late=refuse,least_seconds,mooncake_conductor,dynamo,sglang_cache_aware,colocated"
MOONCAKE, AZURE = "mooncake_conversation.jsonl.gz", "azure_2023_conv.csv.gz"
TRACES = {"Mooncake, as it is": (MOONCAKE, None, 2.0), "Mooncake, spread": (MOONCAKE, 0, 2.0),
          "Azure": (AZURE, None, 10.0)}  # fmt: skip  # file, seed of spreading, speed to begin at


def settings_of(policy: str, split: int, workers: int) -> Settings:
    """One cluster; ``policy`` may carry parameters."""
    name, *given = policy.split(":")
    parameters: dict[str, float | str] = dict(pair.split("=", 1) for pair in given)
    if name == "colocated":
        return Settings(prefill=0, decode=0, both=workers, policy=name, parameters=parameters)
    return Settings(prefill=split, decode=workers - split, policy=name, parameters=parameters)


def capacity_of(made: Runner, settings: Settings, start: float) -> float | None:
    """None where no speed meets the target."""
    try:
        return capacity(made, settings, TARGET, start=start).speed
    except ConfigError:
        return None


def rows(trace: Trace, start: float, args: argparse.Namespace) -> Iterator[str]:
    """A line of the table for each policy."""
    with runner(trace, args.processes) as made:
        for policy in args.policies.split(","):
            splits = [args.workers] if policy.startswith("colocated") else args.splits
            found = [capacity_of(made, settings_of(policy, split, args.workers), start) for split in splits]
            texts = ["none" if each is None else f"{each:.3f}" for each in found]
            cells = texts if len(splits) > 1 else texts * len(args.splits)
            best = max((each for each in found if each is not None), default=0.0)
            yield f"| {policy} | {' | '.join(cells)} | {best:.3f} |"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--policies", default=POLICIES)
    parser.add_argument("--splits", type=lambda text: [int(part) for part in text.split(",")], default=[4, 6, 8, 9])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    started = time.perf_counter()
    text = ["# Capacity of policies", "", f"{describe()}; {FORM} core", ""]
    for name, (file, seed, start) in TRACES.items():
        trace, _ = read_trace(args.traces / file, spread_seed=seed)
        text += [
            f"## {name}",
            "",
            "| policy | " + " | ".join(f"{p}P+{args.workers - p}D" for p in args.splits) + " | best |",
        ]
        text += ["|---" * (len(args.splits) + 2) + "|"]
        for line in rows(trace, start, args):
            print(f"{name}: {line}", flush=True)
            text.append(line)
        text.append("")
    text.append(f"Took {(time.perf_counter() - started) / 60:.0f} minutes.")
    (HERE / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
