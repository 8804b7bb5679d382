"""Prompts that end just before, at and after a block's edge, computed anew and with all their blocks cached."""

from __future__ import annotations

import pytest
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import assert_whole, new_prompt

BLOCK_BYTES = int(str(EMULATED["worker.emulated.block_bytes"]))


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 33, 64, 511, 512, 513])
def test_again_and_again(timed: Cluster, length: int) -> None:
    prompt = new_prompt(length)
    for times in range(4):
        answer = timed.client.generate(prompt, max_tokens=2 + times)
        assert_whole(answer, prompt, 2 + times)
        assert answer.route.attempts == 1
        cached_blocks = (times > 0) * ((length - 1) // 16)  # the last token's block is computed, and moves, each time
        assert answer.route.kv_bytes == BLOCK_BYTES * (-(-length // 16) - cached_blocks)
        assert answer.end.usage.cached_tokens == 16 * cached_blocks
