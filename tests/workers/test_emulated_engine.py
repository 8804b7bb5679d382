"""The emulated engine proves the KV it stands for, at every step and for all positions before the drawn token."""

from __future__ import annotations

import asyncio
from array import array

import pytest

from twinpool.cost import StepCost
from twinpool.errors import EngineError
from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import ModelInfo, Row, SampleState
from twinpool.workers.engine.emulated import EmulatedEngine
from twinpool.workers.transfer.pool import HostPool

SIZE, BLOCKS, VOCAB = 4, 32, 1000
BLOCK_BYTES = 2 * 8 * SIZE  # the second half is never looked at
COST = StepCost(c0=0.0, a=0.0, b=0.0, d0=0.0, d1=0.0, d2=0.0)


class Sequence:
    """One sequence on an engine of its own; its blocks go backwards through the pool."""

    def __init__(self, prompt: int) -> None:
        self.pool = HostPool(BLOCKS, BLOCK_BYTES)
        info = ModelInfo("m", "f", "float32", "l", SIZE, BLOCK_BYTES, VOCAB, BLOCKS * SIZE, ())
        self.engine = EmulatedEngine(info, self.pool.data, COST, 1.0)
        self.tokens = array("I", range(300, 300 + prompt))
        self.table = list(range(BLOCKS - 1, -1, -1))
        self.state = SampleState(SamplingParams(max_tokens=64), self.tokens, prompt)
        self.computed = 0

    def step(self) -> int:
        """Compute what is not computed, draw a token and take it."""
        start, self.computed = self.computed, len(self.tokens)
        row = Row(self.tokens[start:], start, self.table, self.state, decode=start > 0)
        (drawn,) = asyncio.run(self.engine.run([row]))
        assert drawn is not None
        self.tokens.append(drawn.token)
        return drawn.token

    def byte(self, position: int) -> tuple[int, int]:
        """Where the pool has the first byte of a position's stand-in."""
        return self.table[position // SIZE], position % SIZE * 8


def test_tokens_depend_on_prompt_and_position_only() -> None:
    whole, resumed = Sequence(10), Sequence(10)
    drawn = [whole.step() for _ in range(20)]
    resumed.tokens.extend(drawn[:7])
    assert [resumed.step() for _ in range(13)] == drawn[7:]


@pytest.mark.parametrize("position", [0, 5, 9, 12, 14])
def test_a_changed_position_is_found_at_the_next_step(position: int) -> None:
    sequence = Sequence(10)
    for _ in range(6):
        sequence.step()
    sequence.pool.data[sequence.byte(position)] ^= 1
    with pytest.raises(EngineError, match=f"KV at position {position} of 16") as caught:
        sequence.step()
    assert caught.value.reason == "WRONG_KV"


def test_a_block_may_be_replaced_by_an_equal_one_but_by_no_other() -> None:
    sequence = Sequence(10)
    for _ in range(3):
        sequence.step()
    old, new = sequence.table[1], 0
    sequence.pool.data[new] = sequence.pool.data[old]
    sequence.table[1] = new
    sequence.pool.data[old] = 0
    sequence.step()
    sequence.table[1] = old
    with pytest.raises(EngineError, match="KV at position 4 of 14"):
        sequence.step()
