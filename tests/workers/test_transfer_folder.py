"""Socket folders: private, removed at the end, and cleared away after a worker that was killed."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from twinpool.workers.transfer.folder import GRACE_S, PREFIX, PrivateFolder


def aged(folder: Path) -> Path:
    """The folder, last changed longer ago than the grace time."""
    long_ago = time.time() - 2 * GRACE_S
    os.utime(folder, (long_ago, long_ago))
    return folder


def test_a_folder_is_ours_alone_until_removed(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    (folder.path / "kv.sock").touch()
    folder.remove()
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_only_orphans_are_cleared_away(tmp_path: Path) -> None:
    names = [PREFIX + "orphan", PREFIX + "starting", "other"]
    orphan, starting, other = (tmp_path / name for name in names)
    for folder in (orphan, starting, other):
        folder.mkdir()
    (orphan / "kv.sock").touch()
    (tmp_path / (PREFIX + "link")).symlink_to(other)
    living = PrivateFolder(tmp_path)
    for folder in (orphan, other, living.path):
        aged(folder)
    os.utime(tmp_path / (PREFIX + "link"), (0, 0), follow_symlinks=False)
    newcomer = PrivateFolder(tmp_path)
    assert not orphan.exists()
    assert all(folder.exists() for folder in (starting, other, living.path, newcomer.path))
    living.remove()
    newcomer.remove()
