"""``twinpool sim explain``: why a request of a simulated run went where it went."""

from __future__ import annotations

from typing import Annotated

import typer

from twinpool.cli import sim
from twinpool.cli.common import ConfigFile, SetOptions, reporting

Row = Annotated[int, typer.Option("--request", metavar="N", min=0, help="Row of the trace; the first is 0.")]


@sim.app.command()
def explain(
    trace: sim.TraceFile, request: Row, prefill: sim.Prefill = None, decode: sim.Decode = None, both: sim.Both = None,
    profile: sim.ProfileName = None, policy: sim.PolicyName = None, param: sim.Parameters = None,
    speed: sim.Speed = 1.0, limit: sim.Limit = None, spread_timestamps: sim.Spread = False,
    slo_ttft_ms: sim.TtftMs = None, slo_ttft_factor: sim.TtftFactor = None, slo_itl_ms: sim.ItlMs = None,
    chunk_tokens: sim.ChunkTokens = None, scenario: sim.Scenario = None, seed: sim.Seed = 0,
    skip_bad: sim.SkipBad = False, json_file: sim.JsonFile = None, config_file: ConfigFile = None,
    sets: SetOptions = None,
) -> None:  # fmt: skip
    """Why a request of `replay` went where it went: candidates, predicted times, the choice, and what came of it."""
    with reporting():
        screen = sim.Screen(json_file)
        settings = sim.settings_of(config_file, sets, scenario, param, prefill=prefill, decode=decode, both=both,
                                   profile=profile, policy=policy, ttft_ms=slo_ttft_ms, ttft_factor=slo_ttft_factor,
                                   itl_ms=slo_itl_ms, chunk_tokens=chunk_tokens)  # fmt: skip
        settings = sim.ready(settings, seed)
        loaded = sim.load(trace, screen, limit=limit, spread=spread_timestamps, seed=seed, skip_bad=skip_bad,
                          factor=speed)  # fmt: skip
        from twinpool.cli.explain_text import show
        from twinpool.sim.explain import explain as run

        with screen.progress("replaying", len(loaded.trace)) as done:
            story = run(loaded.trace, settings, request, watch=lambda count, _: done(count))
        notices = []
        if settings.edge_s:
            notices.append(f"the router's edge adds {1000.0 * settings.edge_s:.1f} ms to its times in replay")
        screen.notices(notices)
        screen.write({"trace": loaded.trace.name, **story.figures(), "notices": loaded.notices + notices})
        if not screen.only_json:
            show(story)
