"""From a request of either service to the submissions of a cell: who calls, what is asked, checked, tokenised.

``twinpool.v1`` or ``VllmEngine`` message -> Ask, with its Caller -> Intake.order() -> Order: one Submission "ID", or
for n > 1 Submissions "ID#0" ... "ID#n-1".
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec.structs
import xxhash

from twinpool.chat import Message
from twinpool.config import ClusterConfig
from twinpool.errors import ConfigError, InvalidRequest, NotFound, Unavailable
from twinpool.router.cell import Cell, CellModel, Slo, Submission
from twinpool.router.edge import checks
from twinpool.tokenizer import Tokenizer

THREAD_CHARS = 1024  # longer texts are tokenised in a thread: at this length it takes 0.7 ms
MODEL_POLL_S = 0.02
MAX_SALT_CHARS = 256
SEED_BITS = 63

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What is known of a call besides its message. ``deadline_at`` is a time of this process' monotonic clock."""

    tenant: str = ""
    klass: str = ""  # empty: the default class
    session: str = ""
    returns: bool = False  # its conversation will come back
    trace: str = ""
    request_id: str = ""
    deadline_at: float | None = None

    def remaining_s(self) -> float | None:
        """Seconds until the caller gives up; None: never."""
        return None if self.deadline_at is None else max(0.0, self.deadline_at - time.monotonic())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of either service, unchecked. ``sampling`` holds fields of ``SamplingParams`` that differ from their
    default; without ``max_tokens`` the output may fill the context; without ``seed`` one is drawn.
    """

    prompt: str | Sequence[Message] | array[int]
    sampling: Mapping[str, Any]
    stream: bool
    n: int = 1
    request_id: str = ""
    model: str = ""
    salt: str = ""
    resumed: array[int] = field(default_factory=lambda: array("I"))
    max_queue_ms: int = 0
    slo: Mapping[str, float] = field(default_factory=dict)  # ttft_ms, ttft_factor, itl_ms where given


@dataclass(frozen=True, slots=True)
class Order:
    """A checked request: the submissions of its sequences, and what its answer repeats."""

    request_id: str
    seed: int
    stream: bool
    model: CellModel
    caller: Caller
    submissions: tuple[Submission, ...]

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, the same for all sequences."""
        return len(self.submissions[0].prompt)


def seed_of(seed: int, index: int) -> int:
    """Seed of sequence ``index`` of a request: sequence 0 has the request's own, sequence i > 0 the upper 63 bits of
    xxh3-64 over (seed, i) as two little-endian uint64. So each can be repeated alone with n = 1.
    """
    if index == 0:
        return seed
    return xxhash.xxh3_64_intdigest(seed.to_bytes(8, "little") + index.to_bytes(8, "little")) >> 1


def caller_of(metadata: Iterable[Any] | None, remaining_s: float | None) -> Caller:
    """The caller by its metadata (pairs of key and value). A malformed traceparent is
    ignored, as W3C wants it; anything else is refused.
    """
    values = {key: value for key, value in metadata or () if isinstance(value, str)}
    trace = values.get("traceparent", "")
    return Caller(
        tenant=checks.name("tenant", values.get("x-twinpool-tenant", "")),
        klass=values.get("x-twinpool-class", ""),
        session=checks.name("session", values.get("x-twinpool-session", "")),
        returns=checks.yes_or_no("returns", values.get("x-twinpool-returns", "no")),
        request_id=values.get("x-request-id", ""),
        trace=trace if _TRACEPARENT.fullmatch(trace) else "",
        deadline_at=deadline_at(remaining_s),
    )


def deadline_at(remaining_s: float | None) -> float | None:
    """The moment of this process' monotonic clock at which a call ends."""
    return None if remaining_s is None else time.monotonic() + remaining_s


class Intake:
    """Turns asks into orders. Holds no state of its own."""

    def __init__(self, cell: Cell, config: ClusterConfig, tokenizer: Tokenizer) -> None:
        self._cell = cell
        self._config = config
        self._tokenizer = tokenizer

    async def model(self) -> CellModel:
        """The model, waiting a bounded while for the first worker. Raises Unavailable."""
        wait_s = self._config.scheduling.no_worker_wait_ms / 1000
        give_up = time.monotonic() + wait_s
        while (model := self._cell.model) is None:
            if time.monotonic() >= give_up:
                raise Unavailable(f"no worker has come within {wait_s:g} s; try again", retry_s=1.0)
            await asyncio.sleep(MODEL_POLL_S)
        return model

    async def order(self, ask: Ask, caller: Caller) -> Order:
        """Check everything, tokenise. Raises InvalidRequest, NotFound or Unavailable."""
        request_id = checks.name("request_id", ask.request_id or caller.request_id) or secrets.token_hex(16)
        n = checks.sequences(ask.n)
        if len(ask.salt) > MAX_SALT_CHARS:
            raise checks.bad("cache_salt", f"cache_salt has at most {MAX_SALT_CHARS} characters")
        klass = self._klass(caller)
        slo = self._slo(klass, ask.slo)
        model = await self.model()
        if ask.model and ask.model != model.name:
            raise NotFound(f"no model {ask.model[:100]!r} here; this is {model.name!r}", reason="UNKNOWN_MODEL")
        prompt = await self._prompt(ask.prompt, model)
        fields = {"max_tokens": model.max_context - len(prompt), "seed": secrets.randbits(SEED_BITS), **ask.sampling}
        params = checks.sampling(fields, model)
        checks.fits(len(prompt), params.max_tokens, model)
        _check_resumed(ask.resumed, n, params.max_tokens, model)
        base = Submission(
            request_id=request_id,
            prompt=prompt,
            sampling=params,
            slo=slo,
            tenant=caller.tenant,
            klass=klass,
            salt=cache_salt(caller.tenant, ask.salt),
            deadline_s=caller.remaining_s(),
            max_queue_s=(ask.max_queue_ms or self._config.scheduling.classes[klass].max_queue_ms) / 1000,
            resumed=ask.resumed,
            session=caller.session,
            returns=caller.returns,
            trace=caller.trace,
        )
        return Order(request_id, params.seed, ask.stream, model, caller, _sequences(base, n))

    def _klass(self, caller: Caller) -> str:
        known = self._config.scheduling.classes
        klass = caller.klass or self._config.scheduling.default_class
        if klass not in known:
            raise checks.bad("class", f"no class {klass[:100]!r} (x-twinpool-class); there are {', '.join(known)}")
        return klass

    def _slo(self, klass: str, given: Mapping[str, float]) -> Slo:
        base = self._config.scheduling.classes[klass]
        for key, value in given.items():
            if key != "ttft_factor" or value != 0:
                checks.positive(key, value)
        return Slo(
            ttft_s=given.get("ttft_ms", base.ttft_ms) / 1000,
            ttft_factor=given.get("ttft_factor", base.ttft_factor),
            itl_s=given.get("itl_ms", base.itl_ms) / 1000,
        )

    async def _prompt(self, prompt: str | Sequence[Message] | array[int], model: CellModel) -> array[int]:
        if not isinstance(prompt, array):
            prompt = await self._encoded(prompt, model)
        checks.prompt(prompt, model)
        return prompt

    async def _encoded(self, prompt: str | Sequence[Message], model: CellModel) -> array[int]:
        whole = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        if isinstance(prompt, str) or not prompt:
            checks.text_length(len(whole), model)
        else:
            checks.text_length(max(1, len(whole)), model)  # a chat of empty messages still has its roles
        if len(whole) > THREAD_CHARS:
            return await asyncio.to_thread(self._encode, prompt)
        return self._encode(prompt)

    def _encode(self, prompt: str | Sequence[Message]) -> array[int]:
        if isinstance(prompt, str):
            return array("I", self._tokenizer.encode(prompt))
        try:
            return array("I", self._tokenizer.chat(prompt))
        except ConfigError as error:
            raise InvalidRequest(
                "this model has no chat template; send text or token ids instead of messages", reason="NO_CHAT_TEMPLATE"
            ) from error


def _sequences(base: Submission, n: int) -> tuple[Submission, ...]:
    """``base`` itself, or n copies of it with ids and seeds of their own."""
    if n == 1:
        return (base,)
    return tuple(
        replace(
            base,
            request_id=f"{base.request_id}#{index}",
            sampling=msgspec.structs.replace(base.sampling, seed=seed_of(base.sampling.seed, index)),
        )
        for index in range(n)
    )


def _check_resumed(resumed: array[int], n: int, max_tokens: int, model: CellModel) -> None:
    if not resumed:
        return
    if n > 1:
        raise checks.bad("resume_tokens", "resume_tokens go with one sequence (n = 1)")
    if len(resumed) >= max_tokens:
        raise checks.bad("resume_tokens", f"{len(resumed)} of {max_tokens} tokens are there already; nothing is left")
    checks.in_vocabulary("resume_tokens", resumed, model)


def cache_salt(tenant: str, salt: str) -> str:
    """What block hashes are salted with: tenants never share KV, nor do a tenant's own salts."""
    return f"{tenant}\x00{salt}" if tenant or salt else ""
