"""The commands, in this process: output, exit status, and sentences instead of tracebacks."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path

import grpc
import pytest
from tests.fake_inference import FakeInference, accepted, finished, refusal, served, tokens
from typer.testing import CliRunner, Result

from twinpool.cli import app
from twinpool.cli.bench import percentile, report
from twinpool.cli.load import Lengths, LoadSpec, run_load
from twinpool.client import AsyncClient
from twinpool.errors import ConfigError


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


async def run_against(fake: FakeInference, *arguments: str, stdin: str | None = None) -> Result:
    async with served(fake) as address:
        return await asyncio.to_thread(run, *arguments, "--address", address, stdin=stdin)


def test_config_check(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("worker: {threads: 2}")
    assert run("config", "check", str(file)).exit_code == 0
    wrong = run("config", "check", str(file), "--set", "worker.thread=2")
    assert wrong.exit_code == 2
    assert wrong.stderr == "twinpool: --set worker.thread: worker.thread: unknown key; did you mean worker.threads?\n"


def test_config_show_and_schema() -> None:
    shown = json.loads(run("config", "show", "--json", "--set", "link.token=abc").stdout)
    assert shown["values"]["link"]["token"] == "***"
    assert shown["origins"] == {"link.token": "--set link.token"}
    assert json.loads(run("config", "schema").stdout)["title"] == "ClusterConfig"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate",), "give one of PROMPT, --token-ids and --messages"),
        (("generate", "hi", "--token-ids", "1"), "give one of"),
        (("generate", "--token-ids", "1,x"), "--token-ids takes whole numbers"),
        (("generate", "--token-ids", "-1"), "out of range"),
        (("generate", "hi", "--max-tokens", "-1"), "out of range"),
        (("generate", "--messages", "nowhere.json"), "nowhere.json: cannot be read"),
        (("generate", "\udcff"), "not valid UTF-8"),
        (("bench", "--rate", "1", "--concurrency", "1"), "either a rate or a concurrency"),
        (("bench", "--input-tokens", "9:3"), "lengths are at least 1"),
        (("bench", "--duration", "0"), "duration_s must be above 0"),
        (("worker", "--role", "prefill", "--join", "nowhere"), "--join nowhere: an address is HOST:PORT"),
        (("up", "--prefill", "-1"), "--prefill pools.prefill.workers: pools.prefill.workers: expected a whole number"),
        (("up", "--prefill", "0", "--decode", "0"), "no workers at all"),
        (("router", "-c", "nowhere.yaml"), "nowhere.yaml: cannot be read"),
    ],
)
def test_a_wrong_command_line_exits_2_with_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "command", [("generate", "hi"), ("status",), ("bench",), ("drain", "d0"), ("role", "d0", "both")]
)
def test_nobody_there(command: tuple[str, ...]) -> None:
    result = run(*command, "--address", "127.0.0.1:1")
    assert result.exit_code == 1
    assert "cannot connect to 127.0.0.1:1: is `twinpool up` running?" in result.stderr
    assert result.stderr.splitlines()[-1] == "Trying again later may help."


async def test_text_streams_to_stdout() -> None:
    fake = FakeInference()
    result = await run_against(fake, "generate", "hi", "--max-tokens", "3", "--temperature", "0", "--stop", "x")
    assert (result.stdout, result.exit_code) == (" 0 1 2\n", 0)
    asked = fake.requests[0]
    assert [(message.role, message.content) for message in asked.messages.messages] == [("user", "hi")]
    assert (asked.sampling.temperature, list(asked.sampling.stop)) == (0.0, ["x"])
    assert not asked.sampling.HasField("seed")


async def test_raw_from_stdin_and_chat_from_a_file(tmp_path: Path) -> None:
    fake = FakeInference()
    await run_against(fake, "generate", "-", "--raw", stdin="once")
    assert fake.requests[0].text == "once"
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]')
    await run_against(fake, "generate", "--messages", str(chat))
    assert [message.role for message in fake.requests[1].messages.messages] == ["system", "user"]


async def test_json_has_everything() -> None:
    result = await run_against(FakeInference(), "generate", "--token-ids", "1,2,3", "--max-tokens", "2", "--json")
    answer = json.loads(result.stdout)
    assert (answer["text"], answer["token_ids"], answer["finish_reason"]) == (" 0 1", [0, 1], "length")
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0}
    assert answer["route"]["kv_bytes"] == 7
    assert answer["timing"]["ttft_ms"] == 1.5
    assert {"queue_ms", "prefill_ms", "transfer_ms", "itl_ms", "total_ms"} <= answer["timing"].keys()


async def test_several_answers() -> None:
    events = [accepted(), tokens(0, 5), tokens(0, 6, index=1), finished(1), finished(0)]
    assert (await run_against(FakeInference(events), "generate", "hi", "-n", "2")).stdout == "[0]  5\n\n[1]  6\n"


async def test_a_refusal_is_told_with_its_reason_and_advice() -> None:
    fake = FakeInference()
    fake.abort = (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", refusal("QUEUE_FULL", 3))
    result = await run_against(fake, "generate", "hi")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "RESOURCE_EXHAUSTED QUEUE_FULL: the queue is full",
        "Try again in 3.0 s.",
    ]


async def test_bench_writes_its_figures(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    fake = FakeInference()
    result = await run_against(fake, "bench", "--requests", "6", "--output-tokens", "5", "--json", str(file))
    assert result.exit_code == 0
    figures = json.loads(file.read_text())
    assert figures["requests"]["completed"] == len(fake.requests) == 6
    assert figures["ttft_ms"]["p50"] > 0.0


async def loaded(fake: FakeInference, spec: LoadSpec) -> dict[str, object]:
    async with served(fake) as address, AsyncClient(address) as client:
        return report(spec, await run_load(client, spec))


async def test_a_seed_gives_the_same_load() -> None:
    spec = LoadSpec(
        input_tokens=Lengths(4, 9), output_tokens=Lengths(1, 3), rate=1e6, requests=5, shared_prefix=3, seed=7
    )
    first, second = FakeInference(), FakeInference()
    figures = await loaded(first, spec)
    await loaded(second, spec)

    def prompts(fake: FakeInference) -> list[list[int]]:
        return sorted(list(asked.token_ids.ids) for asked in fake.requests)

    assert prompts(first) == prompts(second)
    assert len({tuple(prompt[:3]) for prompt in prompts(first)}) == 1
    assert all(4 <= len(prompt) <= 9 for prompt in prompts(first))
    assert figures["errors"] == {}


@pytest.mark.parametrize(
    ("events", "error"),
    [
        ([accepted(), tokens(0, 1), tokens(2, 3), finished()], "INTERNAL ORDER"),
        ([accepted(), tokens(0, 1), finished()], "CLIENT TOKENS_MISSING"),
    ],
)
async def test_a_lost_token_is_an_error_of_the_run(events: list[object], error: str) -> None:
    spec = LoadSpec(input_tokens=Lengths(4, 4), output_tokens=Lengths(3, 3), concurrency=2, requests=4)
    figures = await loaded(FakeInference(events), spec)  # type: ignore[arg-type]
    assert figures["errors"] == {error: 4}


def test_percentiles_are_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [1.0, 50.0, 99.0, 100.0]
    assert (percentile([], 50), percentile([3.0], 99)) == (0.0, 3.0)


def test_lengths() -> None:
    assert (Lengths.parse("8"), Lengths.parse("2:4")) == (Lengths(8, 8), Lengths(2, 4))
    assert {Lengths(2, 4).draw(random.Random(seed)) for seed in range(50)} == {2, 3, 4}
    for text in ("", "x", "0", "4:2", "1:x"):
        with pytest.raises(ConfigError):
            Lengths.parse(text)
