"""``generate``: one prompt, its text on stdout as it comes, or all about it as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, cast

import typer

from twinpool.cli.common import Address, ConfigFile, loaded, reporting
from twinpool.cli.status import plain
from twinpool.client import ChatMessage, Client, Event, SamplingOptions, request
from twinpool.deploy.local import dialable
from twinpool.errors import ConfigError
from twinpool.proto.twinpool.v1.inference_pb2 import Accepted, Finished, FinishReason, GenerateRequest, Tokens


@dataclass(slots=True)
class Answer:
    """One sequence as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, object]] = field(default_factory=list)
    finished: Finished | None = None

    def add(self, event: Tokens | Finished) -> None:
        """Take what came."""
        if isinstance(event, Finished):
            self.finished = event
            return
        self.text += event.text
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(
            {"logprob": each.logprob, "rank": each.rank, "top": [plain(top) for top in each.top]}
            for each in event.logprobs
        )

    def to_json(self) -> dict[str, object]:
        """All about it."""
        assert self.finished is not None
        end = self.finished
        reason = FinishReason.Name(end.reason).removeprefix("FINISH_REASON_").lower()
        values: dict[str, object] = {"text": self.text, "token_ids": self.token_ids, "finish_reason": reason}
        values |= {name: plain(getattr(end, name)) for name in ("usage", "route", "timing")}
        if self.logprobs:
            values["logprobs"] = self.logprobs
        return values


def generate(
    prompt: Annotated[str | None, typer.Argument(help="Prompt; - reads it from stdin.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    token_ids: Annotated[str | None, typer.Option(metavar="IDS", help="The prompt as ids: 1,2,3.")] = None,
    messages: Annotated[Path | None, typer.Option(metavar="FILE", help="A chat: JSON list of {role, content}.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    min_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy; the server's default is 1.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k best.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the best with this share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop what is below this share of the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: what was there is less likely.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Taken off a token that the answer has.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time it has it.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end-of-text token.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Log-probabilities of so many alternatives (--json).")] = None,
    n: Annotated[int, typer.Option("-n", "--n", min=1, help="Answers to the same prompt.")] = 1,
    model: Annotated[str, typer.Option(help="Refuse any other model than this.")] = "",
    klass: Annotated[str, typer.Option("--class", help="SLO class.")] = "",
    tenant: Annotated[str, typer.Option(help="Tenant the request counts for.")] = "",
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, at the end.")] = False,
    address: Address = None,
    config_file: ConfigFile = None,
) -> None:
    """Generate text for one prompt."""
    sampling = {
        "max_tokens": max_tokens, "min_tokens": min_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "min_p": min_p, "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed, "stop": stop, "ignore_eos": ignore_eos,
        "logprobs": logprobs, "n": n,
    }  # fmt: skip
    given = cast("SamplingOptions", {name: value for name, value in sampling.items() if value is not None})
    with reporting():
        asked = _request(prompt, raw, token_ids, messages, model, given)
        target = address or dialable(loaded(config_file, None).config.edge.inference)
        with Client(target, tenant=tenant, klass=klass) as client:
            _print(client.generate(asked, timeout_s=timeout), n, as_json)


def _request(
    prompt: str | None, raw: bool, token_ids: str | None, file: Path | None, model: str, sampling: SamplingOptions
) -> GenerateRequest:
    """Raises ConfigError where the flags make no request at all; the rest is the server's to judge."""
    if sum(given is not None for given in (prompt, token_ids, file)) != 1:
        raise ConfigError("give one of PROMPT, --token-ids and --messages")
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        if token_ids is not None:
            return request(token_ids=_parse_ids(token_ids), model=model, **sampling)
        if raw and text is not None:
            return request(text, model=model, **sampling)
        chat = [ChatMessage("user", text)] if text is not None else _read_chat(cast("Path", file))
        return request(messages=chat, model=model, **sampling)
    except UnicodeEncodeError:
        raise ConfigError("the prompt is not valid UTF-8") from None
    except (ValueError, TypeError) as error:  # a number that the field can not hold
        raise ConfigError(str(error)) from None


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.split(",") if token.strip()]
    except ValueError:
        raise ConfigError("--token-ids takes whole numbers with commas between them, such as 1,2,3") from None


def _read_chat(file: Path) -> list[ChatMessage]:
    try:
        items = json.loads(file.read_text(encoding="utf-8"))
        return [ChatMessage(str(item["role"]), str(item["content"])) for item in items]
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{file}: expected a JSON list of {{role, content}}") from None


def _print(events: Iterable[Event], n: int, as_json: bool) -> None:
    """One answer streams; of several, each is printed when all are there."""
    answers = [Answer() for _ in range(n)]
    for event in events:
        if isinstance(event, Accepted):
            continue
        answers[event.index].add(event)
        if n == 1 and not as_json and isinstance(event, Tokens):
            typer.echo(event.text, nl=False)
    if as_json:
        whole = [answer.to_json() for answer in answers]
        typer.echo(json.dumps(whole[0] if n == 1 else {"answers": whole}, ensure_ascii=False))
    elif n == 1:
        typer.echo()
    else:
        typer.echo("\n\n".join(f"[{index}] {answer.text}" for index, answer in enumerate(answers)))
