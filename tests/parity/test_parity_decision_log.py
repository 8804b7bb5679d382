"""The decision log of real processes, fed into a fresh core, gives the same actions: nothing hidden steers the core."""

from __future__ import annotations

import random
import signal
from array import array
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from tests.integration.client import Running, until
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import assert_whole, new_prompt
from tests.router.logged_cluster import name_of, turns_of, write

from twinpool.blockhash import token_bytes
from twinpool.errors import ConfigError
from twinpool.router.decision_log import End, encode
from twinpool.router.decision_replay import replay_decisions

GROUP = 40  # requests at once, three times
STOP_S = 120.0
TEXT = "what nobody may read in a log of decisions"

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]  # ends what hangs; a busy machine may take its time


class Traffic:
    """Clients of a cluster. Prompts share beginnings; every ninth client goes after two tokens."""

    def __init__(self, cluster: Cluster) -> None:
        self.prompts: list[list[int]] = []
        self.running: list[Running] = []
        self._client = cluster.client
        self._beginnings = [new_prompt(160) for _ in range(4)]
        self._chance = random.Random(3)
        self._left = 0

    @staticmethod
    def leaves(number: int) -> bool:
        return number % 9 == 8

    def tokens(self, number: int) -> int:
        return 4_000 if self.leaves(number) else 5 + number % 20

    def start(self) -> None:
        """One more group, all at once."""
        for number in range(len(self.running), len(self.running) + GROUP):
            self.prompts.append(self._beginnings[number % 4] + new_prompt(self._chance.randrange(20, 900)))
            self.running.append(self._client.start(self.prompts[-1], max_tokens=self.tokens(number)))

    def leave(self) -> None:
        """Those that leave do so."""
        for number in range(self._left, len(self.running)):
            if self.leaves(number):
                self.running[number].wait_tokens(2).cancel()
        self._left = len(self.running)

    def check(self) -> None:
        """All others got all of it, and some of them from two attempts."""
        resumed = 0
        for number, (prompt, running) in enumerate(zip(self.prompts, self.running, strict=True)):
            answer = running.result()
            if self.leaves(number):
                assert answer.code == grpc.StatusCode.CANCELLED, answer
            else:
                assert_whole(answer, prompt, self.tokens(number))
                resumed += answer.route.attempts > 1
        assert resumed, "the worker that died had nothing to do"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a router with 2 + 2 workers, of which one is killed while it decodes, and comes again."""
    folder = tmp_path_factory.mktemp("decisions")
    path = folder / "decisions"
    settings = EMULATED | {
        "worker.emulated.profile": "llama-70b-h100-tp4",
        "worker.emulated.speed": 4.0,
        "scheduling.decision_log": path,
        "link.lease_ms": 3_000,
    }
    with Cluster(folder, settings, prefill=2, decode=2) as cluster:
        traffic = Traffic(cluster)
        traffic.start()
        until(lambda: (worker := cluster.client.worker("d0")) is not None and worker.running > 0, "work at d0")
        cluster.kill("d0")
        traffic.start()
        traffic.leave()
        cluster.restart("d0")
        traffic.start()
        text = cluster.client.start(TEXT, max_tokens=4)
        traffic.leave()
        traffic.check()
        assert text.result().code == grpc.StatusCode.OK
        cluster.client.wait_idle()
        assert cluster.router is not None
        cluster.router.signal(signal.SIGTERM)
        assert cluster.router.wait(STOP_S) == 0, cluster.router.text()
    check_silence(path.read_bytes(), traffic, text.result().text)
    return path


def check_silence(log: bytes, traffic: Traffic, answer: str) -> None:
    """Nothing of prompts and answers is in it."""
    assert TEXT.encode() not in log
    assert answer.encode() not in log
    ids = [prompt[160:168] for prompt in traffic.prompts] + [running.result().ids[:5] for running in traffic.running]
    for row in ids:
        assert len(row) < 2 or token_bytes(array("I", row)) not in log
        assert len(row) < 2 or encode(row)[1:] not in log


def test_the_log_has_all_that_happened(recorded: Path) -> None:
    """Every request is there once, from its arrival to its end, beside those that prove readiness."""
    header, turns = turns_of(recorded)
    assert header.first_attempt > 1
    events = Counter(map(name_of, turns))
    rows = [row for turn in turns for row in turn.said]
    arrived = [turn.event.request.rid for turn in turns if name_of(turn) == "Submit"]
    assert len(arrived) == len(set(arrived)) >= 3 * GROUP + 2
    assert sorted(row[1] for row in rows if row[0] in ("Finish", "Refuse")) == arrived
    assert events["WorkerUp"] == 5
    assert events["WorkerLost"] >= 1
    assert events["Cancel"] >= sum(map(Traffic.leaves, range(3 * GROUP)))
    assert events >= Counter(
        ["Tick", "Reported", "KvChanged", "Reserved", "Progressed", "BlocksReady", "BlocksVerified", "Emitted", "Ended"]
    )
    assert {row[0] for row in rows} >= {
        "SendReserve", "SendPrefill", "SendPull", "SendDecode", "SendRelease", "SendCancel", "Show", "Finish", "Refuse",
    }  # fmt: skip
    assert all(one.now <= other.now for one, other in pairwise(turns))


def test_a_fresh_core_gives_the_same_actions(recorded: Path) -> None:
    assert replay_decisions(recorded) is None


CHANGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "Submit": lambda event: {"request": msgspec.structs.replace(event.request, prompt_len=9_000)},
    "Emitted": lambda event: {"attempt": event.attempt + 1},
    "Reserved": lambda event: {"attempt": event.attempt + 1},
    "BlocksReady": lambda event: {"sums": bytes(len(event.sums))},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_one_changed_event_is_a_difference(recorded: Path, tmp_path: Path, kind: str) -> None:
    """The one in the middle of its kind, of those that led to an action."""
    header, turns = turns_of(recorded)
    places = [i for i, turn in enumerate(turns) if name_of(turn) == kind and turn.said[0][0] != "next tick"]
    at = places[len(places) // 2]
    event = turns[at].event
    turns[at] = msgspec.structs.replace(turns[at], event=msgspec.structs.replace(event, **CHANGES[kind](event)))
    difference = replay_decisions(write(tmp_path / "changed", [header, *turns, End(len(turns))]))
    assert difference is not None
    assert difference.number > at


def test_a_worker_that_did_not_die_is_a_difference(recorded: Path, tmp_path: Path) -> None:
    header, turns = turns_of(recorded)
    at = next(i for i, turn in enumerate(turns) if name_of(turn) == "WorkerLost")
    del turns[at]
    assert replay_decisions(write(tmp_path / "less", [header, *turns, End(len(turns))])) is not None


def test_a_time_that_is_not_the_live_one_is_a_difference(recorded: Path, tmp_path: Path) -> None:
    header, turns = turns_of(recorded)
    late = [msgspec.structs.replace(turn, now=turn.now + 1e-6 * (i >= len(turns) // 2)) for i, turn in enumerate(turns)]
    assert replay_decisions(write(tmp_path / "late", [header, *late, End(len(late))])) is not None


@pytest.mark.parametrize("share", [0.0001, 0.5, 0.999999])
def test_a_log_that_is_cut_says_so(recorded: Path, tmp_path: Path, share: float) -> None:
    data = recorded.read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ConfigError, match=r"is damaged at .* events before are whole|has no end|is no decision log"):
        replay_decisions(path)


def test_a_log_with_a_wrong_byte_says_so(recorded: Path, tmp_path: Path) -> None:
    data = bytearray(recorded.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "wrong"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"is damaged at event \d+ .* events before are whole"):
        replay_decisions(path)
