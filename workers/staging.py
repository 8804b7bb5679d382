"""Small numbers to a device and back without waiting for it: through pinned memory, in the order of the current stream.

A copy from or to ordinary memory makes the host wait until the device has done all that came before. From pinned memory
it is one more piece of work in the stream; torch keeps the memory until the copy is done. On CPUs nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values`` (in host memory) on ``device``, there for what the current stream does next."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def upload_list(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers, or of rows of them, as :func:`upload` brings it."""
    return upload(torch.tensor(values, dtype=dtype), device)


def put(values: Tensor, place: Tensor) -> None:
    """Copy ``values`` (in host memory) to ``place`` on any device, as :func:`upload` brings them."""
    place.copy_(values.pin_memory() if place.is_cuda else values, non_blocking=True)


class Fence:
    """Marks what the current stream of ``device`` has been given so far; a thread waits for that and nothing later."""

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Return when the device has done it; other threads run meanwhile."""
        if self._event is not None:
            self._event.synchronize()


class Download:
    """Tensors of one device on their way to the host."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Start the copies. ``tensors``: at least one."""
        self._copies = [_to_host(tensor) for tensor in tensors]
        self._fence = Fence(tensors[0].device)

    def wait(self) -> list[Tensor]:
        """The tensors in host memory; valid for good."""
        self._fence.wait()
        return self._copies


def _to_host(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return place.copy_(tensor, non_blocking=True)
