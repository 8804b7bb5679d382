"""Columns that grow while a file is read, and how a mistake in it is told. Shared by the readers of all formats."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from twinpool.errors import ConfigError
from twinpool.sim.trace import HASH_LIMIT, NO_TAIL, Trace, by_arrival, is_chained, no_hashes, quantum, rechain, spread

TOKENS_LIMIT = 1 << 40  # of one request; anything longer is a mistake in the file
SECONDS_LIMIT = 1e12
ID_MASK = HASH_LIMIT - 1
TOP_BYTE = 7 if sys.byteorder == "little" else 0
SKIP = "--skip-bad leaves such lines out"


class TraceError(ConfigError):
    """A trace file that cannot be used: which file, which line, what is wrong, what to do."""

    def __init__(self, path: Path, line: int | None, what: str) -> None:
        super().__init__(f"{path}, line {line}: {what}" if line is not None else f"{path}: {what}")


def zero_tokens(name: str) -> str:
    """What is wrong with a request of no tokens, and what to do."""
    draws = "its answer draws" if name.lower().startswith(("out", "gen", "resp")) else "its prompt has"
    return f"{name} is 0, but a request is one only if {draws} at least 1 token; {SKIP}"


@dataclass(slots=True)
class Columns:
    """A trace being read from ``path``. Optional columns stay empty until a format fills them."""

    path: Path
    skip_bad: bool
    block_tokens: int = 0
    arrival: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("q"))
    output: array[int] = field(default_factory=lambda: array("q"))
    hashes: array[int] = field(default_factory=lambda: array("q"))
    offsets: array[int] = field(default_factory=lambda: array("q", [0]))
    tail: array[int] = field(default_factory=lambda: array("q"))
    after: array[int] = field(default_factory=lambda: array("q"))
    think: array[float] = field(default_factory=lambda: array("d"))
    tenant: list[str] = field(default_factory=list)
    klass: list[str] = field(default_factory=list)
    session: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)  # line numbers
    folded: bool = False  # some hash id was out of range
    ends_sorted: bool = False  # the format is written in another order than arrival: no need to say so

    def bad(self, line: int, what: str) -> None:
        """A line that cannot be used: raises TraceError, or counts it where bad lines are to be skipped."""
        if not self.skip_bad:
            raise TraceError(self.path, line, what)
        self.skipped.append(line)

    def add_ids(self, rows: list[list[int]], fulls: Iterable[int]) -> None:
        """Hash ids of the next requests, taken over: the first ``full`` of each are of full blocks, one more of the
        partly filled one; the rest is left out."""
        offsets, tail = self.offsets, self.tail
        for ids, full in zip(rows, fulls, strict=True):
            last = NO_TAIL
            if len(ids) > full:
                last = ids[full] & ID_MASK
                del ids[full:]
            try:
                self.hashes.fromlist(ids)
            except OverflowError:  # leaves the array as it was
                self.hashes.fromlist([block & ID_MASK for block in ids])
                self.folded = True
            offsets.append(len(self.hashes))
            tail.append(last)

    def trace(self, from_zero: bool) -> Trace:
        """All that was read, sorted; ``from_zero``: the first arrival becomes 0. Raises TraceError without any."""
        n = len(self.arrival)
        if self.skipped:
            lines = ", ".join(map(str, self.skipped[:5])) + (", ..." if len(self.skipped) > 5 else "")
            self.notices.append(f"{self.path}: {len(self.skipped)} bad lines left out (lines {lines})")
        if not n:
            raise TraceError(self.path, None, "no requests in it; give a trace with at least one good line")
        if from_zero:
            first = min(self.arrival)
            self.arrival = array("d", [round(when - first, 9) for when in self.arrival])
        return self._chained(self._sorted(self._built(n)))

    def _built(self, n: int) -> Trace:
        hashed = bool(self.hashes) or any(block >= 0 for block in self.tail)
        follows = any(i >= 0 for i in self.after)
        return Trace(
            name=trace_name(self.path),
            block_tokens=self.block_tokens if hashed else 0,
            arrival=self.arrival,
            prompt=self.prompt,
            output=self.output,
            hashes=self._in_range(),
            offsets=self.offsets if hashed else no_hashes(n),
            after=self.after if follows else None,
            think=self.think if follows else None,
            tenant=self.tenant if any(self.tenant) else None,
            klass=self.klass if any(self.klass) else None,
            session=self.session if any(self.session) else None,
            tail=self.tail if any(block >= 0 for block in self.tail) else None,
        )

    def _in_range(self) -> array[int]:
        top = self.hashes.tobytes()[TOP_BYTE::8]  # a fourth of the time of min() and max()
        if max(top, default=0) >= HASH_LIMIT >> 56:
            self.hashes = array("q", [block & ID_MASK for block in self.hashes])
            self.folded = True
        if self.folded:
            self.notices.append(f"{self.path}: hash ids outside of 0 to 2**62 - 1 were cut to their low 62 bits")
        return self.hashes

    def _sorted(self, trace: Trace) -> Trace:
        ordered = by_arrival(trace)
        late = (
            sum(1 for i in range(1, len(trace)) if trace.arrival[i] < trace.arrival[i - 1])
            if ordered is not trace
            else 0
        )
        if late and not self.ends_sorted:
            self.notices.append(f"{self.path}: {late} requests come before the one above them; sorted by arrival")
        return ordered

    def _chained(self, trace: Trace) -> Trace:
        if is_chained(trace):
            return trace
        self.notices.append(
            f"{self.path}: equal hash ids stand behind different prefixes, so they name the contents of one block; "
            "each was replaced by an id of its block and all before it"
        )
        return rechain(trace)


def even(trace: Trace, path: Path, spread_seed: int | None, notices: list[str]) -> Trace:
    """Spread a trace with quantised stamps where a seed is given, else say that they make bursts."""
    if spread_seed is not None:
        return spread(trace, spread_seed)
    step = quantum(trace)
    if step:
        stamps = len(set(trace.arrival))
        notices.append(
            f"{path}: arrivals are quantised to about {step:.3g} s ({stamps} stamps for {len(trace)} requests), "
            "which makes bursts that were not there; --spread-timestamps spreads them"
        )
    return trace


def trace_name(path: Path) -> str:
    """File name without its endings: conversation of conversation.jsonl.gz."""
    return path.name.split(".")[0] or path.name
