"""``twinpool trace``, in this process: what it prints, where, and its exit status."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from twinpool.cli import app
from twinpool.sim.readers import read_trace

GRID = "".join(
    f'{{"timestamp": {3000 * (i // 5)}, "input_length": {600 + i}, "output_length": 9, "hash_ids": [0, {i + 1}]}}\n'
    for i in range(100)
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["trace", *map(str, arguments)])


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.jsonl"
    path.write_text(GRID)
    return path


def test_stats_in_words(grid: Path) -> None:
    shown = run("stats", grid)
    assert shown.exit_code == 0
    assert "grid: 100 requests in 57.0 s, 1.754 a second" in shown.stdout
    assert "99.00% of full blocks" in shown.stdout
    assert shown.stderr.startswith(f"notice: {grid}: arrivals are quantised to about 3 s")


def test_stats_as_json(grid: Path, tmp_path: Path) -> None:
    figures = json.loads(run("stats", grid, "--json", "-").stdout)
    assert (figures["requests"], figures["duration_s"], figures["rate"]) == (100, 57.0, pytest.approx(100 / 57))
    assert figures["input"] == {"mean": 649.5, "p50": 649, "p90": 689, "p99": 698, "max": 699, "total": 64950}
    hits = figures["hits"]
    assert (hits["blocks"], hits["tokens"], hits["distinct_blocks"]) == (0.99, pytest.approx(99 * 512 / 64950), 1)
    assert hits["blocks_with_tails"] == 99 / 200
    assert (figures["bursts"]["quantum_s"], figures["sessions"], len(figures["notices"])) == (3.0, None, 1)
    file = tmp_path / "figures.json"
    assert "100 requests" in run("stats", grid, "--json", file, "--spread-timestamps").stdout
    spread = json.loads(file.read_text())
    assert (spread["bursts"]["quantum_s"], spread["notices"]) == (0.0, [])


def test_bad_lines(grid: Path) -> None:
    with grid.open("a") as file:
        file.write("{\n")
    refused = run("stats", grid)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"twinpool: {grid}, line 101: no JSON")
    skipped = run("stats", grid, "--skip-bad", "--json", "-")
    assert json.loads(skipped.stdout)["requests"] == 100
    assert "1 bad lines left out (lines 101)" in skipped.stderr


def test_convert(grid: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl.gz"
    done = run("convert", grid, target, "--from", 3, "--until", 30, "--limit", 20, "--speed", 3, "--spread-timestamps")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "out.jsonl.gz: 20 requests in " in done.stderr
    assert gzip.decompress(target.read_bytes()).count(b"\n") == 20
    trace, notices = read_trace(target)
    assert (trace.prompt.tolist(), notices) == (list(range(605, 625)), [])
    assert 0 <= trace.arrival[0] < trace.arrival[-1] < 4
    plain = run("convert", grid, "-", "--to", "mooncake")
    assert [json.loads(line) for line in plain.stdout.splitlines()] == [json.loads(line) for line in GRID.splitlines()]


def test_generate(tmp_path: Path) -> None:
    target = tmp_path / "chat.jsonl"
    done = run("generate", "chat", target, "--requests", 50, "--rate", 5, "--seed", 3, "--json", "-")
    figures = json.loads(done.stdout)
    assert (figures["name"], figures["requests"]) == ("chat", 50)
    assert figures["sessions"]["followers"] > 0
    assert run("generate", "chat", "-", "--requests", 50, "--rate", 5, "--seed", 3).stdout == target.read_text()
    again = json.loads(run("stats", target, "--json", "-").stdout)
    assert {**again, "notices": []} == figures
    other = run("generate", "chat", "-", "--requests", 5, "--to", "mooncake")
    assert "closed loop" in other.stderr
    assert json.loads(other.stdout.splitlines()[0]).keys() == {
        "timestamp", "input_length", "output_length", "hash_ids",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate", "video", "x"), "there are chat, long, code, agentic, mixed"),
        (("generate", "chat", "-", "--json", "-"), "not both go to stdout"),
        (("generate", "chat", "-", "--to", "yaml"), "there are twinpool and mooncake"),
        (("generate", "chat", "nowhere/x"), "nowhere/x: cannot be written"),
        (("stats", "nowhere"), "nowhere: cannot be read"),
        (("convert", "GRID", "-", "--limit", "0"), "at least 1"),
        (("convert", "GRID", "-", "--speed", "0"), "factor above 0"),
        (("convert", "GRID", "-", "--from", "99"), "the trace ends at 57.000 s"),
        (("stats", "GRID", "--json", "nowhere/x"), "nowhere/x: cannot be written"),
    ],
)
def test_mistakes(grid: Path, arguments: tuple[str, ...], sentence: str) -> None:
    failed = run(*(str(grid) if argument == "GRID" else argument for argument in arguments))
    assert failed.exit_code == 2
    assert sentence in failed.stderr.replace("can not both", "not both")
    assert failed.stderr.splitlines()[-1].startswith("twinpool: ")
