"""Readers of streams are woken a few in a loop turn, first tokens before others, and what else is due goes between."""

from __future__ import annotations

import asyncio
from array import array
from functools import partial

from twinpool.router.fanout import WOKEN_A_TURN, Fanout
from twinpool.router.stream import OutStream

READERS = 5 * WOKEN_A_TURN + 1


def _hear(heard: list[int | str], number: int, _: asyncio.Future[None]) -> None:
    heard.append(number)


async def woken_in_order(firsts: set[int], cancelled: set[int]) -> list[int | str]:
    """Wakes all readers at once, and says every turn of the loop; who was heard when."""
    fanout, heard = Fanout(), list[int | str]()
    loop = asyncio.get_running_loop()
    readers = [loop.create_future() for _ in range(READERS)]
    for number, reader in enumerate(readers):
        if number in cancelled:
            reader.cancel()
        else:
            reader.add_done_callback(partial(_hear, heard, number))
    for number, reader in enumerate(readers):
        fanout.wake(reader, number in firsts)
    for _ in range(READERS):
        await asyncio.sleep(0)
        heard.append("turn")
    return heard


def test_others_go_between() -> None:
    heard = asyncio.run(woken_in_order(set(), set()))
    assert [number for number in heard if number != "turn"] == list(range(READERS))
    turns = " ".join(map(str, heard)).split("turn")
    assert max(len(turn.split()) for turn in turns) == WOKEN_A_TURN


def test_first_tokens_go_first() -> None:
    late = READERS - 1
    heard = asyncio.run(woken_in_order({late}, set()))
    order = [number for number in heard if number != "turn"]
    assert order.index(late) == WOKEN_A_TURN  # behind those alone that were woken at once
    assert sorted(order, key=int) == list(range(READERS))


def test_cancelled_readers_are_passed() -> None:
    gone = {0, 7, READERS - 1}
    heard = asyncio.run(woken_in_order(set(), gone))
    assert {number for number in heard if number != "turn"} == set(range(READERS)) - gone


def test_idle_again_each_time() -> None:
    """A reader that is alone is woken at once, however many were before it."""

    async def alone() -> None:
        fanout = Fanout()
        for _ in range(3 * WOKEN_A_TURN):
            reader = asyncio.get_running_loop().create_future()
            fanout.wake(reader, first=False)
            assert reader.done()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(alone())


def test_tokens_of_a_reader_in_line_are_joined() -> None:
    async def drain() -> list[list[int]]:
        fanout = Fanout()
        streams = [OutStream(0, lambda: None, fanout) for _ in range(2 * WOKEN_A_TURN)]
        readers = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)
        for stream in streams:
            stream.show()
        for token in (1, 2):
            for stream in streams:
                stream.push(array("I", [token]), "", ())
        return [list(out.ids) for out in await asyncio.gather(*readers) if hasattr(out, "ids")]

    assert asyncio.run(drain()) == [[1, 2]] * (2 * WOKEN_A_TURN)
