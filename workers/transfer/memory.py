"""How much memory this process may still take: what the host has free, within the limit of its control group."""

from __future__ import annotations

import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Bytes that can be allocated now without killing somebody; a huge number where the kernel does not say."""
    return min(_host_free(), _group_free())


def format_bytes(count: int) -> str:
    """Human form in binary units, e.g. ``94.4 MiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _host_free() -> int:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return sys.maxsize
    fields = (line.split() for line in lines)
    return next((int(field[1]) * 1024 for field in fields if field[0] == "MemAvailable:"), sys.maxsize)


def _group_free() -> int:
    """Room under this container's own limit (cgroup v2 as containers see it); file cache in it counts as free."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
