"""``sim explain``: the request of a run, as the run itself has it, the same each time."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.sim.search_traffic import traffic
from typer.testing import CliRunner, Result

from twinpool.cli import app
from twinpool.errors import ConfigError
from twinpool.router.witness import WatchedCore
from twinpool.sim.explain import explain
from twinpool.sim.generate import generate
from twinpool.sim.replay import build, replay, run
from twinpool.sim.settings import Failure, Settings
from twinpool.sim.trace import Trace
from twinpool.sim.trace_write import write_trace

CLUSTER = Settings(prefill=2, decode=2)
POLICIES = ("least_seconds", "dynamo", "mooncake_conductor", "round_robin")


@pytest.fixture(scope="module")
def chat() -> Trace:
    """Conversations in closed loops, more than two workers can serve at once."""
    return generate("chat", requests=200, rate=25.0, seed=3)


def sim(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sim", *map(str, arguments)])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_watched_run_decides_the_same(chat: Trace, policy: str) -> None:
    settings = replace(CLUSTER, policy=policy)
    loop = build(chat, settings, make_core=partial(WatchedCore, 77))
    run(loop)
    assert loop.record.digest == replay(chat, settings).digest
    assert isinstance(loop.core, WatchedCore)
    assert loop.core.story == replace(explain(chat, settings, 77), id="")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_story_has_the_times_of_the_run(chat: Trace, policy: str) -> None:
    settings = replace(CLUSTER, policy=policy)
    columns = replay(chat, settings).columns
    for row in range(0, 200, 40):
        story = explain(chat, settings, row)
        assert story.clock_s == columns.arrival[row]
        assert story.ended_s == columns.ended[row] - columns.arrival[row]
        if story.code:
            continue
        assert story.shown_s == columns.shown[row] - columns.arrival[row]
        assert story.tokens == chat.output[row]
        (attempt,) = story.attempts
        assert (attempt.prefill_id, attempt.decode_id) == (columns.prefill[row], columns.decode[row])
        assert attempt.cached == columns.cached[row]
        look = story.placing(1)
        assert look is not None
        assert look.prompt_s > 0.0
        assert look.prefill == attempt.prefill_id


def test_an_idle_cluster_does_what_was_predicted() -> None:
    story = explain(traffic(1), CLUSTER, 0)
    look, attempt = story.placing(1), story.attempts[0]
    assert look is not None
    assert attempt.compute_s == pytest.approx(look.prompt_s)
    assert attempt.first_s == pytest.approx(look.first_s + 4 * CLUSTER.latency_s)  # reserve, answer, prefill, token
    assert {(row.path, row.first_s) for row in look.prompt} == {
        ("split", look.first_s), ("local", look.first_s),
    }  # fmt: skip


def test_a_lost_attempt_is_placed_again(chat: Trace) -> None:
    settings = replace(CLUSTER, failures=(Failure(3.0, "die", "d0"),))
    loop = build(chat, CLUSTER)
    there: list[int] = []
    loop.call_at(3.0, lambda _: there.extend(loop.core.state.pool.workers[2].attempts.values()))
    run(loop)
    assert len(there) > 3
    for story in (explain(chat, settings, row) for row in there[:4]):
        assert story.losses == 1
        assert story.attempts[0].outcome == "worker d0 died"
        assert story.attempts[-1].outcome == "finished"
        look = story.placing(len(story.attempts))
        assert look is not None
        assert "d0" not in {row.name for row in look.prompt + look.decoders}


def test_who_is_refused_for_being_late() -> None:
    trace = traffic(200, rate=100.0)
    settings = Settings(prefill=1, decode=1, parameters={"late": "refuse"})
    columns = replay(trace, settings).columns
    row = next(row for row in range(200) if columns.shown[row] < 0.0)
    story = explain(trace, settings, row)
    assert (story.code, story.ended, story.attempts) == ("RESOURCE_EXHAUSTED", "LATE", [])
    assert story.looks[-1].kind == "refused"
    assert "too late: the cell is overloaded" in story.looks[-1].reason
    assert all(each.slack_s < 0.0 for each in story.looks[-1].prompt)


# --- the command ----------


@pytest.fixture(scope="module")
def file(chat: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "chat.jsonl"
    write_trace(chat, path, "twinpool")
    return path


def test_the_command_says_the_same_each_time(file: Path) -> None:
    flags = ("explain", file, "--request", 120, "--prefill", 1, "--decode", 1, "--speed", 2)
    first, again = sim(*flags), sim(*flags)
    assert first.exit_code == 0, first.stderr
    assert first.stdout == again.stdout
    assert max(map(len, first.stdout.splitlines())) <= 80
    for part in ("request 120: ", "policy least_seconds", "prompt at", "chosen", "first token, ms after arrival"):
        assert part in first.stdout
    figures: dict[str, Any] = json.loads(sim(*flags, "--json", "-").stdout)
    assert figures["trace"] == "chat"
    assert figures["id"] == "120"
    assert figures["looks"][-1]["kind"] == "placed"


def test_only_some_rows_of_large_clusters_are_printed(file: Path) -> None:
    large = sim("explain", file, "--request", 120, "--prefill", 30, "--decode", 30).stdout
    assert "44 more: see --json" in large
    assert "14 more: see --json" in large
    assert large.count("chosen") == 2


def test_a_row_that_the_trace_does_not_have(file: Path, chat: Trace) -> None:
    gone = sim("explain", file, "--request", 200)
    assert (gone.exit_code, gone.stdout) == (2, "")
    assert "--request 200: the trace has 200 requests, the first is 0" in gone.stderr
    with pytest.raises(ConfigError):
        explain(chat, CLUSTER, -1)
