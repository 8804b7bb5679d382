"""The machine a result was seen on, without names or addresses."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path


def describe() -> str:
    """One line: processor, cores, memory, Python and the libraries that matter."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "grpcio", "uvloop"))
    return f"{_cpu()}, {os.cpu_count()} cores, {_memory_gib()} GiB; Python {platform.python_version()}, {versions}"


def lacks_for_gpu() -> str:
    """What a benchmark of kernels needs and this machine has not; empty where all is there."""
    import torch  # here: most benchmarks only describe the machine

    if not torch.cuda.is_available():
        return "a CUDA device"
    return "" if importlib.util.find_spec("triton") else "triton (extra: gpu)"


def _cpu() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> int:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20)
    return 0


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
