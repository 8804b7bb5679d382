"""What every test gets: one compute thread, loopback only, marks that need ``--full``; and the summary of a full run.

The model cache of the user stays in use: weights are unpacked once, not once a run.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import pytest

# Before torch is imported, and for the worker processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
OPT_IN_MARKS = ("full", "chaos", "peers")
SUMMARY_PACKAGES = ("twinpool", "torch", "numpy", "grpcio", "protobuf", "msgspec", "transformers", "smg")
SLOWEST = 10


class NetworkBlocked(OSError):
    """A test tried to leave the loopback interface."""


def _is_loopback(host: object) -> bool:
    text = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    return text in ("", "None", "localhost", "::", "::1", "0.0.0.0") or text.startswith(("127.", "::ffff:127."))


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    """Audit hook: sees the connects and look-ups of Python's own sockets; libuv's and gRPC's are not visible to it."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if isinstance(address, tuple) and not _is_loopback(address[0]):
            raise NetworkBlocked(f"tests touch only loopback, not {address[0]}")
    elif event == "socket.getaddrinfo" and not _is_loopback(args[0]):
        raise NetworkBlocked(f"tests touch only loopback, not {args[0]}")


sys.addaudithook(_refuse_network)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help=f"run tests marked {', '.join(OPT_IN_MARKS)} too")
    parser.addoption("--summary", metavar="FILE", type=Path, help="write counts, times and versions to FILE")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--summary")
    if path is not None:
        config.pluginmanager.register(Summary(path), "twinpool-summary")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        for item in items:
            if any(item.get_closest_marker(name) for name in OPT_IN_MARKS):
                item.add_marker(pytest.mark.skip(reason="needs --full"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_gpu():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Summary:
    """Collects the reports of one run and writes them as Markdown, without paths or host names."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, Counter[str]] = {}
        self._seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            file = report.nodeid.split("::")[0]
            outcome = "error" if report.failed and report.when != "call" else report.outcome
            self._outcomes.setdefault(file, Counter())[outcome] += 1

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        lines = ["# Test run", "", *self._header(exitstatus), "", *self._table(), "", *self._slowest()]
        self._path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _header(self, exitstatus: int) -> list[str]:
        total: Counter[str] = sum(self._outcomes.values(), Counter())
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(total.items()))
        versions = ", ".join(f"{name} {_version(name)}" for name in SUMMARY_PACKAGES)
        return [
            f"- Date: {datetime.datetime.now(datetime.UTC).date().isoformat()}",
            f"- Result: exit status {int(exitstatus)}; {counts}; {sum(self._seconds.values()):.0f} s in tests",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Machine: {_machine()}",
        ]

    def _table(self) -> Iterable[str]:
        yield "| file | passed | failed | error | skipped | seconds |"
        yield "|---|---|---|---|---|---|"
        for file, outcomes in sorted(self._outcomes.items()):
            seconds = sum(value for nodeid, value in self._seconds.items() if nodeid.split("::")[0] == file)
            cells = " | ".join(str(outcomes[name]) for name in ("passed", "failed", "error", "skipped"))
            yield f"| {file} | {cells} | {seconds:.1f} |"

    def _slowest(self) -> Iterable[str]:
        yield f"Slowest {SLOWEST}:"
        yield ""
        for nodeid, seconds in sorted(self._seconds.items(), key=lambda item: -item[1])[:SLOWEST]:
            yield f"- {seconds:.1f} s {nodeid}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = "a CUDA device" if _has_gpu() else "no GPU"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB memory, {gpu}"


def _listed(root: Path) -> list[Path]:
    """Files that belong to the repository (tracked, or new and not ignored); a walk where this is no checkout."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, check=False)
    if listing.returncode == 0:
        paths = [root / os.fsdecode(name) for name in listing.stdout.split(b"\0") if name]
    else:
        folders = [folder for folder, _, _ in os.walk(root) if "/." not in folder.removeprefix(str(root))]
        paths = [path for folder in folders for path in Path(folder).iterdir()]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def repository_files() -> list[Path]:
    """Every real file of the repository, as absolute paths; links are left out."""
    return _listed(ROOT)


@pytest.fixture(scope="session")
def python_files(repository_files: list[Path]) -> list[Path]:
    """Every Python file written by hand."""
    generated = ("_pb2.py", "_pb2_grpc.py")
    return [path for path in repository_files if path.suffix == ".py" and not path.name.endswith(generated)]


@pytest.fixture(scope="session")
def module_name() -> Callable[[Path], str]:
    """Import name of a product file: router/core.py is twinpool.router.core, src/twinpool/cost.py is twinpool.cost."""

    def name(path: Path) -> str:
        relative = path.relative_to(ROOT).with_suffix("")
        parts = relative.parts[1:] if relative.parts[0] == "src" else ("twinpool", *relative.parts)
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    return name
