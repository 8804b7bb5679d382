"""A folder of derived weight files, safe to share between processes and versions.

Files are written under another name, synced and renamed; a manifest beside each holds the digest of its bytes. Digests
of large files are remembered by the file's identity (path, inode, size, time of change), so that a start hashes only
what changed. Nothing here is trusted: a file that does not match its manifest is made again.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import xxhash

_CHUNK = 1 << 22


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What belongs to one cached file: the digest of its bytes, and whatever its maker wants back."""

    digest: str
    extra: bytes = b""


def default_dir() -> Path:
    """``$XDG_CACHE_HOME/twinpool``, or ``~/.cache/twinpool``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "twinpool"


def digest_file(path: Path) -> str:
    """xxh3-128 of the bytes of ``path``, in hex (seen: over 5 GB/s from the page cache). Raises OSError."""
    state = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


class WeightCache:
    """Derived files in ``folder``. Every method that writes raises OSError where the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def digest(self, path: Path) -> str:
        """Digest of ``path``, remembered while the file stays as it is. Raises OSError where it cannot be read."""
        stat = path.stat()
        identity = f"{path.resolve()}\x00{stat.st_dev}\x00{stat.st_ino}\x00{stat.st_size}\x00{stat.st_mtime_ns}"
        memo = self._folder / "digests" / xxhash.xxh3_128_hexdigest(identity.encode())
        try:
            known = memo.read_text()
        except (OSError, UnicodeDecodeError):
            known = ""
        if len(known) == 32:
            return known
        found = digest_file(path)
        try:
            self._write(memo, lambda tmp: tmp.write_text(found))
        except OSError:
            return found  # an unwritable cache costs time only
        return found

    def get(self, name: str) -> tuple[Path, bytes] | None:
        """Path and extra bytes of a cached file that is whole; None where it is absent or damaged."""
        path = self._folder / name
        try:
            manifest = msgspec.json.decode((self._folder / f"{name}.json").read_bytes(), type=Manifest)
            return (path, manifest.extra) if self.digest(path) == manifest.digest else None
        except (OSError, msgspec.DecodeError):
            return None

    def put(self, name: str, write: Callable[[Path], None], extra: bytes) -> Path:
        """Let ``write`` make the file ``name``; it appears whole or not at all."""
        path = self._folder / name
        self._write(path, write)
        manifest = msgspec.json.encode(Manifest(self.digest(path), extra))
        self._write(self._folder / f"{name}.json", lambda tmp: tmp.write_bytes(manifest))
        return path

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Exclude other processes that make the same file; released by the kernel if this one dies."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        tmp = Path(name)
        try:
            write(tmp)
            with tmp.open("rb") as file:
                os.fsync(file.fileno())
            tmp.replace(path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
