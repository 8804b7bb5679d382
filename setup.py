"""The compiled form of the decision core and the simulator. All else about the package is in pyproject.toml.

Off unless ``TWINPOOL_COMPILE=1`` is set, and never needed: mypyc makes C of the very files listed here, and what they
decide is the same to the last bit. It needs what ``.[dev]`` brings (mypy reads all types) and a C compiler:

    TWINPOOL_COMPILE=1 pip install --no-build-isolation .

Without a C compiler the build goes on, and what it makes is interpreted. In an editable install (``-e``) edits of the
listed files have no effect until it is compiled again or ``make clean`` removed the ``.so`` files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError

COMPILED = [  # below src/twinpool
    *(f"router/{name}" for name in ("admission", "attempt", "core", "demand", "events", "fair", "kv_index", "line")),
    *(
        f"router/{name}"
        for name in ("fetch", "lengths", "move", "pace", "pool", "record", "request", "state", "worker")
    ),
    *(f"router/policy/{name}" for name in ("base", "candidates", "decode_wait", "fetch", "large_pool")),
    *(f"router/policy/{name}" for name in ("least_seconds", "orders", "price")),
    *(f"sim/{name}" for name in ("decode", "kv_feed", "links", "loop", "members", "memory", "prompts", "record")),
    *(f"sim/{name}" for name in ("seats", "sequence", "steps", "worker")),
    *(f"workers/{name}" for name in ("chunks", "eviction", "pace", "preemption")),
    "cost_grid",
]
FLAGS = ["-ffp-contract=off"]  # a fused multiply-add rounds once where the interpreter rounds twice


class AllOrNothing(build_ext):
    """Compiled modules find each other in one library, so where one cannot be built none is of use."""

    def build_extensions(self) -> None:
        """Goes on without the extensions where the compiler is not there or fails."""
        try:
            super().build_extensions()
        except (BaseError, CompileError, LinkError) as error:
            print(f"twinpool is not compiled, it will run interpreted: {error}", file=sys.stderr)
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = []


def extensions() -> list[Extension]:
    """C of the listed files; ends the build where mypy finds an error in them."""
    try:
        from mypyc.build import mypycify
    except ImportError:
        sys.exit("TWINPOOL_COMPILE=1 needs mypy and what it reads: pip install -e '.[dev]', then --no-build-isolation")
    found = mypycify([f"src/twinpool/{name}.py" for name in COMPILED], group_name="twinpool", debug_level="0")
    for extension in found:
        extension.extra_compile_args += FLAGS
    return found


if os.environ.get("TWINPOOL_COMPILE", "0") not in ("", "0"):
    setup(ext_modules=extensions(), cmdclass={"build_ext": AllOrNothing})
else:
    setup()
