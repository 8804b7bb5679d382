"""The repository's shape: links, the map, the README's commands, nothing of the machine it was written on."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

LINKS = ("router", "workers", "proto", "kernels", "sim", "deploy")
MAP_LINES = 100
COMMANDS = ("make demo", "make serve")

FILE = re.compile(r"(?<![\w*./{}:-])[\w.{},/-]*[\w}]\.(?:py|proto|md|yaml|yml|json|sh|toml|txt)\b(?!\.)")
FOLDER = re.compile(r"(?<![\w*./{}:-])(?:[\w.{},-]+/)+(?![\w*{.<])")
MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:root|home|Users|work)/(?!twinpool\b)\w+")


def expand(pattern: str) -> list[str]:
    """Names meant by ``policy/{base,order}.py``."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [piece.split(",") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ["".join(combination) for combination in itertools.product(*choices)]


def named_paths(text: str) -> set[str]:
    """Every file and every folder (with its closing slash) that a text names."""
    found = itertools.chain(FILE.findall(text), FOLDER.findall(text))
    return {name for pattern in found for name in expand(pattern)}


def missing(names: set[str], files: list[str]) -> list[str]:
    """Names that are neither a file, nor a folder, nor the end of the path of one."""
    known = "\n".join(f"/{file}" for file in files) + "\n"
    return sorted(name for name in names if f"/{name}{'' if name.endswith('/') else chr(10)}" not in known)


def test_links_lead_to_the_folders_at_the_root(root: Path) -> None:
    for name in LINKS:
        link = root / "src" / "twinpool" / name
        advice = f"src/twinpool/{name} is not a link: `git config core.symlinks true`, then check out again"
        assert link.is_symlink(), advice
        assert link.readlink() == Path("../..") / name, advice
        assert link.is_dir(), f"src/twinpool/{name} leads nowhere"


def test_proto_and_kernels_are_namespace_packages(root: Path) -> None:
    for name in ("proto", "kernels"):
        assert not (root / name / "__init__.py").exists(), f"{name}/__init__.py would shadow an installed package"


def test_map_is_short_and_true(root: Path, repository_files: list[Path]) -> None:
    text = (root / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAP_LINES
    files = [path.relative_to(root).as_posix() for path in repository_files]
    files += [f"src/twinpool/{name}/" for name in LINKS]
    assert missing(named_paths(text), files) == []


def test_readme_names_the_two_commands(root: Path) -> None:
    text = (root / "README.md").read_text(encoding="utf-8")
    assert [command for command in COMMANDS if command not in text] == []


def test_test_files_have_names_of_their_own(root: Path, python_files: list[Path]) -> None:
    files = [path for path in python_files if path.is_relative_to(root / "tests")]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_no_path_of_a_machine_is_kept(root: Path, repository_files: list[Path]) -> None:
    found = []
    for path in repository_files:
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(root)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "router/   core.py request.py  policy/{base,order}.py",
            {"router/", "core.py", "request.py", "policy/base.py", "policy/order.py"},
        ),
        ("see `docs/adr/` and https://example.com/page, and/or prefill/decode", {"docs/adr/"}),
        ("proto/  twinpool/v1 *.proto, frames.py", {"proto/", "frames.py"}),
    ],
)
def test_named_paths(text: str, names: set[str]) -> None:
    assert named_paths(text) == names


def test_missing() -> None:
    files = ["router/core.py", "router/policy/base.py"]
    assert missing({"core.py", "policy/", "router/", "policy/base.py"}, files) == []
    assert missing({"ore.py", "policy/order.py", "outer/"}, files) == ["ore.py", "outer/", "policy/order.py"]


def test_machine_path() -> None:
    slash = "/"
    assert MACHINE_PATH.search(f"cd {slash}root{slash}x")
    assert not MACHINE_PATH.search(f"{slash}home{slash}twinpool and https:{slash}{slash}host{slash}home{slash}x")
