"""First tokens that the core holds back until the sequence decodes: what the client feels of it."""

from array import array

import pytest

from twinpool.sim.replay import replay
from twinpool.sim.settings import Settings
from twinpool.sim.trace import Trace

SETUP_S = 0.3  # of each transfer: longer than the ITL SLO
OUTPUTS = (2, 6, 40, 2)


def trace() -> Trace:
    count = len(OUTPUTS)
    return Trace(
        "four", 0, array("d", [2.0 * i for i in range(count)]), array("q", [3000] * count), array("q", OUTPUTS),
        array("q"), array("q", [0] * (count + 1)),
    )  # fmt: skip


@pytest.mark.parametrize("ttft_s", [5.0, 0.3])
def test_a_held_first_token_leaves_with_the_second(ttft_s: float) -> None:
    """Held: no gap between the two, and the wait is in the first token's time. Without time to hold it: the reverse."""
    settings = Settings(
        prefill=1, decode=1, setup_s=SETUP_S, ttft_s=ttft_s, ttft_factor=0.0, parameters={"paths": "split"}
    )
    result = replay(trace(), settings).columns
    held = ttft_s == 5.0
    for i, shown in enumerate(result.shown):
        waited = shown - result.arrival[i]
        assert result.path[i] == 0, "local: nothing was handed over"
        assert (waited > SETUP_S + 0.2) == held  # 0.2: less than the prefill alone
        assert (result.max_gap[i] < settings.itl_s) == held, "the gap after the first token"
    attained = replay(trace(), settings).summary()["attainment"]
    assert attained == (1.0 if held else 0.0)
