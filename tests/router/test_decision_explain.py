"""Requests of a decision log explained: what the policy saw, what came of it, and logs and ids that are not there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import request_of, worker_up
from tests.router.logged_cluster import REQUESTS, cluster_of, log_of, trouble, turns_of, write
from typer.testing import CliRunner, Result

from twinpool.cli import app
from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.decision_explain import Explained, explain
from twinpool.router.decision_log import DecisionLog, End
from twinpool.router.policy import LeastSeconds
from twinpool.router.story import Attempt, Story

EDGES = ("placed_s", "reserved_s", "prefill_started_s", "first_s", "transferred_s", "decoding_s", "ended_s")


class Trouble:
    """The log of ``trouble``, every third of its requests explained, and the rows that the log has of their ends."""

    def __init__(self, path: Path, policy: str) -> None:
        self.path = path
        cluster = cluster_of(path, policy)
        trouble(cluster)
        log_of(cluster).close()
        self.told = {rid: explain(path, f"#{rid}") for rid in range(2, REQUESTS + 1, 3)}
        rows = [row for turn in turns_of(path)[1] for row in turn.said]
        self.ends = {row[1]: row for row in rows if row[0] in ("Finish", "Refuse")}

    def attempts(self) -> Iterator[tuple[Story, Attempt]]:
        """All attempts of all requests."""
        for told in self.told.values():
            yield from ((told.story, attempt) for attempt in told.story.attempts)


@pytest.fixture(scope="module", params=["least_seconds", "dynamo", "aibrix_pd"])
def troubled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trouble:
    return Trouble(tmp_path_factory.mktemp("trouble") / "decisions", request.param)


def test_the_stories_end_as_the_log_says(troubled: Trouble) -> None:
    for rid, told in troubled.told.items():
        story, row = told.story, troubled.ends[rid]
        assert told.notices == []
        assert story.over
        if row[0] == "Refuse":
            assert [story.code, story.message] == [row[2], row[4]]
        ended, emitted, attempts, losses, path, reason, prefill, decode, cached, _ = row[-10:]
        assert (story.ended, story.tokens, len(story.attempts), story.losses) == (ended, emitted, attempts, losses)
        if attempts and story.attempts[-1].ended_s == story.ended_s and path:
            last = story.attempts[-1]
            assert (last.path, last.reason, last.prefill, last.decode) == (path, reason, prefill, decode)
        if attempts == 1 and story.attempts[0].cached >= 0:
            assert story.attempts[0].cached == cached


def test_every_attempt_comes_from_a_look(troubled: Trouble) -> None:
    """The chosen workers are in the tables; ``least_seconds`` takes only candidates."""
    seen = 0
    for story, attempt in troubled.attempts():
        look = story.placing(attempt.number)
        if look is None:
            assert "moved here from" in attempt.reason  # by a drain, not by a choice among all
            continue
        chosen = [row for row in look.prompt if row.worker == look.prefill]
        assert {row.name for row in chosen} == {attempt.prefill}
        assert look.reason == attempt.reason
        if story.policy == "least_seconds":
            assert any((row.why_not, row.prompt_s, row.cached) == ("", look.prompt_s, look.cached) for row in chosen)
            assert attempt.placed_s == look.at_s
        seen += any(row.worker == look.decode for row in look.decoders)
    assert seen or troubled.told[2].story.policy == "dynamo"  # which looks for a decode worker later


def test_stamps_are_in_order_and_attempts_say_how_they_ended(troubled: Trouble) -> None:
    outcomes = set()
    for story, attempt in troubled.attempts():
        stamps = [getattr(attempt, edge) for edge in EDGES]
        assert attempt.ended_s == max(stamps)
        assert attempt.placed_s == min(stamp for stamp in stamps if stamp >= 0.0)
        assert attempt.outcome
        assert story.shown_s < 0.0 or story.attempts[0].placed_s <= story.shown_s <= story.ended_s
        outcomes.add(attempt.outcome)
    assert {"finished", "the request was cancelled", "KV transfer failed (CHECKSUM)"} <= outcomes


def test_what_is_printed_fits_a_terminal(troubled: Trouble) -> None:
    for rid in (2, 20, 47):
        text = told(troubled.path, f"#{rid}").stdout
        assert max(map(len, text.splitlines())) <= 80
        story = troubled.told[rid].story
        assert all(f"Attempt {attempt.number}, " in text for attempt in story.attempts)
        assert text.count("chosen") >= len(story.attempts)


# --- requests that are lost, wait or are refused ----------


def test_lost_attempts_say_what_took_them(tmp_path: Path) -> None:
    """One at its worker, the next with its worker."""
    cluster, log = logged(tmp_path / "log")
    cluster.join(worker_up(2, "decode"))
    submit(cluster, 1, "unlucky", prompt_len=40, max_tokens=30)
    cluster.run(0.1)
    (attempt,) = cluster.core.state.by_attempt
    cluster.workers[1].jobs.pop(attempt)
    cluster.deliver(ev.AttemptLost(1, attempt, "engine", True))
    cluster.run(0.1)
    cluster.kill(cluster.core.state.requests[1].decode)
    cluster.run_until_ended(9.0)
    log.close()
    story = explain(tmp_path / "log", "unlucky").story
    assert [attempt.outcome for attempt in story.attempts] == ["worker w1: engine", "worker w1 died", "finished"]
    assert (story.losses, story.tokens, story.code) == (2, 30, "")
    assert [look.kind for look in story.looks if look.kind == "placed"] == ["placed"] * 3
    assert [attempt.decode for attempt in story.attempts] == ["w1", "w1", "w2"]
    text = told(tmp_path / "log", "unlucky").stdout
    assert "3 attempts, 2 lost by a fault" in text
    assert text.index("worker w1 died") < text.index("Attempt 3, ")


def logged(path: Path) -> tuple[FakeCluster, DecisionLog]:
    """One prefill and one decode worker, recorded."""
    cluster = cluster_of(path)
    cluster.join(worker_up(0, "prefill"))
    cluster.join(worker_up(1, "decode"))
    return cluster, log_of(cluster)


def submit(cluster: FakeCluster, rid: int, name: str, **fields: Any) -> None:
    log_of(cluster).name(name)
    cluster.submit(request_of(rid, **fields))


def told(path: Path, name: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["explain", name, "--log", str(path), *flags])


def test_a_refused_request_says_why(tmp_path: Path) -> None:
    cluster, log = logged(tmp_path / "log")
    submit(cluster, 1, "long", prompt_len=100, max_tokens=9)
    submit(cluster, 2, "impatient", prompt_len=100, queue_until=cluster.now + 0.003)
    submit(cluster, 3, "huge", prompt_len=4000)
    cluster.run_until_ended(9.0)
    log.close()
    story = explain(tmp_path / "log", "impatient").story
    assert (story.code, story.ended, story.asked) == ("RESOURCE_EXHAUSTED", "QUEUE_TIMEOUT", 1)
    assert [look.kind for look in story.looks] == ["waits", "refused"]
    assert story.attempts == []
    text = told(tmp_path / "log", "impatient").stdout
    assert "RESOURCE_EXHAUSTED QUEUE_TIMEOUT after" in text
    assert "busy over 20 ms" in text
    huge = explain(tmp_path / "log", "huge").story
    assert (huge.ended, {row.why_not for row in huge.looks[0].prompt}) == ("KV_TOO_SMALL", {"too small"})


def test_a_log_that_is_still_written(tmp_path: Path) -> None:
    """A request that waits has the table of the last moment; one that runs has what is known of it."""
    path = tmp_path / "log"
    cluster, log = logged(path)
    submit(cluster, 1, "runs", prompt_len=100, max_tokens=9)
    cluster.run(0.012)
    submit(cluster, 2, "waits", prompt_len=100)
    log.close()
    header, turns = turns_of(path)
    write(path, [header, *turns])  # without its end
    for name, looks in (("runs", ["placed"]), ("waits", ["waits", "waits"])):
        story, notices = explain(path, name)
        assert [look.kind for look in story.looks] == looks
        assert not story.over
        assert "has no end" in " ".join(notices)
    assert "not over at the end of what is known" in told(path, "waits").stdout
    assert explain(path, "runs").story.attempts[0].prefill_started_s >= 0.0


# --- ids and files ----------


def test_ids_of_users(tmp_path: Path) -> None:
    """One may come again; sequences of one request have numbers; what has no id is known by the router's number."""
    path = tmp_path / "log"
    cluster, log = logged(path)
    for rid, name in enumerate(("one", "one", "many#0", "many#1", ""), 1):
        submit(cluster, rid, name, prompt_len=10 * rid)
        cluster.run(1.0)
    log.close()
    last, first = explain(path, "one"), explain(path, "one", occurrence=1)
    assert (last.story.prompt_tokens, first.story.prompt_tokens) == (20, 10)
    assert "2 requests had this id" in last.notices[0]
    assert first.notices == []
    assert explain(path, "#5").story.prompt_tokens == 50
    with pytest.raises(ConfigError, match=r"has no request 'many': there are many#0, many#1$"):
        explain(path, "many")
    with pytest.raises(ConfigError, match="has no request 'other': there are one, many#0, many#1, #5"):
        explain(path, "other")
    with pytest.raises(ConfigError, match="has 2 with the id 'one'"):
        explain(path, "one", occurrence=3)


def test_many_ids_and_an_older_log_are_hinted_at(tmp_path: Path) -> None:
    path = tmp_path / "log"
    for start in range(2):
        cluster, log = logged(path)
        for rid in range(1, 9):
            submit(cluster, rid, f"start{start}-{rid}")
        log.close()
    with pytest.raises(ConfigError, match=r"there are start1-1, .*start1-5 and 3 more\. An earlier .*log\.old"):
        explain(path, "start0-1")
    assert explain(tmp_path / "log.old", "start0-1").story.arrived


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["explain", "any"])
    assert missing.exit_code == 2
    assert "scheduling.decision_log" in missing.stderr
    nowhere = told(tmp_path / "no", "any")
    assert (nowhere.exit_code, "cannot read the decision log" in nowhere.stderr) == (2, True)
    cluster, log = logged(tmp_path / "log")
    log.close()
    empty = told(tmp_path / "log", "any")
    assert (empty.exit_code, "has no request 'any': it has none" in empty.stderr) == (2, True)
    named = CliRunner().invoke(app, ["explain", "any", "--set", f"scheduling.decision_log={tmp_path / 'log'}"])
    assert "it has none" in named.stderr
    assert cluster.core.state.requests == {}


def test_json_has_all_of_it(tmp_path: Path) -> None:
    cluster, log = logged(tmp_path / "log")
    submit(cluster, 1, "one", prompt_len=20)
    cluster.run_until_ended(5.0)
    log.close()
    figures = json.loads(told(tmp_path / "log", "one", "--json", "-").stdout)
    assert figures == explain(tmp_path / "log", "one").story.figures() | {
        "log": str(tmp_path / "log"), "notices": [],
    }  # fmt: skip
    (look,), (attempt,) = figures["looks"], figures["attempts"]
    assert {row["name"] for row in look["prompt"]} == {"w0", "w1"}
    assert {row["name"] for row in look["decoders"]} == {"w1"}
    assert attempt["outcome"] == "finished"
    assert attempt["cached"] == 0
    assert figures["itl_s"] > 0.0
    assert figures["late_s"] is None


def test_another_decision_than_the_logs_is_said(tmp_path: Path) -> None:
    path = tmp_path / "log"
    cluster, log = logged(path)
    submit(cluster, 1, "one", prompt_len=20)
    cluster.run_until_ended(5.0)
    log.close()
    header, turns = turns_of(path)
    up = msgspec.structs.replace(turns[0].event, roles=("prefill", "decode"))
    changed = [msgspec.structs.replace(turns[0], event=up), *turns[1:]]
    write(path, [header, *changed, End(len(turns))])
    assert "decides otherwise than the router did" in explain(path, "one").notices[0]


class Own(LeastSeconds):
    """Somebody's policy."""

    name = "own"


def test_a_policy_of_somebody_else_must_be_named_by_the_config(tmp_path: Path) -> None:
    path = tmp_path / "log"
    core, name = Core(Own()), f"{__name__}:Own"
    log = DecisionLog(path, core, name, {})
    log.decide(worker_up(0), 1.0)
    log.name("one")
    log.decide(ev.Submit(request_of(1)), 2.0)
    log.close()
    with pytest.raises(ConfigError, match="was written with the policy"):
        explain(path, "one")
    found: Explained = explain(path, "one", trusted=name)
    assert (found.story.policy, found.story.looks[0].kind) == ("own", "placed")
    config = tmp_path / "cluster.yaml"
    config.write_text(
        "apiVersion: twinpool/v1\nkind: Cluster\n"
        f"scheduling: {{policy: '{name}', decision_log: '{path}'}}\n"
    )  # fmt: skip
    shown = CliRunner().invoke(app, ["explain", "one", "-c", str(config)])
    assert shown.exit_code == 0, shown.stderr
    assert "policy own" in shown.stdout
