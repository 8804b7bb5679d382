"""The simulator against a real vLLM run: fitted on its first 100 requests, asked for all.

    python benchmarks/sim/vllm_run.py --run vllm_rtxpro6000_llama8b_requests.jsonl [--fitted 100]

The run is one of vLLM 0.19.0 (Llama-3.1-8B, bf16, one RTX PRO 6000, max_num_seqs 128, max_num_batched_tokens 2048; from
the examples of LLMServingSim 2.0, MIT): one engine that prefills and decodes, 300 requests with the times of arrival,
queueing, scheduling, first and last token. It has no step log, so the coefficients of cost.py are fitted through the
simulator: those with which the first requests' own times (arrival to first token; first to last token) come out best.
Of all other requests the simulator knows when they arrive and how long prompt and answer are, never a measured time.

What is minimised is the sum of the logarithms of two root mean squares over the fitted requests: of the error of the
time to the first token in seconds, and of the relative error of the time from first to last token (the maximum
likelihood of normal errors of unknown size). Levenberg-Marquardt (Marquardt, 1963) on the logarithms of the
coefficients, with central differences, from two starting points: the 8B profiles of A100 and H100.

Results go to benchmarks/sim/vllm_run.md.
"""

from __future__ import annotations

import argparse
import tempfile
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from twinpool.cost import StepCost
from twinpool.errors import ConfigError
from twinpool.router.policy.base import NOBODY, Placement, Policy, View
from twinpool.router.policy.least_seconds import LeastSeconds
from twinpool.router.request import Request
from twinpool.sim.calibrate import write_profile
from twinpool.sim.profiles import ProfileFile, load_profile
from twinpool.sim.replay import build, run
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace, no_hashes

HERE = Path(__file__).parent
SEATS, STEP_TOKENS = 128, 2048  # max_num_seqs, max_num_batched_tokens
KV_TOKENS = 500_000  # what 96 GB leave beside the weights; the run never held more than 175,000, so it does not matter
KV_BYTES = 131_072  # a token
STARTS = ("a100_sxm/llama-3.1-8b/tp1", "h100_sxm/llama-3.1-8b/tp1")
COEFFICIENTS = ("c0", "a", "b", "d0", "d1", "d2")
ROUNDS, TRIES = 20, 8
ENOUGH = 1e-4  # less gain than that ends the search
STEP, EDGE_STEP = 0.02, 0.005  # of the central differences: of a logarithm, in seconds
LONGEST = 0.5  # of a logarithm, that one round may move
TTFT_GOAL, TPOT_GOAL = 0.05, 0.02

Floats = npt.NDArray[np.float64]


class Row(msgspec.Struct):
    """A line of the run; ``arrival_time`` is of another clock than the rest."""

    input_toks: int
    output_toks: int
    arrival_time: float
    queued_ts: float
    first_token_ts: float
    last_token_ts: float


class Times(NamedTuple):
    """Seconds, one entry a request."""

    ttft: Floats  # from arrival to the first token
    decode: Floats  # from the first token to the last


@dataclass(frozen=True)
class Run:
    """What arrived, and the measured times."""

    trace: Trace
    times: Times
    queued: Floats  # seconds from arrival until the engine had taken the request in

    def tpot(self, times: Times) -> Floats:
        """Seconds a token after the first."""
        tokens: Floats = np.asarray(self.trace.output, dtype=np.float64)
        return times.decode / (tokens - 1.0)


class EngineQueue:
    """vLLM's own queue in front of one engine: first come, first served, while a seat is free."""

    name = "engine_queue"
    early = rebalances = False
    by_deadline = True  # all have the same time to their first token

    def on_room(self, request: Request, view: View, now: float) -> Placement | None:
        """A seat, from the prompt's start to the last token."""
        worker = view.pool.decode[0]
        if worker.batch + len(worker.prefills) >= worker.max_batch or not worker.fits(request.length):
            return None
        return Placement(worker.id, worker.id, "local", "", 0, worker.prefill_s(request.length, 0))

    def decode_for(self, request: Request, view: View, now: float) -> int:
        """Nothing moves."""
        return NOBODY

    def needs(self, request: Request) -> tuple[tuple[str, ...], ...]:
        """One engine."""
        return (("decode",),)

    def next_room(self, view: View, now: float) -> float:
        """Only an event makes room."""
        return float("inf")


@dataclass(frozen=True)
class Setup:
    """How the simulator stands in for the engine. ``edge``: a constant in each first token's time is fitted too."""

    name: str
    policy: Callable[[], Policy] = EngineQueue
    chunk_tokens: int = STEP_TOKENS - SEATS
    edge: bool = True

    def settings(self, profile: Path) -> Settings:
        """One worker for everything; deadlines, ITL and queue bound nothing, equal deadlines keep the order."""
        return Settings(
            prefill=0, decode=0, both=1, profile=str(profile), ttft_s=3600.0, ttft_factor=0.0, itl_s=1000.0,
            chunk_tokens=self.chunk_tokens, max_batch=SEATS, latency_s=0.0, max_queue=1 << 20, max_queue_s=1e9,
        )  # fmt: skip


SETUPS = (
    Setup("as above"),
    Setup("`chunk_tokens` 2048: a step may hold 2048 prompt tokens beside its decodes", chunk_tokens=STEP_TOKENS),
    Setup("no constant (`edge_s` 0)", edge=False),
    Setup("the built-in policy `least_seconds`, `paths` local", policy=lambda: LeastSeconds("local")),
)


def load_run(path: Path, fitted: int) -> Run:
    """The run; its two clocks are laid together by the quickest queueing among the first ``fitted`` requests.

    Raises ConfigError where the file is none.
    """
    try:
        rows = msgspec.json.Decoder(Row).decode_lines(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: not usable as a run ({error})") from None
    if not 1 <= fitted <= len(rows):
        raise ConfigError(f"{path} has {len(rows)} requests: --fitted {fitted} is not among 1 to {len(rows)}")
    arrival = np.array([row.arrival_time for row in rows])
    queued = np.array([row.queued_ts for row in rows])
    first = np.array([row.first_token_ts for row in rows])
    last = np.array([row.last_token_ts for row in rows])
    arrival = arrival + (queued - arrival)[:fitted].min()
    trace = Trace(
        path.stem, 0, array("d", (arrival - arrival[0]).tolist()), array("q", [row.input_toks for row in rows]),
        array("q", [row.output_toks for row in rows]), array("q"), no_hashes(len(rows)),
    )  # fmt: skip
    trace.check_integrity()
    return Run(trace, Times(first - arrival, last - first), queued - arrival)


class Simulated:
    """The simulator as a function of the coefficients."""

    def __init__(self, trace: Trace, setup: Setup, folder: Path) -> None:
        self._trace = trace
        self._setup = setup
        self._folder = folder
        self._runs = 0

    def __call__(self, cost: StepCost) -> Times:
        """Times of all requests, without ``edge_s``."""
        self._runs += 1
        path = self._folder / f"{self._runs}.json"
        write_profile(path, profile_of("fitted", cost))
        loop = build(self._trace, self._setup.settings(path), self._setup.policy())
        run(loop)
        shown = np.asarray(loop.record.shown)
        return Times(shown - np.asarray(loop.record.arrival), np.asarray(loop.record.ended) - shown)


def profile_of(name: str, cost: StepCost) -> ProfileFile:
    """The engine as a profile; what does not matter here is left open."""
    return ProfileFile(
        name=name, gpus=1, kv_bytes_per_token=KV_BYTES, kv_tokens=KV_TOKENS, link_bytes_per_s=25e9,
        price_per_gpu_hour=None, idle_watts_per_gpu=None, busy_watts_per_gpu=None, fit=cost, fit_mean_error=0.0,
        fit_worst_error=0.0, source={"fit": "benchmarks/sim/vllm_run.py"},
    )  # fmt: skip


class Fit(NamedTuple):
    """Coefficients, the constant of each time to the first token, and root mean squares over the fitted requests."""

    cost: StepCost
    edge_s: float
    ttft_rms: float  # seconds
    decode_rms: float  # share
    score: float


def fit(run: Run, setup: Setup, folder: Path, fitted: int, starts: Sequence[StepCost]) -> Fit:
    """The best of what is found from each start; see the top of this file."""
    simulated = Simulated(run.trace, setup, folder)
    found = [_descend(run, simulated, setup.edge, fitted, start) for start in starts]
    return min(found, key=lambda one: one.score)


def _descend(run: Run, simulated: Simulated, edge: bool, fitted: int, start: StepCost) -> Fit:
    def errors(at: Floats) -> tuple[Floats, Floats]:
        times = simulated(_cost(at))
        ttft = times.ttft[:fitted] + (at[6] if edge else 0.0) - run.times.ttft[:fitted]
        return ttft, times.decode[:fitted] / run.times.decode[:fitted] - 1.0

    at = np.array([np.log(getattr(start, name)) for name in COEFFICIENTS] + [0.0] * edge)
    seen, damping = errors(at), 1e-2
    for _ in range(ROUNDS):
        before = _score(seen)
        scale = [_rms(part) for part in seen]
        gradients = _gradients(errors, at, scale)
        wanted = gradients.T @ np.concatenate([part / size for part, size in zip(seen, scale, strict=True)])
        curvature = gradients.T @ gradients
        for _ in range(TRIES):
            damped = curvature + damping * np.diag(np.diag(curvature) + 1e-6)
            move = np.clip(-np.linalg.solve(damped, wanted), -LONGEST, LONGEST)
            there = at + move
            there[len(COEFFICIENTS) :] = np.maximum(there[len(COEFFICIENTS) :], 0.0)  # edge_s
            new = errors(there)
            if _score(new) < before:
                at, seen, damping = there, new, damping / 4.0
                break
            damping *= 4.0
        if before - _score(seen) < ENOUGH:
            break
    return Fit(_cost(at), float(at[6]) if edge else 0.0, _rms(seen[0]), _rms(seen[1]), _score(seen))


def _gradients(
    errors: Callable[[Floats], tuple[Floats, Floats]], at: Floats, scale: Sequence[float]
) -> Floats:  # [error, coefficient]
    columns = []
    for index in range(len(at)):
        step = np.zeros(len(at))
        step[index] = STEP if index < len(COEFFICIENTS) else EDGE_STEP
        pairs = zip(errors(at + step), errors(at - step), scale, strict=True)
        columns.append(np.concatenate([(up - down) / (2.0 * step[index] * size) for up, down, size in pairs]))
    return np.array(columns).T


def _cost(at: Floats) -> StepCost:
    return StepCost(*(float(value) for value in np.exp(at[: len(COEFFICIENTS)])))


def _rms(values: Floats) -> float:
    return max(1e-12, float(np.sqrt(np.mean(values**2))))


def _score(errors: tuple[Floats, Floats]) -> float:
    return float(sum(np.log(_rms(part)) for part in errors))


class Comparison(NamedTuple):
    """Means and percentiles over some requests: (measured, simulated) in milliseconds."""

    ttft: dict[str, tuple[float, float]]
    tpot: dict[str, tuple[float, float]]


def compare(run: Run, times: Times, requests: slice) -> Comparison:
    """Measured against simulated."""
    pairs = ((run.times.ttft, times.ttft), (run.tpot(run.times), run.tpot(times)))
    parts = [{name: (_figure(seen[requests], name), _figure(made[requests], name)) for name in FIGURES}
             for seen, made in pairs]  # fmt: skip
    return Comparison(*parts)


FIGURES = ("mean", "p50", "p90", "p99")


def _figure(seconds: Floats, name: str) -> float:
    return 1000.0 * float(seconds.mean() if name == "mean" else np.percentile(seconds, float(name[1:])))


def error(pair: tuple[float, float]) -> float:
    """Share that the simulated figure is off."""
    return pair[1] / pair[0] - 1.0


def predict(run: Run, setup: Setup, found: Fit, folder: Path) -> Times:
    """All requests with what was fitted."""
    times = Simulated(run.trace, setup, folder)(found.cost)
    return Times(times.ttft + found.edge_s, times.decode)


def main() -> None:
    """Fit, predict, write the note."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--fitted", type=int, default=100)
    options = parser.parse_args()
    measured = load_run(options.run, options.fitted)
    starts = [load_profile(name).fit for name in STARTS]
    made: list[tuple[Setup, Fit, Times]] = []
    for setup in SETUPS:
        with tempfile.TemporaryDirectory() as folder:
            found = fit(measured, setup, Path(folder), options.fitted, starts if setup is SETUPS[0] else starts[:1])
            made.append((setup, found, predict(measured, setup, found, Path(folder))))
        print(setup.name, found, flush=True)
    text = report(measured, made, options.fitted)
    (HERE / "vllm_run.md").write_text(text, encoding="utf-8")
    print(text)


def report(run: Run, made: Sequence[tuple[Setup, Fit, Times]], fitted: int) -> str:
    """The note that is committed."""
    _, found, times = made[0]
    count = len(run.trace)
    whole = compare(run, times, slice(0, count))
    cost = found.cost
    met = abs(error(whole.ttft["mean"])) <= TTFT_GOAL and abs(error(whole.tpot["mean"])) <= TPOT_GOAL
    parts = [("fitted", slice(0, fitted)), ("never fitted", slice(fitted, count)), ("all", slice(0, count))]
    lines = [
        "| requests | figure | measured | simulated | off |", "|---|---|---|---|---|",
        *[line for name, requests in parts for line in _rows(name, requests, compare(run, times, requests))],
    ]  # fmt: skip
    others = ["| set-up, fitted anew on the same requests | TTFT mean, all | TPOT mean, all |", "|---|---|---|"]
    for setup, _, theirs in made:
        all_of = compare(run, theirs, slice(0, count))
        others.append(f"| {setup.name} | {error(all_of.ttft['mean']):+.2%} | {error(all_of.tpot['mean']):+.2%} |")
    queued = 1000.0 * float((run.times.ttft - run.queued).mean())
    return NOTE.format(
        fitted=fitted, count=count, table="\n".join(lines), others="\n".join(others), queued=queued,
        verdict="met" if met else "NOT met", ttft=error(whole.ttft["mean"]), tpot=error(whole.tpot["mean"]),
        ttft_rms=1e3 * found.ttft_rms, decode_rms=found.decode_rms, edge=1e3 * found.edge_s, c0=1e3 * cost.c0,
        a=1e6 * cost.a, b=1e9 * cost.b, d0=1e3 * cost.d0, d1=1e6 * cost.d1, d2=1e9 * cost.d2,
    )  # fmt: skip


def _rows(name: str, requests: slice, seen: Comparison) -> list[str]:
    label = f"{name}, {requests.start + 1} to {requests.stop}"
    return [
        f"| {label} | {what} {figure} | {pair[0]:,.1f} ms | {pair[1]:,.1f} ms | {error(pair):+.2%} |"
        for what, figures in (("TTFT", seen.ttft), ("TPOT", seen.tpot))
        for figure, pair in figures.items()
    ]


NOTE = """# The simulator against a real vLLM run

`python benchmarks/sim/vllm_run.py --run vllm_rtxpro6000_llama8b_requests.jsonl --fitted {fitted}`

vLLM 0.19.0, Llama-3.1-8B in bf16 on one RTX PRO 6000, max_num_seqs 128, max_num_batched_tokens 2048, {count} requests
at 10 a second (examples of LLMServingSim 2.0, MIT). Fitted on the times of the first {fitted} requests, through the
simulator, as the script says; of the others it knows arrivals and lengths only, and nothing was chosen by looking at
how well they come out. Asked for: TTFT mean within 5 %, TPOT mean within 2 % of all {count}: {verdict}
({ttft:+.2%}, {tpot:+.2%}).

{table}

TTFT counts from arrival at the server; from the engine's own queue, as the run's authors count, it is {queued:,.0f} ms.

Coefficients (cost.py): c0 {c0:.3f} ms, a {a:.2f} us, b {b:.3f} ns, d0 {d0:.3f} ms, d1 {d1:.2f} us, d2 {d2:.2f} ns;
{edge:.1f} ms in each time to the first token (`edge_s`). Over the fitted requests the root mean square of the error is
{ttft_rms:.0f} ms for the first token and {decode_rms:.2%} for the time from first to last token.

## What differs between vLLM and our worker, and the setting that stands for it
- vLLM's engine has the queue: first come, first served, at most 128 requests in it. Ours may decode more than
  `max_batch` sequences in turns, and the router keeps the queue: the policy here gives out 128 seats in order of
  arrival (`EngineQueue`, 20 lines; `scheduling.policy` takes any class). Policies that bind at arrival (`round_robin`)
  send all prompts at once and leave it to the worker who decodes: they do not stand for this engine.
- vLLM limits the tokens of a step, decodes included, to 2048; our `chunk_tokens` counts prompts only: 2048 - 128.
- vLLM limits no step by an ITL SLO: `itl_s` is so large that chunks are not cut by it. Deadlines are an hour, so that
  none is missed and order of deadline is order of arrival.
- vLLM plans a step while the one before runs, so a prompt or a free seat is seen a step later. Ours plans at the end of
  a step: a free seat is used a step later too, since the router has to answer; a prompt that finds a seat is not, which
  the constant in each first token stands for.
- Chunks of ours end at blocks of 16 tokens. There are no prefix hashes in the run, so nothing is cached.

## How much the choices matter
{others}
"""


if __name__ == "__main__":
    main()
