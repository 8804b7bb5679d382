"""Cuts what comes over a link into frames (``frames.py``)."""

from __future__ import annotations

from twinpool.proto.frames import MAX_FRAME


class Splitter:
    """Cuts a byte stream into frame bodies. Feeding more than ``MAX_FRAME`` of one frame raises ValueError."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Bodies completed by ``data``, in order; the rest is kept for the next call."""
        self._buffer += data
        bodies: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= 4:
            size = int.from_bytes(self._buffer[start : start + 4], "little")
            if size > MAX_FRAME:
                raise ValueError(f"frame of {size} bytes is above the limit of {MAX_FRAME}")
            if len(self._buffer) - start - 4 < size:
                break
            bodies.append(bytes(self._buffer[start + 4 : start + 4 + size]))
            start += 4 + size
        del self._buffer[:start]
        return bodies
