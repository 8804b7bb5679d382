"""A core fed event by event, and short names for events."""

from __future__ import annotations

import math

from tests.router.fake_worker import BLOCK_BYTES, request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.policy import LeastSeconds
from twinpool.router.request import Phase, Request
from twinpool.router.state import Limits

P, D, P2, D2 = 0, 1, 2, 3
RUNNING = [Phase.PLACED, Phase.PREFILLING, Phase.FIRST, Phase.TRANSFERRED, Phase.DECODING]


class Cell:
    """A core and its clock; by default worker 0 prefills and worker 1 decodes."""

    def __init__(
        self,
        paths: str = "split",
        limits: Limits | None = None,
        *,
        workers: bool = True,
        policy: LeastSeconds | None = None,
    ) -> None:
        self.core = Core(policy or LeastSeconds(paths), limits)
        self.now = 0.0
        if workers:
            self.on(worker_up(P, "prefill"))
            self.on(worker_up(D, "decode"))

    def on(self, event: ev.Event, after: float = 0.001) -> list[ev.Action]:
        self.now += after
        actions = self.core.on(event, self.now)
        self.core.state.check_integrity()
        return actions

    def tick(self) -> list[ev.Action]:
        """The next one, when it is wanted."""
        self.now = self.core.next_tick()
        assert self.now < math.inf
        return self.on(ev.Tick(), 0.0)

    def reach(self, phase: Phase, request: Request | None = None) -> Request:
        """A request of 10 prompt tokens (3 blocks) in that phase of path split."""
        request = request or request_of(1)
        self.on(ev.Submit(request))
        attempt = request.attempt
        steps: list[ev.Event] = [
            ev.Reserved(D, attempt, 0),
            ev.Emitted(P, attempt, 1),
            ready(attempt, 0, 3),
            verified(attempt, 0, 3),
            ev.Emitted(D, attempt, 1),
        ]
        for step in steps:
            if request.phase == phase:
                break
            self.on(step)
        assert request.phase == phase
        return request


def ready(attempt: int, first: int, count: int) -> ev.BlocksReady:
    numbers = range(first, first + count)
    blocks = b"".join(number.to_bytes(4, "little") for number in numbers)
    return ev.BlocksReady(
        P, attempt, first, count, blocks, b"".join(number.to_bytes(8, "little") for number in numbers)
    )


def verified(attempt: int, first: int, count: int, worker: int = D) -> ev.BlocksVerified:
    return ev.BlocksVerified(worker, attempt, first, count, count * BLOCK_BYTES, 0.001, "fake")


def names(actions: list[ev.Action]) -> list[str]:
    return [type(action).__name__ for action in actions]


def phase_of(request: Request) -> Phase:
    """Where it is now (a type checker believes that an attribute stays what it was)."""
    return request.phase


def refusal(actions: list[ev.Action]) -> ev.Refuse:
    (refuse,) = [action for action in actions if isinstance(action, ev.Refuse)]
    return refuse
