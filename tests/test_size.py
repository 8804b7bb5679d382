"""Files of at most 400 lines, functions of at most 50: no exceptions in code written by hand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 50


def long_functions(source: str) -> Iterator[str]:
    """``name (line, length)`` of each function that is too long, decorators and docstring included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            length = (node.end_lineno or node.lineno) - first + 1
            if length > FUNCTION_LINES:
                yield f"{node.name} (line {first}, {length} lines)"


def test_files_are_short(root: Path, python_files: list[Path]) -> None:
    lengths = {str(path.relative_to(root)): len(path.read_bytes().splitlines()) for path in python_files}
    assert {path: length for path, length in lengths.items() if length > FILE_LINES} == {}


def test_functions_are_short(root: Path, python_files: list[Path]) -> None:
    found = [
        f"{path.relative_to(root)}: {function}"
        for path in python_files
        for function in long_functions(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_long_functions_sees_nested_and_async_ones() -> None:
    body = "\n".join("        pass" for _ in range(FUNCTION_LINES))
    source = f"class A:\n    async def long(self):\n{body}\n    def short(self):\n        pass\n"
    assert list(long_functions(source)) == [f"long (line 2, {FUNCTION_LINES + 1} lines)"]
