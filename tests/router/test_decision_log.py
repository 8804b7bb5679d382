"""The decision log: what a core heard and did, twice the same; and no disk stops the core."""

from __future__ import annotations

import inspect
import logging
import os
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec
import pytest
from tests.router.fake_worker import request_of, worker_up
from tests.router.logged_cluster import (
    FIRST,
    REQUESTS,
    cluster_of,
    log_of,
    name_of,
    short_log,
    trouble,
    turns_of,
    write,
)
from tests.router.test_router_live import Joined, submission

from twinpool.config import ClusterConfig
from twinpool.cost import Cost, StepCost
from twinpool.errors import ConfigError
from twinpool.router import decision_log as module
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.decision_log import Arrival, DecisionLog, End, Header, Turn, event_of, event_row
from twinpool.router.decision_replay import replay_decisions
from twinpool.router.dispatch import Dispatcher
from twinpool.router.policy import POLICIES, LeastSeconds
from twinpool.router.request import Request
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.state import Limits

KINDS: tuple[type, ...] = get_args(ev.Event)
SOURCES = pytest.mark.skipif(hasattr(Request, "__mypyc_attrs__"), reason="compiled classes do not tell what they take")
TRANSFERS = {"Reserved", "BlocksReady", "BlocksVerified", "BlocksBad"}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fresh_core_does_the_same(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "decisions"
    cluster = cluster_of(path, policy)
    trouble(cluster)
    log_of(cluster).close()
    header, turns = turns_of(path)
    assert (header.policy, header.first_attempt, header.limits.max_queue) == (policy, FIRST, 20)
    missing = {kind.__name__ for kind in KINDS} - {name_of(turn) for turn in turns}
    assert missing <= (TRANSFERS if policy == "colocated" else set())
    rows = [row for turn in turns for row in turn.said]
    if policy != "colocated":
        actions = {kind.__name__ for kind in get_args(ev.Action)}
        assert {row[0] for row in rows} == {"next tick", *actions}
    assert sum(row[0] in ("Finish", "Refuse") for row in rows) == REQUESTS
    assert replay_decisions(path) is None


async def test_a_live_cell_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    core = Core(LeastSeconds())
    log = DecisionLog(path, core, "least_seconds", {})
    cell = Dispatcher(core, Roster({}), RequestLog(None), ranks={}, transfer_timeout_s=1.0, decide=log.decide)
    worker = Joined(cell)
    streams = [cell.submit(submission(name)) for name in ("a", "b")]
    work = await worker.asked()
    for position in range(4):
        worker.speak(work.attempt, position, 7, last=position == 3)
    assert cell.cancel("a")
    assert not cell.cancel("b")
    assert streams[0].error is not None
    worker.link.connection_lost(None)
    log.close()
    _, turns = turns_of(path)
    names = ["WorkerUp", "Submit", "Submit", *["Emitted"] * 4, "Ended", "Cancel", "WorkerLost"]
    assert [name_of(turn) for turn in turns] == names
    assert replay_decisions(path) is None


def test_every_event_comes_back(tmp_path: Path) -> None:
    request = request_of(7, 5, 9, hashes=[0, (1 << 64) - 1], give_up=3.5, resumed=2)
    examples: list[ev.Event] = [
        ev.Submit(request), ev.Cancel(7), worker_up(3, "decode"), ev.WorkerLost(3), ev.WorkerDraining(3),
        ev.RolesSet(3, ("prefill",)), ev.Reported(3, 1, 2, 3, 4, 0.1), ev.KvChanged(3, [1 << 63], [2], False),
        ev.Reserved(3, 4, 5), ev.NoRoom(3, 4), ev.Progressed(3, 4, 5, 6, 0.1, 1.2),
        ev.BlocksReady(3, 4, 5, 1, b"\1\2\3\4", bytes(range(8))), ev.BlocksVerified(3, 4, 5, 6, 7, 0.1, "tcp"),
        ev.BlocksBad(3, 4, "CHECKSUM"), ev.Emitted(3, 4, 1), ev.Ended(3, 4, "stop"),
        ev.AttemptLost(3, 4, "preempted", False), ev.Short(3, 4), ev.Tick(),
    ]  # fmt: skip
    assert {type(event) for event in examples} == set(KINDS)
    head = Header("0", "least_seconds", {}, Limits(), 1)
    turns = [Turn(float(i), event_row(event), []) for i, event in enumerate(examples)]
    _, read = turns_of(write(tmp_path / "decisions", [head, *turns, End(len(turns))]))
    back = [event_of(turn.event) for turn in read]
    assert back[1:] == examples[1:]
    assert isinstance(back[0], ev.Submit)
    for name in dir(request):
        if not name.startswith("_") and not callable(getattr(request, name)):
            assert getattr(back[0].request, name) == getattr(request, name), name


@SOURCES
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not ev.Tick])
def test_events_are_stored_with_the_types_they_have(kind: type[ev.Record]) -> None:
    wanted = get_type_hints(kind.__init__)
    del wanted["return"]
    (stored,) = [stored for stored, event in module._KINDS.items() if event is kind]
    got = get_type_hints(stored, include_extras=False)
    others = {Request: Arrival, Cost: StepCost}
    assert list(got.items()) == [(name, others.get(hint, hint)) for name, hint in wanted.items()]


@SOURCES
def test_an_arrival_is_what_a_request_is_made_from() -> None:
    wanted = list(inspect.signature(Request).parameters)
    assert list(Arrival.__struct_fields__) == wanted
    values: dict[str, Any] = {name: number for number, name in enumerate(wanted, 100)}
    row = event_row(ev.Submit(Request(**values)))
    assert msgspec.structs.asdict(row[1]) == values


def test_a_core_that_fails_is_recorded_too(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    cluster = cluster_of(path)
    cluster.join(worker_up(0))
    with pytest.raises(AssertionError, match="is up already"):
        cluster.join(worker_up(0))
    cluster.submit(request_of(1))
    cluster.run_until_ended(5.0)
    log_of(cluster).close()
    _, turns = turns_of(path)
    assert turns[1].said == [["raised", "AssertionError"]]
    assert replay_decisions(path) is None


# --- disks ----------


def feed(log: DecisionLog, count: int) -> None:
    for number in range(count):
        log.decide(ev.Cancel(number), float(number))


def test_a_full_disk_costs_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cluster = cluster_of(Path("/dev/full"))
        trouble(cluster)
        time.sleep(4 * module.EVERY_S)
        feed(log_of(cluster), 10)
        log_of(cluster).close()
    assert len(cluster.ended) == REQUESTS
    assert [record.getMessage() for record in caplog.records] == [
        "scheduling.decision_log: No space left on device; later decisions are not recorded"
    ]


def test_a_disk_that_hangs_costs_the_log_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_BACKLOG", 1 << 20)
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)  # so that opening does not wait; a full pipe takes nothing
    core = Core(LeastSeconds())
    log = DecisionLog(path, core, "least_seconds", {})
    feed(log, 40_000)
    kept = len(log._records)
    assert 1000 < kept < 40_000
    feed(log, 1000)
    assert len(log._records) == kept
    log.close()
    log.close()
    os.set_blocking(reader, False)
    while log._thread.is_alive():  # it goes on with what it had
        try:
            os.read(reader, 1 << 16)
        except BlockingIOError:
            time.sleep(0.001)
    os.close(reader)
    assert [record.getMessage() for record in caplog.records] == [
        "scheduling.decision_log: the disk is 1 MiB behind; later decisions are not recorded"
    ]


def test_a_disk_that_hangs_at_the_end_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    log = DecisionLog(path, Core(LeastSeconds()), "least_seconds", {})
    feed(log, 5_000)  # more than a pipe takes
    log.close()
    assert "the disk took nothing for 0.2 s" in caplog.text
    feed(log, 1)
    os.close(reader)  # and with it the writer: its pipe is broken
    log._thread.join(10.0)
    assert not log._thread.is_alive()


def test_what_cannot_be_recorded_ends_the_log_not_the_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "decisions"
    core = Core(LeastSeconds())
    log = DecisionLog(path, core, "least_seconds", {})
    log.decide(worker_up(0), 1.0)
    log.decide(ev.KvChanged(0, [1 << 70], [], False), 2.0)
    assert len(core.state.index) == 1
    actions = log.decide(ev.Submit(request_of(1)), 3.0)
    assert [type(action) for action in actions] == [ev.SendPrefill]
    log.close()
    assert caplog.text.count("KvChanged cannot be recorded") == 1
    with pytest.raises(ConfigError, match="has no end after 1 whole events"):
        replay_decisions(path)


def test_a_record_too_large_ends_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "MAX_RECORD", 1000)
    log = DecisionLog(tmp_path / "decisions", Core(LeastSeconds()), "least_seconds", {})
    log.decide(worker_up(0), 1.0)
    log.decide(ev.KvChanged(0, list(range(2000)), [], False), 2.0)
    log.close()
    assert "bytes, the most is 1000" in caplog.text


def test_the_log_before_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    first = short_log(path)
    second = short_log(path)
    assert first == second  # nothing of the wall clock is in it
    assert (tmp_path / "decisions.old").read_bytes() == first
    assert replay_decisions(tmp_path / "decisions.old") is None


def test_a_file_that_cannot_be_written_is_the_operators_to_mend(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scheduling\.decision_log: cannot write .*No such file"):
        DecisionLog(tmp_path / "nowhere" / "log", Core(LeastSeconds()), "least_seconds", {})
    assert ClusterConfig().scheduling.decision_log is None
    given = ClusterConfig.model_validate({"scheduling": {"decision_log": "a.log"}})
    assert given.scheduling.decision_log == Path("a.log")
