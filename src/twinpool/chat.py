"""Chat templates: Jinja2 programs that come with models, so they run in Jinja2's immutable sandbox.

The names a template may use are those of Hugging Face's convention: ``messages``, ``add_generation_prompt``, ``tools``
(none here), ``bos_token`` and its kin, ``raise_exception``, the filter ``tojson`` without HTML escapes, loop controls
and ``{% generation %}``. ``strftime_now`` is left undefined on purpose: templates that know it fall back to a fixed
date, and the same messages always give the same ids (a prompt that names the day misses every cached prefix tomorrow).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from twinpool.errors import ConfigError, InvalidRequest

Message = Mapping[str, str]


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(TemplateError):
    """Raised by the template itself: its message is meant for whoever wrote the request."""


def _raise_exception(message: object) -> NoReturn:
    raise _Refused(str(message))


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """One compiled template; ``render`` is pure."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ``ConfigError`` when ``source`` is not a template."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text the model expects. Raises ``InvalidRequest`` where the template refuses the messages."""
        _check(messages)
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **self._special_tokens,
            )
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise InvalidRequest("a chat needs at least one message")
    for index, message in enumerate(messages):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InvalidRequest(f"message {index} needs the strings 'role' and 'content'")


def template_source(config: Mapping[str, Any]) -> str | None:
    """The chat template of a tokenizer_config.json; of several named ones the one named ``default``."""
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
