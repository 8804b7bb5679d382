"""From a YAML file and overrides to a :class:`ClusterConfig`, with an error that says where, what and what instead.

Later wins: default, file, then overrides (``--set any.key=value`` and the flags that are short for one) in their order.
The sentences about wrong values come from the JSON schema of the model, so they can not differ from the checks.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from twinpool import config_yaml
from twinpool.config import ClusterConfig
from twinpool.config_yaml import Key
from twinpool.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
SECRETS = frozenset({"link.token"})
Schema = Mapping[str, Any]

# JSON schema in words, for errors.
_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "object": "a mapping", "null": "nothing"}
_BOUNDS = {
    "minimum": "of at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "minLength": "of at least {} characters",
    "maxLength": "of at most {} characters",
}


class Override(NamedTuple):
    """One value from the command line."""

    key: str  # dotted
    value: object
    origin: str  # what to call it in errors, such as "--set"


class Loaded(NamedTuple):
    """A configuration and where each value of it came from."""

    config: ClusterConfig
    origins: dict[str, str]  # dotted leaf -> FILE:LINE or a flag; what is not in it is a default

    def origin(self, key: str) -> str:
        """Where the value of a dotted leaf came from."""
        return self.origins.get(key, "default")


def parse_set(text: str) -> Override:
    """``any.key=value``, the value read as YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text}: expected any.key=value, such as worker.block_size=32")
    return Override(key.strip(), config_yaml.parse(value, f"--set {key.strip()}").value, "--set")


def load(path: Path | None, overrides: Iterable[Override] = ()) -> Loaded:
    """Read, override and check. Without ``path`` the defaults. Raises ConfigError with one line for each mistake."""
    values: dict[str, object] = {}
    places: dict[Key, str] = {}
    if path is not None:
        document = config_yaml.parse(_read(path), str(path))
        if document.value is not None and not isinstance(document.value, dict):
            raise ConfigError(f"{path}:1: expected a mapping of keys, such as 'pools:', got {_shown(document.value)}")
        values = document.value or {}
        places = {key: f"{path}:{line}" for key, line in document.lines.items()}
    for override in overrides:
        _apply(values, places, override)
    try:
        config = ClusterConfig.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentences(error.errors(include_url=False), places))) from None
    return Loaded(config, {".".join(key): place for key, place in _leaves(values, places)})


def schema() -> dict[str, Any]:
    """JSON schema of the file."""
    return ClusterConfig.model_json_schema(by_alias=True)


def schema_text() -> str:
    """The committed form of :func:`schema`."""
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema()}, indent=2) + "\n"


def to_yaml(config: ClusterConfig) -> str:
    """The whole file, secrets included, as ``load`` reads it."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)


def show(loaded: Loaded) -> str:
    """The whole file as YAML, each value with a comment that says where it came from; secrets are masked."""
    lines: list[str] = []
    _show_section(loaded.config.model_dump(mode="json", by_alias=True), (), loaded, lines)
    return "\n".join(lines) + "\n"


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB, so no configuration")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text") from None


def _apply(values: dict[str, object], places: dict[Key, str], override: Override) -> None:
    *parents, last = override.key.split(".")
    place = f"{override.origin} {override.key}"
    section = values
    for depth, name in enumerate(parents, 1):
        child = section.setdefault(name, {})
        places.setdefault(tuple(parents[:depth]), place)
        if not isinstance(child, dict):
            raise ConfigError(f"{place}: {'.'.join(parents[:depth])} has no keys below it")
        section = child
    section[last] = override.value
    key = (*parents, last)
    for known in [known for known in places if known[: len(key)] == key]:
        del places[known]
    places[key] = place


def _place(places: Mapping[Key, str], key: Key) -> str:
    """Where ``key`` or the nearest section around it was written."""
    for end in range(len(key), 0, -1):
        if key[:end] in places:
            return places[key[:end]]
    return "configuration"


def _leaves(values: Mapping[str, object], places: Mapping[Key, str], above: Key = ()) -> Iterable[tuple[Key, str]]:
    for name, value in values.items():
        key = (*above, name)
        if isinstance(value, dict):
            yield from _leaves(value, places, key)
        else:
            yield key, _place(places, key)


def _sentences(errors: Sequence[Mapping[str, Any]], places: Mapping[Key, str]) -> list[str]:
    root = schema()
    return [_sentence(root, error, places) for error in errors]


def _sentence(root: Schema, error: Mapping[str, Any], places: Mapping[Key, str]) -> str:
    key = tuple(str(part) for part in error["loc"])
    place, name = _place(places, key), ".".join(key)
    if error["type"] == "extra_forbidden":
        return f"{place}: {name}: unknown key{_nearest(root, key)}"
    if error["type"] == "value_error":
        reason = error["msg"].removeprefix("Value error, ")
        return f"{place}: {name + ': ' if name else ''}{reason}"
    expected = _expected(root, _find(root, key))
    value = "a secret" if name in SECRETS else _shown(error["input"])
    return f"{place}: {name}: expected {expected or error['msg']}, got {value}"


def _nearest(root: Schema, key: Key) -> str:
    known = sorted(_find(root, key[:-1]).get("properties", {}))
    close = difflib.get_close_matches(key[-1], known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join((*key[:-1], close[0]))}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _find(root: Schema, key: Key) -> Schema:
    """Schema of the value at ``key``; empty when there is none."""
    found: Schema = root
    for name in key:
        found = _resolve(root, found)
        below = found.get("properties", {}).get(name, found.get("additionalProperties", {}))
        found = below if isinstance(below, dict) else {}
    return _resolve(root, found)


def _resolve(root: Schema, found: Schema) -> Schema:
    while "$ref" in found:
        found = root["$defs"][found["$ref"].rpartition("/")[2]]
    return found


def _expected(root: Schema, found: Schema) -> str:
    """What a value of this schema looks like, in words."""
    found = _resolve(root, found)
    if "anyOf" in found:
        return " or ".join(_expected(root, option) for option in found["anyOf"])
    if "const" in found or "enum" in found:
        options = found.get("enum", [found.get("const")])
        return ("one of " if len(options) > 1 else "") + ", ".join(map(str, options))
    limits = [words.format(found[bound]) for bound, words in _BOUNDS.items() if bound in found]
    if "pattern" in found:
        limits.append(f"({found.get('description', found['pattern'])})")
    return " ".join([_KINDS.get(found.get("type", ""), ""), " and ".join(limits)]).strip()


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_section(values: Mapping[str, object], above: Key, loaded: Loaded, lines: list[str]) -> None:
    indent = "  " * len(above)
    for name, value in values.items():
        key = ".".join((*above, name))
        if isinstance(value, dict):
            lines.append(f"{indent}{name}:{'' if value else ' {}'}")
            _show_section(value, (*above, name), loaded, lines)
        else:
            shown = '"***"' if key in SECRETS and value else json.dumps(value)
            lines.append(f"{indent + name + ': ' + shown:<44}  # {loaded.origin(key)}")
