"""Times of clients in ``sim calibrate``: what is between them and the router is a part of the edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from twinpool.cli import sim, sim_calibrate  # noqa: F401  # the second adds its command to the first
from twinpool.sim.calibrate_edge import ENOUGH, measure_edge
from twinpool.sim.calibrate_logs import ClientTime, LoggedRequest, read_clients
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


def test_a_few_clients_tell_nothing() -> None:
    few = measure_edge([logged(i) for i in range(30)], chunk_tokens=2048, kv_bytes_per_token=16,
                       clients=clients(ENOUGH - 1))  # fmt: skip
    assert few.outside_s.value is None
    assert few.edge_s.value == pytest.approx(ROUTER)


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
