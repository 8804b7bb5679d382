"""The cluster YAML: every mistake is told with file, line, key and what would be right."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from twinpool.config import ClusterConfig, split_address
from twinpool.config_load import Loaded, load, parse_set, schema_text, show, to_yaml
from twinpool.errors import ConfigError

HEAD = "apiVersion: twinpool/v1\nkind: Cluster\n"


def loads(tmp_path: Path, text: str, *sets: str) -> Loaded:
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file, [parse_set(each) for each in sets])


def refusal(tmp_path: Path, text: str, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loads(tmp_path, text, *sets)
    return caught.value.message.replace(f"{tmp_path}/", "")


def test_without_a_file_there_are_defaults() -> None:
    assert load(None).config == ClusterConfig()


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert loads(tmp_path, "").config == ClusterConfig()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("worker: {blok_size: 16}", "worker.blok_size: unknown key; did you mean worker.block_size?"),
        ("worker: {threads: many}", 'worker.threads: expected a whole number of at least 1, got "many"'),
        ("worker: {threads: true}", "worker.threads: expected a whole number of at least 1, got true"),
        ("worker: {device: tpu}", 'worker.device: expected text (cpu, cuda or cuda:N), got "tpu"'),
        (
            "pools: {prefill: {workers: -3}}",
            "pools.prefill.workers: expected a whole number of at least 0 and at most 512, got -3",
        ),
        ("model: {dtype: float16}", 'model.dtype: expected one of float32, bfloat16, got "float16"'),
        ("model: {path: 5}", "model.path: expected text or nothing, got 5"),
        ("worker: 3", "worker: expected a mapping, got 3"),
        ("link: {lease_ms: .nan}", "link.lease_ms: expected a number above 0, got NaN"),
        ("link: {token: 12}", "link.token: expected text of at most 256 characters, got a secret"),
        ("edge: {admin: nowhere}", "edge.admin: an address is HOST:PORT, such as 127.0.0.1:50051"),
        ("edge: {admin: 'h:70000'}", "edge.admin: a port is at most 65535"),
        (
            "scheduling: {classes: {mine: {ttft: 5}}}",
            "scheduling.classes.mine.ttft: unknown key; did you mean scheduling.classes.mine.ttft_ms?",
        ),
        ("a: 1\na: 2", None),
        ("a: [1,\nb: 2", None),
    ],
)
def test_a_mistake_names_file_line_key_and_remedy(tmp_path: Path, line: str, sentence: str | None) -> None:
    message = refusal(tmp_path, HEAD + line)
    assert message.startswith("cluster.yaml:")
    if sentence is not None:
        assert f"cluster.yaml:3: {sentence}" in message.splitlines()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, "worker:\n  threads: x\n  device: y\nzzz: 1\n")
    assert sorted(line.split(": ")[0] for line in message.splitlines()) == [f"cluster.yaml:{n}" for n in (2, 3, 4)]


def test_values_that_contradict_each_other(tmp_path: Path) -> None:
    assert "default_class is 'fast'" in refusal(tmp_path, "scheduling: {default_class: fast}")
    assert "edge.vllm.class is 'fast'" in refusal(tmp_path, "edge: {vllm: {class: fast}}")
    assert "dead_after_ms must be above" in refusal(tmp_path, "link: {dead_after_ms: 100}")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [1,\nb: 2", "cluster.yaml:2: not readable as YAML"),
        ("a: 1\nb: 2\na: 3", "cluster.yaml:3: a is given twice"),
        ("- 1", "cluster.yaml:1: expected a mapping of keys"),
        ("1: 2", "cluster.yaml:1: a key must be text"),
        ("a: &x [*x]", "cluster.yaml: not readable as YAML: nested too deeply"),
        ("x: !!python/object/apply:os.getcwd []", "cluster.yaml:1: "),
    ],
)
def test_what_is_no_configuration(tmp_path: Path, text: str, place: str) -> None:
    assert refusal(tmp_path, text).startswith(place)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ConfigError, match=r"c\.yaml:2: not UTF-8"):
        load(file)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "none.yaml")


def test_sets_win_over_the_file_and_origins_tell(tmp_path: Path) -> None:
    text = HEAD + "worker:\n  threads: 2\n  block_size: 8\n"
    result = loads(tmp_path, text, "worker.threads=3", "worker.emulated.speed=1e-3")
    assert (result.config.worker.threads, result.config.worker.block_size) == (3, 8)
    assert result.config.worker.emulated.speed == 0.001
    assert result.origin("worker.threads") == "--set worker.threads"
    assert result.origin("worker.block_size").endswith("cluster.yaml:5")
    assert result.origin("worker.device") == "default"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("worker.threads", "--set worker.threads: expected any.key=value"),
        ("=3", "--set =3: expected any.key=value"),
        ("worker.thread=3", "--set worker.thread: worker.thread: unknown key; did you mean worker.threads?"),
        ("worker.threads.x=1", "worker.threads: expected a whole number of at least 1, got a mapping"),
    ],
)
def test_a_set_that_is_wrong(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, [parse_set(text)])
    assert sentence in caught.value.message


def test_a_file_written_from_a_config_reads_back(tmp_path: Path) -> None:
    config = loads(tmp_path, "model: {path: /m}", "link.token=secret").config
    assert loads(tmp_path, to_yaml(config)).config == config


def test_show_is_yaml_with_origins_and_no_secret() -> None:
    result = load(None, [parse_set("link.token=secret"), parse_set("worker.threads=2")])
    text = show(result)
    assert "secret" not in text
    shown = yaml.safe_load(text)
    assert shown["link"]["token"] == "***"
    assert {**shown, "link": None} == {**result.config.model_dump(mode="json", by_alias=True), "link": None}
    assert any(line.split("#")[-1].strip() == "--set worker.threads" for line in text.splitlines())


def test_the_committed_schema_is_current(root: Path) -> None:
    committed = (root / "deploy/cluster.schema.json").read_text(encoding="utf-8")
    assert committed == schema_text(), "run: twinpool config schema > deploy/cluster.schema.json"


def test_every_example_is_good(root: Path) -> None:
    examples = sorted((root / "deploy/examples").glob("*.yaml"))
    assert examples
    for example in examples:
        assert not stat.S_IMODE(example.stat().st_mode) & stat.S_IXUSR
        load(example)


@pytest.mark.parametrize(
    ("address", "parts"), [("h:1", ("h", 1)), ("[::1]:80", ("::1", 80)), ("127.0.0.1:0", ("127.0.0.1", 0))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", ":1", "h", "h:", "h:x", "h:65536", "::1:80", "h:-1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"address|port"):
        split_address(address)
