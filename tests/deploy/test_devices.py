"""Who gets which GPU."""

from __future__ import annotations

from typing import Any

import pytest

from twinpool.config import ClusterConfig
from twinpool.deploy.devices import deal, visible_gpus, worker_names
from twinpool.deploy.local import LocalCluster
from twinpool.errors import ConfigError


def cluster(prefill: int = 2, decode: int = 1, both: int = 0, ranks: tuple[int, int] = (1, 1), **worker: Any) -> Any:
    pools = {
        "prefill": {"workers": prefill, "tensor_parallel": ranks[0]},
        "decode": {"workers": decode, "tensor_parallel": ranks[1]},
        "both": {"workers": both},
    }
    return ClusterConfig.model_validate({"pools": pools, "worker": worker})


def nobody_asks() -> int:
    raise AssertionError("nothing depends on it")


def test_each_rank_gets_a_gpu_of_its_own() -> None:
    config = cluster(2, 1, 1, (2, 4), device="cuda")
    assert deal(config, lambda: 9) == {
        "prefill-0": "cuda:0", "prefill-1": "cuda:2", "decode-0": "cuda:4", "both-0": "cuda:8",
    }  # fmt: skip
    assert list(worker_names(config)) == list(deal(config, lambda: 9))


def test_too_few_gpus() -> None:
    with pytest.raises(ConfigError, match=r"the pools have 6, torch sees 5\. Start fewer workers"):
        deal(cluster(2, 1, ranks=(1, 4), device="cuda"), lambda: 5)


def test_on_cpus_nobody_asks_for_gpus() -> None:
    assert deal(cluster(device="cpu"), nobody_asks) == {}


def test_a_gpu_that_is_named_is_shared_by_parts() -> None:
    assert deal(cluster(device="cuda:1", kv_memory_mib=64), nobody_asks) == {}
    assert deal(cluster(1, 0, device="cuda:1"), nobody_asks) == {}
    with pytest.raises(ConfigError, match=r"3 workers share cuda:1, .* worker\.kv_memory_mib"):
        deal(cluster(device="cuda:1"), nobody_asks)


@pytest.mark.skipif(visible_gpus() > 2, reason="there are GPUs enough")
def test_up_says_so_before_it_starts_anything() -> None:
    with pytest.raises(ConfigError, match="torch sees"):
        LocalCluster(cluster(device="cuda"), lambda process, line: None)
