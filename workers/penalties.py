"""What changes one sequence's logits before a token is drawn, greedy or not, in vLLM's order.

    1. fewer than ``min_tokens`` drawn: eos (unless ignored) and stop ids become -inf
    2. logit bias: added, within [-100, 100]
    3. repetition penalty r over the tokens of prompt and output: l / r where l > 0, else l * r (Keskar et al., 2019)
    4. frequency penalty f, presence penalty p over the output's tokens: l - f * count - p

Counts live in ``SampleState.cache`` and follow its tokens; from an empty cache they are built anew, with equal results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twinpool.sampling import SamplingParams
from twinpool.workers.engine.base import SampleState
from twinpool.workers.staging import upload_list

_BIAS_LIMIT = 100.0


class _Counts:
    """Which tokens a sequence has (bool [V]) and how often its output has them (float32 [V]), kept up to date."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.output = torch.zeros(vocab_size, dtype=torch.float32, device=device)
        self.upto = 0

    def follow(self, state: SampleState) -> None:
        """Count the tokens that came since the last call."""
        start, self.upto = self.upto, len(state.tokens)
        self.seen.index_fill_(0, self._ids(state.tokens[start:]), True)
        output = self._ids(state.tokens[max(start, state.prompt_len) :])
        self.output.index_add_(0, output, torch.ones(len(output), device=output.device))

    def _ids(self, tokens: Sequence[int]) -> torch.Tensor:
        return _known_ids(tokens, len(self.seen), self.seen.device)


def _known_ids(tokens: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    return upload_list([token for token in tokens if token < vocab_size], torch.int64, device)


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def is_adjusted(state: SampleState) -> bool:
    """Whether ``adjust`` would change the logits of this sequence now."""
    params = state.params
    return bool(params.logit_bias) or state.position < params.min_tokens or _has_penalty(params)


def adjust(row: torch.Tensor, state: SampleState) -> None:
    """Change ``row`` (float32 [V]) in place as the module's table says. Ids outside the vocabulary are ignored."""
    params = state.params
    if state.position < params.min_tokens:
        ends = (*params.stop_token_ids, *(() if params.ignore_eos else state.eos_ids))
        row.index_fill_(0, _known_ids(ends, len(row), row.device), float("-inf"))
    if params.logit_bias:
        row.index_add_(0, *_bias(row, state))
    if _has_penalty(params):
        _penalise(row, state)


def _bias(row: torch.Tensor, state: SampleState) -> tuple[torch.Tensor, torch.Tensor]:
    cached = state.cache.get("bias")
    if isinstance(cached, tuple):
        return cached
    known = {token: bias for token, bias in state.params.logit_bias.items() if token < len(row)}
    values = [min(_BIAS_LIMIT, max(-_BIAS_LIMIT, bias)) for bias in known.values()]
    pair = (_known_ids(tuple(known), len(row), row.device), upload_list(values, row.dtype, row.device))
    state.cache["bias"] = pair
    return pair


def _penalise(row: torch.Tensor, state: SampleState) -> None:
    counts = state.cache.get("counts")
    if not isinstance(counts, _Counts) or counts.upto > len(state.tokens):
        counts = state.cache["counts"] = _Counts(len(row), row.device)
    counts.follow(state)
    params = state.params
    if params.repetition_penalty != 1.0:
        repeated = torch.where(row > 0, row / params.repetition_penalty, row * params.repetition_penalty)
        row.copy_(torch.where(counts.seen, repeated, row))
    if params.frequency_penalty:
        row -= params.frequency_penalty * counts.output
    if params.presence_penalty:
        row -= params.presence_penalty * (counts.output > 0)
