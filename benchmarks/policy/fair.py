"""Fairness: what one tenant at ten times its share costs the others, and what being fair costs everybody.

    python benchmarks/policy/fair.py --traces FOLDER [--prefill 4] [--decode 4] [--parameters late=refuse]

FOLDER holds azure_2023_conv.csv.gz (public). Its requests are dealt to ten tenants in turn. One of them, ``greedy``,
sends each of its requests ten times, within half a minute. Profile Llama-3.1-70B on 4 H100 (TP4), TTFT SLO 1 s + 2 x
unloaded prefill, ITL SLO 50 ms. Three questions:

- All ten at 80 % of capacity together, then the greedy one on top: how much attainment do the nine lose?
- Everybody wants more than its share (the ten at twice the capacity, and the greedy one on top): is what they get in
  time equal? Jain's index of their tokens (computed 1, drawn 2) in requests that met both SLOs.
- The same as one tenant: how much less goodput is there for being fair? In the same tokens, since who may choose whom
  to drop has more requests in time a second by dropping the long ones; these are printed, too.

Writes benchmarks/policy/fair.md; exit status 1 where less than what is asked for was found.
"""

from __future__ import annotations

import argparse
import random
import sys
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, replay
from twinpool.sim.result import Result, jain
from twinpool.sim.search import capacity, runner
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, by_arrival, speed

HERE = Path(__file__).parent
TENANTS, TIMES, WITHIN_S = 10, 10, 30.0
GREEDY = "tenant-0"
CROWD = 2.0
LEAST_JAIN, MOST_LOST, MOST_COST = 0.95, 0.02, 0.03


def dealt(trace: Trace, times: int, seed: int = 0) -> Trace:
    """The requests dealt to the tenants; those of the greedy one ``times`` times. For traces without hashes."""
    rng = random.Random(seed)
    rows = [i for i in range(len(trace)) for _ in range(times if i % TENANTS == 0 else 1)]
    first = dict.fromkeys(range(len(trace)), True)
    arrival = array("d")
    for i in rows:
        arrival.append(trace.arrival[i] + (0.0 if first[i] else rng.uniform(0.0, WITHIN_S)))
        first[i] = False
    return by_arrival(
        replace(
            trace, arrival=arrival, prompt=array("q", [trace.prompt[i] for i in rows]),
            output=array("q", [trace.output[i] for i in rows]), offsets=array("q", bytes(8 * (len(rows) + 1))),
            tenant=[f"tenant-{i % TENANTS}" for i in rows],
        )
    )  # fmt: skip


def others(result: Result) -> float:
    """Attainment of all but the greedy one."""
    attained, tenants = result.columns.attained(), result.columns.tenant
    assert tenants is not None
    return float(np.mean([met for met, tenant in zip(attained, tenants, strict=True) if tenant != GREEDY]))


def tokens_in_time(result: Result) -> list[float]:
    """By tenant."""
    columns = result.columns
    assert columns.tenant is not None
    had: dict[str, float] = {}
    work = columns.prompt - columns.cached + 2.0 * columns.output
    for tenant, met, tokens in zip(columns.tenant, columns.attained(), work, strict=True):
        had[tenant] = had.get(tenant, 0.0) + (float(tokens) if met else 0.0)
    return [had[tenant] for tenant in sorted(had)]


def as_one(trace: Trace, settings: Settings) -> Result:
    """A run in which all count as one tenant; the result has their names again."""
    result = replay(replace(trace, tenant=None), settings)
    result.columns.tenant = trace.tenant
    return result


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--prefill", type=int, default=4)
    parser.add_argument("--decode", type=int, default=4)
    parser.add_argument("--parameters", default="late=refuse")
    args = parser.parse_args()
    given: dict[str, float | str] = dict(pair.split("=", 1) for pair in args.parameters.split(",") if pair)
    settings = Settings(prefill=args.prefill, decode=args.decode, parameters=given)
    trace, _ = read_trace(args.traces / "azure_2023_conv.csv.gz")
    with runner(trace, 0) as made:
        limit = capacity(made, settings, 0.99, start=8.0).speed
    calm = others(replay(speed(dealt(trace, 1), 0.8 * limit), settings))
    shared = others(replay(speed(dealt(trace, TIMES), 0.8 * limit), settings))
    blind = others(as_one(speed(dealt(trace, TIMES), 0.8 * limit), settings))
    crowd = speed(dealt(trace, TIMES), CROWD * limit)
    fair, unfair = replay(crowd, settings), as_one(crowd, settings)
    index = jain(tokens_in_time(fair))
    tokens = [sum(tokens_in_time(result)) / result.columns.duration_s() for result in (fair, unfair)]
    goodput = [result.summary()["goodput_rps"] for result in (fair, unfair)]
    cost = 1.0 - tokens[0] / tokens[1]
    rows = [
        ("attainment of the nine, the greedy one at its share", f"{calm:.4f}", "", True),
        ("the same, the greedy one at ten times its share", f"{shared:.4f}", f"at most {MOST_LOST} less",
         calm - shared <= MOST_LOST),
        ("the same, if all counted as one tenant", f"{blind:.4f}", "", True),
        ("Jain's index, all ten backlogged", f"{index:.4f}", f"at least {LEAST_JAIN}", index >= LEAST_JAIN),
        ("tokens in time a second there, and as one tenant", f"{tokens[0]:,.0f}, {tokens[1]:,.0f}",
         f"at most {100 * MOST_COST:.0f} % less", cost <= MOST_COST),
        ("requests in time a second there, and as one tenant", f"{goodput[0]:.1f}, {goodput[1]:.1f}", "", True),
    ]  # fmt: skip
    about = (
        f"{args.prefill} prefill and {args.decode} decode workers, {args.parameters or 'no parameters'}; "
        f"their capacity is {limit:.2f} times the trace."
    )
    text = ["# Fairness between tenants", "", f"{describe()}; {FORM} core", "", about, ""]
    text += ["| what | found | asked | |", "|---|---|---|---|"]
    text += [f"| {what} | {found} | {asked} | {('met' if met else '**missed**') if asked else ''} |"
             for what, found, asked, met in rows]  # fmt: skip
    (HERE / "fair.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
