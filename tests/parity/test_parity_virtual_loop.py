"""The virtual loop: when things happen, in which order, and what it does where nothing can happen any more."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.parity.virtual import Pipe, Stuck, virtual_loop


def test_the_clock_jumps_and_order_is_that_of_the_calls() -> None:
    loop = virtual_loop(start=10.0)
    seen: list[tuple[float, str]] = []

    def note(name: str) -> None:
        seen.append((loop.time(), name))
        if name == "a":
            loop.call_soon(note, "soon after a")
            loop.call_at(loop.time(), note, "timer of the same moment")

    async def main() -> None:
        loop.call_at(13.0, note, "late")
        for name in "ab":
            loop.call_at(12.0, note, name)
        loop.call_at(11.0, note, "never").cancel()
        await loop.sleep_until(4_000_000.0)

    loop.run(main())
    assert seen == [
        (12.0, "a"),
        (12.0, "b"),
        (12.0, "soon after a"),
        (12.0, "timer of the same moment"),
        (13.0, "late"),
    ]
    assert loop.time() == 4_000_000.0


@given(st.floats(-10.0, 1e6), st.floats(0.0, 1e3))
def test_a_timer_is_never_early(now: float, delay: float) -> None:
    loop = virtual_loop(start=now)
    when = now + delay
    handle = loop.call_later(when - now, print)
    assert when <= handle.when() <= when + 1e-9
    handle.cancel()


def test_many_cancelled_timers_are_forgotten_and_move_no_clock() -> None:
    loop = virtual_loop()

    async def main() -> None:
        for _ in range(10_000):
            loop.call_later(5.0, print).cancel()
        assert len(loop._timers) < 5_000
        await asyncio.sleep(1.0)

    loop.run(main())
    assert loop.time() == pytest.approx(1.0)


def test_waiting_for_what_never_comes_ends() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stuck, match="never come"):
        virtual_loop().run(main())

    loop = virtual_loop(limit=100.0)

    async def for_ever() -> None:
        while True:
            await loop.sleep_until(loop.time() + 1.0)

    with pytest.raises(Stuck, match=r"not over at 100\.0"):
        loop.run(for_ever())


def test_an_exception_in_a_callback_ends_the_run() -> None:
    async def main() -> None:
        asyncio.get_running_loop().call_later(1.0, lambda: 1 // 0)
        await asyncio.sleep(2.0)

    with pytest.raises(ZeroDivisionError):
        virtual_loop().run(main())


class Ear(asyncio.Protocol):
    """Writes down what it hears, and when."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, bytes | None]] = []

    def data_received(self, data: bytes) -> None:
        self.heard.append((asyncio.get_running_loop().time(), data))

    def connection_lost(self, error: Exception | None) -> None:
        self.heard.append((asyncio.get_running_loop().time(), None))


def test_bytes_arrive_in_order_after_the_latency_and_before_the_end() -> None:
    loop = virtual_loop(latency_s=0.25)
    far, near = Ear(), Ear()

    async def main() -> None:
        await loop.create_server(lambda: far, "there", 1)
        wire: Pipe
        wire, _ = await loop.create_connection(lambda: near, "there", 1)
        assert loop.time() == 0.5
        wire.write(b"one")
        wire.write(b"two")
        assert wire.peer is not None
        wire.peer.write(b"too late")
        await loop.sleep_until(0.625)
        wire.write(b"last")
        wire.close()
        wire.write(b"nothing")
        with pytest.raises(ConnectionRefusedError):
            await loop.create_connection(Ear, "nobody", 1)
        await loop.sleep_until(2.0)

    loop.run(main())
    assert far.heard == [(0.75, b"one"), (0.75, b"two"), (0.875, b"last"), (0.875, None)]
    assert near.heard == [(0.625, None)]
