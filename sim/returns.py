"""What requests of a trace may say of themselves: "this conversation will come back". Hints to eviction, made up.

A conversation is known by ``after`` where the trace has it, and else by its hashes: a prompt goes on with the one that
last ended in a full block of its later half. (What ends earlier in it is the beginning that many have in common.)

- oracle: the truth, as clients can tell who wait for a tool, and as nobody else can.
- follow_ups: what a gateway can tell without asking: whoever came back will do so again, a first turn will not.
"""

from __future__ import annotations

import random
from dataclasses import replace

from twinpool.errors import ConfigError
from twinpool.sim.trace import NO_REQUEST, Trace

HINTS = ("oracle", "follow_ups")


def with_returns(trace: Trace, hint: str, wrong: float = 0.0, seed: int = 0) -> Trace:
    """The trace whose requests give this hint; a share ``wrong`` of them says the opposite, drawn by ``seed``.

    Raises ConfigError where there is no such hint, or ``wrong`` is no share.
    """
    if hint not in HINTS or not 0.0 <= wrong <= 1.0:
        raise ConfigError(f"no hint {hint!r} with a share of {wrong:g} wrong: there are {', '.join(HINTS)}, and 0 to 1")
    follows = _follows(trace)
    says = [before != NO_REQUEST for before in follows]
    if hint == "oracle":
        says = [False] * len(trace)
        for before in follows:
            if before != NO_REQUEST:
                says[before] = True
    rng = random.Random(seed)
    if wrong:
        says = [truth != (rng.random() < wrong) for truth in says]
    return replace(trace, returns=says)


def _follows(trace: Trace) -> list[int]:
    """The request that each one goes on with; NO_REQUEST where it begins a conversation."""
    follows: list[int] = []
    ends: dict[int, int] = {}  # last full block of a prompt -> the request that ended there last
    for i in range(len(trace)):
        hashes = trace.block_hashes(i)
        before = trace.after[i] if trace.after is not None else NO_REQUEST
        if before == NO_REQUEST:
            later = reversed(hashes[(len(hashes) - 1) // 2 :])
            before = next((ends[value] for value in later if value in ends), NO_REQUEST)
        follows.append(before)
        if hashes:
            ends[hashes[-1]] = i
    return follows
