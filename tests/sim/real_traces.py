"""Public traces, which are not part of the repository: looked for in $TWINPOOL_TRACES, or beside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).resolve().parents[2].parent / "shared" / "traces"
MOONCAKE = "mooncake_conversation.jsonl.gz"
AZURE = "azure_2023_conv.csv.gz"


def real_trace(name: str) -> Path:
    """The file, or a skip of the test that wants it."""
    path = Path(os.environ.get("TWINPOOL_TRACES", BESIDE)) / name
    if not path.exists():
        pytest.skip(f"needs the public trace {name}: put it into a folder and name that in TWINPOOL_TRACES")
    return path
