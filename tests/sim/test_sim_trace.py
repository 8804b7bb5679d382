"""Whole traces: changes, what is written, and the public ones."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.sim.real_traces import AZURE, MOONCAKE, real_trace

from twinpool.errors import ConfigError
from twinpool.sim import readers
from twinpool.sim.readers import read_trace
from twinpool.sim.trace import Trace, is_chained, limit, no_hashes, quantum, rechain, slice_time, speed, spread
from twinpool.sim.trace_stats import stats
from twinpool.sim.trace_write import trace_lines, write_trace


def simple(arrival: list[float], **columns: object) -> Trace:
    n = len(arrival)
    lengths = array("q", [1]) * n
    made = Trace("t", 0, array("d", arrival), lengths, lengths, array("q"), no_hashes(n), **columns)  # type: ignore[arg-type]
    made.check_integrity()
    return made


# --- changes of whole traces --------------------------------------------------------------------------------------


def grid(step: float, per_stamp: int = 5, n: int = 200, jitter: float = 0.0) -> Trace:
    rng = random.Random(1)
    stamps = [step * (i + rng.choice((0, 1))) for i in range(0, n, 2)]
    stamps = [round(stamp + rng.uniform(-jitter, jitter) if stamp else stamp, 9) for stamp in stamps]
    return simple(sorted(stamp for stamp in stamps for _ in range(per_stamp)))


def test_quantum() -> None:
    assert quantum(grid(3.0)) == pytest.approx(3.0)
    assert quantum(grid(3.0, jitter=0.001)) == pytest.approx(3.0, rel=1e-3)
    assert quantum(grid(1.0)) == pytest.approx(1.0)
    assert quantum(grid(0.001)) == 0.0  # too fine to matter
    assert quantum(grid(3.0, per_stamp=1)) == 0.0  # nobody shares a stamp
    rng = random.Random(2)
    stamps = [rng.uniform(0, 1000) for _ in range(500)]
    assert quantum(simple(sorted(stamps + stamps[:250]))) == 0.0  # shared stamps, but no grid


def test_spread_keeps_order_and_quantum() -> None:
    trace = grid(3.0, jitter=0.001)
    moved = spread(trace, 7)
    moved.check_integrity()
    assert quantum(moved) == 0.0
    assert all(0 <= new - old < 3.01 for new, old in zip(moved.arrival, trace.arrival, strict=True))
    assert moved.prompt is trace.prompt
    assert spread(trace, 7) == moved != spread(trace, 8)
    assert spread(moved, 7) is moved


def test_quantised_files_say_so(tmp_path: Path) -> None:
    path = tmp_path / "grid.jsonl"
    write_trace(grid(3.0), path)
    (notice,) = read_trace(path)[1]
    assert "quantised to about 3 s (100 stamps for 500 requests)" in notice
    moved, notices = read_trace(path, spread_seed=7)
    assert (moved.arrival, notices) == (spread(grid(3.0), 7).arrival, [])


def closed() -> Trace:
    after, think = array("q", [-1, 0, -1, 1]), array("d", [0, 1, 0, 4])
    return simple([1, 2, 3, 6], after=after, think=think, session=["a", "a", "b", "a"])


def test_speed_and_limit() -> None:
    fast = speed(closed(), 2)
    assert (fast.arrival.tolist(), fast.think) == ([0.5, 1, 1.5, 3], array("d", [0, 0.5, 0, 2]))
    assert fast.session is not None
    short = limit(closed(), 3)
    short.check_integrity()
    assert (len(short), short.after, short.session) == (3, array("q", [-1, 0, -1]), ["a", "a", "b"])
    assert limit(short, 3) is short
    for wrong in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="speed"):
            speed(closed(), wrong)
    with pytest.raises(ConfigError, match="at least 1"):
        limit(closed(), 0)


def test_slice_time() -> None:
    part = slice_time(closed(), 2, 6)
    part.check_integrity()
    assert (part.arrival.tolist(), part.after, part.session) == ([0, 1], array("q", [-1, -1]), ["a", "b"])
    hashed = replace(simple([0, 1.5]), block_tokens=1, hashes=array("q", [4, 8]), offsets=array("q", [0, 1, 2]))
    late = slice_time(hashed, 1, 2)
    assert (late.hashes.tolist(), late.offsets.tolist(), late.arrival.tolist()) == ([8], [0, 1], [0.5])
    for start, end in ((7.0, 9.0), (2.0, 2.0), (-1.0, 9.0)):
        with pytest.raises(ConfigError, match=r"no request arrives from .* the trace ends at 6\.000 s"):
            slice_time(closed(), start, end)


# --- writing ------------------------------------------------------------------------------------------------------


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Any trace, with nanosecond stamps; ids are chained by ``rechain``."""
    n = draw(st.integers(1, 12))
    block = draw(st.sampled_from([0, 1, 16, 512, 100]))
    stamps = sorted(draw(st.lists(st.integers(0, 10**14), min_size=n, max_size=n)))
    prompt = draw(st.lists(st.integers(1, 4 * (block or 512)), min_size=n, max_size=n))
    hashes, offsets, tails = array("q"), array("q", [0]), array("q")
    for tokens in prompt:
        full = tokens // block if block else 0
        known = draw(st.sampled_from([full, full, full // 2]))
        hashes.extend(draw(st.lists(st.integers(0, 2), min_size=known, max_size=known)))
        offsets.append(len(hashes))
        has_tail = block and known == full and tokens % block and draw(st.booleans())
        tails.append(draw(st.integers(0, 2)) if has_tail else -1)
    hashed = bool(hashes) or max(tails) >= 0
    after = array("q", [draw(st.integers(-1, i - 1)) for i in range(n)])
    loops = max(after) >= 0
    words = st.one_of(st.none(), st.lists(st.text(max_size=3), min_size=n, max_size=n).filter(any))
    made = Trace(
        name="any",
        block_tokens=block if hashed else 0,
        arrival=array("d", [stamp / 1e9 for stamp in stamps]),
        prompt=array("q", prompt),
        output=array("q", draw(st.lists(st.integers(1, 2**40), min_size=n, max_size=n))),
        hashes=hashes,
        offsets=offsets,
        after=after if loops else None,
        think=array("d", draw(st.lists(st.floats(0, 1e6), min_size=n, max_size=n))) if loops else None,
        tenant=draw(words),
        klass=draw(words),
        session=draw(words),
        tail=tails if max(tails) >= 0 else None,
    )
    made.check_integrity()
    return rechain(made)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces(), packed=st.booleans())
def test_what_is_written_is_read_back(tmp_path: Path, trace: Trace, packed: bool) -> None:
    path = tmp_path / ("any.gz" if packed else "any")
    assert write_trace(trace, path) == []
    first = path.read_bytes()
    assert (first[:2] == readers.GZIP) == packed
    assert read_trace(path)[0] == trace
    write_trace(trace, path)
    assert path.read_bytes() == first


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trace=traces())
def test_mooncake_keeps_lengths_and_shared_prefixes(tmp_path: Path, trace: Trace) -> None:
    path = tmp_path / "any.jsonl"
    if trace.block_tokens == 100:
        with pytest.raises(ConfigError, match="do not make blocks of 512"):
            write_trace(trace, path, "mooncake")
        return
    write_trace(trace, path, "mooncake")
    found, _ = read_trace(path)
    assert (found.prompt, found.output) == (trace.prompt, trace.output)
    assert found.tail is None or found.block_tokens == 512
    step = 512 // (trace.block_tokens or 512)
    for i in range(len(trace)):
        for j in range(i):
            shared = common(trace.block_hashes(i), trace.block_hashes(j)) // step
            assert common(found.block_hashes(i), found.block_hashes(j)) == shared


def common(one: list[int], other: list[int]) -> int:
    """How many leading ids are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_unknown_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twinpool and mooncake"):
        trace_lines(closed(), "yaml")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_trace(closed(), tmp_path)


# --- the public traces --------------------------------------------------------------------------------------------


def test_mooncake_conversation() -> None:
    trace, notices = read_trace(real_trace(MOONCAKE))
    trace.check_integrity()
    found = stats(trace)
    assert (found.requests, found.input.p50, found.input.p99) == (12_031, 6_909, 85_401)
    assert (round(found.input.mean), round(found.output.mean)) == (12_035, 343)
    assert found.hits is not None
    assert round(found.hits.blocks_with_tails, 4) == 0.3664
    assert round(found.hits.tokens_with_tails, 4) == 0.3736
    assert found.bursts.quantum_s == pytest.approx(3.0, rel=1e-3)
    assert "1180 stamps for 12031 requests" in notices[0]
    assert is_chained(trace)
    even = spread(trace, 1)
    even.check_integrity()
    assert quantum(even) == 0.0
    assert stats(even).bursts.gap_cv < 1.2 < 3 < found.bursts.gap_cv


def test_mooncake_conversation_survives_both_forms(tmp_path: Path) -> None:
    trace = limit(read_trace(real_trace(MOONCAKE))[0], 2_000)
    for form in ("mooncake", "twinpool"):
        path = tmp_path / "mooncake_conversation.jsonl"
        assert write_trace(trace, path, form) == []
        assert read_trace(path)[0] == trace


def test_azure_conversation() -> None:
    trace, notices = read_trace(real_trace(AZURE))
    trace.check_integrity()
    found = stats(trace)
    assert (found.requests, round(found.duration_s), notices) == (19_366, 3_502, [])
    assert (round(found.input.mean), round(found.output.mean)) == (1_155, 211)
    assert trace.arrival[1] == 4.314579
    assert (found.hits, found.sessions) == (None, None)
