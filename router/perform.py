"""Performs the core's actions: frames to workers, tokens and ends to streams."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any

from twinpool.blockhash import token_bytes
from twinpool.errors import BY_CODE, Internal
from twinpool.proto import frames
from twinpool.router import events as ev
from twinpool.router.flow import Flow
from twinpool.router.request import Request
from twinpool.router.roster import Roster


class Performer:
    """Turns actions into frames and stream calls; ``close(request, outcome)`` takes a finished request's flow out."""

    def __init__(
        self,
        roster: Roster,
        flows: dict[int, Flow],
        counts: dict[str, int],
        *,
        lease_s: float,
        transfer_timeout_s: float,
        clock: Callable[[], float],
        close: Callable[[Request, str], Flow],
    ) -> None:
        self._roster = roster
        self._flows = flows
        self._counts = counts
        self._lease_s = lease_s
        self._transfer_timeout_s = transfer_timeout_s
        self._clock = clock
        self._close = close
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.SendReserve: self._reserve, ev.SendLend: self._lend, ev.SendPrefill: self._prefill,
            ev.SendPull: self._pull, ev.SendDecode: self._decode, ev.SendRelease: self._release,
            ev.SendYield: self._yield, ev.SendCancel: self._cancel, ev.SendRenew: self._renew, ev.Show: self._show,
            ev.Finish: self._finish, ev.Refuse: self._refuse,
        }  # fmt: skip

    def perform(self, action: ev.Action) -> None:
        """Do one action; never raises for a worker that is gone."""
        self._handlers[type(action)](action)

    def _send(self, worker: int, frame: frames.Frame) -> None:
        member = self._roster.get(worker)
        if member is not None:
            member.link.send(frame)

    def _reserve(self, action: ev.SendReserve) -> None:
        request, flow = action.request, self._flows[action.request.rid]
        # KV moves for what this attempt prefills: a token it has drawn meanwhile must not lengthen the held prefix.
        prompt = token_bytes(flow.tokens()[: request.length])
        frame = frames.Reserve(attempt=action.attempt, prompt=prompt, salt=flow.submission.salt,
                               blocks=action.blocks, lease_s=self._lease_s, keep=request.keep)  # fmt: skip
        self._send(action.worker, frame)

    def _lend(self, action: ev.SendLend) -> None:
        hashes = array("Q", action.request.hashes[: action.hashes]).tobytes()
        self._send(action.worker, frames.Lend(attempt=action.attempt, hashes=hashes, lease_s=self._lease_s))

    def _prefill(self, action: ev.SendPrefill) -> None:
        if action.request.attempts - action.request.moves == 2 and not action.request.moves:
            self._counts["resumed"] += 1
        sequence = self._flows[action.request.rid].sequence(action.request)
        frame = frames.Prefill(attempt=action.attempt, sequence=sequence, decode=action.decode,
                               transfer=action.transfer, lease_s=self._lease_s, cached=action.cached)  # fmt: skip
        self._send(action.worker, frame)

    def _pull(self, action: ev.SendPull) -> None:
        peer = self._roster.get(action.peer)
        if peer is None:
            return  # its loss is the next event
        hello = peer.hello
        timeout_s = min(action.timeout_s or math.inf, self._transfer_timeout_s)
        frame = frames.Pull(attempt=action.attempt, first=action.first, blocks=action.blocks, sums=action.sums,
                            peer=hello.worker, peer_epoch=hello.epoch, addresses=hello.kv_addresses,
                            secret=hello.kv_secret, timeout_s=timeout_s)  # fmt: skip
        self._send(action.worker, frame)

    def _decode(self, action: ev.SendDecode) -> None:
        sequence = self._flows[action.request.rid].sequence(action.request)
        self._send(action.worker, frames.Decode(attempt=action.attempt, sequence=sequence))

    def _release(self, action: ev.SendRelease) -> None:
        self._send(action.worker, frames.Release(attempt=action.attempt))

    def _yield(self, action: ev.SendYield) -> None:
        self._send(action.worker, frames.Yield(attempt=action.attempt))

    def _cancel(self, action: ev.SendCancel) -> None:
        self._send(action.worker, frames.Cancel(attempt=action.attempt, suspect=action.suspect))

    def _renew(self, action: ev.SendRenew) -> None:
        attempts = token_bytes(array("I", action.attempts))
        self._send(action.worker, frames.Renew(attempts=attempts, lease_s=self._lease_s))

    def _show(self, action: ev.Show) -> None:
        self._flows[action.rid].show(self._clock())

    def _finish(self, action: ev.Finish) -> None:
        flow = self._close(action.request, "ok")
        self._counts["completed"] += 1
        flow.stream.finish(flow.finished(action.request))

    def _refuse(self, action: ev.Refuse) -> None:
        flow = self._close(action.request, action.reason)
        self._counts["cancelled" if action.code == "CANCELLED" else "refused"] += 1
        kind = BY_CODE.get(action.code, Internal)
        flow.stream.finish(kind(action.message, reason=action.reason, retry_s=action.retry_s))
