"""Writes a trace: as our own JSON lines, which keep all of it, or as plain Mooncake lines, which other tools read.

Both have ``timestamp`` in milliseconds, ours to the nanosecond (six decimals), Mooncake's whole. ``readers.py`` reads
both back.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, cast

import msgspec

from twinpool.errors import ConfigError
from twinpool.sim.trace import NO_TAIL, Trace

MOONCAKE_BLOCK = 512
FORMS = ("twinpool", "mooncake")


def write_trace(trace: Trace, path: Path, form: str = "twinpool") -> list[str]:
    """Write a file, gzip where its name ends in ``.gz``; returns sentences about what the form can not keep.

    The same trace makes the same bytes. Raises ConfigError on an unknown form, hash ids that the form has no place for,
    or a file that can not be written.
    """
    lines, notices = trace_lines(trace, form), losses(trace, form)
    try:
        with _opened(path) as file:
            file.writelines(lines)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror or error})") from None
    return notices


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("wb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                yield cast(BinaryIO, packed)
        else:
            yield raw


def trace_lines(trace: Trace, form: str) -> Iterator[bytes]:
    """The lines of the file, each with its newline. Raises ConfigError as :func:`write_trace` does, at once."""
    if form not in FORMS:
        raise ConfigError(f"no format {form!r}: there are {' and '.join(FORMS)}")
    if form == "mooncake" and trace.block_tokens and MOONCAKE_BLOCK % trace.block_tokens:
        raise ConfigError(
            f"hash ids of {trace.block_tokens} tokens do not make blocks of {MOONCAKE_BLOCK}, as Mooncake's format has "
            "them; write the format twinpool"
        )
    records = _own(trace) if form == "twinpool" else _mooncake(trace)
    encode = msgspec.json.Encoder().encode
    return (encode(record) + b"\n" for record in records)


def losses(trace: Trace, form: str) -> list[str]:
    """Sentences about what ``form`` does not keep of this trace."""
    if form != "mooncake":
        return []
    notices = []
    columns = {"class": trace.klass, "tenant": trace.tenant, "session": trace.session}
    gone = [name for name, column in columns.items() if column is not None]
    if gone:
        notices.append(f"Mooncake's format has no {', '.join(gone)}: left out")
    if trace.after is not None:
        notices.append("Mooncake's format has no closed loop: each request arrives at its own time, as early as it may")
    if not trace.block_tokens:
        notices.append("the trace has no hash ids, but Mooncake's format must: each block got one of its own")
    if any(when * 1000 != round(when * 1000) for when in trace.arrival):
        notices.append("Mooncake's format has whole milliseconds: arrivals were rounded")
    return notices


def _own(trace: Trace) -> Iterator[dict[str, Any]]:
    for i in range(len(trace)):
        stamp = round(trace.arrival[i] * 1000, 6)
        record: dict[str, Any] = {
            "timestamp": int(stamp) if stamp.is_integer() else stamp,
            "input_length": trace.prompt[i],
            "output_length": trace.output[i],
        }
        if trace.block_tokens:
            record["hash_ids"] = trace.block_hashes(i) + _tail(trace, i)
            if trace.block_tokens != MOONCAKE_BLOCK:
                record["block_tokens"] = trace.block_tokens
        if trace.after is not None and trace.think is not None:
            if trace.after[i] >= 0:
                record["after"] = trace.after[i]
            if trace.think[i]:
                record["think"] = trace.think[i]
        for name, column in (("session", trace.session), ("class", trace.klass), ("tenant", trace.tenant)):
            if column is not None and column[i]:
                record[name] = column[i]
        yield record


def _tail(trace: Trace, i: int) -> list[int]:
    """The id of the partly filled last block, where the full ones before it all have theirs."""
    known = trace.offsets[i + 1] - trace.offsets[i]
    if trace.tail is None or trace.tail[i] == NO_TAIL or known < trace.prompt[i] // trace.block_tokens:
        return []
    return [trace.tail[i]]


def _mooncake(trace: Trace) -> Iterator[dict[str, Any]]:
    used = {*trace.hashes, *(trace.tail or ())}
    fresh = (block for block in count() if block not in used)
    for i, tokens in enumerate(trace.prompt):
        ids = _grouped(trace, i)
        blocks = -(-tokens // MOONCAKE_BLOCK)
        yield {
            "timestamp": round(trace.arrival[i] * 1000),
            "input_length": tokens,
            "output_length": trace.output[i],
            "hash_ids": ids + [next(fresh) for _ in range(blocks - len(ids))],
        }


def _grouped(trace: Trace, i: int) -> list[int]:
    """Known ids of the blocks of 512 tokens: ids are chained, so the last one inside a block names the whole block."""
    if not trace.block_tokens:
        return []
    step = MOONCAKE_BLOCK // trace.block_tokens
    ids, tail = trace.block_hashes(i), _tail(trace, i)
    tokens = trace.prompt[i]
    grouped = ids[step - 1 :: step]
    if tokens % MOONCAKE_BLOCK and len(ids) == tokens // trace.block_tokens:
        exact = tokens % trace.block_tokens == 0
        grouped += ids[-1:] if exact else tail
    return grouped
