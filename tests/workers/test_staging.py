"""Numbers to the device and back; tests/gpu/test_engine_gpu.py shows that nothing waits on the way."""

from __future__ import annotations

import pytest
import torch

from twinpool.workers.staging import Download, Fence, put, upload, upload_list

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("name", DEVICES)
def test_there_and_back(name: str) -> None:
    device = torch.device(name)
    rows = upload_list([[1, 2], [3, 4]], torch.int32, device)
    flags = upload(torch.tensor([True, False]), device)
    assert rows.device.type == flags.device.type == name
    place = torch.zeros(3, 2, dtype=torch.int32, device=device)
    put(torch.tensor([[7, 8]], dtype=torch.int32), place[1:2])
    back = Download([rows, flags, place, flags[:0]]).wait()
    assert [tensor.device.type for tensor in back] == ["cpu"] * 4
    assert [tensor.tolist() for tensor in back] == [[[1, 2], [3, 4]], [True, False], [[0, 0], [7, 8], [0, 0]], []]
    Fence(device).wait()
