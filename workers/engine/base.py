"""The seam between a worker and whatever computes: rows of one step in, sampled tokens out.

An engine owns the weights and a view of the worker's KV pool. It knows nothing of requests, leases or links: the
scheduler decides what is in a step, the worker keeps sequences, the engine turns rows into tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from twinpool.cost import StepCost
from twinpool.sampling import SamplingParams, TokenLogprob


@dataclass(slots=True)
class SampleState:
    """All that the choice of the next token of one sequence depends on, besides the logits.

    ``tokens`` is the sequence's own growing list (prompt, then output): borrowed, never changed by the engine.
    """

    params: SamplingParams
    tokens: Sequence[int]
    prompt_len: int  # tokens[:prompt_len] is the prompt, the rest is output
    eos_ids: tuple[int, ...] = ()
    cache: dict[str, object] = field(default_factory=dict)  # the sampler's own (penalty counts and the like)

    @property
    def position(self) -> int:
        """Index of the token to be drawn, counted in this output from 0."""
        return len(self.tokens) - self.prompt_len


class Row(NamedTuple):
    """One sequence's share of a step: compute ``tokens`` at positions ``start``.. , then draw a token if asked to.

    ``table[i]`` is the pool index of the block that holds positions ``i * block_size`` to ``(i + 1) * block_size - 1``;
    it covers at least ``start + len(tokens)`` positions, and the first ``start`` of them are already computed.
    """

    tokens: Sequence[int]
    start: int
    table: Sequence[int]
    sample: SampleState | None  # None: a chunk that is not the last of its prompt
    decode: bool = False  # the one token drawn last, not (the rest of) a prompt: only the step's time depends on it


class Sampled(NamedTuple):
    """A drawn token."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What must be equal at both ends before KV may move (except ``name``), and what a client may ask."""

    name: str
    fingerprint: str  # hex digest of config and weights
    dtype: str  # of weights
    layout: str  # text form of the KV layout, e.g. "block-major/30x2x3x16x64/rope-pairs/float32"
    block_size: int  # tokens
    block_bytes: int
    vocab_size: int
    max_context: int  # tokens
    eos_ids: tuple[int, ...]


class Engine(Protocol):
    """Turns steps into tokens. ``run`` is called by one task at a time and never overlaps itself."""

    info: ModelInfo

    async def run(self, rows: Sequence[Row]) -> list[Sampled | None]:
        """Compute one step; the result has one entry a row, None where ``sample`` is None.

        KV of all rows' tokens is in the pool when it returns. Raises ``EngineError`` when the step cannot be computed.
        """
        ...

    async def calibrate(self) -> StepCost:
        """Coefficients of the step time, measured with a few real steps on scratch blocks (the pool must be unused)."""
        ...

    def close(self) -> None:
        """Stop threads and give the weights back. Idempotent."""
        ...
