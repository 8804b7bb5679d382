"""Explains one request of a simulated run: the same run, with a core that watches it, until the request is over."""

from __future__ import annotations

import contextlib
from functools import partial

from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.router.story import Story
from twinpool.router.witness import WatchedCore
from twinpool.sim.replay import Watch, build, run
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace


class _OverError(Exception):
    """The request is over: the rest of the run does not matter."""


class _Until(WatchedCore):
    """Stops the run with the request's last event."""

    def on(self, event: ev.Event, now: float) -> list[ev.Action]:
        actions = super().on(event, now)
        if self.story.over:
            raise _OverError
        return actions


def explain(trace: Trace, settings: Settings, request: int, watch: Watch | None = None) -> Story:
    """The story of the request in row ``request`` of the trace, the first is 0. Raises ConfigError if it has none."""
    if not 0 <= request < len(trace):
        raise ConfigError(f"--request {request}: the trace has {len(trace)} requests, the first is 0")
    loop = build(trace, settings, watch=watch, make_core=partial(_Until, request))
    core = loop.core
    assert isinstance(core, _Until)
    with contextlib.suppress(_OverError):
        run(loop)
    core.story.id = str(request)
    return core.story
