"""Device memory of another process: what a holder says of its pool, and how a receiver maps it.

CUDA exports whole allocations, so what is said is the handle of the segment of torch's allocator that the pool lies in,
and the pool's offset in it. The runtime is called directly: torch's own sharing of storages would add an event and a
counter in shared memory to every share, for memory that here lives as long as its process.

- Opened twice in one process, a handle gives the same address and counts. CUDA cannot open one of its own process: that
  is looked up here.
- GPUs have other numbers in other processes: the UUID tells which one it is. On another GPU than ours the memory is
  mapped into our own one's address space, where both can reach each other.
- Segments that can grow (``expandable_segments``) have no such handle: ``TransferError``, and the next backend's turn.
- A holder that ends takes its handle with it; what is mapped stays until it is closed. Its channel tells of its end.

Written after CUDA's and torch's documentation, and not run on GPUs by the authors.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch

from twinpool.errors import TransferError

MOST_SAID = 1024  # bytes that a share may take on the wire

_HANDLE_BYTES = 64
_SAID = struct.Struct(f"<40sQ{_HANDLE_BYTES}s")  # the GPU's UUID, offset of the pool in its segment, handle of that
_LAZY_ENABLE_PEER_ACCESS = 1


class Mapped(NamedTuple):
    """A peer's pool: uint8 [bytes], not to be written to, valid until ``close`` is called (once)."""

    memory: torch.Tensor
    close: Callable[[], None]


class Share(Protocol):
    """One kind of memory that processes can share."""

    def export(self, memory: torch.Tensor) -> bytes:
        """What a peer needs to map ``memory``. Raises ``TransferError`` where it cannot be shared."""
        ...

    def open(self, said: bytes, size: int, device: torch.device) -> Mapped:
        """Map a peer's ``size`` bytes for ``device``. Raises ``TransferError``."""
        ...


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class CudaShare:
    """CUDA IPC."""

    def __init__(self) -> None:
        self._own: WeakValueDictionary[bytes, torch.Tensor] = WeakValueDictionary()  # what this process has exported

    def export(self, memory: torch.Tensor) -> bytes:
        """See :class:`Share`."""
        base = _segment(memory)
        handle = _Handle()
        with torch.cuda.device(memory.device):
            _call("cudaIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(base))
        said = _SAID.pack(_uuid(memory.device), memory.data_ptr() - base, bytes(handle))
        self._own[said] = memory
        return said

    def open(self, said: bytes, size: int, device: torch.device) -> Mapped:
        """See :class:`Share`."""
        own = self._own.get(said)
        if own is not None:
            return Mapped(own.view(-1), lambda: None)
        if len(said) != _SAID.size:
            raise TransferError(f"a CUDA share of {len(said)} bytes, not {_SAID.size}", reason="REFUSED")
        uuid, offset, handle = _SAID.unpack(said)
        _check_reach(uuid, device)
        base = ctypes.c_void_p()
        with torch.cuda.device(device):  # not the peer's GPU: it is ours that has to reach the memory
            segment = _Handle.from_buffer_copy(handle)
            _call("cudaIpcOpenMemHandle", ctypes.byref(base), segment, _LAZY_ENABLE_PEER_ACCESS)

        def close() -> None:
            with torch.cuda.device(device):
                _call("cudaIpcCloseMemHandle", base)

        try:
            return Mapped(torch.as_tensor(_Array((base.value or 0) + offset, size)), close)
        except RuntimeError as error:
            close()
            raise TransferError(f"CUDA IPC: torch does not take the memory: {error}", reason="REFUSED") from error


class _Array:
    """Device memory as torch takes it over: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 3,
        }  # fmt: skip


def _segment(memory: torch.Tensor) -> int:
    """Address of the allocation that ``memory`` lies in. Raises ``TransferError`` where it cannot be exported."""
    address = memory.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            if segment.get("is_expandable"):
                raise TransferError("CUDA IPC cannot share expandable_segments of torch's allocator", reason="REFUSED")
            return int(segment["address"])
    raise TransferError("CUDA IPC: the KV pool is not in torch's own allocator", reason="REFUSED")


def _uuid(device: torch.device | int) -> bytes:
    return str(torch.cuda.get_device_properties(device).uuid).encode()


def _check_reach(uuid: bytes, device: torch.device) -> None:
    """Raises ``TransferError`` when ``device`` cannot reach the memory of the GPU of that UUID."""
    name = uuid.rstrip(b"\x00")
    index = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == name), None)
    if index is None:
        said = name.decode("ascii", "replace")
        raise TransferError(f"this process does not see the KV peer's GPU {said}", reason="REFUSED")
    if index != device.index and not torch.cuda.can_device_access_peer(device, index):
        raise TransferError(f"{device} cannot reach the memory of GPU {index}, the KV peer's", reason="REFUSED")


@cache
def _runtime() -> ctypes.CDLL:
    """The CUDA runtime that torch has loaded. Raises OSError."""
    library = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
    library.cudaIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), ctypes.c_void_p]
    library.cudaIpcOpenMemHandle.argtypes = [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint]
    library.cudaIpcCloseMemHandle.argtypes = [ctypes.c_void_p]
    library.cudaGetErrorString.argtypes = [ctypes.c_int]
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _call(name: str, *arguments: object) -> None:
    """Call the runtime. Raises ``TransferError``; torch does not hear of the error."""
    try:
        library = _runtime()
    except OSError as error:
        raise TransferError(f"CUDA IPC: torch's CUDA runtime cannot be called: {error}", reason="REFUSED") from error
    code = getattr(library, name)(*arguments)
    if code:
        library.cudaGetLastError()
        text = library.cudaGetErrorString(code).decode("ascii", "replace")
        raise TransferError(f"CUDA IPC: {name}: {text}", reason="REFUSED")


SHARES: dict[str, Share] = {"cuda": CudaShare()}
