"""Seeds of sequences and callers by their metadata."""

from __future__ import annotations

import threading
import time
from array import array
from typing import Any

import xxhash

from twinpool.router.edge.convert import THREAD_CHARS, Ask, Caller, Intake, caller_of, seed_of


def test_seeds_are_a_documented_function() -> None:
    assert seed_of(7, 0) == 7
    assert seed_of(7, 2) == xxhash.xxh3_64_intdigest(bytes([7, *[0] * 7, 2, *[0] * 7])) >> 1
    seeds = {seed_of(seed, index) for seed in range(50) for index in range(1, 16)}
    assert len(seeds) == 50 * 15
    assert max(seeds) < 2**63


def test_a_malformed_traceparent_is_ignored() -> None:
    assert caller_of([("traceparent", "00-xyz")], None).trace == ""


def test_time_left_shrinks() -> None:
    caller = caller_of(None, 5.0)
    remaining = caller.remaining_s()
    assert remaining is not None
    assert 0 < remaining <= 5.0
    assert Caller(deadline_at=time.monotonic() - 1).remaining_s() == 0.0
    assert Caller().remaining_s() is None


async def test_long_texts_leave_the_loop_alone(cell: Any, config: Any, tokenizer: Any, monkeypatch: Any) -> None:
    threads = []
    encode = tokenizer.encode

    def spy(text: str) -> list[int]:
        threads.append(threading.current_thread())
        ids: list[int] = encode(text)
        return ids

    monkeypatch.setattr(tokenizer, "encode", spy)
    intake = Intake(cell, config, tokenizer)
    for text in ("a short text", "word " * (THREAD_CHARS // 5 + 1)):
        order = await intake.order(Ask(prompt=text, sampling={"max_tokens": 1}, stream=True), Caller())
        assert order.submissions[0].prompt == array("I", encode(text))
    assert [thread is threading.main_thread() for thread in threads] == [True, False]
