"""Synthetic traffic: the promised shapes, prefixes that are what they say, the same for the same seed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from itertools import islice

import pytest

from twinpool.errors import ConfigError
from twinpool.sim.generate import BURSTS, KINDS, MIXED, generate, kind_names
from twinpool.sim.trace import Trace, is_chained
from twinpool.sim.trace_stats import bursts, stats

PROGRAM = """
import sys
from twinpool.sim.generate import generate
from twinpool.sim.trace_write import trace_lines
sys.stdout.buffer.writelines(trace_lines(generate("mixed", requests=300, rate=4, seed=5, bursts="gamma"), "twinpool"))
"""


@pytest.mark.parametrize("kind", kind_names())
def test_prompts_go_on_from_the_turn_before(kind: str) -> None:
    trace = generate(kind, requests=600, rate=5, seed=1)
    trace.check_integrity()
    assert is_chained(trace)
    assert len(trace) == 600
    assert trace.after is not None
    assert trace.think is not None
    assert trace.session is not None
    seen: set[int] = set()
    for i, before in enumerate(trace.after):
        if before >= 0:
            assert trace.session[i] == trace.session[before]
            assert trace.arrival[i] == pytest.approx(trace.arrival[before] + trace.think[i], abs=2e-6)
            check_prefix(trace, before, i, edits=trace.session[i].startswith("code"))
            # blocks with output or new text were known to nobody
            assert seen.isdisjoint(trace.block_hashes(i)[len(trace.block_hashes(before)) :])
        seen.update(trace.block_hashes(i))
    followed = [before for before in trace.after if before >= 0]
    assert len(followed) == len(set(followed)) > 100  # nobody is followed twice


def check_prefix(trace: Trace, before: int, i: int, edits: bool) -> None:
    """Request ``i`` begins with the prompt and output of ``before``; with edits: with part of the prompt."""
    old, new = trace.block_hashes(before), trace.block_hashes(i)
    assert len(new) == trace.prompt[i] // trace.block_tokens  # every full block has its id
    same = sum(1 for one, other in zip(old, new, strict=False) if one == other)
    if not edits:
        assert trace.prompt[i] > trace.prompt[before] + trace.output[before]
        assert new[: len(old)] == old
    else:
        assert set(new[same:]).isdisjoint(old)


@pytest.mark.parametrize(
    ("kind", "prompt", "output"),
    [("chat", 1_155, 211), ("code", 2_048, 28), ("long", 12_035, 343)],
)
def test_lengths_are_those_of_the_public_traces(kind: str, prompt: int, output: int) -> None:
    found = stats(generate(kind, requests=8_000, rate=10, seed=2, block_tokens=512))
    assert found.input.mean == pytest.approx(prompt, rel=0.2)
    assert found.output.mean == pytest.approx(output, rel=0.1)
    assert found.input.p50 < found.input.mean


def test_what_sessions_share() -> None:
    hits = {}
    for kind in KINDS:
        found = stats(generate(kind, requests=3_000, rate=5, seed=3))
        assert found.hits is not None
        assert found.sessions is not None
        hits[kind] = found.hits.tokens
        assert found.sessions.mean_turns == pytest.approx(KINDS[kind].turns, rel=0.25)
    assert 0.25 < hits["long"] < 0.45  # Mooncake's conversations: 0.37
    assert hits["long"] < hits["chat"] < hits["code"] < hits["agentic"] < 1


def test_shares_of_mixed_traffic() -> None:
    trace = generate("mixed", requests=6_000, rate=20, seed=4)
    assert trace.session is not None
    for kind, share in MIXED.items():
        found = sum(1 for name in trace.session if name.startswith(kind)) / len(trace)
        assert found == pytest.approx(share, rel=0.25)


@pytest.mark.parametrize("kind", kind_names())
def test_traffic_is_under_way_from_the_start(kind: str) -> None:
    trace = generate(kind, seconds=300, rate=10, seed=6)
    assert trace.arrival[-1] < 300
    halves = [sum(1 for when in trace.arrival if (when < 150) == early) for early in (True, False)]
    assert all(half == pytest.approx(1500, rel=0.25) for half in halves)


def session_starts(how: str) -> list[float]:
    """Arrivals of first turns, once no session that began before the trace can still show its first turn in it."""
    trace = generate("chat", requests=9_000, rate=20, seed=7, bursts=how, cv=3, block_tokens=512)
    assert trace.after is not None
    return [when for when, before in zip(trace.arrival, trace.after, strict=True) if before < 0 and when > 120]


def test_a_ramp_begins_with_nobody() -> None:
    trace = generate("agentic", requests=2000, rate=10.0, seed=3, ramp=True)
    assert trace.after is not None
    begins = [i for i, before in enumerate(trace.after) if before < 0]
    shared = {tuple(trace.block_hashes(i)[:7]) for i in begins}
    assert len(shared) <= KINDS["agentic"].prefixes  # these are first turns, not what is left of longer sessions
    tenth = trace.arrival[-1] / 10
    early, late = (sum(1 for when in trace.arrival if start <= when < start + tenth) for start in (0.0, 8 * tenth))
    assert early < 0.75 * late


def test_bursts() -> None:
    found = {how: bursts(session_starts(how)) for how in BURSTS}
    assert found["poisson"].gap_cv == pytest.approx(1.0, abs=0.1)
    assert found["poisson"].dispersion < 2
    assert found["gamma"].gap_cv == pytest.approx(3.0, rel=0.15)
    assert found["gamma"].dispersion == pytest.approx(9, rel=0.5)  # cv**2, in the long run
    assert found["onoff"].dispersion > 10
    assert found["onoff"].peak_to_mean > 2


def test_both_limits_hold() -> None:
    assert len(generate("chat", requests=50, seconds=1000, rate=5)) == 50
    short = generate("chat", requests=5000, seconds=10, rate=5)
    assert len(short) < 200
    assert short.arrival[-1] < 10


def test_seed_decides_everything() -> None:
    one, same = (generate("mixed", requests=300, rate=4, seed=5, bursts="gamma") for _ in range(2))
    assert asdict(one) == asdict(same)
    assert generate("mixed", requests=300, rate=4, seed=6, bursts="gamma").arrival != one.arrival
    longer = generate("mixed", requests=301, rate=4, seed=5, bursts="gamma")
    assert list(islice(longer.prompt, 300)) == list(one.prompt)


def test_other_processes_make_the_same_bytes() -> None:
    made = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert made[0] == made[1] != b""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "video", "requests": 1}, "there are chat, long, code, agentic, mixed"),
        ({"kind": "chat"}, "give a number of requests"),
        ({"kind": "chat", "requests": 1, "bursts": "wild"}, "there are poisson, gamma, onoff"),
        ({"kind": "chat", "requests": 0}, "requests is 0"),
        ({"kind": "chat", "requests": 1, "rate": 0.0}, "rate is 0"),
        ({"kind": "chat", "seconds": -1.0}, "seconds is -1"),
        ({"kind": "chat", "requests": 1, "cv": float("nan")}, "cv is nan"),
        ({"kind": "chat", "requests": 1, "block_tokens": 5000}, "block-tokens is 5000"),
        ({"kind": "chat", "seconds": 1e6, "rate": 1e4}, "ask for fewer"),
        ({"kind": "chat", "seconds": 1e-6, "rate": 1e-3}, "no request arrives within"),
    ],
)
def test_arguments_that_make_no_traffic(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        generate(**arguments)  # type: ignore[arg-type]
