"""Clusters that many tests share (processes take seconds to start), and their logs when a test fails."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from tests.integration.cluster import EMULATED, TORCH, Cluster


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the logs of a failed test's clusters."""
    report = yield
    if report.failed:
        for cluster in {value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Cluster)}:
            report.sections.append(("logs of the cluster", cluster.report()))
    return report


@pytest.fixture(scope="session")
def _timed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("timed")
    settings = EMULATED | {
        "worker.emulated.profile": "llama-70b-h100-tp4",
        "edge.request_log": folder / "requests",
        "scheduling.path": "split",
        "scheduling.no_worker_wait_ms": 2_000,
        "transfer.backend": "tcp",
        "link.lease_ms": 3_000,
    }
    with Cluster(folder, settings, prefill=2, decode=2) as cluster:
        yield cluster


@pytest.fixture
def timed(_timed: Cluster) -> Iterator[Cluster]:
    """Emulated, path split, 2 prefill and 2 decode workers with steps of some 20 to 40 ms; idle before and after."""
    _timed.restore()
    yield _timed
    if _timed.router is not None:
        _timed.client.wait_idle()


@pytest.fixture(scope="session")
def torch_split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The embedded model in float32 through two pools."""
    with Cluster(tmp_path_factory.mktemp("torch-split"), TORCH | {"scheduling.path": "split"}) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def torch_local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The embedded model in float32 in one worker of both pools."""
    settings = TORCH | {"scheduling.path": "local"}
    with Cluster(tmp_path_factory.mktemp("torch-local"), settings, prefill=0, decode=0, both=1) as cluster:
        yield cluster
