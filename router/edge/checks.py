"""Checks of one request, pure: each refusal has a reason of its own and a sentence that says what would be accepted.

Ranges of sampling parameters are those of ``SamplingParams``' annotations: they are written once, there.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec.inspect

from twinpool.errors import InvalidRequest
from twinpool.router.cell import CellModel
from twinpool.sampling import SamplingParams

MAX_N = 16
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_NAME_CHARS = 128
CHARS_PER_TOKEN = 64  # a text longer than so many characters for each token of the context is refused unread

_NAME = re.compile(r"[\x21-\x7e]*")  # printable ASCII without space


def _bounded_fields() -> dict[str, Any]:
    info = msgspec.inspect.type_info(SamplingParams)
    assert isinstance(info, msgspec.inspect.StructType)
    number = (msgspec.inspect.IntType, msgspec.inspect.FloatType)
    return {field.name: field.type for field in info.fields if isinstance(field.type, number)}


_BOUNDS = _bounded_fields()


def bad(field: str, sentence: str) -> InvalidRequest:
    """The refusal of one field, reason ``BAD_<FIELD>``."""
    return InvalidRequest(sentence, reason=f"BAD_{field.upper()}")


def name(field: str, value: str) -> str:
    """An id or a label: at most 128 printable ASCII characters."""
    if len(value) > MAX_NAME_CHARS or not _NAME.fullmatch(value):
        raise bad(field, f"{field} must be at most {MAX_NAME_CHARS} printable ASCII characters without spaces")
    return value


def yes_or_no(field: str, value: str) -> bool:
    """What a caller says by metadata."""
    if value not in ("yes", "no"):
        raise bad(field, f"{field} must be yes or no, got {value[:100]!r}")
    return value == "yes"


def positive(field: str, value: float) -> float:
    """A finite number above 0."""
    if not (math.isfinite(value) and value > 0):
        raise bad(field, f"{field} must be a positive number, got {value}")
    return value


def sequences(n: int) -> int:
    """How many sequences are asked for; 0 means 1."""
    if n > MAX_N:
        raise bad("n", f"n must be at most {MAX_N}, got {n}")
    return max(1, n)


def _in_range(field: str, value: float) -> None:
    bounds = _BOUNDS[field]
    limits = [
        f"{words} {limit}"
        for words, limit in (
            ("at least", bounds.ge), ("above", bounds.gt), ("at most", bounds.le), ("below", bounds.lt),
        )
        if limit is not None
    ]  # fmt: skip
    if (
        not math.isfinite(value)
        or (bounds.ge is not None and value < bounds.ge)
        or (bounds.gt is not None and value <= bounds.gt)
        or (bounds.le is not None and value > bounds.le)
        or (bounds.lt is not None and value >= bounds.lt)
    ):
        raise bad(field, f"{field} must be a number {' and '.join(limits)}, got {value}")


def _stops(stops: Sequence[str]) -> None:
    if len(stops) > MAX_STOPS:
        raise bad("stop", f"at most {MAX_STOPS} stop strings are taken, got {len(stops)}")
    if not all(stops):
        raise bad("stop", "a stop string must not be empty")
    if max(map(len, stops), default=0) > MAX_STOP_CHARS:
        raise bad("stop", f"a stop string has at most {MAX_STOP_CHARS} characters")


def _known_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            raise bad(field, f"{field} names token {token}, but ids go from 0 to {vocab_size - 1}")


def sampling(fields: Mapping[str, Any], model: CellModel) -> SamplingParams:
    """Checked ``SamplingParams`` from unchecked values of its fields. Raises InvalidRequest."""
    for field in _BOUNDS.keys() & fields.keys():
        _in_range(field, fields[field])
    params = SamplingParams(**fields)
    if params.min_tokens > params.max_tokens:
        raise bad("min_tokens", f"min_tokens ({params.min_tokens}) must not exceed max_tokens ({params.max_tokens})")
    _stops(params.stop)
    if len(params.stop_token_ids) > MAX_STOP_IDS:
        raise bad("stop_token_ids", f"at most {MAX_STOP_IDS} ids are taken, got {len(params.stop_token_ids)}")
    _known_ids("stop_token_ids", params.stop_token_ids, model.vocab_size)
    if len(params.logit_bias) > MAX_BIASES:
        raise bad("logit_bias", f"at most {MAX_BIASES} biases are taken, got {len(params.logit_bias)}")
    _known_ids("logit_bias", tuple(params.logit_bias), model.vocab_size)
    if not all(map(math.isfinite, params.logit_bias.values())):
        raise bad("logit_bias", "logit_bias must be finite")
    return params


def text_length(characters: int, model: CellModel) -> None:
    """Refuse a text that cannot fit before any work goes into it."""
    if characters == 0:
        raise InvalidRequest("the prompt is empty; at least one token is needed", reason="EMPTY_PROMPT")
    if characters > CHARS_PER_TOKEN * model.max_context:
        raise InvalidRequest(
            f"the prompt has {characters} characters; the context of {model.max_context} tokens can not hold it",
            reason="PROMPT_TOO_LONG",
        )


def prompt(ids: array[int], model: CellModel) -> None:
    """At least one id, all in the vocabulary, and room for one more token."""
    if not ids:
        raise InvalidRequest("the prompt is empty; at least one token is needed", reason="EMPTY_PROMPT")
    if len(ids) + 1 > model.max_context:
        raise InvalidRequest(
            f"the prompt has {len(ids)} tokens; with one new token at most {model.max_context} fit the context",
            reason="PROMPT_TOO_LONG",
        )
    in_vocabulary("prompt", ids, model)


def in_vocabulary(what: str, ids: array[int], model: CellModel) -> None:
    """All ids are tokens of the model."""
    if ids and max(ids) >= model.vocab_size:
        index = next(index for index, token in enumerate(ids) if token >= model.vocab_size)
        raise InvalidRequest(
            f"token {index} of the {what} is {ids[index]}, but ids go from 0 to {model.vocab_size - 1}",
            reason="TOKEN_OUT_OF_RANGE",
        )


def fits(prompt_tokens: int, max_tokens: int, model: CellModel) -> None:
    """The prompt and everything it may become stay within the context."""
    left = model.max_context - prompt_tokens
    if max_tokens > left:
        raise InvalidRequest(
            f"max_tokens is {max_tokens}, but after a prompt of {prompt_tokens} tokens {left} are left "
            f"of the context of {model.max_context}",
            reason="CONTEXT_EXCEEDED",
        )
