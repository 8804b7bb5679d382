"""How KV lies in a block of the pool, whoever computes it: equal at both ends of a transfer, or KV does not move.

A block is ``[layer][k or v][kv head]`` of *lines*. A line holds what one head keeps of the block's tokens,
[token][dim]; in float8 (e4m3) it ends in their scales, float32, one a token (kernels/reference.py). Keys are kept after
rotation, pairs adjacent.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from twinpool.errors import ConfigError
from twinpool.workers.models.config import DTypeName, LlamaConfig

KvDTypeName = Literal["float32", "bfloat16", "float8_e4m3"]

DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KV_DTYPES: dict[KvDTypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
}
_SCALE_BYTES = 4


class KvLayout(NamedTuple):
    """How KV lies in a block."""

    block_bytes: int
    text: str  # equal at both ends of a transfer, or KV does not move
    shape: tuple[int, int, int, int, int]  # layers, k and v, kv heads, tokens, dim


def kv_layout(config: LlamaConfig, dtype: KvDTypeName, block_size: int) -> KvLayout:
    """Bytes, text form and shape of a block of ``block_size`` tokens; ask before allocating the pool.

    Raises ConfigError where the scales of a float8 block would not lie on words of their own.
    """
    shape = (config.layers, 2, config.kv_heads, block_size, config.head_dim)
    line_bytes = block_size * config.head_dim * KV_DTYPES[dtype].itemsize
    text = f"block-major/{'x'.join(map(str, shape))}/rope-pairs/{dtype}"
    if dtype == "float8_e4m3":
        if line_bytes % _SCALE_BYTES:
            raise ConfigError(
                f"model.kv_dtype: {block_size} tokens of {config.head_dim} float8 numbers are not a multiple of four "
                "bytes; raise worker.block_size or take another kv_dtype"
            )
        line_bytes += block_size * _SCALE_BYTES
        text += "/scale-per-token"
    return KvLayout(config.layers * 2 * config.kv_heads * line_bytes, text, shape)
