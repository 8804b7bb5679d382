"""Explains one request of a decision log: the log is fed into a core that watches it, up to the request's end.

Nothing of this costs the live router anything but the log. A log without an end (its router still runs, or was killed)
is good as far as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from twinpool.errors import ConfigError
from twinpool.router.decision_log import Header, Turn
from twinpool.router.decision_replay import Difference, feed, fresh_core, read_decisions
from twinpool.router.policy.base import Policy
from twinpool.router.policy.registry import make_policy
from twinpool.router.story import Story
from twinpool.router.witness import WatchedCore

SHOWN_IDS = 5
UNNAMED = "#"  # and the router's number: a request whose id the log does not have

Watch = Callable[[int], None]


class Explained(NamedTuple):
    """A story, and what there is to say about how it was found."""

    story: Story
    notices: list[str]


class Place(NamedTuple):
    """Where a request is in a log."""

    rid: int
    number: int  # its Submit among the events, from 1


class Contents(NamedTuple):
    """What a log has."""

    header: Header
    places: dict[str, list[Place]]  # by id; an id may be used again
    turns: int
    problem: str  # why it ends where it does; empty for a whole one


def contents(path: Path) -> Contents:
    """All requests of a log. Raises ConfigError where the file is none."""
    turns, problem = 0, ""
    records = read_decisions(path)
    header = next(records)
    assert isinstance(header, Header)
    places: dict[str, list[Place]] = {}
    try:
        for turns, turn in enumerate(records, 1):
            assert isinstance(turn, Turn)
            if type(turn.event).__name__ == "Submit":
                rid = turn.event.request.rid
                places.setdefault(turn.id or f"{UNNAMED}{rid}", []).append(Place(rid, turns))
    except ConfigError as error:
        problem = error.message
    return Contents(header, places, turns, problem)


def explain(
    path: Path, request_id: str, *, occurrence: int = 0, trusted: str = "", watch: Callable[[int], Watch] | None = None
) -> Explained:
    """The story of a request.

    ``occurrence``: of several with that id the first, second ...; 0: the last. ``trusted``: a policy module:Class that
    the operator's own configuration names, so it may be imported. ``watch``: is given the number of events once it is
    known, what it returns how many are done. Raises ConfigError: no log, no such request, another policy.
    """
    found = contents(path)
    place = _place(found, path, request_id, occurrence)
    policy = _policy(found.header, trusted)
    core = fresh_core(found.header, path, policy, partial(WatchedCore, place.rid))
    assert isinstance(core, WatchedCore)
    story = core.story
    story.id = request_id
    difference = _replay(core, path, found.turns, watch(found.turns) if watch is not None else None)
    notices = []
    if difference is not None:
        notices.append(
            f"this twinpool decides otherwise than the router did, so from then on it may be untrue: {difference}"
        )
    if found.problem and not story.over:
        notices.append(found.problem)
    count = len(found.places[request_id])
    if count > 1 and not occurrence:
        notices.append(f"{count} requests had this id; this is the last (--occurrence 1 is the first)")
    return Explained(story, notices)


def _policy(header: Header, trusted: str) -> Policy | None:
    """None: a built-in one, that ``fresh_core`` makes."""
    return make_policy(header.policy, header.parameters) if ":" in header.policy and header.policy == trusted else None


def _place(found: Contents, path: Path, request_id: str, occurrence: int) -> Place:
    places = found.places.get(request_id)
    if places is None:
        raise ConfigError(f"{path} has no request {request_id!r}: {_known(found, path, request_id)}")
    if occurrence > len(places):
        raise ConfigError(f"--occurrence {occurrence}: {path} has {len(places)} with the id {request_id!r}")
    return places[occurrence - 1]


def _known(found: Contents, path: Path, request_id: str) -> str:
    """What ids there are instead: those of its own sequences, else the first ones."""
    own = [name for name in found.places if name.startswith(f"{request_id}#")]
    names = own or list(found.places)
    if not names:
        return f"it has none{': ' * bool(found.problem)}{found.problem}"
    more = f" and {len(names) - SHOWN_IDS} more" if len(names) > SHOWN_IDS else ""
    older = Path(f"{path}.old")
    hint = f". An earlier start of the router: --log {older}" if older.is_file() else ""
    return f"there are {', '.join(names[:SHOWN_IDS])}{more}{hint}"


def _replay(core: WatchedCore, path: Path, turns: int, watch: Watch | None) -> Difference | None:
    """Until the request is over, or the log is."""
    first: Difference | None = None
    now = 0.0
    for number, turn in enumerate(_turns(path, turns), 1):
        now = turn.now
        difference = feed(core, turn, number)
        first = first or difference
        if core.story.over:
            break
        if watch is not None and number % 256 == 0:
            watch(number)
    core.stop(now)
    return first


def _turns(path: Path, count: int) -> Iterator[Turn]:
    """The first so many: a log that still grows has more by now."""
    records = read_decisions(path)
    next(records)
    for _ in range(count):
        turn = next(records)
        assert isinstance(turn, Turn)
        yield turn
