"""The headline: capacity of the default policy against every baseline at its best, on six traffics.

    python benchmarks/policy/run.py --traces FOLDER [--only NAME,...] [--seeds 5] [--processes 0]

FOLDER holds mooncake_conversation.jsonl.gz and azure_2023_conv.csv.gz (public); the other traffics are generated, in
closed loops. Llama-3.1-70B on 4 H100 (TP4), 12 workers (and 24), TTFT SLO 1 s + 2 x unloaded prefill, ITL SLO 50 ms, 99
% of offered requests in time, the best split for everybody from 2 to 9 prefill workers. Baselines have the best of the
parameters in contest.py on the first fifth of the trace; ours refuses who cannot be in time, which counts as missed.
Writes results.md; exit status 1 where less was found than asked. The compiled form takes a third of the time:
benchmarks/sim/run.py says how a copy of the package is compiled; give its ``src`` as PYTHONPATH.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
from contest import AZURE, COLOCATED, DISAGGREGATED, MOONCAKE, OURS, TARGET, Contest, Found
from machine import describe

from twinpool.sim.bound import bound_capacity
from twinpool.sim.generate import generate
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import FORM, replay
from twinpool.sim.search import runner
from twinpool.sim.trace import Trace
from twinpool.sim.trace import speed as sped_up

HERE = Path(__file__).parent
WORKERS, SPLITS = 12, (2, 3, 4, 5, 6, 7, 8, 9)
FLAT = (4, 8)  # splits between which capacity should hardly change
LARGER, LARGER_SPLITS = 24, (8, 12, 14, 16, 18)
RIVALS_START = 0.75  # times where we do: a race that begins too high costs a run for everybody
MEANS = (1.5, 1.25)  # asked of the geometric means: against the best with two pools, and of all
Make = Callable[[Path, int], Trace]  # folder of traces, seed


class Traffic(NamedTuple):
    """``asked``: times the best baseline with two pools, and the colocated one; 0: nothing by itself."""

    name: str
    make: Make
    start: float  # speed
    seeded: bool
    asked: tuple[float, float] = (0.0, 0.0)


def mooncake(spread: bool) -> Make:
    """Arrivals spread within their stamps of 3 s, or as they are."""
    return lambda folder, seed: read_trace(folder / MOONCAKE, spread_seed=seed if spread else None)[0]


def made_up(kind: str, rate: float, requests: int, block_tokens: int = 64) -> Make:
    """Generated, growing from nobody; ``rate`` is about what the cluster can do."""
    return lambda folder, seed: generate(
        kind, requests=requests, rate=rate, seed=seed, block_tokens=block_tokens, ramp=True
    )


TRAFFIC = (
    Traffic("Mooncake conversation, spread", mooncake(True), 2.8, True, (1.4, 1.2)),
    Traffic("Mooncake conversation, as it is", mooncake(False), 2.8, False, (1.7, 1.2)),
    Traffic("Azure conversation", lambda folder, seed: read_trace(folder / AZURE)[0], 14.0, False),
    Traffic("generated code", made_up("code", 500.0, 20_000), 1.3, True),
    Traffic("generated agentic", made_up("agentic", 40.0, 9000, 512), 1.4, True),
    Traffic("generated mixed", made_up("mixed", 90.0, 10_000, 256), 1.0, True),
)
ASKED_LARGER = 1.25
EVEN = 0.97  # of each tenth of prompt lengths


@dataclass
class Outcome:
    """What one traffic showed."""

    traffic: Traffic
    curve: list[Found]
    best: Found | None  # with two pools
    missed: dict[str, float]  # of each policy with two pools, a speed at which it misses at every split
    colocated: Found | None
    repeats: list[tuple[float, float, float]] = field(default_factory=list)  # ours, best rival, colocated, by seed

    @property
    def ours(self) -> Found:
        """At our best split."""
        return max(self.curve, key=lambda found: found.speed)

    def ratios(self) -> tuple[float, float]:
        """Ours over the best with two pools, and over the colocated; geometric means over the seeds."""
        return _ratio([(a, b) for a, b, _ in self.repeats]), _ratio([(a, c) for a, _, c in self.repeats])


def _ratio(pairs: list[tuple[float, float]]) -> float:
    return geometric_mean([a / b if b else math.inf for a, b in pairs])


def say(what: str) -> None:
    """Where it is, for whoever waits."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def contested(traffic: Traffic, args: argparse.Namespace) -> Outcome:
    """One traffic; every seed at the splits and parameters that were best with the first."""
    trace = traffic.make(args.traces, 0)
    with runner(trace, args.processes) as made:
        contest = Contest(made, trace, WORKERS, SPLITS, traffic.start)
        lower = RIVALS_START * traffic.start
        say(f"{traffic.name}: choosing parameters on the first fifth")
        contest.choose([OURS], traffic.start)
        contest.choose((*DISAGGREGATED, COLOCATED), lower)
        say(f"{traffic.name}: ours at every split")
        curve = contest.curve(OURS)
        say(f"{traffic.name}: {len(DISAGGREGATED)} baselines at every split")
        best, colocated = contest.best(DISAGGREGATED, lower), contest.best([COLOCATED], lower)
        missed = {each.policy: contest.missed_at(each) for each in DISAGGREGATED}
    outcome = Outcome(traffic, curve, best, missed, colocated)
    outcome.repeats.append((outcome.ours.speed, best.speed if best else 0.0, colocated.speed if colocated else 0.0))
    for seed in range(1, args.seeds if traffic.seeded else 1):
        say(f"{traffic.name}: seed {seed}")
        outcome.repeats.append(_repeated(outcome, traffic.make(args.traces, seed), args))
    return outcome


def _repeated(outcome: Outcome, trace: Trace, args: argparse.Namespace) -> tuple[float, float, float]:
    with runner(trace, args.processes) as made:
        contest = Contest(made, trace, WORKERS, SPLITS, outcome.traffic.start)
        found = (outcome.ours, outcome.best, outcome.colocated)
        speeds = iter([each.speed for each in contest.again([each for each in found if each])])
    ours, best, colocated = (next(speeds) if each else 0.0 for each in found)
    return ours, best, colocated


def lines_of(outcome: Outcome) -> Iterator[str]:
    """The section of one traffic."""
    ours = outcome.ours
    yield f"## {outcome.traffic.name}"
    yield ""
    yield "| policy | best split | capacity | ours is |"
    yield "|---|---|---|---|"
    yield f"| **{ours.name}** | {ours.split} | **{ours.speed:.3f}** | |"
    for found in (outcome.best, outcome.colocated):
        if found is not None:
            yield f"| {found.name} | {found.split} | {found.speed:.3f} | {ours.speed / found.speed:.2f} x |"
    for policy, speed in sorted(outcome.missed.items(), key=lambda pair: -pair[1]):
        if outcome.best is None or policy != outcome.best.settings.policy:
            yield f"| {policy} | any | below {speed:.3f} | above {ours.speed / speed:.2f} x |"
    yield ""
    yield "| ours at | " + " | ".join(found.split for found in outcome.curve) + " |"
    yield "|---" * (len(outcome.curve) + 1) + "|"
    yield "| capacity | " + " | ".join(f"{found.speed:.3f}" for found in outcome.curve) + " |"
    yield ""
    if len(outcome.repeats) > 1:
        seeds = ", ".join(f"{a:.3f} / {b:.3f} / {c:.3f}" for a, b, c in outcome.repeats)
        yield f"Seeds (ours / best with two pools / colocated, at these splits and parameters): {seeds}."
        yield ""


def flatness(outcome: Outcome) -> tuple[str, bool]:
    """By how much the worst split from 4P to 8P is below the best of these."""
    speeds = [found.speed for found in outcome.curve if FLAT[0] <= found.settings.prefill <= FLAT[1]]
    lost = 1.0 - min(speeds) / max(speeds)
    return f"{outcome.traffic.name}: capacity from {FLAT[0]}P to {FLAT[1]}P within {lost:.1%} (asked 10 %)", lost <= 0.1


def deciles(outcome: Outcome, trace: Trace) -> tuple[str, bool]:
    """Attainment of the worst tenth of prompt lengths at the capacity, and up to which speed all tenths have enough;
    the same of the best baseline."""
    ours, even = _worst_decile(outcome.ours, outcome.ours.speed, trace), _even(outcome.ours, trace)
    text = (
        f"{outcome.traffic.name}: worst decile of prompt lengths {ours:.1%} at the capacity (asked {EVEN:.0%}); "
        f"all have {EVEN:.0%} up to {even:.3f}"
    )
    if outcome.best is not None:
        other, evenly = _worst_decile(outcome.best, outcome.best.speed, trace), _even(outcome.best, trace)
        times = f", ours is {even / evenly:.2f} x" if evenly else ""
        text += f"; with the best baseline {other:.1%}, up to {evenly:.3f}{times}"
    return text, ours >= EVEN


def _even(found: Found, trace: Trace) -> float:
    """The highest speed, in steps of 1 % from the capacity down, at which every decile has enough; 0 far below."""
    speed = found.speed
    while speed > found.speed / 2:
        if _worst_decile(found, speed, trace) >= EVEN:
            return speed
        speed /= 1.01
    return 0.0


def _worst_decile(found: Found, speed: float, trace: Trace) -> float:
    shares: list[float] = replay(sped_up(trace, speed), found.settings).summary()["attainment_by_decile"]
    return min(shares)


def gap(outcome: Outcome, trace: Trace) -> tuple[str, bool]:
    """To what nobody could surpass, workers of any role: at the target; with enough in every decile, too; and of those
    that find no more in caches than ours does, since who comes back is not known."""
    ours = outcome.ours
    settings = replace(ours.settings, prefill=0, decode=0, both=WORKERS)
    cached = replay(sped_up(trace, ours.speed), ours.settings).columns.cached
    plain = bound_capacity(trace, settings, TARGET)
    even, evenly = bound_capacity(trace, settings, TARGET, decile=EVEN), _even(ours, trace)
    alike = bound_capacity(trace, settings, TARGET, cached=cached)
    lost = 1.0 - ours.speed / plain
    text = (
        f"{outcome.traffic.name}: {lost:.1%} below the bound of {plain:.3f}, any role (asked 30 %); with {EVEN:.0%} in "
        f"every decile {1.0 - evenly / even:.1%} below {even:.3f}; {1.0 - ours.speed / alike:.1%} below {alike:.3f}, "
        f"the bound of whoever finds no more in caches"
    )
    return text, lost <= 0.3


def larger(args: argparse.Namespace) -> tuple[str, bool]:
    """Twice the workers, on the first traffic."""
    trace = TRAFFIC[0].make(args.traces, 0)
    with runner(trace, args.processes) as made:
        contest = Contest(made, trace, LARGER, LARGER_SPLITS, 2 * TRAFFIC[0].start)
        start = 2 * TRAFFIC[0].start
        contest.choose([OURS], start)
        contest.choose(DISAGGREGATED, RIVALS_START * start)
        ours, best = contest.best([OURS], start), contest.best(DISAGGREGATED, RIVALS_START * start)
    if ours is None or best is None:
        return "24 workers: nobody has a capacity", False
    ratio = ours.speed / best.speed
    text = (
        f"{TRAFFIC[0].name}, {LARGER} workers: {ours.speed:.3f} at {ours.split} against {best.speed:.3f} "
        f"of {best.name} at {best.split}: {ratio:.2f} x (asked {ASKED_LARGER})"
    )
    return text, ratio >= ASKED_LARGER


def verdicts(outcomes: list[Outcome], args: argparse.Namespace) -> Iterator[tuple[str, bool]]:
    """A sentence for each thing that is asked, and whether it holds."""
    for outcome in outcomes:
        for ratio, asked, what in zip(
            outcome.ratios(), outcome.traffic.asked, ("best with two pools", "colocated"), strict=True
        ):
            told = f" (asked {asked})" if asked else ""
            yield f"{outcome.traffic.name}: {ratio:.2f} x the {what}{told}", ratio >= asked
    if len(outcomes) == len(TRAFFIC):
        both = [outcome.ratios() for outcome in outcomes]
        means = geometric_mean([a for a, _ in both]), geometric_mean([min(a, b) for a, b in both])
        for mean, asked, what in zip(means, MEANS, ("the best with two pools", "the best of all"), strict=True):
            yield f"geometric mean over {len(both)} traffics: {mean:.2f} x {what} (asked {asked})", mean >= asked
    for outcome in outcomes:
        yield flatness(outcome)
    for outcome in outcomes[:2]:
        trace = outcome.traffic.make(args.traces, 0)
        yield deciles(outcome, trace)
        yield gap(outcome, trace)
    if args.larger:
        yield larger(args)


def main() -> int:
    """Measure, write, and say whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--only", default="", help="names of traffics, or parts of them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--larger", action=argparse.BooleanOptionalAction, default=True, help="24 workers, too")
    args = parser.parse_args()
    started, missed = time.perf_counter(), 0
    text = ["# Capacity against every baseline", "", f"{describe()}; {FORM} core", ""]
    outcomes: list[Outcome] = []
    for traffic in TRAFFIC:
        if args.only and not any(part in traffic.name for part in args.only.split(",")):
            continue
        outcomes.append(contested(traffic, args))
        for line in lines_of(outcomes[-1]):
            print(line, flush=True)
            text.append(line)
    text += ["## What was asked", ""]
    for sentence, holds in verdicts(outcomes, args):
        text.append(f"- {sentence}: {'met' if holds else '**missed**'}.")
        print(text[-1], flush=True)
        missed += not holds
    text += ["", f"Took {(time.perf_counter() - started) / 60:.0f} minutes."]
    if not args.only:
        (HERE / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
