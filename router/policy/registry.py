"""Policies by name: the built-in ones, what packages bring along, and any class on the path.

least_seconds              built in (``POLICIES``)
their_name                 entry point of group ``twinpool.policies``: a policy class, or a ``PolicyInfo``
their.module:TheirClass    the same, by its import path
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from twinpool.errors import ConfigError
from twinpool.router.policy.base import Policy
from twinpool.router.policy.baselines import INFOS
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo, Value
from twinpool.router.policy.least_seconds import WITHOUT, LeastSeconds

DEFAULT = "least_seconds"
GROUP = "twinpool.policies"

_LEAST_SECONDS = PolicyInfo(
    DEFAULT,
    "commit late, to whoever is predicted to give the first token earliest, split or local",
    "twinpool",
    "nothing",
    LeastSeconds,
    {
        "paths": Parameter("auto", help="auto: whichever is earlier", choices=("auto", "split", "local")),
        "fetch": Parameter("on", help="what others have cached: fetched where that is earlier", choices=("on", "off")),
        "rebalance": Parameter(
            "on", help="before memory runs out on a decode worker some go on at another one", choices=("on", "off")
        ),
        "late": Parameter("serve", help="who cannot be in time: served last, or refused", choices=("serve", "refuse")),
        "without": Parameter("nothing", help="a part of the rule to leave out, to see its worth", choices=WITHOUT),
    },
)

POLICIES: dict[str, PolicyInfo] = {info.name: info for info in (_LEAST_SECONDS, *INFOS)}


def policy_names() -> list[str]:
    """Names that ``make_policy`` takes: built in first, then those of installed packages."""
    installed = sorted({point.name for point in _entry_points()} - set(POLICIES))
    return [*POLICIES, *installed]


def make_policy(name: str = DEFAULT, parameters: Mapping[str, Value] | None = None) -> Policy:
    """A new policy with these parameters, and defaults for the others. Numbers may be given as text.

    Raises ConfigError for an unknown name, for a parameter that does not exist or is out of its range, and for a class
    that cannot be imported or is no policy.
    """
    given = dict(parameters or {})
    info = _find(name)
    if isinstance(info, PolicyInfo):
        return info.make(**_checked(info, given))
    return _made(name, info, {key: _number(value) for key, value in given.items()})


def _find(name: str) -> PolicyInfo | Callable[..., Policy]:
    if ":" in name:
        return _imported(name)
    points = [point for point in _entry_points() if point.name == name]
    if name in POLICIES and points:
        raise ConfigError(
            f"the package entry point {points[0].value} names its policy {name}, which is built in: rename it"
        )
    if name in POLICIES:
        return POLICIES[name]
    if len(points) > 1:
        both = " and ".join(sorted(point.value for point in points))
        raise ConfigError(
            f"two packages bring a policy {name}: {both}. Remove one, or give its import path module:Class"
        )
    if points:
        return _imported(points[0].value)
    close = difflib.get_close_matches(name, policy_names(), 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"there is no policy {name}: {hint}there are {', '.join(policy_names())}, or give module:Class")


@functools.cache
def _entry_points() -> tuple[EntryPoint, ...]:
    """Of installed packages; a process looks for them once."""
    return tuple(entry_points(group=GROUP))


def _imported(path: str) -> PolicyInfo | Callable[..., Policy]:
    """The object at ``module:Class``; it runs that module, as any import does."""
    module, _, attribute = path.partition(":")
    try:
        found: object = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"policy {path} cannot be imported ({error}): give it as module:Class") from error
    if not (isinstance(found, PolicyInfo) or callable(found)):
        raise ConfigError(f"policy {path} is neither a class nor a PolicyInfo: name the class itself")
    return cast("PolicyInfo | Callable[..., Policy]", found)


def _made(name: str, make: Callable[..., Policy], parameters: dict[str, Value]) -> Policy:
    """A policy of somebody else's class, with what the core will use of it looked for now."""
    try:
        policy = make(**parameters)
    except TypeError as error:
        raise ConfigError(f"policy {name} does not take these parameters: {error}") from error
    wanted = ("name", "early", "by_deadline", "rebalances", "on_room", "decode_for", "needs", "next_room")
    missing = [part for part in wanted if not hasattr(policy, part)]
    if missing:
        raise ConfigError(f"policy {name} lacks {', '.join(missing)}: see twinpool.router.policy.Policy")
    return policy


def _checked(info: PolicyInfo, given: dict[str, Value]) -> dict[str, Value]:
    checked: dict[str, Value] = {}
    for name, value in given.items():
        parameter = info.parameters.get(name)
        if parameter is None:
            raise ConfigError(_unknown(info, name))
        checked[name] = _value(f"policy {info.name}: {name}", parameter, value)
    return checked


def _unknown(info: PolicyInfo, name: str) -> str:
    if not info.parameters:
        return f"policy {info.name} has no parameter {name}: it has none"
    close = difflib.get_close_matches(name, info.parameters, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"policy {info.name} has no parameter {name}: {hint}it has {', '.join(info.parameters)}"


def _value(what: str, parameter: Parameter, value: Value) -> Value:
    """The value with its parameter's type, in its range."""
    if parameter.choices:
        if value not in parameter.choices:
            raise ConfigError(f"{what} is one of {', '.join(parameter.choices)}, not {value}")
        return value
    number = _number(value)
    if isinstance(number, str):
        raise ConfigError(f"{what} is a number, not {value}")
    if not parameter.low <= number <= parameter.high:
        raise ConfigError(f"{what} is {parameter.low:g} to {parameter.high:g}, not {value}")
    if isinstance(parameter.default, int):
        if number != int(number):
            raise ConfigError(f"{what} is a whole number, not {value}")
        return int(number)
    return float(number)


def _number(value: Value) -> Value:
    """Text that reads as a number as that number; else as it is."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
