"""``twinpool sim``, run as its user would: what it prints, where, its exit status, and that it repeats itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.sim.search_traffic import traffic
from typer.testing import CliRunner, Result

from twinpool.cli import app
from twinpool.router.policy.registry import DEFAULT, POLICIES
from twinpool.sim.generate import generate
from twinpool.sim.profiles import profile_names
from twinpool.sim.readers import read_trace
from twinpool.sim.replay import replay
from twinpool.sim.search import nearest, speed_of, trial
from twinpool.sim.settings import Settings
from twinpool.sim.trace import limit, speed, spread
from twinpool.sim.trace_write import write_trace

SMALL = ("--prefill", "1", "--decode", "1")


def sim(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sim", *map(str, arguments)])


def figures(result: Result) -> dict[str, Any]:
    """Of ``--json -``: nothing else is on stdout."""
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def timeless(value: Any) -> Any:
    """Without what depends on the machine."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if "wall" not in key}
    return [timeless(each) for each in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small traces: ``open`` without hash ids, ``chat`` in closed loops, ``grid`` with quantised stamps."""
    folder = tmp_path_factory.mktemp("traces")
    write_trace(traffic(80), folder / "open.jsonl", "twinpool")
    write_trace(generate("chat", requests=80, rate=4.0, seed=3), folder / "chat.jsonl", "twinpool")
    lines = [
        f'{{"timestamp": {3000 * (i // 5)}, "input_length": {600 + i}, "output_length": 9, "hash_ids": [0, {i + 1}]}}\n'
        for i in range(60)
    ]
    (folder / "grid.jsonl").write_text("".join(lines))
    return folder


# --- replay ----------


def test_replay_as_json(folder: Path, tmp_path: Path) -> None:
    found = figures(sim("replay", folder / "open.jsonl", "--json", "-"))
    wanted = {
        "requests", "completed", "refused", "wall_s", "requests_per_wall_s", "attainment", "goodput_rps", "ttft_ms",
        "itl_ms", "e2e_ms", "cached_token_share", "digest", "trace", "notices",
    }  # fmt: skip
    assert wanted <= set(found)
    for name in ("ttft_ms", "itl_ms", "e2e_ms"):
        assert {"mean", "p50", "p90", "p99"} <= set(found[name])
    trace, _ = read_trace(folder / "open.jsonl")
    assert timeless(found) == timeless(
        {**json.loads(json.dumps(replay(trace, Settings()).summary())), "trace": "open", "notices": []}
    )
    assert found["wall_s"] > found["wall_load_s"] > 0
    file = tmp_path / "figures.json"
    shown = sim("replay", folder / "open.jsonl", "--json", file)
    assert "80 completed" in shown.stdout
    assert timeless(json.loads(file.read_text())) == timeless(found)


def test_replay_takes_its_flags(folder: Path) -> None:
    found = figures(
        sim(
            "replay", folder / "open.jsonl", "--prefill", 2, "--decode", 3, "--both", 1, "--profile",
            "h100_sxm/llama-3.1-8b/tp1", "--policy", "sglang_cache_aware", "--speed", 2, "--limit", 50, "--slo-ttft-ms",
            400, "--slo-ttft-factor", 3, "--slo-itl-ms", 30, "--chunk-tokens", 1024, "--json", "-",
        )
    )  # fmt: skip
    trace, _ = read_trace(folder / "open.jsonl")
    settings = Settings(
        prefill=2, decode=3, both=1, profile="h100_sxm/llama-3.1-8b/tp1", policy="sglang_cache_aware", ttft_s=0.4,
        ttft_factor=3.0, itl_s=0.03, chunk_tokens=1024,
    )  # fmt: skip
    assert found["digest"] == replay(speed(limit(trace, 50), 2.0), settings).digest
    assert found["slo"] == {"ttft_ms": 400.0, "ttft_factor": 3.0, "itl_ms": 30.0}
    assert (found["requests"], found["gpus"]) == (50, 6)


def test_replay_takes_errors(folder: Path) -> None:
    flags = ("--prefill-error", 0.1, "--output-error", 0.5, "--kv-delay-ms", 500, "--kv-loss", 0.01, "--seed", 4)
    found = figures(sim("replay", folder / "chat.jsonl", *flags, "--json", "-"))
    trace, _ = read_trace(folder / "chat.jsonl")
    settings = Settings(prefill_error=0.1, output_error=0.5, kv_delay_s=0.5, kv_loss=0.01, error_seed=4)
    assert found["digest"] == replay(trace, settings).digest
    assert found["settings"]["kv_loss"] == 0.01
    compared = figures(sim("compare", folder / "chat.jsonl", "--policy", "least_seconds", *flags, "--json", "-"))
    assert compared["runs"][0]["digest"] == found["digest"]


def test_errors_change_a_capacity_and_leave_no_bound(folder: Path) -> None:
    flags = ("--prefill", 1, "--decode", 1, "--target", 0.9, "--processes", 1, "--json", "-")
    plain = figures(sim("capacity", folder / "open.jsonl", *flags))
    wrong = figures(sim("capacity", folder / "open.jsonl", *flags, "--prefill-error", 1.0))
    assert plain["bound"] is not None
    assert wrong["bound"] is None
    assert wrong["share_of_bound"] is None
    assert wrong["capacity"] < plain["capacity"]


def test_an_error_that_is_none_is_refused(folder: Path) -> None:
    for flags in (("--kv-loss", 1.5), ("--prefill-error", 9)):
        assert sim("replay", folder / "open.jsonl", *flags).exit_code != 0


def test_both_alone_means_no_others(folder: Path) -> None:
    found = figures(sim("replay", folder / "open.jsonl", "--both", 3, "--policy", "colocated", "--json", "-"))
    assert [worker["roles"] for worker in found["workers"]] == ["prefill+decode"] * 3
    assert found["completed"] == 80


def test_replay_of_a_yaml_with_flags_on_top(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("pools: {prefill: {workers: 1}, decode: {workers: 2}}\nscheduling: {path: split}\n")
    given = figures(sim("replay", folder / "open.jsonl", "-c", config, "--decode", 1, "--json", "-"))
    assert (given["settings"]["prefill"], given["settings"]["decode"]) == (1, 1)
    assert given["settings"]["parameters"] == {"paths": "split", "fetch": "on"}
    assert given["path_share"]["local"] == 0.0
    other = figures(sim("replay", folder / "open.jsonl", "-c", config, "--policy", "dynamo", "--json", "-"))
    assert other["settings"]["parameters"] == {}
    other = figures(sim("replay", folder / "open.jsonl", "--set", "worker.chunk_tokens=256", "--json", "-"))
    assert other["settings"]["chunk_tokens"] == 256


def test_the_seed_reaches_what_is_random(folder: Path) -> None:
    digests = {
        figures(sim("replay", folder / "open.jsonl", "--policy", "random", "--seed", seed, "--json", "-"))["digest"]
        for seed in (0, 1, 2)
    }
    assert len(digests) == 3
    own = figures(sim("replay", folder / "open.jsonl", "--policy", "random", "--param", "seed=2", "--json", "-"))
    assert own["digest"] in digests
    plain = [figures(sim("replay", folder / "open.jsonl", "--seed", seed, "--json", "-")) for seed in (0, 1)]
    assert timeless(plain[0]) == timeless(plain[1])


def test_quantised_stamps_are_told_and_spread(folder: Path) -> None:
    told = sim("replay", folder / "grid.jsonl", "--json", "-")
    assert "notice: " in told.stderr
    assert "--spread-timestamps" in figures(told)["notices"][0]
    found = sim("replay", folder / "grid.jsonl", "--spread-timestamps", "--seed", 5, "--json", "-")
    assert found.stderr == ""
    trace, _ = read_trace(folder / "grid.jsonl")
    assert figures(found)["digest"] == replay(spread(trace, 5), Settings()).digest


def test_a_scenario(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scenario.yaml"
    file.write_text("events:\n  - {at_s: 1, worker: d0, what: stall, seconds: 7}\n")
    found = figures(sim("replay", folder / "open.jsonl", *SMALL, "--scenario", file, "--json", "-"))
    assert found["worst_gap_ms"]["max"] > 5000
    assert found["settings"]["failures"] == [{"at": 1.0, "what": "stall", "worker": "d0", "seconds": 7.0}]


def test_a_prompt_larger_than_any_memory_is_refused_and_told(tmp_path: Path) -> None:
    file = tmp_path / "big.csv"
    rows = "".join(f"2023-11-16 18:15:{46 + i}.6805900,{1000 + 999_999 * (i == 3)},10\n" for i in range(8))
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    shown = sim("replay", file, "--json", "-")
    found = figures(shown)
    assert (found["completed"], found["refused"], found["refusals"]) == (7, 1, {"KV_TOO_SMALL": 1})
    assert "notice: 1 of 8 requests need more KV memory than any worker has" in shown.stderr
    assert found["notices"][0] in shown.stderr
    stuck = sim("capacity", file, "--processes", 1)
    assert stuck.exit_code == 2
    assert "1 of 8 requests are larger than any worker's KV memory" in stuck.stderr


# --- many runs ----------


def test_compare(folder: Path, tmp_path: Path) -> None:
    arguments = ("compare", folder / "open.jsonl", *SMALL, "--processes", 2, "--speed", 2)
    both = sim(*arguments, "--policy", "least_seconds", "--policy", "random", "--seed", 4, "--json", "-")
    runs = figures(both)["runs"]
    assert [run["label"] for run in runs] == ["least_seconds", "random"]
    alone = sim("replay", folder / "open.jsonl", *SMALL, "--speed", 2, "--policy", "random", "--seed", 4, "--json", "-")
    assert runs[1]["digest"] == figures(alone)["digest"]
    paths: list[object] = []
    for name, chunk in (("a", 512), ("b", 4096)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"worker: {{chunk_tokens: {chunk}}}\n")
        paths += ["-c", path]
    configs = figures(sim("compare", folder / "open.jsonl", *paths, "--processes", 1, "--json", "-"))["runs"]
    assert [(run["label"], run["settings"]["chunk_tokens"]) for run in configs] == [("a", 512), ("b", 4096)]


def test_compare_takes_all_policies(folder: Path) -> None:
    shown = sim("compare", folder / "open.jsonl", "--limit", 10, "--processes", 2)
    assert shown.exit_code == 0, shown.stderr
    for name in POLICIES:
        assert name in shown.stdout


def test_capacity(folder: Path) -> None:
    flags = ("--processes", 2, "--target", 0.9, *SMALL)
    found = figures(sim("capacity", folder / "open.jsonl", *flags, "--policy", "vllm_pd", "--json", "-"))
    k = nearest(found["capacity"])
    trace, _ = read_trace(folder / "open.jsonl")
    settings = Settings(prefill=1, decode=1, policy="vllm_pd")
    assert trial(speed(trace, found["capacity"]), settings).attained >= 0.9
    assert trial(speed(trace, speed_of(k + 1)), settings).attained < 0.9
    assert found["bound"] >= found["capacity"]
    assert found["share_of_bound"] == found["capacity"] / found["bound"]
    assert found["requests_per_s"] == pytest.approx(found["capacity"] * 80 / trace.duration_s)
    shown = sim("capacity", folder / "chat.jsonl", *flags)
    assert "no policy can do more than" in shown.stdout
    assert "1 prefill + 1 decode" in shown.stdout


def test_tune(folder: Path) -> None:
    arguments = ("tune", folder / "open.jsonl", "--gpus", 9, "--target", 0.9, "--processes", 2, "--limit", 40)
    found = figures(sim(*arguments, "--json", "-"))
    assert (found["prefill"], found["decode"], found["gpus"]) == (1, 1, 9)
    assert found["capacity"] > 0
    assert {"cost_per_million_tokens", "tokens_per_joule", "neighbours", "analytic", "chunk_tokens"} <= set(found)
    shown = sim(*arguments)
    assert "1 prefill + 1 decode of h100_sxm" in shown.stdout
    for each in found["neighbours"]:
        least = f"by {max(0.0, 100 * each['margin_at_least']):.1f}"
        far = each["margin_at_most"] is None
        assert least + (" % or more" if far else f" to {max(0.0, 100 * each['margin_at_most']):.1f} %") in shown.stdout
    assert found["neighbours"]
    few = sim("tune", folder / "open.jsonl", "--gpus", 7)
    assert few.exit_code == 2
    assert "give --gpus 8 or more" in few.stderr


def test_policies() -> None:
    found = figures(sim("policies", "--json", "-"))
    assert found["default"] == DEFAULT
    assert {each["name"] for each in found["policies"]} == set(POLICIES)
    for each in found["policies"]:
        assert {"name", "summary", "source", "parameters"} <= set(each)
    assert f"{DEFAULT} (default)" in sim("policies").stdout


# --- the same again ----------

SAME = [
    ("replay", "chat.jsonl", "--policy", "least_seconds"),
    ("replay", "grid.jsonl", "--policy", "power_of_two", "--seed", "3", "--spread-timestamps"),
    ("compare", "chat.jsonl", "--policy", "dynamo", "--policy", "preble", "--processes", "2"),
    ("capacity", "open.jsonl", "--target", "0.9", "--processes", "2", "--limit", "40", *SMALL),
    ("policies",),
]


@pytest.mark.parametrize("arguments", SAME, ids=lambda arguments: arguments[0])
def test_other_processes_with_other_hashes_say_the_same(folder: Path, arguments: tuple[str, ...]) -> None:
    said = []
    for seed in ("1", "77"):
        done = subprocess.run(
            [sys.executable, "-m", "twinpool.cli", "sim", *arguments, "--json", "-"],
            cwd=folder, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True,
        )  # fmt: skip
        said.append([line for line in done.stdout.splitlines() if "wall" not in line])
    assert said[0] == said[1]
    assert len(said[0]) > 5


def test_help_does_not_wait_for_the_simulator() -> None:
    program = "import sys, twinpool.cli.sim, twinpool.cli.sim_search; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    for module in ("twinpool.sim.replay", "twinpool.router.core", "twinpool.sim.search", "twinpool.sim.present"):
        assert f"'{module}'" not in done.stdout
    shown = sim("--help")
    for command in ("replay", "compare", "capacity", "tune", "policies"):
        assert command in shown.stdout


# --- mistakes ----------


@pytest.mark.parametrize("command", ["replay", "compare", "capacity", "tune"])
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--policy", "nobody"), f"there are {', '.join(list(POLICIES)[:3])}"),
        (("--profile", "h100_sxm/gpt-9/tp1"), ", ".join(profile_names())),
        (("--json", "nowhere/x.json"), "there is no folder nowhere: create it first"),
        (("--json", "."), "give the name of a file in it"),
    ],
)
def test_mistakes_of_all_commands(folder: Path, command: str, flags: tuple[str, ...], sentence: str) -> None:
    more = ("--gpus", 16) if command == "tune" else ()
    failed = sim(command, folder / "open.jsonl", *flags, *more)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert sentence in failed.stderr
    assert failed.stderr.startswith("twinpool: ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("replay", "open.jsonl", "--param", "paths"), "--param paths: must be NAME=VALUE"),
        (("replay", "open.jsonl", "--param", "=3"), "must be NAME=VALUE"),
        (("replay", "open.jsonl", "--param", "pahts=split"), "has no parameter pahts: did you mean paths?"),
        (("replay", "open.jsonl", "--param", "paths=left"), "paths is one of auto, split, local, not left"),
        (("replay", "open.jsonl", "--policy", "preble", "--param", "x=1"), "policy preble has no parameter x"),
        (("replay", "open.jsonl", "--policy", "nowhere:Policy"), "policy nowhere:Policy cannot be imported"),
        (("replay", "open.jsonl", "--prefill", "0", "--decode", "0"), "a cluster needs at least one worker"),
        (("replay", "open.jsonl", "--decode", "0"), "both pools need one"),
        (("replay", "none.jsonl"), "none.jsonl: cannot be read"),
        (("replay", "empty.csv"), "the file is empty; give a trace with at least one request"),
        (("replay", "wrong.csv"), "wanted are TIMESTAMP, ContextTokens, GeneratedTokens"),
        (("capacity", "wrong.csv"), "columns are a, b"),
        (("replay", "open.jsonl", "--scenario", "bad.yaml"), "events.0.what: Input should be 'die'"),
        (("replay", "open.jsonl", "--scenario", "none.yaml"), "none.yaml: cannot be read"),
        (("replay", "open.jsonl", "-c", "none.yaml"), "none.yaml: cannot be read"),
        (("replay", "open.jsonl", "--set", "worker.chunks=3"), "worker.chunks"),
        (("capacity", "open.jsonl", "--slo-itl-ms", "1", "--processes", "1"), "these workers cannot"),
    ],
)
def test_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], sentence: str) -> None:
    (folder / "empty.csv").touch()
    (folder / "wrong.csv").write_text("a,b\n1,2\n")
    (folder / "bad.yaml").write_text("events:\n  - {at_s: 1, worker: p0, what: explode}\n")
    monkeypatch.chdir(folder)
    failed = sim(*arguments)
    assert (failed.exit_code, failed.stdout) == (2, "")
    assert sentence in failed.stderr
    assert failed.stderr.splitlines()[0].startswith("twinpool: ")


@pytest.mark.parametrize(
    "flags", [("--prefill", "-1"), ("--limit", "0"), ("--speed", "0"), ("--seed", "x"), ("--slo-itl-ms", "0")]
)
def test_values_out_of_range(folder: Path, flags: tuple[str, ...]) -> None:
    failed = sim("replay", folder / "open.jsonl", *flags)
    assert failed.exit_code == 2
    assert flags[0] in failed.stderr
