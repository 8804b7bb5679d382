"""Draws one token a row from a step's logits. Every row is a function of its own logits and ``SampleState`` alone.

Order of operations (vLLM's): min_tokens, bias and penalties (``penalties.py``); greedy rows (temperature < 1e-5) take
the largest logit, of equal ones the lowest id; the others are divided by the temperature T, cut by min-p and top-k,
then by top-p over what these two kept, and the token is ``argmax(logit / T + Gumbel)`` over what is left.

Every filter is a cut-off on the logit, so tokens of equal logit stay or go together and the result does not depend on
how a sort breaks ties. Cut-offs are first sought among the largest ``_NARROW`` logits; only a row whose kept tokens may
reach beyond them is sorted whole. Both give the same token.

On a device all this is put on the current stream, behind the step that makes the logits, and the host waits once: for
the copies of what was drawn. Rows to be sorted whole, which are rare, and rows that ask for logprobs add a wait each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from twinpool.errors import EngineError
from twinpool.sampling import TokenLogprob
from twinpool.workers.engine.base import Sampled, SampleState
from twinpool.workers.gumbel import draw_keys, gumbel
from twinpool.workers.penalties import adjust, is_adjusted
from twinpool.workers.staging import Download, upload_list

_GREEDY_BELOW = 1e-5  # temperature; dividing by less overflows
_NARROW = 1024  # tokens
_MINUS_INF = float("-inf")


class Sampler:
    """The sampler of one engine; it keeps nothing between calls (counts live in each ``SampleState.cache``)."""

    def __init__(self, vocab_size: int, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._ids = torch.arange(vocab_size, dtype=torch.int32, device=self._device).unsqueeze(0)

    def sample(self, logits: torch.Tensor, states: Sequence[SampleState]) -> list[Sampled]:
        """Draw one token for each row of ``logits`` (float [R, V], any float dtype; not changed).

        Raises ``EngineError`` where the shape is wrong or a row is not a distribution (NaN, +inf or all -inf).
        """
        if logits.shape != (len(states), self._vocab_size):
            raise EngineError(f"logits have shape {tuple(logits.shape)}, not {(len(states), self._vocab_size)}")
        if not states:
            return []
        with torch.inference_mode():
            drawing = self._launch(logits, states)
            tokens, finite, is_open = Download(drawing.found).wait()
            if not bool(finite):
                raise EngineError("the model produced logits that are not finite")
            if bool(is_open.any()):
                rows = [drawing.filtered[index] for index in is_open.nonzero().flatten().tolist()]
                (tokens,) = Download([self._draw_whole(drawing, rows, states)]).wait()
            logprobs = _logprobs(logits, tokens, states)
            return [Sampled(token, logprobs.get(row)) for row, token in enumerate(tokens.tolist())]

    def _launch(self, logits: torch.Tensor, states: Sequence[SampleState]) -> _Drawing:
        """Draw without waiting for anything."""
        best = logits.max(dim=-1)  # the first of equal ones; NaN wins
        finite = best.values.isfinite().all()
        adjusted = [row for row, state in enumerate(states) if is_adjusted(state)]
        if adjusted:
            logits = logits.to(torch.float32, copy=True)
            for row in adjusted:
                adjust(logits[row], states[row])
            best = logits.max(dim=-1)
        tokens = best.indices
        plain, filtered = _random_rows(states)
        is_open = finite.new_zeros(0)
        if plain:
            index = upload_list(plain, torch.int64, self._device)
            scaled = _scaled(logits, best.values, index, states, plain)
            tokens[index] = self._draw_plain(scaled, [states[row] for row in plain])
        if filtered:
            index = upload_list(filtered, torch.int64, self._device)
            scaled = _scaled(logits, best.values, index, states, filtered)
            width = min(_NARROW, self._vocab_size)
            tokens[index], is_open = _draw_among(scaled, [states[row] for row in filtered], width)
        return _Drawing(logits, best.values, tokens, finite, is_open, filtered)

    def _draw_plain(self, scaled: torch.Tensor, states: Sequence[SampleState]) -> torch.Tensor:
        noise = gumbel(_keys(states, self._device), self._ids)
        return noise.add_(scaled).argmax(dim=-1)

    def _draw_whole(self, drawing: _Drawing, rows: list[int], states: Sequence[SampleState]) -> torch.Tensor:
        """All tokens, those of ``rows`` drawn again from their whole vocabulary."""
        index = upload_list(rows, torch.int64, self._device)
        scaled = _scaled(drawing.logits, drawing.best, index, states, rows)
        drawing.tokens[index], _ = _draw_among(scaled, [states[row] for row in rows], self._vocab_size)
        return drawing.tokens


class _Drawing(NamedTuple):
    """Tokens on the device, and what may be asked of them once they are there."""

    logits: torch.Tensor  # adjusted
    best: torch.Tensor  # of each row
    tokens: torch.Tensor  # int64 [R]
    finite: torch.Tensor  # bool []
    is_open: torch.Tensor  # bool [rows in filtered]: its token is void, it is to be drawn from the whole vocabulary
    filtered: list[int]

    @property
    def found(self) -> list[torch.Tensor]:
        return [self.tokens, self.finite, self.is_open]


def _random_rows(states: Sequence[SampleState]) -> tuple[list[int], list[int]]:
    """Rows that are not greedy: those over the whole vocabulary, those with a filter."""
    plain: list[int] = []
    filtered: list[int] = []
    for row, state in enumerate(states):
        params = state.params
        if params.temperature >= _GREEDY_BELOW:
            has_filter = params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0
            (filtered if has_filter else plain).append(row)
    return plain, filtered


def _scaled(
    logits: torch.Tensor, best: torch.Tensor, index: torch.Tensor, states: Sequence[SampleState], rows: Sequence[int]
) -> torch.Tensor:
    """Logits of the given rows over their temperatures, float32 [len(rows), V], the largest of each row moved to 0."""
    heat = upload_list([states[row].params.temperature for row in rows], torch.float32, logits.device)
    chosen = logits if len(rows) == len(logits) else logits[index]
    shifted = chosen.to(torch.float32) - best[index].to(torch.float32).unsqueeze(1)
    return shifted.div_(heat.unsqueeze(1))


def _keys(states: Sequence[SampleState], device: torch.device) -> torch.Tensor:
    return draw_keys(((state.params.seed, state.position) for state in states), device)


def _draw_among(scaled: torch.Tensor, states: Sequence[SampleState], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the filtered ones of each row's ``width`` largest logits.

    Returns the tokens (int64 [R]) and, for each row, whether kept tokens may lie beyond those (bool [R]), which makes
    its token void; never so when ``width`` is the vocabulary.
    """
    top, ids = scaled.topk(width, dim=-1)
    cutoff = _cutoffs(scaled, top, states)
    noisy = top + gumbel(_keys(states, scaled.device), ids.to(torch.int32))
    noisy.masked_fill_(top < cutoff, _MINUS_INF)
    best = noisy.amax(dim=-1, keepdim=True)
    tokens = ids.masked_fill(noisy < best, scaled.shape[1]).amin(dim=-1)
    is_open = (cutoff <= top[:, -1:]).squeeze(1) & (width < scaled.shape[1])
    return tokens, is_open


def _cutoffs(scaled: torch.Tensor, top: torch.Tensor, states: Sequence[SampleState]) -> torch.Tensor:
    """The smallest scaled logit that each row keeps, float32 [R, 1]; -inf where ``top`` (descending) cannot tell."""
    floor, is_short = _floors(top, states, scaled.shape[1])
    if any(state.params.top_p < 1.0 for state in states):
        top_p = _column([state.params.top_p for state in states], torch.float64, top.device)
        mass = scaled.masked_fill(scaled < floor, _MINUS_INF).logsumexp(dim=-1, keepdim=True)
        share = (top.to(torch.float64) - mass).exp_().masked_fill_(top < floor, 0.0)
        last = (share.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)  # index of the token that reaches top_p
        width = top.shape[1]
        edge = top.gather(1, last.clamp(max=width - 1))
        is_cut = (last < width) & (top_p < 1.0)
        floor = torch.where(is_cut, torch.maximum(floor, edge), floor)
    return floor.masked_fill(is_short, _MINUS_INF)


def _floors(top: torch.Tensor, states: Sequence[SampleState], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut-off of min-p and top-k, float32 [R, 1], and where ``top`` has fewer than top-k entries, bool [R, 1]."""
    min_p = _column([state.params.min_p for state in states], torch.float32, top.device)
    top_k = _column([min(state.params.top_k, vocab_size) for state in states], torch.int64, top.device)
    width = top.shape[1]
    kth = top.gather(1, (top_k - 1).clamp(0, width - 1)).masked_fill(top_k == 0, _MINUS_INF)
    return torch.maximum(kth, top[:, :1] + min_p.log()), top_k > width


def _column(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return upload_list(values, dtype, device).unsqueeze(1)


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, states: Sequence[SampleState]) -> dict[int, TokenLogprob]:
    """For the rows that ask for it: the drawn token under softmax of the raw logits, and the best alternatives.

    ``tokens`` are in host memory.
    """
    rows = [row for row, state in enumerate(states) if state.params.logprobs >= 0]
    if not rows:
        return {}
    raw = logits[upload_list(rows, torch.int64, logits.device)].to(torch.float32).log_softmax(dim=-1)
    chosen = raw.gather(1, upload_list(tokens[rows].tolist(), torch.int64, logits.device).unsqueeze(1))
    ranks = (raw > chosen).sum(dim=-1).add_(1)
    top = raw.topk(min(max(states[row].params.logprobs for row in rows), raw.shape[1]), dim=-1)
    chosen, ranks, *best = Download([chosen.flatten(), ranks, top.values, top.indices]).wait()
    columns = zip(rows, chosen.tolist(), ranks.tolist(), best[0].tolist(), best[1].tolist(), strict=True)
    result = {}
    for row, logprob, rank, values, ids in columns:
        ordered = sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
        ordered = ordered[: states[row].params.logprobs]
        result[row] = TokenLogprob(logprob, rank, tuple(i for _, i in ordered), tuple(v for v, _ in ordered))
    return result
