"""Replaying a decision log: one event changed is a difference, a file that is not whole says so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.router.fake_worker import request_of, worker_up
from tests.router.logged_cluster import FIRST, cluster_of, log_of, name_of, short_log, trouble, turns_of, write

from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.decision_log import MAGIC, PREFIX, DecisionLog, End, Header, Turn
from twinpool.router.decision_replay import read_decisions, replay_decisions
from twinpool.router.policy import LeastSeconds, Passed, Placement, Refusal, View
from twinpool.router.request import Request
from twinpool.router.state import Limits

CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Submit": lambda event: {"request": msgspec.structs.replace(event.request, prompt_len=99)},
    "WorkerUp": lambda event: {"cost": msgspec.structs.replace(event.cost, d0=event.cost.d0 / 2)},
    "Reserved": lambda event: {"attempt": event.attempt + 1},
    "Progressed": lambda event: {"cached": event.done},
    "Emitted": lambda event: {"attempt": event.attempt + 1},
    "BlocksReady": lambda event: {"blocks": bytes(len(event.blocks) * [9])},
    "BlocksVerified": lambda event: {"bytes": event.bytes + 1},
    "Ended": lambda event: {"reason": "length" if event.reason == "stop" else "stop"},
    "KvChanged": lambda event: {"stored": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "decisions"
    cluster = cluster_of(path)
    trouble(cluster)
    log_of(cluster).close()
    return path


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_event_is_a_difference(tmp_path: Path, long_log: Path, kind: str) -> None:
    """The first one of its kind; what differs may show only later."""
    header, turns = turns_of(long_log)
    at = next(i for i, turn in enumerate(turns) if name_of(turn) == kind)
    turns[at] = msgspec.structs.replace(
        turns[at], event=msgspec.structs.replace(turns[at].event, **CHANGES[kind](turns[at].event))
    )
    difference = replay_decisions(write(tmp_path / "changed", [header, *turns, End(len(turns))]))
    assert difference is not None
    assert difference.number > at
    assert f"event {difference.number} ({difference.event} at" in str(difference)


def test_one_event_less_or_at_another_time_is_a_difference(tmp_path: Path, long_log: Path) -> None:
    header, turns = turns_of(long_log)
    at = next(i for i, turn in enumerate(turns) if name_of(turn) == "WorkerLost")
    less = turns[:at] + turns[at + 1 :]
    assert replay_decisions(write(tmp_path / "less", [header, *less, End(len(less))])) is not None
    at = next(i for i, turn in enumerate(turns) if name_of(turn) == "Submit")
    late = [msgspec.structs.replace(turn, now=turn.now + 1e-9 * (i >= at)) for i, turn in enumerate(turns)]
    difference = replay_decisions(write(tmp_path / "late", [header, *late, End(len(late))]))
    assert difference is not None
    other = msgspec.structs.replace(header, first_attempt=FIRST + 1)
    assert replay_decisions(write(tmp_path / "other", [other, *turns, End(len(turns))])) is not None


class Moody(LeastSeconds):
    """Something steers it that does not come in through the core."""

    calls = itertools.count()

    def on_room(self, request: Request, view: View, now: float) -> Placement | Refusal | Passed | None:
        answer = super().on_room(request, view, now)
        return answer._replace(cached=next(self.calls) % 7) if isinstance(answer, Placement) else answer


def test_hidden_state_is_a_difference(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    core = Core(Moody())
    log = DecisionLog(path, core, "moody:Moody", {})
    log.decide(worker_up(0), 1.0)
    for rid in range(3):
        log.decide(ev.Submit(request_of(rid)), 2.0 + rid)
    log.close()
    difference = replay_decisions(path, Moody())
    assert difference is not None
    assert (difference.number, difference.event) == (2, "Submit")
    assert "recorded ['SendPrefill', 0, 0, 1, True, False, 0], replayed ['SendPrefill', 0, 0, 1, True, False," in str(
        difference
    )


# --- files that are not whole ----------


def test_a_log_that_is_cut_anywhere_says_so(tmp_path: Path) -> None:
    whole = short_log(tmp_path / "decisions")
    path = tmp_path / "cut"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match=r"is no decision log|is damaged at|has no end after \d+ whole events"):
            list(read_decisions(path))
    path.write_bytes(whole)
    assert replay_decisions(path) is None


def test_a_log_with_any_wrong_byte_says_so(tmp_path: Path) -> None:
    whole = short_log(tmp_path / "decisions")
    path = tmp_path / "wrong"
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"is no decision log|is a decision log of another|is damaged at"):
            list(read_decisions(path))


def test_nonsense_with_a_good_checksum_says_so(tmp_path: Path) -> None:
    head = Header("0", "least_seconds", {}, Limits(), 1)
    tick = Turn(1.0, ["Tick"], [["next tick", math.inf]])
    cases: dict[str, list[Any]] = {
        "header.*another place": [tick, End(1)],
        "event 1 .*another place": [head, head, End(0)],
        "event 3 .*another place": [head, tick, End(1), End(1)],
        "counts 2 events": [head, tick, End(2)],
        "time 0 after 1": [head, tick, Turn(0.0, ["Tick"], []), End(2)],
        "time nan": [head, Turn(math.nan, ["Tick"], []), End(1)],
        r"Expected `int` <= 65535": [head, Turn(1.0, ["WorkerLost", 1 << 40], []), End(1)],
        r"Expected `int` >= 0": [head, Turn(1.0, ["WorkerLost", -1], []), End(1)],
        "Invalid value 'Sleep'": [head, Turn(1.0, ["Sleep"], []), End(1)],
        "Expected `int`, got `str`": [head, Turn(1.0, ["Cancel", "1"], []), End(1)],
        "length": [head, Turn(1.0, ["Cancel", 1, 2], []), End(1)],
    }
    for sentence, records in cases.items():
        with pytest.raises(ConfigError, match=f"is damaged at .*{sentence}"):
            list(read_decisions(write(tmp_path / "log", records)))


def test_files_that_are_something_else(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with pytest.raises(ConfigError, match=r"cannot read the decision log .*No such file"):
        replay_decisions(path)
    with pytest.raises(ConfigError, match=r"cannot read the decision log .*directory"):
        replay_decisions(tmp_path)
    path.write_bytes(b'{"v": 1}\n')
    with pytest.raises(ConfigError, match="is no decision log"):
        replay_decisions(path)
    path.write_bytes(MAGIC.replace(b"3", b"9"))
    with pytest.raises(ConfigError, match="of another version"):
        replay_decisions(path)
    path.write_bytes(MAGIC + PREFIX.pack(0xFFFFFFFF, 0))
    with pytest.raises(ConfigError, match="4294967295 bytes, the most is"):
        replay_decisions(path)


def test_a_log_does_not_choose_what_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    core = Core(LeastSeconds())
    log = DecisionLog(path, core, "os:system", {"command": f"touch {tmp_path}/done"})
    log.decide(worker_up(0), 1.0)
    log.close()
    with pytest.raises(ConfigError, match="written with the policy os:system"):
        replay_decisions(path)
    assert not (tmp_path / "done").exists()
    assert replay_decisions(path, LeastSeconds()) is None
