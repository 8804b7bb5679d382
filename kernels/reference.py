"""What the kernels compute, in plain torch on any device: the reference they are tested against, and the CPU path."""

from __future__ import annotations

import torch

MASK_64 = (1 << 64) - 1


def sum_weights(words: int, device: torch.device | str) -> torch.Tensor:
    """Odd weights ``2 i + 1`` of the block checksum: int64 [words]."""
    return torch.arange(words, device=device).mul_(2).add_(1)


def block_sums(words: torch.Tensor, weights: torch.Tensor) -> list[int]:
    """Checksums of blocks given as int64 [blocks, words]: ``sum of w[i] * (2 i + 1) mod 2**64``, as unsigned ints.

    The odd weights are invertible, so any one changed word changes the sum, and so do most words that change places.
    One parallel reduction, and one wait for the device.
    """
    sums: list[int] = (words * weights).sum(dim=1).tolist()
    return [value & MASK_64 for value in sums]
