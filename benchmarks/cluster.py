"""A cluster for a benchmark: `twinpool up` on free ports, stopped for sure."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PORTS = ("inference", "vllm.listen", "admin", "metrics")


@contextlib.contextmanager
def cluster(*flags: str, within_s: float = 120.0) -> Iterator[dict[str, str]]:
    """Addresses of a ready cluster ("inference", "admin", ...), drained at the end."""
    free = [flag for port in PORTS for flag in ("--set", f"edge.{port}=127.0.0.1:0")]
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "ready.json"
        command = [sys.executable, "-m", "twinpool.cli", "up", "--ready-file", str(ready), *free, *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _wait(process, ready, time.monotonic() + within_s)
            yield json.loads(ready.read_text(encoding="utf-8"))
        finally:
            process.terminate()
            process.wait(60)


def _wait(process: subprocess.Popen[bytes], ready: Path, deadline: float) -> None:
    while not ready.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the cluster did not start")
        time.sleep(0.1)
