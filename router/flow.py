"""One running request outside the core: its submission, journal and stream, and what is said about it at the end."""

from __future__ import annotations

import json
from array import array
from typing import Any

from twinpool.blockhash import token_bytes
from twinpool.proto import frames
from twinpool.router.cell import FinishedOut, Submission
from twinpool.router.request import Fetch, Request
from twinpool.router.stream import OutStream
from twinpool.sampling import TokenLogprob


class Flow:
    """Journal (prompt and output so far) and stream of a request; times in seconds of the router's clock.

    The journal is all that another worker needs to go on exactly where a lost one stopped.
    """

    __slots__ = ("arrival", "first_sent", "last_sent", "last_text", "output", "stop", "stream", "submission")

    def __init__(self, submission: Submission, stream: OutStream, now: float) -> None:
        self.submission = submission
        self.stream = stream
        self.output = array("I", submission.resumed)
        self.arrival = now
        self.first_sent = -1.0  # when the first token might leave: held tokens count from Show
        self.last_sent = -1.0
        self.stop: str | int | None = None
        self.last_text = ""

    def tokens(self) -> array[int]:
        """Prompt, then output so far."""
        return self.submission.prompt + self.output

    def sequence(self, request: Request) -> frames.Sequence:
        """What a worker needs to compute or continue this request."""
        submission = self.submission
        return frames.Sequence(
            tokens=token_bytes(self.tokens()),
            prompt_len=len(submission.prompt),
            sampling=submission.sampling,
            salt=submission.salt,
            itl_s=request.itl_s,
            rank=request.rank,
            keep=request.keep,
        )

    def add(self, ids: array[int], text: str, logprobs: tuple[TokenLogprob, ...], now: float) -> None:
        """Tokens came from a worker."""
        self.output.extend(ids)
        self.stream.push(ids, text, logprobs)
        self.last_sent = now

    def show(self, now: float) -> None:
        """The first token may leave."""
        self.first_sent = now
        self.stream.show()

    def finished(self, request: Request) -> FinishedOut:
        """The last message of a stream that went well."""
        new = len(self.output) - len(self.submission.resumed)
        first = self.first_sent
        return FinishedOut(
            reason=request.ended,
            stop=self.stop,
            text=self.last_text,
            prompt_tokens=len(self.submission.prompt),
            completion_tokens=len(self.output),
            cached_tokens=request.cached,
            prefill_worker=request.prefill_name,
            decode_worker=request.decode_name if request.path == "local" or request.decoding_at >= 0.0 else "",
            path=request.path,
            path_reason=request.reason,
            kv_bytes=request.kv_bytes,
            backend=request.backend,
            attempts=request.attempts - request.moves,
            queue_s=_span(request.arrival, request.placed_at),
            reserve_s=_span(request.placed_at, request.prefill_started_at),
            prefill_s=_span(request.prefill_started_at, request.first_at),
            compute_s=request.compute_s,
            transfer_s=_span(request.first_at, request.transferred_at),
            ttft_s=first - request.arrival,
            itl_s=(self.last_sent - first) / (new - 1) if new > 1 else 0.0,
            total_s=request.finished_at - request.arrival,
            **_fetched(request.fetch),
            moves=request.moves,
            expected=request.expected if request.attempts == 1 and not self.submission.resumed else None,
        )

    def record(self, request: Request, outcome: str, unix_time: float, now: float, block_tokens: int = 0) -> str:
        """One line of the request log: lengths, block hashes, route and the seconds of each edge after arrival.

        Never text nor token ids. ``unix_time`` is the wall clock at ``now``; a hash stands for ``block_tokens`` (0: ?).
        """
        submission = self.submission
        edges = {
            name: round(stamp - request.arrival, 6)
            for name, stamp in (
                ("placed", request.placed_at),
                ("reserved", request.reserved_at),
                ("prefill", request.prefill_started_at),
                ("first", request.first_at),
                ("shown", self.first_sent),
                ("transferred", request.transferred_at),
                ("decoding", request.decoding_at),
                ("ended", request.finished_at),
            )
            if stamp >= 0.0
        }
        return json.dumps(
            {
                "v": 1,
                "id": submission.request_id,
                "arrival": round(unix_time - (now - request.arrival), 6),
                "tenant": submission.tenant,
                "class": submission.klass,
                "session": submission.session,
                "prompt_tokens": len(submission.prompt),
                "output_tokens": len(self.output),
                "max_tokens": submission.sampling.max_tokens,
                "cached_tokens": request.cached,
                **({"block_tokens": block_tokens} if block_tokens else {}),
                "hashes": request.hashes,
                "path": request.path,
                "prefill": request.prefill_name,
                "decode": request.decode_name,
                "attempts": request.attempts,
                "kv_bytes": request.kv_bytes,
                "compute_s": round(request.compute_s, 6),
                **({"fetch": _fetched(request.fetch)} if request.fetch is not None else {}),
                **({"expected": request.expected._asdict()} if request.expected is not None else {}),
                "outcome": outcome,
                "edges": edges,
            },
            separators=(",", ":"),
        )


def _fetched(fetch: Fetch | None) -> dict[str, Any]:
    """What came of a fetch, as fields of ``FinishedOut``."""
    if fetch is None:
        return {}
    return {
        "fetch_outcome": fetch.outcome,
        "fetched_blocks": fetch.blocks,
        "fetch_predicted_s": round(fetch.predicted_s, 6),
        "fetch_s": round(_span(fetch.began_at, fetch.ended_at), 6),
    }


def _span(start: float, end: float) -> float:
    """Seconds between two stamps; 0 where one did not happen or they overlap."""
    return max(0.0, end - start) if start >= 0.0 and end >= 0.0 else 0.0
