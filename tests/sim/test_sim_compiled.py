"""The compiled form (setup.py) of core and simulator: built from a copy of the package, it prints what this one prints.

Other tests run on it too, so: ``TWINPOOL_COMPILE=1 python setup.py build_ext --inplace`` in a copy of the checkout, and
there ``PYTHONPATH=src python -m pytest tests/router tests/property tests/parity tests/sim``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from tests.sim.real_traces import AZURE, MOONCAKE, real_trace

from twinpool.sim.generate import generate
from twinpool.sim.trace_write import write_trace

ROOT = Path(__file__).resolve().parents[2]
SCENARIO = """events:
  - {at_s: 5, worker: d0, what: die}
  - {at_s: 6, worker: p0, what: stall, seconds: 2}
  - {at_s: 15, worker: d0, what: return}
  - {at_s: 20, worker: p1, what: both}
"""


def without_compiler() -> str:
    """Why nothing can be compiled here, or nothing."""
    compiler = os.environ.get("CC", str(sysconfig.get_config_var("CC"))).split()[0]
    header = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        return f"needs the C compiler {compiler}"
    return "" if header.exists() else f"needs {header}"


def run(arguments: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=900
    )


def copy_of_the_package(folder: Path) -> Path:
    """What a build needs, without what an earlier one left; links become folders."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    return folder


def build(folder: Path, **env: str) -> str:
    """Compiles in place; what was said."""
    built = run(["setup.py", "build_ext", "--inplace"], folder, TWINPOOL_COMPILE="1", **env)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return built.stderr


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to import the compiled package from."""
    if problem := without_compiler():
        pytest.skip(problem)
    folder = copy_of_the_package(tmp_path_factory.mktemp("compiled"))
    build(folder)
    return folder / "src"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without compiling: this one may run compiled itself."""
    return copy_of_the_package(tmp_path_factory.mktemp("interpreted")) / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    for kind in ("chat", "agentic"):
        write_trace(generate(kind, requests=400, rate=6.0, seed=3), folder / kind, "twinpool")
    (folder / "scenario").write_text(SCENARIO)
    return folder


def replay(package: Path, folder: Path, arguments: str) -> dict[str, Any]:
    """Of ``twinpool sim replay --json -`` in that folder, with that package."""
    line = ["-c", "from twinpool.cli import app; app()", "sim", "replay", *arguments.split(), "--json", "-"]
    done = run(line, folder, PYTHONPATH=str(package))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def split(value: Any) -> tuple[Any, dict[str, Any]]:
    """Figures, and apart from them what differs from run to run: keys with ``wall``."""
    if isinstance(value, list):
        return [split(each)[0] for each in value], {}
    if not isinstance(value, dict):
        return value, {}
    walls = {key: each for key, each in value.items() if "wall" in key}
    return {key: split(each)[0] for key, each in value.items() if key not in walls}, walls


def same_in_both(interpreted: Path, compiled: Path, folder: Path, arguments: str) -> None:
    one, how = split(replay(interpreted, folder, arguments))
    other, quicker = split(replay(compiled, folder, arguments))
    assert (how["wall_core"], quicker["wall_core"]) == ("interpreted", "compiled")
    assert json.dumps(one) == json.dumps(other)  # the digest is among them


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "arguments",
    [
        "chat",
        "agentic --prefill 1 --decode 3 --speed 3",
        "agentic --scenario scenario",
        "chat --policy dynamo --scenario scenario",
        "agentic --both 3 --slo-itl-ms 30",
    ],
)
def test_both_forms_say_the_same(compiled: Path, interpreted: Path, folder: Path, arguments: str) -> None:
    same_in_both(interpreted, compiled, folder, arguments)


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [MOONCAKE, AZURE])
def test_both_forms_say_the_same_of_real_traffic(compiled: Path, interpreted: Path, name: str) -> None:
    path = real_trace(name)
    same_in_both(interpreted, compiled, path.parent, f"{path.name} --limit 4000")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_without_a_compiler_it_is_built_all_the_same(tmp_path: Path) -> None:
    folder = copy_of_the_package(tmp_path)
    assert "will run interpreted" in build(folder, CC="no-such-compiler")
    assert not list(folder.rglob("*.so"))


def test_nothing_compiled_is_older_than_its_source() -> None:
    """A ``.so`` in the checkout shadows the file beside it: after an edit compile again, or ``make clean``."""
    stale = [
        str(source.relative_to(ROOT))
        for name in ("router", "sim", "workers", "src/twinpool")
        for source in (ROOT / name).rglob("*.py")
        for made in source.parent.glob(f"{source.stem}.*.so")
        if made.stat().st_mtime < source.stat().st_mtime
    ]
    assert stale == []
