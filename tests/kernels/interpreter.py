"""A process in which Triton interprets: kernels run on CPU tensors there, and nothing of it reaches other tests.

Triton decides when it is imported whether it compiles or interprets, so a process can do but one of the two.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def start_interpreter() -> ProcessPoolExecutor:
    """One process with TRITON_INTERPRET=1; importing torch and triton there takes a few seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return _started(patch, _prepare)


def start_compiler(cache: Path) -> ProcessPoolExecutor:
    """One process in which triton compiles, for any target and without a device; what it makes stays in ``cache``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        return _started(patch, _nothing)


def _started(patch: pytest.MonkeyPatch, prepare: Any) -> ProcessPoolExecutor:
    patch.syspath_prepend(ROOT)  # what is sent over is found by its name, tests.kernels...
    executor = ProcessPoolExecutor(1, get_context("spawn"), prepare)
    executor.submit(_nothing).result()  # a process takes over environment and path when it starts
    return executor


def _nothing() -> None:
    pass


def _prepare() -> None:
    """Mend what the interpreter of triton 3.6 lacks: loops bounded by tensors with numpy 2.4, and bfloat16 products."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_tensor, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    def wide(handle: Any) -> Any:
        if handle.dtype != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    warnings.simplefilter("error")
