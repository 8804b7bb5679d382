"""The client: what it asks for, what it makes of statuses, and that it notices a lost or repeated token."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from tests.fake_inference import FakeInference, accepted, finished, refusal, served, tokens

from twinpool.client import AsyncAdminClient, AsyncClient, ChatMessage, Client, Event, request
from twinpool.errors import DeadlineExceeded, Internal, NotFound, Overloaded, Unavailable
from twinpool.proto.twinpool.v1.inference_pb2 import Accepted, Finished, GenerateEvent, Tokens


async def ask(fake: FakeInference) -> list[Event]:
    async with served(fake) as address, AsyncClient(address, tenant="me", klass="batch") as client:
        return [event async for event in client.generate(request("hello", max_tokens=4))]


async def test_events_come_in_order() -> None:
    fake = FakeInference()
    events = await ask(fake)
    assert [type(event) for event in events] == [Accepted, Tokens, Tokens, Finished]
    assert fake.requests[0].text == "hello"
    assert fake.requests[0].sampling.max_tokens == 4
    assert (fake.metadata["x-twinpool-tenant"], fake.metadata["x-twinpool-class"]) == ("me", "batch")


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([accepted(), tokens(0, 1, 2), tokens(3, 4), finished()], "ORDER"),
        ([accepted(), tokens(0, 1, 2), tokens(1, 2), finished()], "ORDER"),
        ([accepted(), tokens(1, 1), finished()], "ORDER"),
        ([accepted(), tokens(0, 1)], "TRUNCATED"),
        ([accepted(), tokens(0, 1), tokens(0, 1, index=1), finished()], "TRUNCATED"),
        ([accepted(), GenerateEvent()], "UNKNOWN_EVENT"),
    ],
)
async def test_a_broken_promise_raises(events: list[GenerateEvent], reason: str) -> None:
    with pytest.raises(Internal) as caught:
        await ask(FakeInference(events))
    assert caught.value.reason == reason


async def test_a_resumed_stream_goes_on_after_what_is_there() -> None:
    async with served(FakeInference([accepted(), tokens(2, 8, 9), finished()])) as address:
        again = request("hello", max_tokens=4)
        again.resume_tokens.ids.extend([6, 7])
        async with AsyncClient(address) as client:
            assert len([event async for event in client.generate(again)]) == 3


async def test_a_status_carries_reason_and_retry() -> None:
    fake = FakeInference()
    fake.abort = (grpc.StatusCode.RESOURCE_EXHAUSTED, "full", refusal("QUEUE_FULL", 3))
    with pytest.raises(Overloaded) as caught:
        await ask(fake)
    assert (caught.value.message, caught.value.reason, caught.value.retry_s) == ("full", "QUEUE_FULL", 3.0)


async def test_a_status_outside_the_tree_is_internal() -> None:
    fake = FakeInference()
    fake.abort = (grpc.StatusCode.UNIMPLEMENTED, "no such method", ())
    with pytest.raises(Internal, match="UNIMPLEMENTED: no such method"):
        await ask(fake)


async def test_leaving_early_cancels() -> None:
    fake = FakeInference([accepted(), *(tokens(n, n) for n in range(100_000))])
    async with served(fake) as address, AsyncClient(address) as client:
        events = client.generate(request("hello"))
        async for _ in events:
            break
        await events.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            await fake.left.wait()


async def test_a_deadline() -> None:
    async with served(FakeInference()) as address, AsyncClient(address) as client:
        with pytest.raises(DeadlineExceeded):
            async for _ in client.generate(request("hello"), timeout_s=0.0):
                pass


async def test_cancel_of_what_does_not_run() -> None:
    async with served(FakeInference()) as address, AsyncClient(address) as client:
        with pytest.raises(NotFound):
            await client.cancel("x")


async def test_nobody_there() -> None:
    async with AsyncClient("127.0.0.1:1") as client, AsyncAdminClient("127.0.0.1:1") as admin:
        for call in (client.model, admin.status):
            with pytest.raises(Unavailable, match=r"cannot connect to 127\.0\.0\.1:1: is `twinpool up` running"):
                await call()


async def test_the_blocking_client() -> None:
    fake = FakeInference()

    def use(address: str) -> list[Event]:
        with Client(address) as client:
            assert client.model().name == "fake"
            with pytest.raises(NotFound):
                client.cancel("x")
            return list(client.generate(request(token_ids=[1, 2], max_tokens=2)))

    async with served(fake) as address:
        events = await asyncio.to_thread(use, address)
    assert [type(event) for event in events] == [Accepted, Tokens, Finished]
    assert list(fake.requests[0].token_ids.ids) == [1, 2]


def test_a_request_has_one_prompt() -> None:
    assert request("").WhichOneof("prompt") == "text"
    assert request(token_ids=[]).WhichOneof("prompt") == "token_ids"
    assert request(messages=[ChatMessage("user", "hi")]).messages.messages[0].content == "hi"
    with pytest.raises(ValueError, match="one prompt"):
        request()
    with pytest.raises(ValueError, match="one prompt"):
        request("a", token_ids=[1])
