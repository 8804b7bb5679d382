"""What a request asks of the sampler: one frozen, range-checked record at the edge, on the wire and in workers."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_TOKEN_ID = 2**32 - 1

TokenId = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKEN_ID)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are drawn and when it ends.

    ``temperature`` 0 is greedy. A token is ``argmax(filtered logits / T + Gumbel(seed, position, token))``, where
    ``position`` counts the tokens of this output from 0: it depends on nothing else, so a resumed stream goes on
    exactly and results do not change with the batch.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)]
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=100.0)] = 1.0
    top_k: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: off
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = (
        1.0  # over prompt and output (CTRL, sec. 4.1)
    )
    presence_penalty: Annotated[float, msgspec.Meta(ge=-10.0, le=10.0)] = 0.0  # over the output
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-10.0, le=10.0)] = 0.0  # over the output
    logit_bias: dict[TokenId, float] = {}
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    stop: tuple[str, ...] = ()  # the matched string is not part of the text
    stop_token_ids: tuple[TokenId, ...] = ()
    include_stop: bool = False  # keep the matched stop string in the text
    ignore_eos: bool = False
    logprobs: Annotated[int, msgspec.Meta(ge=-1, le=20)] = -1  # -1: none; 0: of the sampled token; k: and of the k best
    skip_special_tokens: bool = True


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one sampled token under the raw distribution (unfiltered, T = 1), and the best others."""

    logprob: float
    rank: int  # 1 = the most likely token
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()
