"""The private folder of a worker's Unix socket, and the removal of those that killed workers have left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "twinpool-kv-"
GRACE_S = 60.0  # a younger folder may belong to a worker that has not locked it yet


class PrivateFolder:
    """A new folder of mode 0700, locked for as long as this process lives: a lock that can be had marks an orphan."""

    def __init__(self, parent: Path | None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        remove_orphans(parent)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._fd = _lock(self.path)

    def remove(self) -> None:
        """Remove the folder and what is in it. Idempotent."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1


def remove_orphans(parent: Path) -> None:
    """Remove this user's folders whose owner is dead."""
    for folder in parent.glob(PREFIX + "*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.geteuid() or time.time() - status.st_mtime < GRACE_S:
                continue
            fd = _lock(folder)
        except OSError:  # locked by its owner, or gone, or no folder
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(fd)


def _lock(folder: Path) -> int:
    """Descriptor that holds the lock. Raises OSError when somebody else has it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd
