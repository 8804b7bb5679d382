"""The key-value header of a GGUF file, read without touching its tensors.

Layout (GGUF specification, versions 2 and 3, little-endian): magic ``GGUF``, u32 version, u64 tensor count, u64 entry
count, then the entries: a key string, a u32 type and a value. A string is a u64 length and that many UTF-8 bytes; an
array is a u32 element type, a u64 count and the elements.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from twinpool.errors import ConfigError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_HEADER = struct.Struct("<4sIQQ")
_COUNT = struct.Struct("<Q")
_TYPE = struct.Struct("<I")
_LONGEST_ENTRY_LIST = 65_536


def read_metadata(path: Path) -> dict[str, object]:
    """All metadata of the file: str, int, float, bool, or a list or tuple of one of them.

    Raises ``ConfigError`` when the file cannot be read or is not little-endian GGUF 2 or 3.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Cursor(view).entries()
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(f"{path} is not a readable GGUF file: {error}") from error


class _Cursor:
    """A reading position in the header; lengths are compared with the file's size before anything is made of them."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._at = 0

    def entries(self) -> dict[str, object]:
        magic, version, _, count = self._unpack(_HEADER)
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("wrong magic or version")
        if count > _LONGEST_ENTRY_LIST:
            raise ValueError(f"{count} metadata entries")
        return {self._string(): self._value(self._unpack(_TYPE)[0]) for _ in range(count)}

    def _unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        values = form.unpack_from(self._view, self._at)
        self._at += form.size
        return values

    def _take(self, size: int) -> int:
        """Start of the next ``size`` bytes, which are then behind the cursor."""
        start = self._at
        if size > len(self._view) - start:
            raise ValueError("a length exceeds the file")
        self._at += size
        return start

    def _string(self) -> str:
        start = self._take(self._unpack(_COUNT)[0])
        return self._view[start : self._at].decode("utf-8")

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(self._unpack(_TYPE)[0], self._unpack(_COUNT)[0])
        return self._scalars(kind, 1)[0]

    def _array(self, kind: int, count: int) -> list[str] | tuple[float, ...]:
        if kind != _STRING:
            return self._scalars(kind, count)
        if count * _COUNT.size > len(self._view) - self._at:
            raise ValueError("an array exceeds the file")
        return [self._string() for _ in range(count)]

    def _scalars(self, kind: int, count: int) -> tuple[float, ...]:
        letter = _SCALARS.get(kind)
        if letter is None:
            raise ValueError(f"unknown value type {kind}")
        start = self._take(struct.calcsize("<" + letter) * count)
        return struct.unpack_from(f"<{count}{letter}", self._view, start)
