"""Traffic small enough to be looked at in many ways, and a cluster for it."""

from __future__ import annotations

from array import array

from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

SETTINGS = Settings(prefill=2, decode=2, profile="h100_sxm/llama-3.1-8b/tp1")


def traffic(requests: int = 160) -> Trace:
    """Bursts of prompts of many lengths, half of which share their beginning."""
    hashes, offsets = array("q"), array("q", [0])
    prompt = array("q", [300 + (i * 7919) % 9000 for i in range(requests)])
    for i, tokens in enumerate(prompt):
        hashes.extend([*range(tokens // 512)] if i % 2 else [1000 * (i + 1) + j for j in range(tokens // 512)])
        offsets.append(len(hashes))
    arrival = array("d", [0.5 + 0.4 * (i // 8) + 0.01 * (i % 8) for i in range(requests)])
    return Trace(
        "small", 512, arrival, prompt, array("q", [1 + (i * 31) % 90 for i in range(requests)]), hashes, offsets
    )
