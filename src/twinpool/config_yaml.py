"""YAML into plain values, with the line of every key: what errors and ``twinpool config show`` point at.

Beside PyYAML's safe loader: a key that occurs twice is refused, ``1e-3`` is a number (YAML 1.2) and dates stay text.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import yaml

from twinpool.errors import ConfigError

Key = tuple[str, ...]  # path of a key from the top of the file


class Document(NamedTuple):
    """A YAML file as plain values; ``lines`` has the line of each key and list item, counted from 1."""

    value: object
    lines: dict[Key, int]


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers changed below."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, source: str) -> Document:
    """Values and lines of one YAML document. Raises ConfigError naming ``source`` and the line."""
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Document(None if node is None else _build(loader, node, (), lines, source), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = source if mark is None else f"{source}:{mark.line + 1}"
        raise ConfigError(f"{place}: not readable as YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not readable as YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not readable as YAML: {error}") from None


def _build(loader: _Loader, node: yaml.Node, path: Key, lines: dict[Key, int], source: str) -> object:
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(loader, node, path, lines, source)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            lines[(*path, str(index))] = child.start_mark.line + 1
            items.append(_build(loader, child, (*path, str(index)), lines, source))
        return items
    return loader.construct_object(node)


def _build_mapping(
    loader: _Loader, node: yaml.MappingNode, path: Key, lines: dict[Key, int], source: str
) -> dict[str, object]:
    values: dict[str, object] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"{source}:{line}: a key must be text, not {key!r}")
        if key in values:
            raise ConfigError(f"{source}:{line}: {'.'.join((*path, key))} is given twice")
        lines[(*path, key)] = line
        values[key] = _build(loader, child, (*path, key), lines, source)
    return values
