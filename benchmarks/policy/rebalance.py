"""What it is worth to move sequences off decode workers whose KV memory runs out, before they are preempted.

    python benchmarks/policy/rebalance.py [--requests 3000] [--kv-tokens 60000] [--prefill 2] [--decode 4]

Outputs that nobody can predict, on workers with little KV memory: profile Llama-3.1-70B on 4 H100 (TP4), TTFT SLO 1 s +
2 x unloaded prefill, ITL SLO 50 ms, prompts of 600 tokens (median; mean 1,200), gamma arrivals with a coefficient of
variation of 2. Two kinds of output lengths, all of one tenant and class:

- heavy tail: lognormal, median 400 tokens, mean 1,600, at most 16,000.
- phases: a minute of short answers (median 150, mean 250), then a minute of long ones (median 2,500, mean 3,500), and
  so on: those that come first in a minute are predicted by the minute before.

Each at several rates, with ``rebalance`` off and on. Preempted: attempts that lost their KV for want of memory. Writes
benchmarks/policy/rebalance.md.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import describe

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy.base import Policy
from twinpool.router.state import Limits
from twinpool.sim.generate import Spread
from twinpool.sim.replay import FORM, build, result_of, run
from twinpool.sim.settings import Settings
from twinpool.sim.trace import NO_TAIL, Trace

HERE = Path(__file__).parent
BLOCK_TOKENS = 64
CV = 2.0
PHASE_S = 60.0
PROMPT = Spread(600, 1_200, 16, 16_000)
TAIL = Spread(400, 1_600, 8, 16_000)
BRIEF, LONG = Spread(150, 250, 8, 2_000), Spread(2_500, 3_500, 64, 16_000)
RATES = {"heavy tail": (2.0, 2.75, 3.25), "phases": (1.5, 2.0, 2.5)}  # requests a second
HEAD = (
    "| requests a second | rebalance | preempted | moved | met both SLOs | missed TTFT | missed ITL | gaps above 1 s "
    "| in time a second |\n" + "|---" * 9 + "|"
)  # fmt: skip


class Counting(Core):
    """A core that counts what became of running sequences."""

    def __init__(self, policy: Policy, limits: Limits) -> None:
        super().__init__(policy, limits)
        self.preempted = self.moved = 0

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        """See Core."""
        if isinstance(event, ev.AttemptLost) and not event.counts:
            request = self.state.attempt_of(event.worker, event.attempt)
            if request is not None and request.move is not None and request.move.yields:
                self.moved += 1
            elif request is not None:
                self.preempted += 1
        return super().on(event, now)


def traffic(kind: str, requests: int, rate: float, seed: int = 0) -> Trace:
    """See the module's docstring; no two prompts share anything."""
    rng = random.Random(seed)
    arrival, prompt, output, offsets = array("d"), array("q"), array("q"), array("q", [0])
    now, shape = 0.0, 1 / CV**2
    for _ in range(requests):
        now += rng.gammavariate(shape, 1 / (rate * shape))
        arrival.append(now)
        prompt.append(PROMPT.tokens(rng))
        offsets.append(offsets[-1] + prompt[-1] // BLOCK_TOKENS)
        spread = TAIL if kind == "heavy tail" else LONG if now // PHASE_S % 2 else BRIEF
        output.append(spread.tokens(rng))
    hashes = array("q", range(offsets[-1]))
    return Trace(kind, BLOCK_TOKENS, arrival, prompt, output, hashes, offsets, tail=array("q", [NO_TAIL] * requests))


def row(kind: str, rate: float, rebalance: str, args: argparse.Namespace) -> str:
    """One run, as a line of the table."""
    trace = traffic(kind, args.requests, rate)
    settings = Settings(
        prefill=args.prefill, decode=args.decode, kv_tokens=args.kv_tokens, parameters={"rebalance": rebalance}
    )
    loop = build(trace, settings, make_core=Counting)
    run(loop)
    core = loop.core
    assert isinstance(core, Counting)
    result = result_of(loop, trace, settings)
    columns, figures = result.columns, result.summary()
    done = columns.completed()
    late = int((~done | (columns.ttft() > columns.ttft_limit)).sum())
    torn = int((done & (columns.output > 1) & (columns.itl > columns.itl_limit)).sum())
    gaps = int((done & (columns.max_gap > 1.0)).sum())
    return (
        f"| {rate} | {rebalance} | {core.preempted} | {core.moved} | {figures['attainment']:.2%} | {late} | {torn} "
        f"| {gaps} | {figures['goodput_rps']:.3f} |"
    )


def sections(args: argparse.Namespace) -> Iterator[str]:
    """All tables."""
    for kind, rates in RATES.items():
        head = f"## Outputs: {kind}\n\n{HEAD}"
        print(head, flush=True)
        yield head
        for rate in rates:
            for rebalance in ("off", "on"):
                line = row(kind, rate, rebalance, args)
                print(line, flush=True)
                yield line
        yield ""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--kv-tokens", type=int, default=60_000)
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=4)
    args = parser.parse_args()
    started = time.perf_counter()
    about = (
        f"{args.prefill}P+{args.decode}D, {args.kv_tokens:,} KV tokens a worker, {args.requests:,} requests a line; "
        "a request may miss both SLOs. Missed TTFT: refused ones, too."
    )
    text = [f"# Moving sequences before they are preempted\n\n{describe()}; {FORM} core\n\n{about}\n", *sections(args)]
    text.append(
        f"Made with `python benchmarks/policy/rebalance.py --requests {args.requests}` in "
        f"{time.perf_counter() - started:.0f} s. "
        "The 128 tokens booked ahead (router/state.py) were chosen on this traffic."
    )
    (HERE / "rebalance.md").write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
