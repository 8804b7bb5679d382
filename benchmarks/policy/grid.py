"""The grid: on no traffic, model, ITL or split is a baseline more than 1 % better than the default policy.

    python benchmarks/policy/grid.py --traces FOLDER [--only NAME,...] [--models 70b,8b] [--itl 50,30] [--splits 2,9]

FOLDER, traffics and parameters as for run.py; 12 workers. At each split our capacity is searched; then each baseline
with two pools runs once at 1.01 times that: enough that it misses there. At our best split of all, colocated does, too.
Where one does not miss, its own capacity is searched, and said. Writes grid.md, line by line as it goes; exit status 1
where a baseline is better. Takes hours, the compiled form a third of that: ``--only Mooncake,Azure`` is the greater
part of what there is to see.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from contest import COLOCATED, DISAGGREGATED, OURS, PROFILE, Contest, Found
from machine import describe
from run import RIVALS_START, SPLITS, TRAFFIC, WORKERS, Traffic

from twinpool.sim.replay import FORM
from twinpool.sim.search import runner

HERE = Path(__file__).parent
MODELS = {"70b": PROFILE, "8b": "h100_sxm/llama-3.1-8b/tp1"}
MORE = 1.01  # times our capacity
SLOWER = {"8b": 0.8}  # about what a worker of one GPU carries of one of four


class Cell(NamedTuple):
    """One row of the grid."""

    traffic: Traffic
    model: str
    itl_ms: float


def better(contest: Contest, ours: Found) -> list[Found]:
    """Baselines that meet the target above our capacity at the same split, with what they carry."""
    split = ours.settings.prefill
    rivals = [contest.of(entry, [contest.chosen[entry.policy]], [split])[0] for entry in DISAGGREGATED]
    return contest.above(rivals, MORE * ours.speed)


def text_of(ours: Found, rivals: list[Found]) -> str:
    """A cell of the table."""
    told = f"{ours.speed:.3f}"
    for rival in sorted(rivals, key=lambda found: -found.speed)[:1]:
        told += f" (**{rival.settings.policy} {rival.speed:.3f}**)"
    return told


def row(cell: Cell, args: argparse.Namespace) -> tuple[str, int]:
    """One line of the table, and how many of its cells were lost."""
    trace = cell.traffic.make(args.traces, 0)
    with runner(trace, args.processes) as made:
        start = cell.traffic.start * SLOWER.get(cell.model, 1.0)
        contest = Contest(made, trace, WORKERS, args.splits, start, MODELS[cell.model], cell.itl_ms / 1e3)
        contest.choose([OURS], start)
        contest.choose((*DISAGGREGATED, COLOCATED), RIVALS_START * start)
        curve = contest.curve(OURS)
        lost = [better(contest, found) if found.speed else [] for found in curve]
        best = max(curve, key=lambda found: found.speed)
        colocated = contest.above(contest.of(COLOCATED, [contest.chosen[COLOCATED.policy]], [0]), best.speed)
    cells = [text_of(found, rivals) for found, rivals in zip(curve, lost, strict=True)]
    last = f"**{colocated[0].speed:.3f}**" if colocated else f"below {best.speed:.3f}"
    return (
        f"| {cell.traffic.name} | {cell.model} | {cell.itl_ms:g} | {' | '.join(cells)} | {last} |",
        sum(map(bool, lost)) + bool(colocated),
    )


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All that was asked for."""
    for traffic in TRAFFIC:
        if args.only and not any(part in traffic.name for part in args.only.split(",")):
            continue
        for model in args.models.split(","):
            for itl_ms in args.itl:
                yield Cell(traffic, model, itl_ms)


def numbers(text: str) -> list[int]:
    """Of a list with commas."""
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Measure, write, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of traffics, or parts of them")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--itl", type=numbers, default=[50, 30])
    parser.add_argument("--splits", type=numbers, default=list(SPLITS))
    parser.add_argument("--processes", type=int, default=0)
    args = parser.parse_args()
    started, lost = time.perf_counter(), 0
    text = [
        "# Every split against every baseline",
        "",
        f"{describe()}; {FORM} core",
        "",
        "Our capacity at each split of 12 workers; in brackets the best baseline, where one is more than 1 % better.",
        "",
        "| traffic | model | ITL, ms | " + " | ".join(f"{p}P+{WORKERS - p}D" for p in args.splits) + " | colocated |",
        "|---" * (4 + len(args.splits)) + "|",
    ]
    for cell in cells(args):
        line, missed = row(cell, args)
        text.append(line)
        lost += missed
        print(line, flush=True)
        (HERE / "grid.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    text += ["", f"Baselines better: {lost}. Took {(time.perf_counter() - started) / 60:.0f} minutes."]
    (HERE / "grid.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(text[-1])
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
