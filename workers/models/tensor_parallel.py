"""One rank's share of a model: column-parallel q, k, v, gate and up, row-parallel output and down.

Each rank computes its own heads and its own part of the MLP; the two row-parallel products of a layer are partial sums
over the hidden size, added up by one all-reduce each (Shoeybi et al., "Megatron-LM", 2019, section 3). Embedding, norms
and head are replicated. Shares may be uneven: nothing has to divide the number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from torch import Tensor

from twinpool.errors import ConfigError
from twinpool.workers.models.config import LlamaConfig
from twinpool.workers.transfer.layout import held_heads


class Share(NamedTuple):
    """What one rank computes: ranges of the model's query heads, KV heads and MLP columns."""

    heads: range
    kv_heads: range
    ffn: range


def share(config: LlamaConfig, rank: int, ranks: int) -> Share:
    """The share of ``rank``; shares cover every query head and MLP column exactly once.

    Raises ConfigError where there are more ranks than query heads.
    """
    if ranks > min(config.heads, config.ffn):
        raise ConfigError(
            f"tensor_parallel: {ranks} ranks cannot share {config.heads} attention heads; lower it to {config.heads}"
        )
    kv_heads = held_heads(config.kv_heads, rank, ranks)
    group = config.heads // config.kv_heads
    first, last = kv_heads.start * group, kv_heads.stop * group
    sharers = [other for other in range(ranks) if held_heads(config.kv_heads, other, ranks) == kv_heads]
    heads = _part(first, last, sharers.index(rank), len(sharers))
    return Share(heads, kv_heads, _part(0, config.ffn, rank, ranks))


def _part(first: int, last: int, index: int, count: int) -> range:
    size = last - first
    return range(first + index * size // count, first + (index + 1) * size // count)


def share_config(config: LlamaConfig, own: Share) -> LlamaConfig:
    """``config`` with the sizes of a share."""
    sizes = {"heads": len(own.heads), "kv_heads": len(own.kv_heads), "ffn": len(own.ffn)}
    return msgspec.structs.replace(config, **sizes)


def share_weights(config: LlamaConfig, own: Share, first: bool, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Views of the share's part of ``weights`` (Hugging Face names); replicated ones are passed on as they are.

    ``first``: this rank adds the biases of row-parallel products, so that the sum has them once.
    """
    q, kv = _rows(own.heads, config.head_dim), _rows(own.kv_heads, config.head_dim)
    columns = {"q_proj": q, "k_proj": kv, "v_proj": kv, "gate_proj": _rows(own.ffn), "up_proj": _rows(own.ffn)}
    rows = {"o_proj": q, "down_proj": _rows(own.ffn)}
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module, kind = name.split(".")[-2:]
        if module in columns:
            parts[name] = weight[columns[module]]
        elif module in rows and kind == "weight":
            parts[name] = weight[:, rows[module]]
        elif module not in rows or first:
            parts[name] = weight
    return parts


def _rows(part: range, width: int = 1) -> slice:
    return slice(part.start * width, part.stop * width)
