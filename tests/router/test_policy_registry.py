"""Policies by name: parameters are checked, sources are named, other packages may bring their own."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from tests.router.policy_cells import ask, cell, placed

from twinpool.errors import ConfigError
from twinpool.router.policy import DEFAULT, POLICIES, LeastSeconds, PolicyInfo, make_policy, policy_names, registry
from twinpool.router.policy.baselines.info import Value

OWN = """
from twinpool.router.policy.baselines.at_arrival import AtArrival
from twinpool.router.policy import Parameter, PolicyInfo

class Last(AtArrival):
    name = "last"
    def __init__(self, back=1):
        self.back = back
    def choose(self, request, workers, stairs, view, now):
        return workers[-self.back]

class Half:
    name, early, by_deadline, rebalances = "half", True, True, False

INFO = PolicyInfo("last", "the last one", "here", "nothing", Last, {"back": Parameter(1, 1, 3, "from the end")})
number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_policies.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_policies", None)


def bring(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Installed packages with these entry points; a name may end in _ to be there twice."""
    found = tuple(EntryPoint(name.rstrip("_"), value, registry.GROUP) for name, value in points.items())
    monkeypatch.setattr(registry, "_entry_points", lambda: found)


# --- built in ----------


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_says_what_it_is(name: str) -> None:
    info = POLICIES[name]
    assert info.name == name == make_policy(name).name
    assert info.summary
    assert info.source
    assert info.left_out
    assert json.loads(json.dumps(info.figures())) == info.figures()
    takes = inspect.signature(info.make).parameters
    assert {key: parameter.default for key, parameter in info.parameters.items()} == {
        key: parameter.default for key, parameter in takes.items()
    }
    for parameter in info.parameters.values():
        assert parameter.help
        if parameter.choices:
            assert parameter.default in parameter.choices
        else:
            assert not isinstance(parameter.default, str)
            assert parameter.low <= parameter.default <= parameter.high


def test_the_table_of_the_plan_is_complete() -> None:
    assert set(POLICIES) == {
        *("least_seconds", "round_robin", "random", "least_requests", "least_tokens", "power_of_two", "session"),
        *("sglang_cache_aware", "lmetric", "dynamo", "llm_d", "aibrix_pd", "preble", "mooncake_conductor", "vllm_pd"),
        "colocated",
    }
    assert policy_names()[0] == DEFAULT
    default = make_policy()
    assert isinstance(default, LeastSeconds)
    assert default.paths == "auto"


def test_policies_share_no_state() -> None:
    view = cell("prefill", "prefill", "decode")
    first, second = make_policy("round_robin"), make_policy("round_robin")
    assert [placed(first, ask(), view).prefill, placed(first, ask(), view).prefill] == [0, 1]
    assert placed(second, ask(), view).prefill == 0


@pytest.mark.parametrize(
    ("name", "parameters", "values"),
    [
        ("least_seconds", {"paths": "split"}, {"paths": "split"}),
        ("dynamo", {"overlap_weight": "2"}, {"overlap_weight": 2.0}),
        ("aibrix_pd", {"prefill_gap": "8", "deviations": 2}, {"prefill_gap": 8, "deviations": 2.0, "decode_gap": 32}),
        ("aibrix_pd", {"prefill_gap": 8.0}, {"prefill_gap": 8}),
        ("random", {"seed": 7}, {"seed": 7}),
    ],
)
def test_parameters(name: str, parameters: dict[str, Value], values: dict[str, Value]) -> None:
    policy = make_policy(name, parameters)
    for key, value in values.items():
        assert getattr(policy, key) == value
        assert type(getattr(policy, key)) is type(value)


@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("dynamoo", {}, "there is no policy dynamoo: did you mean dynamo? there are least_seconds, round_robin"),
        ("x" * 9, {}, "xxxxxxxxx: there are least_seconds"),
        ("dynamo", {"overlap": 1}, "has no parameter overlap: did you mean overlap_weight? it has overlap_weight"),
        ("vllm_pd", {"seed": 1}, "policy vllm_pd has no parameter seed: it has none"),
        ("dynamo", {"overlap_weight": 11}, "overlap_weight is 0 to 10, not 11"),
        ("dynamo", {"overlap_weight": "nan"}, "overlap_weight is 0 to 10, not nan"),
        ("dynamo", {"overlap_weight": "high"}, "overlap_weight is a number, not high"),
        ("lmetric", {"queued": 0.5}, "queued is a whole number, not 0.5"),
        ("least_seconds", {"paths": "both"}, "paths is one of auto, split, local, not both"),
    ],
)
def test_what_is_wrong_is_said(name: str, parameters: dict[str, Value], says: str) -> None:
    with pytest.raises(ConfigError, match="policy") as caught:
        make_policy(name, parameters)
    assert says in caught.value.message


# --- brought along ----------


@pytest.mark.usefixtures("own")
def test_a_class_by_its_import_path() -> None:
    view = cell("prefill", "prefill", "prefill", "decode")
    assert placed(make_policy("own_policies:Last"), ask(), view).prefill == 2
    assert placed(make_policy("own_policies:Last", {"back": "2"}), ask(), view).prefill == 1
    assert placed(make_policy("own_policies:INFO", {"back": 3}), ask(), view).prefill == 0


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("own_policies:First", {}, "cannot be imported"),
        ("no_such_module:First", {}, "cannot be imported"),
        (":First", {}, "cannot be imported"),
        ("own_policies:", {}, "cannot be imported"),
        ("own_policies:number", {}, "neither a class nor a PolicyInfo"),
        ("own_policies:Half", {}, "lacks on_room, decode_for, needs, next_room"),
        ("own_policies:Last", {"front": 1}, "does not take these parameters"),
        ("own_policies:INFO", {"back": 4}, "back is 1 to 3, not 4"),
    ],
)
def test_a_class_that_is_no_policy(name: str, parameters: dict[str, Value], says: str) -> None:
    with pytest.raises(ConfigError, match="policy") as caught:
        make_policy(name, parameters)
    assert says in caught.value.message


@pytest.mark.usefixtures("own")
def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, last="own_policies:INFO", plain="own_policies:Last")
    assert policy_names()[-2:] == ["last", "plain"]
    view = cell("prefill", "prefill", "decode")
    assert placed(make_policy("last", {"back": "2"}), ask(), view).prefill == 0
    assert placed(make_policy("plain"), ask(), view).prefill == 1
    with pytest.raises(ConfigError, match=r"did you mean plain\?"):
        make_policy("plane")


def test_names_that_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, dynamo="own_policies:Last", twice="own_policies:Last", twice_="own_policies:INFO")
    with pytest.raises(ConfigError, match="entry point own_policies:Last names its policy dynamo, which is built in"):
        make_policy("dynamo")
    with pytest.raises(ConfigError, match="two packages bring a policy twice: own_policies:INFO and own_policies:Last"):
        make_policy("twice")
    assert make_policy("lmetric").name == "lmetric"


def test_the_real_entry_points_are_looked_for() -> None:
    assert all(point.group == registry.GROUP for point in registry._entry_points())
    assert isinstance(POLICIES[DEFAULT], PolicyInfo)
