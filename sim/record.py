"""What a run leaves behind: columns of request times, and where each request's gaps are to be found."""

from __future__ import annotations

import struct
from array import array
from typing import Final

import xxhash

from twinpool.router.request import Request
from twinpool.sim.gaps import GapLog
from twinpool.sim.result import LOST, NEVER, REFUSED

FLUSH_VALUES: Final = 1 << 16


class Recorder:
    """Filled by the loop; read by ``replay`` when all is over. Columns are indexed by rid."""

    __slots__ = (
        "_hash", "_log", "arrival", "cached", "decode", "digest", "ended", "gaps", "itl_limit", "joined", "kv_bytes",
        "latest", "outcome", "path", "prefill", "reasons", "shown", "transferred", "ttft_limit", "unloaded",
    )  # fmt: skip

    def __init__(self, requests: int) -> None:
        zeros, nevers = bytes(8 * requests), [NEVER] * requests
        self.arrival, self.shown, self.ended = array("d", nevers), array("d", nevers), array("d", nevers)
        self.transferred = array("d", nevers)  # seconds from the first token to the last verified block
        self.ttft_limit, self.itl_limit, self.unloaded = array("d", zeros), array("d", zeros), array("d", zeros)
        self.cached, self.kv_bytes = array("q", zeros), array("q", zeros)
        self.prefill, self.decode = array("i", [-1] * requests), array("i", [-1] * requests)
        self.path, self.outcome = array("b", bytes(requests)), array("b", [LOST] * requests)
        self.reasons: dict[str, int] = {}  # why requests were refused, and how many
        self.gaps = GapLog()
        self.joined = array("d", nevers)  # the last token that no run explains: first ones, here or after a hand-over
        self.latest: dict[int, float] = {}  # rid -> last token of an attempt that was lost while it decoded
        self.digest = ""
        self._log: list[float] = []  # not hashed yet
        self._hash = xxhash.xxh3_128()

    def decided(self, now: float, kind: int, worker: int, attempt: int) -> None:
        """One decision for the digest."""
        self._log.extend((now, kind, worker, attempt))
        if len(self._log) >= FLUSH_VALUES:
            self._flush()

    def _flush(self) -> None:
        self._hash.update(struct.pack(f"{len(self._log)}d", *self._log))
        self._log.clear()

    def close(self, request: Request, now: float, outcome: int) -> None:
        """The request is over."""
        rid = request.rid
        self.outcome[rid] = outcome
        self.ended[rid] = now
        self.arrival[rid] = request.arrival
        limit = request.deadline - request.arrival
        self.ttft_limit[rid] = limit
        if request.ttft_factor > 0.0:
            self.unloaded[rid] = (limit - request.ttft_s) / request.ttft_factor
        self.itl_limit[rid] = request.itl_s
        self.cached[rid] = request.cached
        self.kv_bytes[rid] = request.kv_bytes
        self.prefill[rid] = request.prefill
        self.decode[rid] = request.decode
        self.path[rid] = request.path == "local"
        if outcome == REFUSED:
            self.reasons[request.ended] = self.reasons.get(request.ended, 0) + 1
        elif request.transferred_at >= 0.0 and request.kv_bytes:
            self.transferred[rid] = request.transferred_at - request.first_at

    def seal(self) -> None:
        """All is over: the digest of all decisions."""
        self._flush()
        self.digest = self._hash.hexdigest()
