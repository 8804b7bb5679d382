"""Live, not only simulated: the policies on a real cluster of emulated engines, one after the other, on real time.

    python benchmarks/life/policies.py [--seconds 600] [--kind agentic] [--rate R] [--prefer]

4 prefill and 2 decode workers that take the time of Llama-3.1-70B on 4 H100 (TP4) at full speed, everything else real:
processes, sockets, gRPC, transfers. Generated multi-turn traffic in closed loops, at 80 % of the rate at which the
default policy still serves 99 % in time by its simulation (``--rate``: requests a second in its place). Each policy has
a cluster of its own and the same traffic; then its logs make a profile, and the requests as they were sent are
simulated with it. TTFT SLO 1 s + 2 x unloaded prefill; ITL SLO 50 ms, the mean of its longest tenth of gaps.

Writes benchmarks/life/policies.md for runs of full length; exit status 1 where ours is not ahead, or a policy is
further from its simulation than allowed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from client import Answer
from machine import describe
from run import KINDS, Logs, as_sent, calibrate, live, simulate

from twinpool.sim.gaps import quantile
from twinpool.sim.generate import generate, kind_names
from twinpool.sim.replay import FORM, replay
from twinpool.sim.result import Result
from twinpool.sim.scenario import from_config
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, select

HERE = Path(__file__).parent
POLICIES = ("least_seconds", "dynamo", "least_requests", "round_robin")
LOAD, TARGET, ALLOWED = 0.8, 0.99, 0.10
FULL_S, SEED = 600.0, 11
LONGEST = 0.1  # share of a request's gaps
HEAD = (
    "| policy | requests | TTFT p99 live, ms | simulated | off | met both SLOs, live | simulated | off | failed "
    "| router, cores | simulation |"
)
CONFIG = """\
apiVersion: twinpool/v1
kind: Cluster
pools:
  prefill: {{workers: 4}}
  decode: {{workers: 2}}
worker:
  engine: emulated
  chunk_tokens: 2048
  max_batch: 256
  emulated: {{profile: llama-70b-h100-tp4}}
scheduling:
  policy: {policy}
  classes:
    realtime: {{ttft_ms: 1000, ttft_factor: 2, itl_ms: 50}}
log_level: warning
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one policy. ``late_s``: TTFT of which 99 % are no longer; ``met``: share of requests that met both SLOs."""

    policy: str
    late_s: tuple[float, float]  # live, simulated
    met: tuple[float, float]
    requests: int
    failed: int
    router: float  # cores

    @property
    def off(self) -> tuple[float, float]:
        """Simulated against live."""
        return self.late_s[1] / self.late_s[0] - 1.0, self.met[1] / self.met[0] - 1.0 if self.met[0] else math.inf

    def text(self) -> str:
        """A row."""
        late, met = self.off
        far = max(abs(late), abs(met)) > ALLOWED
        ttft_ms = f"{1e3 * self.late_s[0]:,.0f} | {1e3 * self.late_s[1]:,.0f} | {late:+.1%}"
        return (
            f"| {self.policy} | {self.requests:,} | {ttft_ms} | {self.met[0]:.2%} | {self.met[1]:.2%} | {met:+.1%} "
            f"| {self.failed} | {self.router:.2f} | {'**too far**' if far else 'near'} |"
        )


def main() -> None:
    """Each policy in turn, and the table."""
    options = _options()
    with tempfile.TemporaryDirectory() as folder:
        root = options.keep or Path(folder)
        configs = {policy: _config(root, policy) for policy in options.policies}
        rate = options.rate or LOAD * _most(options.kind, from_config(configs[options.policies[0]], None, None))
        trace = generate(options.kind, seconds=options.seconds, rate=rate, seed=SEED)
        outcomes = []
        for policy, config in configs.items():
            outcomes.append(measure(policy, config, trace, Logs(root / policy), options.prefer, options.seconds))
            print(outcomes[-1].text(), flush=True)
    good, text = report(outcomes, options, rate)
    print(text)
    if options.seconds >= FULL_S:
        (HERE / "policies.md").write_text(text, encoding="utf-8")
    raise SystemExit(not good)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=FULL_S, help="of each live run")
    parser.add_argument("--kind", choices=kind_names(), default="agentic")
    parser.add_argument("--rate", type=float, help="requests a second, in place of a search for it")
    parser.add_argument("--policies", nargs="+", default=POLICIES, help="ours first")
    parser.add_argument("--prefer", action="store_true", help="CPU before other work of the machine; needs root")
    parser.add_argument("--keep", type=Path, help="folder for all logs; a temporary one if not given")
    return parser.parse_args()


def _config(root: Path, policy: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    file = root / f"{policy}.yaml"
    file.write_text(CONFIG.format(policy=policy), encoding="utf-8")
    return file


def _most(kind: str, settings: Settings) -> float:
    """Requests a second at which enough of them are in time, to 2 %."""

    def enough(rate: float) -> bool:
        trace = generate(kind, seconds=FULL_S, rate=rate, seed=SEED)
        return float(replay(trace, settings).summary()["attainment"]) >= TARGET

    low, high = 1.0, 2.0
    while enough(high):
        low, high = high, 2.0 * high
    while high > 1.02 * low:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def measure(policy: str, config: Path, trace: Trace, logs: Logs, prefer: bool, seconds: float) -> Outcome:
    """Live for so many seconds, and then the simulation of the requests that were sent."""
    answers = live(config, trace, logs, prefer, seconds)
    calibrate(KINDS["emulated"], logs)
    rows = [i for i, answer in enumerate(answers) if answer.sent]
    answers = [answers[i] for i in rows]
    sent = as_sent(select(replace(trace, after=None, think=None), rows), answers)
    simulated = simulate(config, logs.profile, sent)
    in_order = sorted(answers, key=lambda answer: answer.sent)
    ttft = [answer.ttft_s for answer in in_order if not answer.error]
    late_s = quantile(np.sort(ttft), 0.99), float(simulated.summary()["ttft_ms"]["p99"]) / 1e3
    met = _met(in_order, simulated), float(simulated.summary()["attainment"])
    cores = json.loads(logs.cores.read_text(encoding="utf-8"))
    return Outcome(policy, late_s, met, len(answers), sum(bool(answer.error) for answer in answers), cores["router"])


def _met(answers: Sequence[Answer], simulated: Result) -> float:
    """Share of the requests that met both limits, which are those that the simulation gave the same requests."""
    columns = simulated.columns
    good = 0
    for i, answer in enumerate(answers):
        if not answer.error and answer.ttft_s <= columns.ttft_limit[i]:
            gaps = sorted(answer.gaps(), reverse=True)[: math.ceil(LONGEST * (sum(answer.tokens) - 1))]
            good += not gaps or sum(gaps) / len(gaps) <= columns.itl_limit[i]
    return good / len(answers)


def report(outcomes: list[Outcome], options: argparse.Namespace, rate: float) -> tuple[bool, str]:
    """Whether all is as asked, and the text."""
    ours, *others = outcomes
    ahead = all(ours.late_s[0] < other.late_s[0] and ours.met[0] >= other.met[0] for other in others)
    near = all(max(map(abs, outcome.off)) <= ALLOWED for outcome in outcomes)
    load = f"{rate:.2f} requests a second"
    if options.rate is None:
        load += f", {LOAD:.0%} of what {ours.policy} serves in time by its simulation ({FORM})"
    what = f"{options.kind} traffic, sent for {options.seconds:g} s: {load}."
    lines = ["# Live: the policies on real time", ""]
    lines += [f"`python benchmarks/life/policies.py{' --prefer' if options.prefer else ''}`", "", describe(), ""]
    lines += [f"4 prefill + 2 decode workers, {what}", "", HEAD, "|" + "---|" * 11]
    lines += [*[outcome.text() for outcome in outcomes], ""]
    lines += [f"{ours.policy} is {'ahead of' if ahead else '**not** ahead of'} all others live, in both.", ""]
    return ahead and near, "\n".join(lines)


if __name__ == "__main__":
    main()
