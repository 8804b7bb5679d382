"""Reads a traffic trace, plain or gzip, whatever its name: the first line tells which format it is.

====================  ===========================================================================================
Mooncake JSONL        timestamp (ms), input_length, output_length, hash_ids (one per 512 tokens, the last may stand for
                      a partly filled block). Source: Mooncake, FAST'25 traces.
our own               Mooncake's, and where they are not the default: block_tokens (512), after (number of the record,
                      from 0, that this one follows), think (s), session, class, tenant. ``trace_write.py`` writes it.
Qwen-Bailian JSONL    chat_id, parent_chat_id, timestamp (s), input_length, output_length, turn, hash_ids of 16 tokens.
the router's log      one line a request: ``router/flow.py`` writes it.
Azure CSV             TIMESTAMP, ContextTokens, GeneratedTokens (2023, 2024 and ISO stamps).
BurstGPT CSV          Timestamp (s), Request tokens, Response tokens, and Session ID where there is one.
====================  ===========================================================================================
"""

from __future__ import annotations

import gzip
import re
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Protocol, cast

import msgspec

from twinpool.errors import ConfigError
from twinpool.sim.readers_csv import CsvRows
from twinpool.sim.trace import NO_REQUEST, Trace
from twinpool.sim.trace_columns import SECONDS_LIMIT, SKIP, TOKENS_LIMIT, Columns, TraceError, even, zero_tokens

MOONCAKE_BLOCK = 512
BAILIAN_BLOCK = 16
LOG_BLOCK = 16  # where the log leaves a choice: the default of model.block_size
SLAB = 1 << 20  # bytes parsed at a time
LINE_LIMIT = 1 << 26  # bytes
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"

Tokens = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_LIMIT)]
AnyTokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_LIMIT)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=SECONDS_LIMIT)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1000 * SECONDS_LIMIT)]


def read_trace(path: Path | str, *, skip_bad: bool = False, spread_seed: int | None = None) -> tuple[Trace, list[str]]:
    """The trace in a file, and sentences about what was mended or is odd.

    ``skip_bad`` leaves bad lines out and counts them; ``spread_seed`` spreads quantised arrivals (``trace.spread``).
    Raises TraceError (a ConfigError) on a file that is no trace, is empty or has a bad line.
    """
    path = Path(path)
    columns = Columns(path, skip_bad)
    rows: Rows | None = None
    for slab in _slabs(path):
        if rows is None:
            rows = _rows_for(columns, slab)
        if rows is not None:
            rows.read(slab.first, slab.data)
    if rows is None:
        raise TraceError(path, None, "the file is empty; give a trace with at least one request")
    rows.finish()
    trace = columns.trace(from_zero=rows.absolute)
    return even(trace, path, spread_seed, columns.notices), columns.notices


class Rows(Protocol):
    """Reader of one format into columns."""

    absolute: bool  # stamps count from some date: the first becomes 0

    def read(self, first: int, data: bytes) -> None:
        """Whole lines, the first of which has number ``first``."""

    def finish(self) -> None:
        """Nothing more comes."""


class Slab(NamedTuple):
    """Some whole lines of a file; ``first`` is the number of the first one, from 1."""

    first: int
    data: bytes


def _slabs(path: Path) -> Iterator[Slab]:
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == GZIP
            # GzipFile is a BinaryIO in all that is used here
            file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
            yield from _whole_lines(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise TraceError(path, None, f"the gzip data is cut short or damaged ({error}); fetch the file again") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error})") from None


def _whole_lines(path: Path, file: BinaryIO) -> Iterator[Slab]:
    rest, first = b"", 1
    while data := file.read(SLAB):
        data = rest + data
        cut = data.rfind(b"\n") + 1
        if cut:
            yield Slab(first, data[:cut])
            first += data.count(b"\n", 0, cut)
        rest = data[cut:]
        if len(rest) > LINE_LIMIT:
            raise TraceError(path, first, f"longer than {LINE_LIMIT} bytes; this is no trace")
    if rest:
        yield Slab(first, rest)


def _rows_for(columns: Columns, slab: Slab) -> Rows | None:
    """The reader for a file that begins so; None where there are blank lines only. Raises TraceError."""
    data = slab.data.removeprefix(BOM).lstrip()
    line = data[: data.find(b"\n") + 1 or None].rstrip()
    if not line:
        return None
    if not line.startswith((b"{", b"[")):
        return CsvRows.of_header(columns, line)
    try:
        keys = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if not columns.skip_bad:
            raise TraceError(columns.path, slab.first, f"no JSON: {error}") from None
        keys = {key.decode(errors="replace"): None for key in re.findall(rb'"(\w+)"\s*:', data[: 1 << 16])}
    for kind in (_BailianRows, _LogRows, _MooncakeRows):
        if isinstance(keys, dict) and kind.needs <= keys.keys():
            return kind(columns)
    raise TraceError(
        columns.path,
        slab.first,
        "no format known here: wanted are the JSON fields timestamp, input_length, output_length (Mooncake; with "
        "chat_id: Qwen-Bailian), those of the router's request log, or the CSV columns of Azure or BurstGPT",
    )


# --- JSON lines ---------------------------------------------------------------------------------------------------


class _JsonRows:
    """Decodes lines into structs, many at once where all are good, one by one where not."""

    needs: frozenset[str]
    absolute = False

    def __init__(self, columns: Columns, row: type[Any]) -> None:
        self._columns = columns
        self._decoder = msgspec.json.Decoder(row)

    def read(self, first: int, data: bytes) -> None:
        data = data.removeprefix(BOM) if first == 1 else data
        lines = data.count(b"\n") + (not data.endswith(b"\n"))
        try:
            rows = self._decoder.decode_lines(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            rows = []
        if len(rows) == lines:
            self.add(range(first, first + lines), rows)
        else:
            self._one_by_one(first, data)

    def _one_by_one(self, first: int, data: bytes) -> None:
        for number, line in enumerate(data.split(b"\n"), first):
            if line.strip():
                try:
                    row = self._decoder.decode(line)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    self.skip(number, _why(line, error))
                else:
                    self.add((number,), (row,))

    def skip(self, line: int, what: str) -> None:
        """Raise, or leave the line out."""
        self._columns.bad(line, what)

    def add(self, lines: Sequence[int], rows: Sequence[Any]) -> None:
        """Append ``rows``, which stand on ``lines``."""
        raise NotImplementedError

    def finish(self) -> None:
        pass


def _why(line: bytes, error: Exception) -> str:
    """A sentence about a line that did not decode."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return f"no JSON: {error}; {SKIP}"
    missing = re.search(r"missing required field `(\w+)`", str(error))
    if missing:
        return f"{missing[1]} is missing; {SKIP}"
    field = re.search(r"`\$\.(\w+)", str(error))
    if not isinstance(found, dict) or field is None:
        return f"no JSON object with the fields of this format ({error}); {SKIP}"
    name, value = field[1], found.get(field[1])
    if value == 0 and name.endswith(("_length", "_tokens")):
        return zero_tokens(name)
    wanted = str(error).split(" - at")[0].replace("`", "")
    return f"{name} is {msgspec.json.encode(value).decode()[:60]}: {wanted[:1].lower()}{wanted[1:]}; {SKIP}"


class _Mooncake(msgspec.Struct, gc=False):
    timestamp: Milliseconds
    input_length: Tokens
    output_length: Tokens
    hash_ids: list[int] = []
    block_tokens: Tokens = MOONCAKE_BLOCK
    after: Annotated[int, msgspec.Meta(ge=-1)] = -1
    think: Seconds = 0.0
    session: str = ""
    klass: str = msgspec.field(name="class", default="")
    tenant: str = ""


class _MooncakeRows(_JsonRows):
    """Mooncake's format and our own, which adds fields to it."""

    needs = frozenset({"timestamp", "input_length", "output_length"})

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns, _Mooncake)
        self._lost: list[int] = []  # numbers of the records that were left out, ascending

    def skip(self, line: int, what: str) -> None:
        super().skip(line, what)
        self._lost.append(len(self._columns.after) + len(self._lost))

    def add(self, lines: Sequence[int], rows: Sequence[_Mooncake]) -> None:
        columns = self._columns
        block = columns.block_tokens = columns.block_tokens or rows[0].block_tokens
        if {row.block_tokens for row in rows} != {block} or max([row.after for row in rows]) >= 0:
            rows = self._checked(lines, rows)
        else:
            columns.after.fromlist([NO_REQUEST] * len(rows))
        stamps = [row.timestamp for row in rows]
        # our own stamps have fractions: exact to the nanosecond
        columns.arrival.fromlist([ms / 1e3 if ms.is_integer() else round(ms / 1e3, 9) for ms in stamps])
        columns.prompt.fromlist([row.input_length for row in rows])
        columns.output.fromlist([row.output_length for row in rows])
        columns.add_ids([row.hash_ids for row in rows], [row.input_length // block for row in rows])
        columns.think.fromlist([row.think for row in rows])
        columns.session += [row.session for row in rows]
        columns.klass += [row.klass for row in rows]
        columns.tenant += [row.tenant for row in rows]

    def _checked(self, lines: Sequence[int], rows: Sequence[_Mooncake]) -> list[_Mooncake]:
        """The rows that can be used; whom they follow is in the columns already."""
        columns, good = self._columns, []
        for line, row in zip(lines, rows, strict=True):
            record = len(columns.after) + len(self._lost)
            if row.block_tokens != columns.block_tokens:
                self.skip(line, f"block_tokens is {row.block_tokens}, but {columns.block_tokens} above; {SKIP}")
            elif row.after >= record:
                self.skip(line, f"after is {row.after}: one follows a record above it only, from 0; {SKIP}")
            else:
                columns.after.append(self._place(row.after))
                good.append(row)
        return good

    def _place(self, record: int) -> int:
        """Index of a record, less those that were left out; -1 where it is itself one of those."""
        if not self._lost or record < 0:
            return record
        place = bisect_left(self._lost, record)
        return -1 if place < len(self._lost) and self._lost[place] == record else record - place


class _Bailian(msgspec.Struct, gc=False):
    chat_id: int | str
    timestamp: Seconds
    input_length: Tokens
    output_length: Tokens
    parent_chat_id: int | str = -1
    hash_ids: list[int] = []


class _BailianRows(_JsonRows):
    """Qwen-Bailian: a session is a chat with all that descend from it."""

    needs = frozenset({"chat_id", "timestamp", "input_length", "output_length"})

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns, _Bailian)
        columns.block_tokens = BAILIAN_BLOCK
        self._roots: dict[int | str, str] = {}

    def add(self, lines: Sequence[int], rows: Sequence[_Bailian]) -> None:
        columns, roots = self._columns, self._roots
        for row in rows:
            columns.arrival.append(row.timestamp)
            columns.prompt.append(row.input_length)
            columns.output.append(row.output_length)
            root = roots.get(row.parent_chat_id) or str(row.chat_id)
            roots[row.chat_id] = root
            columns.session.append(root)
        columns.add_ids([row.hash_ids for row in rows], [row.input_length // BAILIAN_BLOCK for row in rows])


class _Log(msgspec.Struct, gc=False):
    arrival: Seconds
    prompt_tokens: Tokens
    output_tokens: AnyTokens
    max_tokens: AnyTokens = 0
    block_tokens: AnyTokens = 0
    hashes: list[int] = []
    tenant: str = ""
    klass: str = msgspec.field(name="class", default="")
    session: str = ""


class _LogRows(_JsonRows):
    """The router's log. Requests that drew no token keep their place, with the mean output of the others.

    ``hashes`` may go on into the output (a resumed request): they are cut to the prompt, which needs the block size.
    """

    needs = frozenset({"v", "arrival", "prompt_tokens", "output_tokens"})
    absolute = True

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns, _Log)
        columns.ends_sorted = True
        self._silent: list[tuple[int, int]] = []  # (index, max_tokens) of requests without output
        self._above, self._most = 0.0, float("inf")  # the block size is above the one, and at most the other

    def add(self, lines: Sequence[int], rows: Sequence[_Log]) -> None:
        columns = self._columns
        for row in rows:
            if not row.output_tokens:
                self._silent.append((len(columns.arrival), row.max_tokens))
            if row.hashes:
                count = len(row.hashes)
                self._above = max(self._above, row.prompt_tokens / (count + 1))
                self._most = min(self._most, (row.prompt_tokens + row.output_tokens) / count)
                columns.block_tokens = columns.block_tokens or row.block_tokens
            columns.arrival.append(row.arrival)
            columns.prompt.append(row.prompt_tokens)
            columns.output.append(row.output_tokens)
            columns.tenant.append(row.tenant)
            columns.klass.append(row.klass)
            columns.session.append(row.session)
        columns.add_ids([row.hashes for row in rows], [len(row.hashes) for row in rows])

    def finish(self) -> None:
        columns = self._columns
        if columns.hashes:
            columns.block_tokens = columns.block_tokens or self._block()
            self._cut()
        self._fill()

    def _block(self) -> int:
        """The block size that the numbers of hashes tell."""
        fitting = [size for size in (LOG_BLOCK, *(1 << bits for bits in range(13))) if self._above < size <= self._most]
        if not fitting:
            raise TraceError(self._columns.path, None, "prompt_tokens and the numbers of hashes fit no block size")
        return fitting[0] if LOG_BLOCK in fitting else fitting[-1]

    def _cut(self) -> None:
        columns = self._columns
        hashes, offsets = array("q"), array("q", [0])
        for (low, high), tokens in zip(pairwise(columns.offsets), columns.prompt, strict=True):
            hashes += columns.hashes[low : min(high, low + tokens // columns.block_tokens)]
            offsets.append(len(hashes))
        columns.hashes, columns.offsets = hashes, offsets

    def _fill(self) -> None:
        columns = self._columns
        spoke = len(columns.output) - len(self._silent)
        if not self._silent or not columns.output:
            return
        if not spoke:
            raise TraceError(columns.path, None, "no request in it has output: nothing tells how long answers are")
        mean = max(1, round(sum(columns.output) / spoke))
        for i, most in self._silent:
            columns.output[i] = min(mean, most) if most else mean
        columns.notices.append(
            f"{columns.path}: {len(self._silent)} requests drew no token (refused or lost); they count with the mean "
            f"output of the others, {mean} tokens"
        )
