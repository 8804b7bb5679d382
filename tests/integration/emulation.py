"""What the emulated engine answers, and prompts that no other test has left in a cache."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import xxhash
from tests.integration.client import Answer

from twinpool.proto.twinpool.v1 import inference_pb2 as pb
from twinpool.workers.engine.emulated import FIRST_ORDINARY

VOCAB = 49152
_seeds = itertools.count(1)


def new_prompt(length: int) -> list[int]:
    """Token ids, different in each call."""
    chooser = random.Random(next(_seeds))
    return [chooser.randrange(FIRST_ORDINARY, VOCAB) for _ in range(length)]


def expected_ids(prompt: Sequence[int], count: int) -> list[int]:
    """The rule of workers/engine/emulated.py, for requests that ignore the end token."""
    digest = xxhash.xxh3_128_digest(np.asarray(prompt, dtype="<u4").tobytes())
    values = [xxhash.xxh3_64_intdigest(digest, seed=position) for position in range(count)]
    return [FIRST_ORDINARY + value % (VOCAB - FIRST_ORDINARY) for value in values]


def assert_whole(answer: Answer, prompt: Sequence[int], count: int) -> None:
    """All ``count`` tokens came, each once, in order, and they are the right ones."""
    assert answer.end.reason == pb.FINISH_REASON_LENGTH
    assert answer.ids == expected_ids(prompt, count)
    assert answer.end.usage.completion_tokens == count
    assert answer.end.usage.prompt_tokens == len(prompt)
