"""The live router without sockets: real dispatcher, core, links and request log, fed with frames of a worker."""

from __future__ import annotations

import asyncio
import time
from array import array
from pathlib import Path

import pytest
from tests.router.fake_worker import COST

from twinpool.blockhash import token_bytes
from twinpool.errors import AlreadyExists, Cancelled, Overloaded
from twinpool.proto import frames
from twinpool.proto.splitter import Splitter
from twinpool.router.cell import FinishedOut, Slo, Submission, TokensOut
from twinpool.router.core import Core
from twinpool.router.dispatch import Dispatcher
from twinpool.router.links import LinkSettings, WorkerLink
from twinpool.router.policy import LeastSeconds
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.state import MIN_TIMERS, Limits
from twinpool.sampling import SamplingParams

SETTINGS = LinkSettings("secret", heartbeat_s=0.05, dead_after_s=0.2, lease_s=5.0, hello_s=0.05)
MODEL = frames.Model(
    name="m", fingerprint="f", dtype="float32", layout="l", block_size=4, block_bytes=64, vocab_size=1000,
    max_context=256, eos_ids=(),
)  # fmt: skip


class Wire(asyncio.Transport):
    """The router's end of a connection: what is written, and whether it was cut."""

    def __init__(self) -> None:
        super().__init__()
        self.aborted = False
        self._splitter = Splitter()
        self.heard: list[frames.Frame] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.heard += [frames.to_worker.decode(body) for body in self._splitter.feed(bytes(data))]

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        self.aborted = True


class Joined:
    """A worker that both prefills and decodes, as its router sees it."""

    def __init__(self, cell: Dispatcher, name: str = "w", roles: tuple[str, ...] = ("prefill", "decode")) -> None:
        self.wire = Wire()
        self.link = WorkerLink(cell, SETTINGS)
        self.link.connection_made(self.wire)
        self.say(
            frames.Hello(
                version=frames.VERSION,
                worker=name,
                epoch=1,
                token="secret",
                roles=roles,
                model=MODEL,
                blocks=64,
                device="cpu",
                cost=COST,
                chunk_tokens=64,
                max_batch=8,
                kv_addresses={},
                kv_secret=b"",
            )
        )

    def say(self, frame: frames.Frame) -> None:
        self.link.data_received(frames.encode(frame))

    async def asked(self) -> frames.Prefill:
        """The latest prefill that it was asked for."""
        await asyncio.sleep(0)
        return [frame for frame in self.wire.heard if isinstance(frame, frames.Prefill)][-1]

    def speak(self, attempt: int, position: int, token: int, *, last: bool = False) -> None:
        one = array("I", [1])
        self.say(
            frames.Tokens(
                attempts=token_bytes(array("I", [attempt])),
                positions=token_bytes(array("I", [position])),
                counts=token_bytes(one),
                ids=token_bytes(array("I", [token])),
                texts=("t",),
                ends=(frames.End(attempt=attempt, reason="length"),) if last else (),
            )
        )


def cell_of(limits: Limits | None = None) -> Dispatcher:
    core = Core(LeastSeconds(), limits)
    return Dispatcher(core, Roster({}), RequestLog(None), ranks={}, transfer_timeout_s=1.0)


def submission(request_id: str, *, tenant: str = "", resumed: tuple[int, ...] = ()) -> Submission:
    return Submission(
        request_id=request_id,
        prompt=array("I", range(10)),
        sampling=SamplingParams(max_tokens=4),
        slo=Slo(ttft_s=5.0, ttft_factor=0.0, itl_s=1.0),
        tenant=tenant,
        resumed=array("I", resumed),
    )


async def test_a_client_that_comes_back_takes_its_stream_over() -> None:
    cell = cell_of()
    worker = Joined(cell)
    old = cell.submit(submission("r", tenant="a"))
    first = await worker.asked()
    worker.speak(first.attempt, 0, 7)
    with pytest.raises(AlreadyExists):
        cell.submit(submission("r", tenant="a"))
    with pytest.raises(AlreadyExists):
        cell.submit(submission("r", tenant="b", resumed=(7,)))
    new = cell.submit(submission("r", tenant="a", resumed=(7,)))
    with pytest.raises(Cancelled):
        [out async for out in old]
    again = await worker.asked()
    assert again.sequence.tokens == token_bytes(array("I", [*range(10), 7]))
    worker.speak(first.attempt, 1, 99)  # a late word of the first stream
    worker.speak(again.attempt, 1, 8)
    worker.speak(again.attempt, 2, 9)
    worker.speak(again.attempt, 3, 10, last=True)
    outs = [out async for out in new]
    assert [token for out in outs if isinstance(out, TokensOut) for token in out.ids] == [8, 9, 10]
    assert isinstance(outs[-1], FinishedOut)
    assert outs[-1].completion_tokens == 4
    assert not cell.cancel("r")
    cell.core.state.check_integrity()


async def test_a_full_queue_refuses_before_anything_was_said() -> None:
    cell = cell_of(Limits(max_queue=1))
    cell.submit(submission("waits"))
    with pytest.raises(Overloaded) as refusal:
        cell.submit(submission("too many"))
    assert refusal.value.retry_s
    assert cell.status().refused == 1
    assert not cell.cancel("too many")


async def test_a_router_that_stood_still_does_not_blame_its_workers() -> None:
    cell = cell_of()
    worker = Joined(cell)
    await asyncio.sleep(2 * SETTINGS.hello_s)
    time.sleep(2 * SETTINGS.dead_after_s)  # noqa: ASYNC251 (the point: timers are due before sockets are read)
    await asyncio.sleep(0.001)
    assert not worker.wire.aborted
    worker.say(frames.Heartbeat(step=0, busy=False))
    await asyncio.sleep(0.75 * SETTINGS.dead_after_s)
    assert not worker.wire.aborted
    async with asyncio.timeout(5.0):
        while not worker.wire.aborted:  # noqa: ASYNC110 (really silent now)
            await asyncio.sleep(0.01)


async def test_timers_of_what_is_over_do_not_pile_up() -> None:
    cell = cell_of()
    for number in range(2 * MIN_TIMERS):
        cell.submit(submission(str(number)))
        cell.cancel(str(number))
    assert len(cell.core.state.timers) <= MIN_TIMERS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
async def test_a_full_disk_does_not_stop_the_request_log(caplog: pytest.LogCaptureFixture) -> None:
    log = RequestLog(Path("/dev/full"))
    for _ in range(100):
        log.write("x" * 1000)
    log.close()  # its thread takes all lines, or this never returns
    assert [record.levelname for record in caplog.records].count("ERROR") >= 1
    assert "edge.request_log" in caplog.text


async def test_room_is_asked_for_the_prompt_only_also_after_the_first_token() -> None:
    cell = cell_of()
    prefill, decode = Joined(cell, "p", ("prefill",)), Joined(cell, "d", ("decode",))
    cell.submit(submission("r"))
    await asyncio.sleep(0)
    [asked] = [frame for frame in decode.wire.heard if isinstance(frame, frames.Reserve)]
    decode.say(frames.NoRoom(attempt=asked.attempt, free=0))
    work = await prefill.asked()
    prefill.speak(work.attempt, 0, 7)
    decode.say(frames.Report(free=9, cached=0, running=0, waiting=0, context=0, step_s=0.0))
    await asyncio.sleep(0)
    again = [frame for frame in decode.wire.heard if isinstance(frame, frames.Reserve)][-1]
    assert again is not asked
    assert len(again.prompt) == 4 * 10  # the first token is not part of it
