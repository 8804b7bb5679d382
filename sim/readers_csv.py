"""CSV traces: Azure (2023, 2024 and ISO stamps) and BurstGPT. Columns are found by the header, in any order."""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import NamedTuple

from twinpool.sim.trace_columns import SECONDS_LIMIT, SKIP, TOKENS_LIMIT, Columns, TraceError, zero_tokens

BOM = b"\xef\xbb\xbf"


class _Format(NamedTuple):
    """Names of the columns of one format."""

    stamp: str
    prompt: str
    output: str
    session: str = ""


AZURE = _Format("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = _Format("Timestamp", "Request tokens", "Response tokens", "Session ID")
FORMATS = (AZURE, BURSTGPT)


class CsvRows:
    """Reader of one CSV file, made from its header."""

    absolute = True

    def __init__(self, columns: Columns, names: list[str], form: _Format) -> None:
        self._columns = columns
        self._names = form
        self._width = len(names)
        self._at = [names.index(name.lower()) for name in form[:3]]
        self._session = names.index(form.session.lower()) if form.session.lower() in names else -1
        self._clock = Clock() if form is AZURE else None
        self._header_read = False

    @classmethod
    def of_header(cls, columns: Columns, line: bytes) -> CsvRows:
        """The reader for a file with this first line. Raises TraceError where no format has such columns."""
        names = [name.strip().strip('"').lower() for name in line.decode(errors="replace").split(",")]
        for form in FORMATS:
            if all(name.lower() in names for name in form[:3]):
                return cls(columns, names, form)
        wanted = "; or ".join(", ".join(form[:3]) for form in FORMATS)
        found = ", ".join(names)[:100]
        raise TraceError(
            columns.path, 1, f"no header of a trace: columns are {found}; wanted are {wanted}; or JSON lines"
        )

    def read(self, first: int, data: bytes) -> None:
        """Whole lines, the first of which has number ``first``."""
        text = data.removeprefix(BOM).decode(errors="replace").replace('"', "").replace("\r", "")
        lines = text.removesuffix("\n").split("\n")
        while lines and not self._header_read:
            self._header_read = bool(lines.pop(0).strip())
            first += 1
        try:
            self._add_all([line.split(",") for line in lines])
        except ValueError:  # nothing was added
            self._one_by_one(first, lines)

    def _one_by_one(self, first: int, lines: list[str]) -> None:
        for number, line in enumerate(lines, first):
            if line.strip():
                try:
                    self._add(line.split(","))
                except ValueError as error:
                    self._columns.bad(number, f"{error}; {SKIP}" if SKIP not in str(error) else str(error))

    def finish(self) -> None:
        """Nothing more comes."""

    def _add_all(self, rows: list[list[str]]) -> None:
        """Append many lines of the plainest form. Raises ValueError, before anything is appended, on any other."""
        if set(map(len, rows)) != {self._width}:
            raise ValueError("blank lines, or other numbers of columns")
        stamps, prompts, outputs = ([row[at] for row in rows] for at in self._at)
        if not ("".join(prompts).isdecimal() and "".join(outputs).isdecimal()):
            raise ValueError("not only digits")
        tokens, answers = list(map(int, prompts)), list(map(int, outputs))
        if min(min(tokens), min(answers)) < 1 or max(max(tokens), max(answers)) > TOKENS_LIMIT:
            raise ValueError("lengths out of range")
        times = self._clock.column(stamps) if self._clock else [_seconds(self._names.stamp, text) for text in stamps]
        columns = self._columns
        columns.arrival.fromlist(times)
        columns.prompt.fromlist(tokens)
        columns.output.fromlist(answers)
        columns.offsets.fromlist([0] * len(rows))
        if self._session >= 0:
            columns.session += [row[self._session].strip() for row in rows]

    def _add(self, fields: list[str]) -> None:
        """Append one line. Raises ValueError, before anything is appended."""
        if len(fields) != self._width:
            raise ValueError(f"{len(fields)} columns where the header has {self._width}")
        stamp, prompt, output = self._at
        clock = self._clock
        when = _seconds(self._names.stamp, fields[stamp]) if clock is None else clock.seconds(fields[stamp])
        asked, drawn = fields[prompt], fields[output]
        tokens = int(asked) if asked.isdecimal() else _tokens(self._names.prompt, asked)
        answer = int(drawn) if drawn.isdecimal() else _tokens(self._names.output, drawn)
        if not (0 < tokens <= TOKENS_LIMIT and 0 < answer <= TOKENS_LIMIT):
            raise ValueError(self._unfit(tokens, answer))
        columns = self._columns
        columns.arrival.append(when)
        columns.prompt.append(tokens)
        columns.output.append(answer)
        columns.offsets.append(0)
        if self._session >= 0:
            columns.session.append(fields[self._session].strip())

    def _unfit(self, tokens: int, answer: int) -> str:
        names = self._names
        name, value = (names.output, answer) if 0 < tokens <= TOKENS_LIMIT else (names.prompt, tokens)
        return zero_tokens(name) if value == 0 else f"{name} is {value}: too many to be true"


def _tokens(name: str, text: str) -> int:
    """A count with blanks around it, or one written as 12.0. Raises ValueError."""
    whole, _, fraction = text.strip().partition(".")
    if not whole.isdecimal() or fraction.strip("0"):
        raise ValueError(f"{name} is {text.strip()[:40]!r}: wanted is a number of tokens, at least 1")
    return int(whole)


def _seconds(name: str, text: str) -> float:
    try:
        when = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text.strip()[:40]!r}: wanted are seconds") from None
    if not 0 <= when <= SECONDS_LIMIT:
        raise ValueError(f"{name} is {text.strip()[:40]}: wanted are seconds, 0 or more")
    return when


class Clock:
    """Turns stamps like ``2023-11-16 18:17:03.9799600`` (or with T, Z, +00:00) into seconds.

    The minute and the offset of a stamp are looked up, only its seconds are parsed. Times count from the minute of the
    first stamp, so that a fraction of 100 ns survives in a float.
    """

    def __init__(self) -> None:
        self._minutes: dict[str, float] = {}  # "2023-11-16 18:17:" -> seconds from the first minute
        self._offsets: dict[str, float] = {"": 0.0, "Z": 0.0}
        self._first: datetime | None = None

    def seconds(self, stamp: str) -> float:
        """Seconds from the first minute seen; may be negative in a file that is not sorted. Raises ValueError."""
        parts = _parts(stamp.strip())
        return self._minute(parts["minute"]) + float(parts["seconds"]) - self._ahead(parts["offset"] or "")

    def column(self, stamps: list[str]) -> list[float]:
        """:meth:`seconds` of many stamps that all end in the same offset. Raises ValueError on others."""
        offset = _parts(stamps[0])["offset"] or ""
        end = -len(offset) or None
        digits = [stamp[17:end] for stamp in stamps]
        heads = {text[:3] for text in digits}
        if not ("".join(digits).replace(".", "").isdecimal() and all(map(SECONDS_HEAD.fullmatch, heads))):
            raise ValueError("not only digits")
        if offset and {stamp[end:] for stamp in stamps} != {offset}:
            raise ValueError("several offsets")
        minutes = {
            key: self._minute(key) - self._ahead(offset) for key in dict.fromkeys(stamp[:17] for stamp in stamps)
        }
        return [minutes[stamp[:17]] + float(text) for stamp, text in zip(stamps, digits, strict=True)]

    def _minute(self, text: str) -> float:
        known = self._minutes.get(text)
        if known is not None:
            return known
        try:
            when = datetime.fromisoformat(text[:16])
        except ValueError as error:
            raise _no_time(text, str(error)) from None
        if self._first is None:
            self._first = when
        return self._minutes.setdefault(text, (when - self._first).total_seconds())

    def _ahead(self, offset: str) -> float:
        known = self._offsets.get(offset)
        if known is not None:
            return known
        delta = datetime.fromisoformat(f"2000-01-01T00:00{offset}").utcoffset() or timedelta()
        return self._offsets.setdefault(offset, delta.total_seconds())


STAMP = re.compile(
    r"(?P<minute>\d{4}-\d\d-\d\d[ T]\d\d:\d\d:)(?P<seconds>(?:[0-5]\d|60)(?:\.\d+)?)"
    r"(?P<offset>Z|[+-](?:[01]\d|2[0-3]):?[0-5]\d)?",
    re.ASCII,
)
SECONDS_HEAD = re.compile(r"(?:[0-5]\d|60)\.?", re.ASCII)


def _parts(stamp: str) -> re.Match[str]:
    parts = STAMP.fullmatch(stamp)
    if parts is None:
        raise _no_time(stamp)
    return parts


def _no_time(stamp: str, why: str = "") -> ValueError:
    reason = f" ({why})" if why else ""
    return ValueError(f"TIMESTAMP is {stamp[:40]!r}{reason}: wanted is a time like 2023-11-16 18:17:03.9799600")
