"""A user of the cell: sends each request of a trace when it is due, and notes when every message comes.

One process, one connection (wire.py), all streams at once. So that its own work distorts little, requests are made
before the run, answers are kept as they come and taken apart after it. Times are seconds of this process's monotonic
clock.

A token has come when the message with it was read. Where several tokens come in one message, their gaps are: for the
first the time since the message before, for the others 0. That is what the simulator counts: a gap a token.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from array import array
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import uvloop
from wire import Connection, Incoming

from twinpool.client import AsyncClient, request
from twinpool.proto.twinpool.v1.inference_pb2 import Finished, GenerateEvent
from twinpool.sim.trace import NO_REQUEST, Trace

METHOD = "/twinpool.v1.Inference/Generate"
FIRST_ORDINARY = 256  # token ids below may be special
READY_S = 10.0  # for the router to say its first word


@dataclass(slots=True)
class Answer:
    """What came of one request."""

    due: float
    sent: float = 0.0
    incoming: Incoming = field(default_factory=Incoming)
    # from here on: what ``open_answer`` found in it
    error: str = ""
    times: array[float] = field(default_factory=lambda: array("d"))  # of each message
    tokens: array[int] = field(default_factory=lambda: array("q"))  # of each message; 0: it is no Tokens
    last: Finished | None = None

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return next(when for when, count in zip(self.times, self.tokens, strict=True) if count) - self.sent

    @property
    def outside_s(self) -> float:
        """What of that is not in the router's own time to the first token: gRPC, both ways, and this client."""
        return self.ttft_s - (self.last.timing.ttft_ms / 1e3 if self.last is not None else 0.0)

    @property
    def ended(self) -> float:
        """When the stream was over."""
        return self.times[-1]

    def gaps(self) -> list[float]:
        """One a token after the first."""
        gaps: list[float] = []
        before = -1.0
        for when, count in zip(self.times, self.tokens, strict=True):
            if count:
                gaps += [when - before] if before >= 0.0 else []
                gaps += [0.0] * (count - 1)
                before = when
        return gaps


def requests_of(trace: Trace, vocab: int, seed: int) -> list[bytes]:
    """One message a request, with just so many tokens out. Equal hash ids are equal tokens; all else is random, so
    that prompts begin alike where the trace says so and nowhere else.
    """
    rng = np.random.default_rng(seed)
    blocks: dict[int, list[int]] = {}
    made = []
    for i, (prompt, output) in enumerate(zip(trace.prompt, trace.output, strict=True)):
        ids: list[int] = []
        for key in trace.block_hashes(i):
            if key not in blocks:
                blocks[key] = rng.integers(FIRST_ORDINARY, vocab, trace.block_tokens).tolist()
            ids += blocks[key]
        ids += rng.integers(FIRST_ORDINARY, vocab, prompt - len(ids)).tolist()
        made.append(request(token_ids=ids, max_tokens=output, temperature=0.0, ignore_eos=True).SerializeToString())
    return made


def drive(address: str, trace: Trace, *, seed: int = 0, until_s: float = math.inf) -> list[Answer]:
    """Send the trace, wait for every answer; ``open_answer`` is for later. Raises ConnectionError without a router.

    Closed loops stretch: nothing is sent after ``until_s`` seconds, and what was not has no ``sent``.
    """
    return uvloop.run(_drive(address, trace, seed, until_s))


def open_answer(answer: Answer) -> None:
    """Take its messages apart, check that positions follow each other and that there is an end."""
    position = 0
    for when, message in answer.incoming.messages():
        event = GenerateEvent.FromString(message)
        count = 0
        if event.WhichOneof("event") == "tokens":
            count = len(event.tokens.token_ids)
            if count and event.tokens.position != position:
                answer.error = f"position {event.tokens.position} came where {position} was due"
            position += count
        elif event.WhichOneof("event") == "finished":
            answer.last = event.finished
        answer.times.append(when)
        answer.tokens.append(count)
    if answer.last is None:
        answer.error = answer.incoming.error or f"ended without Finished: {answer.incoming.trailers}"
    answer.incoming = Incoming()


async def _drive(address: str, trace: Trace, seed: int, until_s: float) -> list[Answer]:
    async with AsyncClient(address) as client:
        vocab = (await client.model()).vocab_size
    bodies = requests_of(trace, vocab, seed)
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    _, connection = await loop.create_connection(lambda: Connection(address, METHOD), host, int(port))
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        await asyncio.wait_for(connection.ready.wait(), READY_S)
        return await _send_all(connection, trace, bodies, until_s)
    finally:
        connection.close()
        gc.enable()
        gc.unfreeze()


async def _send_all(connection: Connection, trace: Trace, bodies: list[bytes], until_s: float) -> list[Answer]:
    began = time.monotonic() + 0.1
    if trace.after is not None and trace.think is not None:
        return await _send_sessions(connection, trace, bodies, began, began + until_s)
    answers = [Answer(began + arrival - trace.arrival[0]) for arrival in trace.arrival]
    for answer, body in zip(answers, bodies, strict=True):
        await _send(connection, answer, body)
    await connection.idle.wait()
    return answers


async def _send(connection: Connection, answer: Answer, body: bytes) -> None:
    await asyncio.sleep(max(0.0, answer.due - time.monotonic()))
    answer.sent = time.monotonic()
    answer.incoming = connection.send(body)


async def _send_sessions(
    connection: Connection, trace: Trace, bodies: list[bytes], began: float, until: float
) -> list[Answer]:
    """Who follows another request comes a think time after that one has ended, and not before its own arrival."""
    assert trace.after is not None
    assert trace.think is not None
    think = trace.think
    answers = [Answer(began + arrival - trace.arrival[0]) for arrival in trace.arrival]
    followers: dict[int, list[int]] = {}
    for i, before in enumerate(trace.after):
        followers.setdefault(before, []).append(i)
    turns: deque[asyncio.Task[None]] = deque()

    async def turn(i: int) -> None:
        await _send(connection, answers[i], bodies[i])
        await answers[i].incoming.over.wait()
        for follower in followers.get(i, ()):
            answers[follower].due = max(answers[follower].due, time.monotonic() + think[follower])
            if answers[follower].due <= until:
                turns.append(asyncio.create_task(turn(follower)))

    turns.extend(asyncio.create_task(turn(i)) for i in followers[NO_REQUEST])
    while turns:
        await turns.popleft()
    return answers
