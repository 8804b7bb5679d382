"""Workers with very little KV memory: requests wait, are preempted and resumed, and all of them complete."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from tests.integration.cluster import EMULATED, Cluster
from tests.integration.emulation import assert_whole, new_prompt

BLOCKS = 64  # of 16 tokens


@pytest.fixture(scope="module", params=["auto", pytest.param("split", marks=pytest.mark.full)])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = EMULATED | {
        "scheduling.path": request.param,
        "worker.emulated.block_bytes": (1 << 20) // BLOCKS,
        "worker.emulated.profile": "llama-8b-h100-tp1",
        "worker.emulated.speed": 20.0,
    }
    with Cluster(tmp_path_factory.mktemp("tiny"), settings) as cluster:
        assert {worker.blocks for worker in cluster.client.status().workers} == {BLOCKS}
        yield cluster


def test_more_than_fits_at_once(tiny: Cluster) -> None:
    """Outputs longer than the running mean: more is admitted than there will be room for."""
    for _ in range(3):
        tiny.client.generate(new_prompt(30), max_tokens=2)
    prompts = [new_prompt(40 + 16 * (number % 5)) for number in range(24)]
    streams = [tiny.client.start(prompt, max_tokens=300) for prompt in prompts]
    answers = [running.result() for running in streams]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_whole(answer, prompt, 300)
    assert any(answer.route.attempts > 1 for answer in answers), "nothing was preempted: the test shows nothing"
    tiny.client.wait_idle()


def test_more_than_ever_fits(tiny: Cluster) -> None:
    answer = tiny.client.generate(new_prompt(1_100), max_tokens=4)
    assert (answer.code, answer.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "KV_TOO_SMALL"), answer
    prompt = new_prompt(900)
    assert_whole(tiny.client.generate(prompt, max_tokens=4), prompt, 4)
    tiny.client.wait_idle()
