"""The tokenizer as one zip, made when first asked for, the same bytes each time."""

from __future__ import annotations

import asyncio
import hashlib
import io
import zipfile
from typing import NamedTuple

from twinpool.tokenizer import Tokenizer

CHUNK_BYTES = 512 * 1024
# smg 1.13 looks for the model's config.json here; without one it asks Hugging Face's hub, once for each request, and a
# resolver that does not answer costs 5 s each time.
_CONFIG = {"config.json": b"{}"}
_DATE = (1980, 1, 1, 0, 0, 0)


class Archive(NamedTuple):
    """A zip and the hex digest of all of it."""

    data: bytes
    sha256: str


def pack(files: dict[str, bytes]) -> Archive:
    """Zip ``files`` (name -> content); equal files give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name, _DATE), files[name], zipfile.ZIP_DEFLATED)
    data = buffer.getvalue()
    return Archive(data, hashlib.sha256(data).hexdigest())


class TokenizerArchive:
    """Packs a tokenizer once, in a thread; readers that come meanwhile wait for the same work."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.bos_id = tokenizer.bos_id
        self._tokenizer = tokenizer
        self._packing: asyncio.Task[Archive] | None = None

    async def read(self) -> Archive:
        """The zip."""
        if self._packing is None:
            self._packing = asyncio.create_task(asyncio.to_thread(lambda: pack(_CONFIG | self._tokenizer.files())))
        return await asyncio.shield(self._packing)
