"""When a worker's news of itself leave, and what they say of its steps. On a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any, TypeVarTuple

import pytest
from tests.parity.virtual import VirtualLoop, virtual_loop

from twinpool.cost import StepCost
from twinpool.proto import frames
from twinpool.workers.blocks import BlockPool
from twinpool.workers.reporter import Decoded, Reporter
from twinpool.workers.scheduler import Scheduler

ZERO = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)
HEARTBEAT_S = 0.5

Ts = TypeVarTuple("Ts")


class Rig:
    """A reporter whose router let it in at 0.0013 s, and what it said afterwards, and when."""

    def __init__(self) -> None:
        self.loop: VirtualLoop = virtual_loop(start=0.0013)
        self.pool = BlockPool(8, 4)
        self.said: list[tuple[float, frames.Frame]] = []

    def play(self, *moments: tuple[float, Decoded | None]) -> None:
        """A step ends at each moment; then 30 ms pass."""
        self.loop.run(self._play(moments))

    async def _play(self, moments: tuple[tuple[float, Decoded | None], ...]) -> None:
        scheduler = Scheduler(self.pool, ZERO, 64, 8)
        reporter = Reporter(scheduler, self._hear, lambda: True, self.loop.time)
        reporter.start(HEARTBEAT_S)
        await self.loop.sleep_until(0.030)
        self.said.clear()
        for when, decoded in moments:
            await self.loop.sleep_until(when)
            self.pool.seal(self.pool.allocate(1)[0], round(1e6 * when))
            reporter.changed(0.007, decoded)
        await self.loop.sleep_until(self.loop.time() + 0.030)
        reporter.stop()

    def _hear(self, frame: frames.Frame) -> None:
        self.said.append((self.loop.time(), frame))

    def times(self, kind: type[frames.Frame]) -> list[float]:
        """When frames of a kind left."""
        return [when for when, frame in self.said if isinstance(frame, kind)]

    def reports(self) -> list[Decoded]:
        """What each report said of decode steps."""
        said = [frame for _, frame in self.said if isinstance(frame, frames.Report)]
        return [Decoded(report.decode_batch, report.decode_context, report.decode_s) for report in said]


@pytest.mark.parametrize(
    ("changes", "reports"),
    [
        ([0.0401], [0.06]),
        ([0.0401, 0.0599], [0.06]),
        ([0.0401, 0.0601], [0.06, 0.08]),
        ([0.5], [0.52]),  # never at once, also at a multiple
        ([0.4999], [0.5]),
    ],
)
def test_changes_leave_at_multiples_of_20_ms(changes: list[float], reports: list[float]) -> None:
    rig = Rig()
    rig.play(*((when, None) for when in changes))
    assert rig.times(frames.KvEvents) == pytest.approx(reports, abs=1e-12)
    assert rig.times(frames.Report)[: len(reports)] == pytest.approx(reports, abs=1e-12)


def test_a_heartbeat_moves_no_report() -> None:
    rig = Rig()
    rig.play((0.501, None), (0.549, None))
    assert rig.times(frames.Heartbeat) == pytest.approx([0.5013])
    assert rig.times(frames.KvEvents) == pytest.approx([0.52, 0.56])


def test_a_timer_that_is_early_gives_no_second_report() -> None:
    """As those of a loop with whole milliseconds are."""

    class Hasty(VirtualLoop):
        def call_later(
            self, delay: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
        ) -> asyncio.TimerHandle:
            return self.call_at(self.time() + max(0.0, delay - 0.0006), callback, *args, context=context)

    rig = Rig()
    make: Any = Hasty
    rig.loop = make(start=0.0013)
    rig.play((0.0401, None), (0.0597, None))
    assert rig.times(frames.Report) == pytest.approx([0.0594, 0.0794])


def test_a_decode_step_is_told_once_and_the_latest_counts() -> None:
    rig = Rig()
    early, late = Decoded(3, 300, 0.015), Decoded(4, 400, 0.016)
    rig.play((0.041, early), (0.045, late), (0.049, None), (0.061, None))
    assert rig.reports() == [late, Decoded(0, 0, 0.0)]
