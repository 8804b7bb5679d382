"""Ablation: capacity of the default policy with each part of the design left out in turn.

    python benchmarks/policy/ablation.py --traces FOLDER [--splits 8,6] [--workers 12] [--processes 1]

FOLDER holds mooncake_conversation.jsonl.gz (stamps spread within their 3 s) and azure_2023_conv.csv.gz (public).
Profile Llama-3.1-70B on 4 H100 (TP4), TTFT SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms, 99 % of offered requests in
time; ``late: refuse`` where that means something. Writes ablation.md beside this file. The compiled form takes a
quarter of the time: benchmarks/sim/run.py says how a copy of the package is compiled; give its ``src`` as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from contest import AZURE, MOONCAKE, TARGET
from machine import describe

from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM
from twinpool.sim.search import Runner, Search, allowed_misses, narrow, nearest, runner, speed_of
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

HERE = Path(__file__).parent
TRACES = {"Mooncake conversation, spread": (MOONCAKE, 0, 2.6), "Azure conversation": (AZURE, None, 14.0)}
NEAR = 3  # steps of 0.5 % between what is met and what is not
JUMP = 24  # steps, at first


class Part(NamedTuple):
    """What is left out, and how."""

    name: str
    what: str
    parameters: dict[str, float | str]


PARTS = (
    Part("nothing", "", {}),
    Part("late binding", "every request is committed to a worker when it comes, to wait there", {}),
    Part("feasible first", "who cannot be in time keeps its place before who can", {}),
    Part("slack", "order by deadline alone, feasible first: the longest prompts wait for all others", {}),
    Part("passing over", "where the first in order finds no worker all wait", {}),
    Part("waiting", "a worker with room is taken although a busy one will be earlier, for what it has cached", {}),
    Part("affinity", "where a prefix is cached plays no part in the choice; caches work on", {}),
    Part("decode ITL", "decode workers are chosen by memory alone", {}),
    Part("home", "where no decode worker has room KV waits for one: nobody decodes where the prompt was computed", {}),
    Part("price", "decode workers take prompts only where that is earlier, not for the sake of others", {}),
    Part("fetching", "what other workers have cached is computed again", {"fetch": "off"}),
    Part("local prefill", "decode workers compute no prompts", {"paths": "split"}),
    Part("split", "all of a request on one decode worker: the prefill workers idle", {"paths": "local"}),
    Part("refusing", "who cannot be in time is served when nobody else can be", {"late": "serve"}),
)
TEXT = """
A speed-up of the trace at which 99 % of offered requests meet both SLOs, to about 1.5 %: the searches step by half
a per cent and attainment is noisy near the limit. *Lost*: of the capacity with everything.
"""
BESIDE = """
Not here, since they are no parts of a policy that could be left out by a parameter: announcing blocks in parts (a
worker does that), holding the first token (the core does), and the booking of decode room at decision time.
"""


def settings_of(part: Part, split: int, workers: int) -> Settings:
    """The cluster without that part."""
    parameters: dict[str, float | str] = {"late": "refuse", "without": "nothing"} | part.parameters
    if not part.parameters:
        parameters["without"] = part.name
    return Settings(prefill=split, decode=workers - split, parameters=parameters)


def capacity_of(made: Runner, settings: Settings, start: float) -> float:
    """The largest speed that was seen to meet the target, beside one that does not; 0 where none does."""
    search = Search(settings, allowed_misses(made.requests, TARGET), nearest(start), JUMP)
    narrow(made, [search], TARGET, NEAR)
    return 0.0 if search.low is None else speed_of(search.low)


def section(name: str, trace: Trace, start: float, args: argparse.Namespace) -> Iterator[str]:
    """The table of one trace."""
    with runner(trace, args.processes) as made:
        full = [0.0] * len(args.splits)
        yield f"## {name}"
        yield ""
        yield "| without | " + " | ".join(f"{p}P+{args.workers - p}D | lost" for p in args.splits) + " | |"
        yield "|---" * (2 + 2 * len(args.splits)) + "|"
        for part in PARTS:
            found = [capacity_of(made, settings_of(part, p, args.workers), start) for p in args.splits]
            if part.name == "nothing":
                full = found
            cells = [f"{speed:.3f} | {_lost(speed, whole)}" for speed, whole in zip(found, full, strict=True)]
            yield f"| {part.name} | {' | '.join(cells)} | {part.what} |"
        yield ""


def _lost(speed: float, whole: float) -> str:
    return "" if speed is whole else f"{1.0 - speed / whole:.1%}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--splits", type=lambda text: [int(part) for part in text.split(",")], default=[8, 6])
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    text = ["# Ablation", "", f"{describe()}; {FORM} core", TEXT]
    for name, (file, seed, start) in TRACES.items():
        trace, _ = read_trace(args.traces / file, spread_seed=seed)
        for line in section(name, trace, start, args):
            print(line, flush=True)
            text.append(line)
    spent = os.times()
    minutes = (spent.user + spent.system + spent.children_user + spent.children_system) / 60
    text += [BESIDE, f"Took {minutes:.0f} minutes of CPU."]
    (HERE / "ablation.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(text[-1])


if __name__ == "__main__":
    main()
