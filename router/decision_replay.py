"""Replays a decision log: a fresh core, fed with all that entered the live one, must give the same actions.

That it does proves that nothing else steers the core: no clock, no randomness, no order of a set.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from twinpool.errors import ConfigError
from twinpool.router import events as ev
from twinpool.router.core import Core
from twinpool.router.decision_log import (
    MAGIC,
    MAX_RECORD,
    PREFIX,
    End,
    Header,
    Record,
    Row,
    Turn,
    encode,
    event_of,
    raised,
    said,
)
from twinpool.router.policy.base import Policy
from twinpool.router.policy.registry import make_policy
from twinpool.router.state import Limits

MakeCore = Callable[[Policy, Limits], Core]
_decode = msgspec.msgpack.Decoder(Record).decode


class Difference(NamedTuple):
    """An event after which the fresh core did something else."""

    number: int  # of the event, from 1
    now: float
    event: str
    recorded: list[Row]
    replayed: list[Row]

    def __str__(self) -> str:
        pairs = itertools.zip_longest(self.recorded, self.replayed)
        first, second = next(pair for pair in pairs if encode(pair[0]) != encode(pair[1]))
        return f"event {self.number} ({self.event} at {self.now:.6f} s): recorded {first}, replayed {second}"


def replay_decisions(path: Path, policy: Policy | None = None) -> Difference | None:
    """Feed a log into a fresh core: the first event that had another effect, None where all had the same.

    ``policy``: a fresh one, for a log of a policy given as module:Class. A file must not choose what is imported.
    Raises ConfigError where the file is no log, damaged or not closed; what comes before that had the same effect.
    """
    records = read_decisions(path)
    header = next(records)
    assert isinstance(header, Header)
    core = fresh_core(header, path, policy)
    for number, turn in enumerate(records, 1):
        assert isinstance(turn, Turn)
        difference = feed(core, turn, number)
        if difference is not None:
            return difference
    return None


def feed(core: Core, turn: Turn, number: int) -> Difference | None:
    """Give a core the next event of a log; what it did otherwise. ``number``: of the event, from 1."""
    event = event_of(turn.event)
    replayed = _effect(core, event, turn.now)
    if encode(replayed) == encode(turn.said):
        return None
    return Difference(number, turn.now, type(event).__name__, turn.said, replayed)


def _effect(core: Core, event: ev.Event, now: float) -> list[Row]:
    try:
        return said(core, core.on(event, now))
    except Exception as error:  # compared like anything else that comes out
        return raised(error)


def fresh_core(header: Header, path: Path, policy: Policy | None = None, make: MakeCore = Core) -> Core:
    """A core that has heard nothing, as the log's was. Raises ConfigError; see ``replay_decisions`` for ``policy``."""
    if policy is None:
        if ":" in header.policy:
            raise ConfigError(f"{path} was written with the policy {header.policy}: hand a fresh one of it over")
        policy = make_policy(header.policy, header.parameters)
    core = make(policy, header.limits)
    core.state.next_attempt = header.first_attempt
    return core


def read_decisions(path: Path) -> Iterator[Header | Turn]:
    """The header of a log, then its turns; their times do not go back.

    Raises ConfigError where the file is no log, and where it is damaged or its end is missing.
    """
    now, turns, over = -math.inf, -1, False
    for number, record in enumerate(_records(path)):
        if over or isinstance(record, Header) != (number == 0):
            raise _damaged(path, number, "a record of another place")
        if isinstance(record, End):
            over = True
            if record.turns != turns:
                raise _damaged(path, number, f"the end counts {record.turns} events")
            continue
        turns = number
        if isinstance(record, Turn):
            if not now <= record.now < math.inf:
                raise _damaged(path, number, f"time {record.now:g} after {now:g}")
            now = record.now
        yield record
    if not over:
        state = "the router was killed, gave the log up, or still runs"
        raise ConfigError(f"{path} has no end after {max(0, turns)} whole events: {state}")


def _records(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        for number in itertools.count():
            prefix = file.read(PREFIX.size)
            if not prefix:
                return
            length, crc = PREFIX.unpack(prefix.ljust(PREFIX.size, b"\0"))
            if length > MAX_RECORD:
                raise _damaged(path, number, f"{length} bytes, the most is {MAX_RECORD}")
            body = file.read(length)
            if len(prefix) < PREFIX.size or len(body) < length:
                raise _damaged(path, number, "it is cut off")
            if zlib.crc32(body) != crc:
                raise _damaged(path, number, "its checksum differs")
            try:
                yield _decode(body)
            except (msgspec.DecodeError, ValueError) as error:
                raise _damaged(path, number, str(error)) from None


def _opened(path: Path) -> BinaryIO:
    """The file, read up to its first record."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read the decision log {path} ({error.strerror})") from None
    first = file.read(len(MAGIC))
    if first == MAGIC:
        return file
    file.close()
    if len(first) == len(MAGIC) and first.startswith(MAGIC.rstrip(b"0123456789\n")):
        raise ConfigError(f"{path} is a decision log of another version: replay it with the twinpool that wrote it")
    raise ConfigError(f"{path} is no decision log: give the file that scheduling.decision_log named")


def _damaged(path: Path, number: int, why: str) -> ConfigError:
    place = f"event {number}" if number > 0 else "its header"
    return ConfigError(f"{path} is damaged at {place} ({why}); the {max(0, number - 1)} events before are whole")
