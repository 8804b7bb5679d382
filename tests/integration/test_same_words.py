"""The same words, however they were computed: two pools == one process == transformers.

Teacher-forced: transformers runs once over the prompt and our tokens; each of them must be its choice wherever the best
two scores are more than ``oracle.MARGIN`` apart. The same holds for drawn tokens, with the noise added. Between our own
ways, token ids are compared as they are where one request runs alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.integration.client import Answer
from tests.integration.cluster import TORCH, Cluster
from tests.integration.corpus import ALL, SHORT, Case
from tests.integration.oracle import OneProcess, Oracle, Words

AT_ONCE = 16
WATCHDOG_S = 600.0  # of one request on a busy machine
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def words() -> Words:
    return Words()


@pytest.fixture(scope="session")
def oracle(words: Words, pytestconfig: pytest.Config) -> Oracle:
    return Oracle(words, from_gguf=pytestconfig.getoption("--full"))


@pytest.fixture(scope="session")
def one_process(words: Words) -> Iterator[OneProcess]:
    engine = OneProcess(words)
    yield engine
    engine.close()


def _alone(cluster: Cluster, cases: Iterable[Case], **fields: Any) -> list[Answer]:
    return [
        cluster.client.generate(case.prompt, sampling=case.sampling, timeout=WATCHDOG_S, **fields) for case in cases
    ]


def _at_once(cluster: Cluster, cases: Sequence[Case], **fields: Any) -> list[Answer]:
    answers: list[Answer] = []
    for start in range(0, len(cases), AT_ONCE):
        part = cases[start : start + AT_ONCE]
        running = [
            cluster.client.start(case.prompt, sampling=case.sampling, timeout=WATCHDOG_S, **fields) for case in part
        ]
        answers += [stream.result() for stream in running]
    return answers


def _judge(
    oracle: Oracle, words: Words, cases: Sequence[Case], answers: Sequence[Answer], path: str, attempts: int = 1
) -> None:
    """Ids, lengths and route of each answer, made with at most so many attempts."""
    faults = []
    for case, answer in zip(cases, answers, strict=True):
        end = answer.end
        assert end.usage.prompt_tokens == len(words.ids(case.prompt)), case.name
        assert end.usage.completion_tokens == len(answer.ids), case.name
        assert len(answer.ids) == case.sampling["max_tokens"] or answer.ids[-1] in words.tokenizer.eos_ids, case.name
        assert end.route.path == path, f"{case.name}: {end.route}"
        assert end.route.attempts <= attempts, f"{case.name}: {end.route}"
        faults += oracle.faults(case, answer.ids)
    assert faults == []


def _ids(answers: Iterable[Answer]) -> list[list[int]]:
    return [answer.ids for answer in answers]


def test_two_pools(torch_split: Cluster, oracle: Oracle, one_process: OneProcess, words: Words) -> None:
    """Short prompts, all at once: each as transformers has it, alone and from cached blocks too."""
    together = _at_once(torch_split, SHORT)
    _judge(oracle, words, SHORT, together, "split")
    assert all(
        answer.route.kv_bytes > 0 and answer.route.backend == "shm" for answer in together if len(answer.ids) > 1
    )
    some = [case for case in SHORT if case.name in ("sentence", "code sampled", "penalties", "one wanted")]
    alone = _alone(torch_split, some, cache_salt="alone")
    _judge(oracle, words, some, alone, "split")
    assert _ids(alone) == [one_process.generate(case) for case in some]
    cached = _alone(torch_split, some, cache_salt="alone")
    _judge(oracle, words, some, cached, "split")
    assert all(answer.end.usage.cached_tokens > 0 for answer in cached)
    torch_split.client.wait_idle()


def test_one_worker(torch_local: Cluster, oracle: Oracle, words: Words) -> None:
    """Path local: nothing moves."""
    some = SHORT[:4] + SHORT[-2:]
    answers = _at_once(torch_local, some)
    _judge(oracle, words, some, answers, "local")
    assert all(answer.route.kv_bytes == 0 for answer in answers)
    torch_local.client.wait_idle()


def _all_alone(cluster: Cluster, oracle: Oracle, words: Words, one_process: OneProcess, path: str) -> None:
    """The whole corpus one by one, computed anew, then from cached blocks."""
    assert len(ALL) >= 40
    alone = _alone(cluster, ALL)
    _judge(oracle, words, ALL, alone, path)
    assert _ids(alone) == [one_process.generate(case) for case in ALL]
    cached = _alone(cluster, ALL)
    _judge(oracle, words, ALL, cached, path)
    assert all(answer.end.usage.cached_tokens > 0 for answer in cached if answer.end.usage.prompt_tokens > 16)
    cluster.client.wait_idle()


def _all_at_once(cluster: Cluster, oracle: Oracle, words: Words, path: str) -> list[Answer]:
    """The whole corpus 16 at once, computed anew, then from cached blocks."""
    answers: list[Answer] = []
    for _ in range(2):
        answers += _at_once(cluster, ALL, cache_salt="at once")
    _judge(oracle, words, ALL + ALL, answers, path)
    cluster.client.wait_idle()
    return answers


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("clusters", ["torch_split", "torch_local"])
def test_whole_corpus_alone(
    request: pytest.FixtureRequest, clusters: str, oracle: Oracle, one_process: OneProcess, words: Words
) -> None:
    path = clusters.removeprefix("torch_")
    _all_alone(request.getfixturevalue(clusters), oracle, words, one_process, path)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("backend", ["shm", "tcp", "gloo"])
def test_whole_corpus_at_once(tmp_path: Path, backend: str, oracle: Oracle, words: Words) -> None:
    settings = TORCH | {"scheduling.path": "split", "transfer.backend": backend}
    with Cluster(tmp_path, settings) as cluster:
        answers = _all_at_once(cluster, oracle, words, "split")
    assert {answer.route.backend for answer in answers if answer.route.kv_bytes} == {backend}


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_whole_corpus_at_once_in_one_worker(torch_local: Cluster, oracle: Oracle, words: Words) -> None:
    _all_at_once(torch_local, oracle, words, "local")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_words_after_a_loss(tmp_path: Path, oracle: Oracle, words: Words) -> None:
    """The decode worker is killed in mid-stream: another one goes on with the same words, greedy and sampled."""
    cases = [Case(case.name, case.prompt, case.sampling | {"max_tokens": 40}) for case in SHORT]
    with Cluster(tmp_path, TORCH | {"scheduling.path": "split"}, decode=2) as cluster:
        running = [cluster.client.start(case.prompt, sampling=case.sampling, timeout=300.0) for case in cases]
        for stream in running:
            stream.wait_tokens(3)
        cluster.kill(next(worker.worker for worker in cluster.client.status().workers if worker.running))
        answers = [stream.result(300.0) for stream in running]
        _judge(oracle, words, cases, answers, "split", attempts=2)
        assert any(answer.route.attempts == 2 for answer in answers)
        cluster.client.wait_idle()
