"""What is compared: percentiles and throughput, live and simulated, and how far they may be apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from client import Answer

from twinpool.sim.gaps import quantile
from twinpool.sim.result import Result

NAMES = {
    "ttft_p50": "TTFT p50, ms", "ttft_p90": "TTFT p90, ms", "ttft_p99": "TTFT p99, ms",
    "itl_p50": "ITL p50, ms", "itl_p99": "ITL p99, ms", "throughput": "output tokens/s",
}  # fmt: skip
Figures = Mapping[str, float]


class Row(NamedTuple):
    """One figure; ``allowed`` is a share of the live one."""

    name: str
    live: float
    simulated: float
    allowed: float

    @property
    def difference(self) -> float:
        """Of the simulated figure, as a share of the live one."""
        return self.simulated / self.live - 1.0

    @property
    def missed(self) -> bool:
        """Too far apart."""
        return not abs(self.difference) <= self.allowed

    def text(self) -> str:
        """A row of the table."""
        verdict = "**missed**" if self.missed else "met"
        return (
            f"| {self.name} | {self.live:.2f} | {self.simulated:.2f} | {100 * self.difference:+.1f} % "
            f"| {100 * self.allowed:.0f} % | {verdict} |"
        )


TABLE_HEAD = "| figure | live | simulated | difference | allowed | |\n|---|---:|---:|---:|---:|---|"


def of_live(answers: Sequence[Answer]) -> Figures:
    """Of requests that were answered; the others are told apart."""
    good = [answer for answer in answers if not answer.error]
    ttft = np.sort([answer.ttft_s for answer in good])
    gaps = np.sort(np.fromiter(chain.from_iterable(answer.gaps() for answer in good), dtype=np.float64))
    seconds = max(answer.ended for answer in good) - min(answer.sent for answer in good)
    return _named(ttft, gaps) | {"throughput": sum(sum(answer.tokens) for answer in good) / seconds}


def _named(ttft: Any, gaps: Any) -> dict[str, float]:
    figures = {f"ttft_p{p}": 1e3 * quantile(ttft, p / 100) for p in (50, 90, 99)}
    return figures | {f"itl_p{p}": 1e3 * quantile(gaps, p / 100) for p in (50, 99)}


def of_simulated(result: Result) -> Figures:
    """The same of a simulation."""
    summary = result.summary()
    figures = {f"{kind}_p{p}": summary[f"{kind}_ms"][f"p{p}"] for kind in ("ttft", "itl") for p in (50, 90, 99)}
    return figures | {"throughput": summary["throughput"]["output_tokens_per_s"]}


def rows(live: Figures, simulated: Figures, allowed: Mapping[str, float]) -> list[Row]:
    """In the order of NAMES."""
    return [Row(NAMES[key], live[key], simulated[key], allowed[key]) for key in NAMES]
