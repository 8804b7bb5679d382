"""Settings from a cluster's YAML and from a scenario file: what they say, what is wrong with them, what they do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.sim.search_traffic import traffic

from twinpool.errors import ConfigError
from twinpool.sim.replay import replay
from twinpool.sim.result import COMPLETED
from twinpool.sim.scenario import from_config, with_scenario
from twinpool.sim.settings import DEFAULT_PROFILE, Failure, Settings

CLUSTER = Settings(prefill=2, decode=2)
HEAD = "apiVersion: twinpool/v1\nkind: Scenario\nevents:\n"


def scenario(folder: Path, *events: str, head: str = HEAD) -> Path:
    path = folder / "scenario.yaml"
    path.write_text(head + "".join(f"  - {event}\n" for event in events), encoding="utf-8")
    return path


# --- scenario files ----------


def test_events_become_failures(tmp_path: Path) -> None:
    path = scenario(
        tmp_path, "{at_s: 60, worker: p0, what: die}", "{at_s: 90, worker: p0, what: return}",
        "{at_s: 1.5, worker: d1, what: stall, seconds: 5}", "{at_s: 3, worker: d0, what: both}",
    )  # fmt: skip
    assert with_scenario(CLUSTER, path).failures == (
        Failure(60.0, "die", "p0"),
        Failure(90.0, "return", "p0"),
        Failure(1.5, "stall", "d1", 5.0),
        Failure(3.0, "both", "d0"),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "scenario.yaml: top: Input should be"),
        ("events: [", "scenario.yaml:1: not readable as YAML"),
        ("events: []\nevent: 3\n", "event: Extra inputs are not permitted"),
        ("kind: Cluster\nevents: []\n", "kind: Input should be 'Scenario'"),
        (
            "events:\n  - {at_s: -1, worker: p0, what: die}\n",
            "events.0.at_s: Input should be greater than or equal to 0",
        ),
        ("events:\n  - {at_s: .nan, worker: p0, what: die}\n", "events.0.at_s: Input should be a finite number"),
        ("events:\n  - {at_s: 1, worker: p0, what: explode}\n", "events.0.what: Input should be 'die', 'return'"),
        ("events:\n  - {at_s: 1, worker: p7, what: die}\n", "there is no worker 'p7', only p0, p1, d0, d1"),
        ("events:\n  - {at_s: 1, worker: p0, what: stall}\n", "a stall of p0 needs its length"),
        ("events:\n  - {at_s: 1, at_s: 2, worker: p0, what: die}\n", "at_s is given twice"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match="scenario") as error:
        with_scenario(CLUSTER, scenario(tmp_path, head=text))
    assert sentence in error.value.message


def test_a_scenario_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        with_scenario(CLUSTER, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        with_scenario(CLUSTER, tmp_path)


def test_all_kinds_of_events_end_well(tmp_path: Path) -> None:
    path = scenario(
        tmp_path, "{at_s: 2, worker: p0, what: die}", "{at_s: 4, worker: p0, what: return}",
        "{at_s: 5, worker: d0, what: stall, seconds: 3}", "{at_s: 9, worker: d1, what: die}",
        "{at_s: 10, worker: p1, what: both}", "{at_s: 12, worker: d1, what: return}",
        "{at_s: 15, worker: p1, what: prefill}", "{at_s: 16, worker: d0, what: drain}",
        "{at_s: 16, worker: d0, what: return}", "{at_s: 17, worker: d1, what: die}",
        "{at_s: 17, worker: d1, what: die}", "{at_s: 19, worker: d1, what: return}",
        "{at_s: 9999, worker: p0, what: decode}",
    )  # fmt: skip
    result = replay(traffic(100), with_scenario(CLUSTER, path))
    assert (result.columns.outcome == COMPLETED).all()
    assert result.figures()["refused"] == 0


def test_a_stall_shows_in_the_longest_gap(tmp_path: Path) -> None:
    trace = traffic(60, output=200)
    stalls = [f"{{at_s: 6, worker: {name}, what: stall, seconds: 4}}" for name in ("d0", "d1")]
    calm = replay(trace, CLUSTER).figures()
    stalled = replay(trace, with_scenario(CLUSTER, scenario(tmp_path, *stalls))).figures()
    assert calm["worst_gap_ms"]["max"] < 1000 < 3900 < stalled["worst_gap_ms"]["max"]
    assert stalled["completed"] == 60


def test_a_new_role_takes_work(tmp_path: Path) -> None:
    trace = traffic(80, rate=8.0)
    plain = replay(trace, CLUSTER)
    moved = replay(trace, with_scenario(CLUSTER, scenario(tmp_path, "{at_s: 0, worker: p1, what: decode}")))
    decode = {"plain": set(plain.columns.decode.tolist()), "moved": set(moved.columns.decode.tolist())}
    assert 1 not in decode["plain"]
    assert 1 in decode["moved"]


# --- a cluster's YAML ----------


def test_a_clusters_yaml(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "pools: {prefill: {workers: 3}, decode: {workers: 5}}\n"
        "worker: {engine: emulated, chunk_tokens: 1024, max_batch: 32, block_size: 32, kv_memory_mib: 1}\n"
        "scheduling:\n"
        "  path: split\n"
        "  max_queue: 77\n"
        "  classes: {realtime: {ttft_ms: 700, ttft_factor: 1.5, itl_ms: 40, max_queue_ms: 9000}}\n",
        encoding="utf-8",
    )
    settings = from_config(path, ["pools.both.workers=1"])
    assert settings == Settings(
        prefill=3, decode=5, both=1, parameters={"paths": "split", "fetch": "on"}, ttft_s=0.7, ttft_factor=1.5,
        itl_s=0.04,
        chunk_tokens=1024, max_batch=32, block_size=32, kv_tokens=32 * (1 << 20) // 256, closed_form=True, max_queue=77,
        max_queue_s=9.0,
    )  # fmt: skip


def test_hardware_of_a_yaml() -> None:
    small = from_config(None, ["worker.engine=emulated", "worker.emulated.profile=llama-8b-h100-tp1"])
    assert (small.profile, small.closed_form, small.kv_tokens) == ("h100_sxm/llama-3.1-8b/tp1", True, 0)
    other = from_config(None, ["worker.engine=emulated"], "b200_sxm/qwen3-32b/tp2")
    assert (other.profile, other.closed_form) == ("b200_sxm/qwen3-32b/tp2", False)
    real = from_config(None, ["worker.engine=torch"])
    assert (real.profile, real.closed_form) == (DEFAULT_PROFILE, False)
    with pytest.raises(ConfigError, match="take no time, so there is nothing to simulate: give --profile"):
        from_config(None, ["worker.engine=emulated", "worker.emulated.profile=zero"])
    with pytest.raises(ConfigError, match="worker"):
        from_config(None, ["worker.engin=torch"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prefill": 0, "decode": 0}, "at least one worker"),
        ({"prefill": 3, "decode": 0}, "both pools need one"),
        ({"prefill": -1, "decode": 3}, "at least one worker"),
        ({"itl_s": 0.0}, "itl_s is 0.0: it must be above 0"),
        ({"ttft_s": float("nan")}, "ttft_s is nan"),
        ({"edge_s": -1.0}, "must not be negative"),
    ],
)
def test_settings_that_make_no_cluster(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Settings(**changes)  # type: ignore[arg-type]


def test_the_edge_counts_in_the_first_token_and_in_the_end() -> None:
    trace = traffic(30)
    plain = replay(trace, CLUSTER).figures()
    edged = replay(trace, Settings(prefill=2, decode=2, edge_s=0.25)).figures()
    for key in ("ttft_ms", "e2e_ms"):
        assert edged[key]["mean"] == pytest.approx(plain[key]["mean"] + 250.0)
    assert edged["digest"] == plain["digest"]
