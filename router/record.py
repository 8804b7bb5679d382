"""What events and actions of the core are made of: plain records that compare and print by their fields. Pure."""

from __future__ import annotations

import inspect

_FIELDS: dict[str, tuple[str, ...]] = {}


def fields(kind: type[Record]) -> tuple[str, ...]:
    """Names of a record's fields, in the order in which it takes them. Compiled classes have no ``__slots__``."""
    name = kind.__name__
    if name not in _FIELDS:
        _FIELDS[name] = tuple(inspect.signature(kind).parameters)
    return _FIELDS[name]


class Record:
    """Equal to another of its type with equal fields. By hand, since compiled that is what is quick."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and type(self) is type(other) and _values(self) == _values(other)

    def __repr__(self) -> str:
        values = zip(fields(type(self)), _values(self), strict=True)
        return f"{type(self).__name__}({', '.join([f'{name}={value!r}' for name, value in values])})"


def _values(record: Record) -> list[object]:
    return [getattr(record, name) for name in fields(type(record))]
