"""benchmarks/gpu/serve.py on a CPU: real clusters with a tiny model of random weights, and the tokens they compare."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]  # two clusters, on a machine that may be busy


def serve(root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks/gpu/serve.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)


def test_two_processes_against_one(root: Path) -> None:
    file = root / "benchmarks/gpu/serve.md"
    before = file.stat().st_mtime_ns if file.exists() else None
    ran = serve(root, "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    assert "all of 4 answers are the same" in ran.stdout
    early = re.search(r"first token \| (\d+)% of the bytes \| - \|", ran.stdout)
    assert early is not None, ran.stdout
    assert 0 < int(early[1]) < 100  # the last block goes with the first token
    assert "KV moved by shm: 0.19 MiB a request." in ran.stdout
    assert (file.stat().st_mtime_ns if file.exists() else None) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(root: Path) -> None:
    ran = serve(root)
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "needs a CUDA device" in ran.stderr
