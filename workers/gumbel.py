"""Counter-based Gumbel noise: a pure function of (seed, position, token id), so no generator state has to move.

``argmax(log p + Gumbel)`` draws from p (Gumbel 1954; Maddison et al., "A* sampling", 2014). The integers are the same
on every device; the two logarithms may differ in the last bit. Per draw a 64-bit key comes from SplitMix64's finaliser
(Steele et al., 2014). Per token the key's halves enter before and amid the 32-bit finaliser lowbias32 (Wellons, 2018):

    x = token ^ key_low;  x ^= x >> 16;  x *= 0x7feb352d;  x += key_high;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

The low 31 bits h give the uniform (h + 1/2) / 2^31, float32. The likely winners have h near 0, where its relative
precision is full: the noise reaches 22 and has no coarse upper end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from twinpool.workers.staging import upload_list

_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)  # as int32
_LARGEST_UNIFORM = 1.0 - 2.0**-24


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _key(seed: int, position: int) -> int:
    stream = _finalise((seed + _GOLDEN) & _MASK64)
    return _finalise((stream + position * _GOLDEN) & _MASK64)


def draw_keys(counters: Iterable[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """One key for each (seed, position): int32 [R, 2], low and high half."""
    keys = [_key(seed, position) for seed, position in counters]
    halves = [[_as_int32(key), _as_int32(key >> 32)] for key in keys]
    return upload_list(halves, torch.int32, device)


def _as_int32(x: int) -> int:
    return ((x + 2**31) & 0xFFFFFFFF) - 2**31


def token_hash(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """31 mixed bits for each token of each draw: keys int32 [R, 2], ids int32 [R or 1, N] -> int32 [R, N], >= 0."""
    x = ids ^ keys[:, :1]
    x ^= (x >> 16) & 0xFFFF  # >> keeps the sign: the mask makes the shift logical
    x *= _MULTIPLIERS[0]
    x += keys[:, 1:]
    x ^= (x >> 15) & 0x1FFFF
    x *= _MULTIPLIERS[1]
    x ^= (x >> 16) & 0xFFFF
    x &= 0x7FFFFFFF
    return x


def gumbel(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise: keys int32 [R, 2], ids int32 [R or 1, N] -> float32 [R, N], finite."""
    uniform = token_hash(keys, ids).to(torch.float32)
    uniform.add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_UNIFORM)
    return uniform.neg_().log1p_().neg_().log_().neg_()
