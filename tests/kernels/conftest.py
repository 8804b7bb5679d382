"""Processes of their own for triton: one that interprets, one that compiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from tests.kernels.interpreter import start_compiler, start_interpreter

Run = Callable[..., object]


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Run]:
    """Calls a function of a test module, with its arguments, where triton interprets."""
    yield from _runs(lambda: start_interpreter())


@pytest.fixture(scope="session")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Calls a function of a test module, with its arguments, where triton compiles."""
    yield from _runs(lambda: start_compiler(tmp_path_factory.mktemp("triton")))


def _runs(start: Callable[[], ProcessPoolExecutor]) -> Iterator[Run]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (Linux only; extra: gpu)")
    with start() as executor:
        yield lambda function, *args: executor.submit(function, *args).result()
