"""The request log: one JSON line a request, to a file and to whoever watches. ``twinpool sim`` replays it.

Lines go to disk from a thread of their own, so that a slow disk never holds up the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

from twinpool.errors import ConfigError

log = logging.getLogger("twinpool.router")

WATCH_BACKLOG = 1024  # lines a slow watcher may fall behind before it loses the oldest


class RequestLog:
    """Writes to ``path`` (appending; None: no file). Use on one event loop."""

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError when the file cannot be opened."""
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._watchers: set[asyncio.Queue[str]] = set()
        self._thread: threading.Thread | None = None
        if path is not None:
            try:
                file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"edge.request_log: cannot write {path} ({error.strerror})") from None
            self._thread = threading.Thread(target=self._run, args=(file,), name="request-log", daemon=True)
            self._thread.start()

    def write(self, line: str) -> None:
        """Add one line (without its newline)."""
        if self._thread is not None:
            self._lines.put(line)
        for watcher in self._watchers:
            if watcher.full():
                watcher.get_nowait()
            watcher.put_nowait(line)

    async def watch(self) -> AsyncIterator[str]:
        """Lines from now on; ends only with its reader."""
        lines: asyncio.Queue[str] = asyncio.Queue(WATCH_BACKLOG)
        self._watchers.add(lines)
        try:
            while True:
                yield await lines.get()
        finally:
            self._watchers.discard(lines)

    def close(self) -> None:
        """Everything written is on disk when this returns. Idempotent."""
        if self._thread is not None:
            self._lines.put(None)
            self._thread.join()
            self._thread = None

    def _run(self, file: TextIO) -> None:
        failing = False
        with contextlib.suppress(OSError), file:  # what a full disk did not take, closing cannot write either
            for line in iter(self._lines.get, None):
                try:
                    file.write(line + "\n")
                    if self._lines.empty():
                        file.flush()
                        failing = False
                except OSError as error:
                    if not failing:
                        log.error("edge.request_log: %s; lines are lost until that is mended", error.strerror)
                    failing = True
