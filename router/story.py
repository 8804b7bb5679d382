"""What is known of one request after its decisions were watched: looks, attempts, stamps. Pure; see witness.py.

Times are seconds after the request's arrival, -1 for what did not happen, unless said otherwise.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from twinpool.router.policy.explain import DecodeRow, PromptRow
from twinpool.router.request import NOBODY

NEVER: Final = -1.0
PLACED: Final = "placed"
WAITS: Final = "waits"
REFUSED: Final = "refused"
DECODE: Final = "decode"


@dataclass(slots=True)
class Look:
    """What the policy saw at one moment, and what it answered."""

    at_s: float
    kind: str  # placed | waits | refused | decode: only a decode worker was looked for
    attempt: int  # 1 is the first; of a request that waits the one that it waits for
    reason: str  # the placement's own, or why it waits
    prompt: list[PromptRow] = field(default_factory=list)
    decoders: list[DecodeRow] = field(default_factory=list)
    path: str = ""
    prefill: int = NOBODY
    decode: int = NOBODY
    cached: int = 0  # predicted, at the worker that was chosen
    prompt_s: float = NEVER  # predicted, and booked
    first_s: float = NEVER  # predicted, from the look on


@dataclass(slots=True)
class Attempt:
    """One attempt, and how it went."""

    number: int  # 1 is the first
    path: str
    reason: str
    prefill: str = ""  # names of the workers
    decode: str = ""
    prefill_id: int = NOBODY
    decode_id: int = NOBODY
    placed_s: float = NEVER  # sent on its way: for policies that bind at arrival later than the look
    reserved_s: float = NEVER
    prefill_started_s: float = NEVER
    first_s: float = NEVER
    transferred_s: float = NEVER
    decoding_s: float = NEVER
    ended_s: float = NEVER
    outcome: str = ""  # finished, or why it ended
    cached: int = -1  # prompt tokens that were cached
    compute_s: float = NEVER  # of the prompt's steps, in seconds, not after arrival
    source: str = ""  # worker that it fetched a prefix from; "": it fetched nothing
    fetched: int = 0  # prompt tokens that came from there
    fetch_predicted_s: float = NEVER  # seconds, not after arrival
    fetch_s: float = NEVER  # likewise, from the request to the last block
    fetch_ended_s: float = NEVER
    fetch_outcome: str = ""  # OK, or why the prefill began without
    kv_bytes: int = 0  # moved so far, those of earlier attempts included
    backend: str = ""


@dataclass(slots=True)
class Story:
    """One request from its arrival to its end, or to the end of what is known."""

    policy: str
    rid: int
    id: str = ""  # as the user knows it
    arrived: bool = False
    clock_s: float = 0.0  # the driver's clock at arrival
    prompt_tokens: int = 0
    max_tokens: int = 0
    resumed: int = 0  # output tokens that the client brought along
    klass: str = ""
    tenant: str = ""
    session: str = ""
    ttft_slo_s: float = 0.0
    itl_slo_s: float = 0.0
    ahead: int = 0  # requests that waited before it when it arrived
    asked: int = 0  # times that the policy was asked and did not place it
    passed: int = 0  # of them, times that others might go before it
    late_s: float = NEVER  # when it was found that its first token cannot come in time
    looks: list[Look] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    losses: int = 0  # attempts lost by a fault
    shown_s: float = NEVER  # its first token left
    ended_s: float = NEVER
    ended: str = ""  # stop | length, or the reason of a refusal
    code: str = ""  # gRPC status of a refusal
    message: str = ""
    tokens: int = 0  # of the output, those brought along included

    @property
    def over(self) -> bool:
        """Whether its end is known."""
        return self.ended_s >= 0.0

    @property
    def itl_s(self) -> float:
        """Mean seconds between its output tokens; -1 with fewer than two."""
        new = self.tokens - self.resumed
        return (self.ended_s - self.shown_s) / (new - 1) if self.over and self.shown_s >= 0.0 and new > 1 else NEVER

    def placing(self, attempt: int) -> Look | None:
        """The look that an attempt came from."""
        looks = [look for look in self.looks if look.attempt == attempt and look.kind == PLACED]
        return looks[-1] if looks else None

    def figures(self) -> dict[str, Any]:
        """All of it as plain values for JSON; None for what did not happen, and for infinity."""
        figures: dict[str, Any] = _plain(asdict(self))
        return figures | {"class": figures.pop("klass"), "itl_s": None if self.itl_s < 0.0 else self.itl_s}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if _absent(key, each) else _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _absent(key: str, value: object) -> bool:
    return value == NEVER and key != "slack_s"
