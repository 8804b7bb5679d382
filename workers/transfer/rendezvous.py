"""torch's rendezvous over a KV channel."""

from __future__ import annotations

import struct
from datetime import timedelta

import torch._C._distributed_c10d as c10d

from twinpool.errors import TransferError
from twinpool.workers.transfer.channel import Channel

_ITEM = struct.Struct("<HH")  # lengths of a store's key and value
_MAX_KEY, _MAX_VALUE = 256, 8192


class ChannelStore(c10d.Store):
    """A store of two over a KV channel that nobody else uses meanwhile: what one end sets, the other can get.

    Once the group stands the channel carries requests: :meth:`seal` keeps torch's threads, which may write down what
    went wrong long after, off it.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel: Channel | None = channel
        self._items: dict[str, bytes] = {}

    def seal(self) -> None:
        """Say and hear nothing any more."""
        self._channel = None

    def set(self, key: str, value: str | bytes) -> None:
        """Keep the value and tell the peer."""
        name, data = key.encode(), value.encode() if isinstance(value, str) else value
        self._items[key] = data
        if self._channel is not None:
            self._channel.send(_ITEM.pack(len(name), len(data)), name, data)

    def get(self, key: str) -> bytes:
        """The value, waited for if need be. Raises ``TransferError`` when it does not come in time."""
        while key not in self._items:
            if self._channel is None:
                raise TransferError("the rendezvous is over", reason="NO_CHANNEL")
            key_size, value_size = _ITEM.unpack(self._channel.recv(_ITEM.size))
            if key_size > _MAX_KEY or value_size > _MAX_VALUE:
                raise TransferError("the KV peer sends nonsense", reason="REFUSED")
            name = self._channel.recv(key_size).decode("ascii", "replace")
            self._items[name] = self._channel.recv(value_size)
        return self._items[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are there; the channel's deadline holds."""
        for key in keys:
            self.get(key)
