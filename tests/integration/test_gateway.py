"""A real upstream gateway, smg, in front of the ``VllmEngine`` port: OpenAI chat completions with our own words.

Chat template, tokenizer and detokenizer are the gateway's there, read from the files that GetTokenizer hands out, so
equal words and equal counts say that both ends agree on all of them. In 32 answers at once the order of additions
differs from run to run; CHATS are chosen so that no greedy choice is closer than 1e-3.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import pytest
from tests.integration.client import Answer, Client, until
from tests.integration.cluster import Cluster, free_ports

from twinpool.proto.twinpool.v1 import inference_pb2 as pb
from twinpool.router.edge.convert import seed_of

AT_ONCE = 32
TOKENS = 16
WAIT_S = 100.0
FREED_S = 10.0
REASONS = {"stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}
SUBJECTS = ("a river", "snow", "iron", "bread", "the moon", "a mill", "rain", "salt", "glass", "a bridge")
FORMS = ("What is {}?", "Write one sentence about {}.", "Explain {} to a child.")
MILLS = [{"role": "user", "content": "Why do mills stand at rivers?"}]
CHATS = [
    *([{"role": "user", "content": form.format(subject)}] for form in FORMS for subject in SUBJECTS),
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Name a colour."}],
    [
        *MILLS,
        {"role": "assistant", "content": "They need water: 水車 🏞️."},
        {"role": "user", "content": "Who told you?"},
    ],
]
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("smg") is None, reason="smg is not installed"),
    pytest.mark.timeout(180),
]

Messages = Sequence[Mapping[str, str]]


@dataclass
class Reply:
    """What the gateway said: an error, or the choices put together, with their finish reasons and the usage."""

    status: int
    text: dict[int, str] = field(default_factory=dict)  # by index of the choice
    reason: dict[int, str] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)
    events: int = 0  # with words

    def add(self, body: Mapping[str, Any]) -> None:
        """One JSON body: of a whole answer, or of one event of a stream."""
        self.error |= body.get("error", {})
        self.usage |= body.get("usage") or {}
        for choice in body.get("choices", ()):
            index, words = choice["index"], (choice.get("message") or choice["delta"]).get("content") or ""
            self.text[index] = self.text.get(index, "") + words
            self.events += bool(words)
            if choice["finish_reason"]:
                assert index not in self.reason, "a choice that ends twice"
                self.reason[index] = choice["finish_reason"]


class Exchange:
    """One HTTP request on a connection of its own; ``leave`` closes it, whatever was read."""

    def __init__(self, port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"})
        self._response: http.client.HTTPResponse | None = None

    def leave(self) -> None:
        """The client goes."""
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def reply(self) -> Reply:
        """All of it."""
        response = self._open()
        reply = Reply(response.status)
        if response.headers.get_content_type() == "text/event-stream":
            for event in self.events():
                reply.add(event)
        else:
            data = response.read()
            reply.add(json.loads(data) if data.startswith(b"{") else {})
            self.leave()
        return reply

    def events(self) -> Iterator[dict[str, Any]]:
        """Server-sent events as they come; the stream must end with [DONE]."""
        data = b""
        for line in filter(None, map(bytes.strip, self._open())):
            assert data != b"[DONE]", "an event after the end"
            assert line.startswith(b"data: "), line
            data = line.removeprefix(b"data: ")
            if data != b"[DONE]":
                yield json.loads(data)
        assert data == b"[DONE]", "a stream without an end"
        self.leave()

    def _open(self) -> http.client.HTTPResponse:
        self._response = self._response or self._connection.getresponse()
        return self._response


class Gateway:
    """An smg process in a group of its own, in front of one cluster; a context manager."""

    def __init__(self, cluster: Cluster) -> None:
        self._log = cluster.folder / "smg.out"
        self._port, metrics = free_ports(2)
        self._model = cluster.client.model().name
        address = f"grpc://{cluster.settings['edge.vllm.listen']}"
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(self._port),
                    "--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--policy", "round_robin",
                    "--worker-urls", address, "--shutdown-grace-period-secs", "1",
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Gateway:
        try:
            until(self._is_ready, "a ready gateway")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends by SIGTERM with status 0, and leaves no process behind."""
        try:
            self._process.terminate()
            assert self._process.wait(WAIT_S) == 0, self._log.read_text(encoding="utf-8")[-4000:]
            with pytest.raises(ProcessLookupError):
                os.killpg(self._process.pid, 0)
        finally:
            self._kill()

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text(encoding="utf-8")[-4000:]
        try:
            return Exchange(self._port, "GET", "/readiness").reply().status == http.HTTPStatus.OK
        except ConnectionError:
            return False

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def start(self, messages: Messages, stream: bool = False, **fields: Any) -> Exchange:
        """Send a chat completion: greedy and of TOKENS tokens unless ``fields`` say otherwise."""
        body = {"model": self._model, "messages": messages, "stream": stream, "temperature": 0, "max_tokens": TOKENS}
        if stream:
            body["stream_options"] = {"include_usage": True}
        return Exchange(self._port, "POST", "/v1/chat/completions", body | fields)

    def chat(self, messages: Messages, stream: bool = False, **fields: Any) -> Reply:
        """Send one and read its answer."""
        return self.start(messages, stream, **fields).reply()

    def chats(self, chats: Sequence[Messages], stream: bool) -> list[Reply]:
        """Send all at once."""
        exchanges = [self.start(messages, stream) for messages in chats]
        with ThreadPoolExecutor(len(exchanges)) as threads:
            return list(threads.map(Exchange.reply, exchanges))


@pytest.fixture(scope="module")
def gateway(torch_split: Cluster) -> Iterator[Gateway]:
    """In front of the embedded model in two pools."""
    with Gateway(torch_split) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def ours(torch_split: Cluster) -> list[Answer]:
    """What our own service answers to CHATS."""
    return _ours(torch_split.client, CHATS)


def _ours(client: Client, chats: Sequence[Messages], **sampling: Any) -> list[Answer]:
    settings = {"max_tokens": TOKENS, "ignore_eos": False} | sampling
    prompts = [[(message["role"], message["content"]) for message in messages] for messages in chats]
    return [running.result(WAIT_S) for running in [client.start(p, sampling=settings, timeout=WAIT_S) for p in prompts]]


def _assert_same(reply: Reply, answer: Answer) -> None:
    """The same words, end and counts."""
    usage = answer.end.usage
    assert reply.status == http.HTTPStatus.OK, reply.error
    assert reply.text == {0: answer.text}
    assert REASONS[reply.reason[0]] == answer.end.reason
    assert reply.usage["prompt_tokens"] == usage.prompt_tokens
    assert reply.usage["completion_tokens"] == usage.completion_tokens
    assert reply.usage["total_tokens"] == usage.prompt_tokens + usage.completion_tokens


def test_words_of_one(gateway: Gateway, torch_split: Cluster) -> None:
    """Unary and streaming: the same as ours; a stream comes in parts, and the second time from cached blocks."""
    (answer,) = _ours(torch_split.client, [MILLS], max_tokens=8)
    assert answer.text
    whole = gateway.chat(MILLS, max_tokens=8)
    stream = gateway.chat(MILLS, stream=True, max_tokens=8)
    for reply in (whole, stream):
        _assert_same(reply, answer)
        assert 0 < reply.usage["prompt_tokens_details"]["cached_tokens"] < reply.usage["prompt_tokens"]
    assert (whole.events, stream.events > 1) == (1, True)
    torch_split.client.wait_idle()


@pytest.mark.peers
@pytest.mark.parametrize("stream", [False, True])
def test_words_of_many_at_once(gateway: Gateway, torch_split: Cluster, ours: list[Answer], stream: bool) -> None:
    assert len(CHATS) == AT_ONCE
    for reply, answer in zip(gateway.chats(CHATS, stream), ours, strict=True):
        _assert_same(reply, answer)
    assert {answer.end.reason for answer in ours} == set(REASONS.values())  # some end by themselves
    torch_split.client.wait_idle()


@pytest.mark.peers
@pytest.mark.parametrize("max_tokens", [6, 8, 16])
def test_words_of_several_bytes(gateway: Gateway, torch_split: Cluster, max_tokens: int) -> None:
    """A character that max_tokens cuts is U+FFFD in our words; the gateway leaves it out, streaming or not."""
    emoji = [{"role": "user", "content": "Write three emoji of food."}]
    (answer,) = _ours(torch_split.client, [emoji], max_tokens=max_tokens)
    assert not answer.text.isascii()
    answer.text = answer.text.removesuffix("\ufffd")
    for stream in (False, True):
        _assert_same(gateway.chat(emoji, stream, max_tokens=max_tokens), answer)


@pytest.mark.peers
@pytest.mark.parametrize("stream", [False, True])
def test_stop_string(gateway: Gateway, torch_split: Cluster, stream: bool) -> None:
    """One that spans tokens: neither it nor anything after it is said, and the sequence ends there for us too."""
    (answer,) = _ours(torch_split.client, [MILLS])
    stop = answer.text[len(answer.text) // 2 :][1:6]
    before = answer.text[: answer.text.index(stop)]
    (stopped,) = _ours(torch_split.client, [MILLS], stop=[stop])
    assert (stopped.text, stopped.end.stop_string) == (before, stop)
    reply = gateway.chat(MILLS, stream, stop=[stop])
    assert (reply.text, reply.reason) == ({0: before}, {0: "stop"})
    assert reply.usage["completion_tokens"] == stopped.end.usage.completion_tokens < TOKENS
    torch_split.client.wait_idle()


@pytest.mark.peers
@pytest.mark.parametrize("stream", [False, True])
def test_two_sequences(gateway: Gateway, torch_split: Cluster, stream: bool) -> None:
    """n = 2 with a seed: each choice has the words that its own seed draws."""
    seeds = [seed_of(5, index) for index in range(2)]
    answers = [_ours(torch_split.client, [MILLS], temperature=1.0, seed=seed)[0] for seed in seeds]
    reply = gateway.chat(MILLS, stream, n=2, temperature=1.0, seed=5)
    assert answers[0].text != answers[1].text
    assert reply.text == {index: answer.text for index, answer in enumerate(answers)}
    assert reply.usage["completion_tokens"] == sum(answer.end.usage.completion_tokens for answer in answers)
    assert reply.usage["prompt_tokens"] == answers[0].end.usage.prompt_tokens
    torch_split.client.wait_idle()


LONG = [{"role": "user", "content": "word " * 9_000}]
INVALID: dict[str, tuple[http.HTTPStatus, Messages, dict[str, Any]]] = {
    "beyond the context": (http.HTTPStatus.BAD_REQUEST, MILLS, {"max_tokens": 100_000}),
    "grammar": (http.HTTPStatus.BAD_REQUEST, MILLS, {"response_format": {"type": "json_object"}}),
    "no tokens": (http.HTTPStatus.BAD_REQUEST, MILLS, {"max_tokens": 0}),
    "negative temperature": (http.HTTPStatus.BAD_REQUEST, MILLS, {"temperature": -1}),
    "no messages": (http.HTTPStatus.BAD_REQUEST, [], {}),
    "long prompt": (http.HTTPStatus.BAD_REQUEST, LONG, {}),
    "unknown model": (http.HTTPStatus.NOT_FOUND, MILLS, {"model": "nobody"}),
}


@pytest.mark.peers
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", INVALID)
def test_invalid_request(gateway: Gateway, torch_split: Cluster, what: str, stream: bool) -> None:
    """Refused with a sentence, by the gateway or by us; the next request is served."""
    status, messages, fields = INVALID[what]
    reply = gateway.chat(messages, stream, **fields)
    assert (reply.status, reply.text) == (status, {})
    assert reply.error["message"]
    assert gateway.chat(MILLS, stream, max_tokens=1).status == http.HTTPStatus.OK
    torch_split.client.wait_idle()


@pytest.mark.peers
def test_our_refusal_reaches_the_client(gateway: Gateway) -> None:
    reply = gateway.chat(MILLS, max_tokens=100_000)
    assert "of the context of 8192" in reply.error["message"]


@pytest.mark.peers
@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_free_their_blocks(gateway: Gateway, torch_split: Cluster, stream: bool) -> None:
    """Eight go together, streaming ones after 1 to 8 events; a ninth that stays gets all its words."""
    client = torch_split.client
    before = client.status().cancelled
    leavers = [gateway.start(MILLS, stream, max_tokens=2_000, ignore_eos=True) for _ in range(8)]
    stays = gateway.start(MILLS)
    until(lambda: client.status().active >= len(leavers), "running requests")
    for count, leaver in enumerate(leavers, start=1):
        events = leaver.events() if stream else iter(())
        for _ in zip(range(count), events, strict=False):
            pass
    for leaver in leavers:
        leaver.leave()
    _assert_same(stays.reply(), _ours(client, [MILLS])[0])
    client.wait_idle(FREED_S)
    assert client.status().cancelled == before + len(leavers)


@pytest.mark.peers
def test_draining_router_ends_its_streams(timed: Cluster) -> None:
    """SIGTERM to the router behind the gateway: what runs ends whole, what comes later is refused, it exits with 0."""
    assert timed.router is not None
    settings: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
    (answer,) = _ours(timed.client, [MILLS], **settings)
    with Gateway(timed) as gateway:
        running = gateway.start(MILLS, stream=True, **settings)
        events = running.events()
        reply = Reply(http.HTTPStatus.OK)
        reply.add(next(events))
        timed.router.signal(signal.SIGTERM)
        until(lambda: "draining" in timed.router.text(), "draining")  # type: ignore[union-attr]
        assert gateway.chat(MILLS).status == http.HTTPStatus.SERVICE_UNAVAILABLE
        for event in events:
            reply.add(event)
        _assert_same(reply, answer)
        assert timed.router.wait() == 0
    timed.router = None
