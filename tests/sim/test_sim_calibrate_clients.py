"""Times of clients in ``sim calibrate``: what is between them and the router is a part of the edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twinpool.cli import sim, sim_calibrate  # noqa: F401  # the second adds its command to the first
from twinpool.errors import ConfigError
from twinpool.sim.calibrate_edge import ENOUGH, QUANTILES, measure_edge
from twinpool.sim.calibrate_logs import ClientTime, LoggedRequest, read_clients
from twinpool.sim.generate import generate
from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings
from twinpool.sim.trace_columns import TraceError

OUTSIDE, ROUTER, ONE_WAY = 0.0021, 0.0007, 0.001


def logged(i: int, apart: float = 2.0) -> LoggedRequest:
    """A prompt that took 0.1 s; ``apart`` seconds between two."""
    first = 2 * ONE_WAY + 0.1 + 2 * ONE_WAY + ROUTER
    edges = {"placed": 0.0, "reserved": 2 * ONE_WAY, "prefill": 2 * ONE_WAY, "first": first, "ended": 1.0}
    return LoggedRequest(apart * i, 512, 0, 9, "split", "p", "", 1, 0, 0.1, edges)


def clients(count: int) -> list[ClientTime]:
    """Around OUTSIDE, one of them far off."""
    return [ClientTime(0.2 + OUTSIDE + 1e-5 * (i % 3 - 1) + 5.0 * (i == 0), 0.2) for i in range(count)]


def test_what_is_outside_adds_to_the_edge() -> None:
    requests = [logged(i) for i in range(30)]
    without = measure_edge(requests, chunk_tokens=2048, kv_bytes_per_token=16)
    assert without.edge_s.value == pytest.approx(ROUTER)
    assert without.outside_s.value is None
    found = measure_edge(requests, chunk_tokens=2048, kv_bytes_per_token=16, clients=clients(30))
    assert found.outside_s.value == pytest.approx(OUTSIDE, abs=2e-5)
    assert found.edge_s.value == pytest.approx(ROUTER + OUTSIDE, abs=2e-5)
    assert found.edge().edge_s == pytest.approx(ROUTER + OUTSIDE, abs=2e-5)


def test_what_is_outside_counts_alone_where_no_prompt_had_its_worker_to_itself() -> None:
    crowded = [logged(i, apart=0.01) for i in range(30)]
    found = measure_edge(crowded, chunk_tokens=2048, kv_bytes_per_token=16, clients=clients(30))
    assert found.edge_s.value == pytest.approx(OUTSIDE, abs=2e-5)
    assert "outside of the router alone" in found.edge_s.note


def test_how_clients_differ_is_spread_over_the_first_tokens(tmp_path: Path) -> None:
    """A tail of one in twenty: the profile has it, and the simulation of it too, around the median as before."""
    times = [ClientTime(0.2 + (0.1 if i % 20 == 7 else OUTSIDE), 0.2) for i in range(400)]
    found = measure_edge([logged(i) for i in range(30)], chunk_tokens=2048, kv_bytes_per_token=16, clients=times)
    edge = found.edge()
    assert len(edge.edge_spread_s) == QUANTILES
    assert edge.edge_spread_s[QUANTILES // 2] == pytest.approx(0.0, abs=1e-9)
    assert edge.edge_spread_s[-1] == pytest.approx(0.1 - OUTSIDE)
    assert edge.edge_s is not None
    trace = generate("code", requests=300, seed=3)
    plain = replay(trace, Settings(prefill=2, decode=2, edge_s=edge.edge_s))
    wide = replay(trace, Settings(prefill=2, decode=2, edge_s=edge.edge_s, edge_spread_s=edge.edge_spread_s))
    more = [after - before for after, before in zip(wide.columns.shown, plain.columns.shown, strict=True)]
    assert sum(one > 0.05 for one in more) / len(more) == pytest.approx(0.05, abs=0.01)
    assert sum(abs(one) < 1e-6 for one in more) / len(more) == pytest.approx(0.95, abs=0.01)
    assert wide.figures()["digest"] == plain.figures()["digest"]


def test_no_first_token_comes_before_it_is_drawn() -> None:
    slow = [ClientTime(0.2 + 0.01 + 1e-4 * (i % 7), 0.2) for i in range(100)]
    quick = [ClientTime(0.2 + 1e-6, 0.2)] * 10
    crowded = [logged(i, apart=0.01) for i in range(30)]
    edge = measure_edge(crowded, chunk_tokens=2048, kv_bytes_per_token=16, clients=slow + quick).edge()
    assert edge.edge_s is not None
    assert min(edge.edge_spread_s) < -0.009
    assert edge.edge_s + min(edge.edge_spread_s) >= 0.0
    with pytest.raises(ConfigError, match="less than nothing"):
        Settings(edge_s=0.001, edge_spread_s=(-0.002, 0.0))


def test_a_few_clients_tell_nothing() -> None:
    few = measure_edge([logged(i) for i in range(30)], chunk_tokens=2048, kv_bytes_per_token=16,
                       clients=clients(ENOUGH - 1))  # fmt: skip
    assert few.outside_s.value is None
    assert few.edge_s.value == pytest.approx(ROUTER)
    assert few.edge().edge_spread_s == ()


def test_the_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "clients.jsonl"
    file.write_text('{"ttft_s":0.3,"router_ttft_s":0.2}\n{"ttft_s":-1,"router_ttft_s":0.2}\n{"ttft_s":0.', "utf-8")
    with pytest.raises(TraceError, match=r"2.*no time of a client"):
        read_clients(file)
    times, notices = read_clients(file, skip_bad=True)
    assert [time.outside_s for time in times] == [pytest.approx(0.1)]
    assert "2 malformed lines" in notices[0]
    file.write_text("", "utf-8")
    with pytest.raises(TraceError, match="no time of a client in it"):
        read_clients(file)


def test_the_command_wants_the_routers_log_beside_it(tmp_path: Path) -> None:
    steps, file = tmp_path / "steps.csv", tmp_path / "clients.jsonl"
    rows = ["tokens,cached,batch,context,seconds", *(f"{n},0,0,0,{1e-4 * n}" for n in range(64, 640, 64))]
    rows += [f"0,0,{n},{100 * n},{0.01 + 1e-4 * n}" for n in range(1, 10)]
    steps.write_text("\n".join(rows) + "\n", "utf-8")
    file.write_text(json.dumps({"ttft_s": 0.3, "router_ttft_s": 0.2}) + "\n", "utf-8")
    result = CliRunner().invoke(sim.app, ["calibrate", "--table", str(steps), "--client-log", str(file)])
    assert result.exit_code == 2
    assert "--request-log" in result.output
