"""Chained hashes of KV blocks: equal hash = equal tokens from the start, in the same model, dtype and tenant salt.

Hashes are ints of 62 bits (they fit a signed 64-bit column). BLAKE2b keyed by the root keeps one tenant from crafting a
block that collides with another's.
"""

from __future__ import annotations

import hashlib
import sys
from array import array

HASH_BITS = 62
_MASK = (1 << HASH_BITS) - 1


def root(fingerprint: str, block_size: int, dtype: str, salt: str) -> bytes:
    """32-byte key of all hashes of one (model, block size, KV dtype, tenant salt)."""
    text = "\x00".join((fingerprint, str(block_size), dtype, salt))
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


def token_bytes(tokens: array[int]) -> bytes:
    """Little-endian uint32 bytes of token ids, the form they have in frames."""
    if sys.byteorder == "big":
        tokens = array("I", tokens)
        tokens.byteswap()
    return tokens.tobytes()


def tokens_from_bytes(data: bytes) -> array[int]:
    """Inverse of :func:`token_bytes`. Raises ValueError when the length is no multiple of 4."""
    tokens = array("I")
    tokens.frombytes(data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


def block_hash(key: bytes, parent: int | None, tokens: bytes) -> int:
    """Hash of one full block (its :func:`token_bytes`) after the block with hash ``parent`` (None: the first)."""
    chain = b"" if parent is None else parent.to_bytes(8, "little")
    digest = hashlib.blake2b(chain + tokens, digest_size=8, key=key).digest()
    return int.from_bytes(digest, "little") & _MASK


def block_hashes(key: bytes, tokens: array[int], block_size: int) -> list[int]:
    """Hashes of all *full* blocks of ``tokens``, first to last."""
    data = token_bytes(tokens)
    size = 4 * block_size
    hashes: list[int] = []
    parent: int | None = None
    for start in range(0, len(data) - size + 1, size):
        parent = block_hash(key, parent, data[start : start + size])
        hashes.append(parent)
    return hashes
