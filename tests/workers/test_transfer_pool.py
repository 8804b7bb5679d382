"""Pools: what peers can and cannot do with shared KV memory, and what the checksums see."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import torch
import xxhash

from twinpool.errors import ConfigError
from twinpool.workers.transfer import memory
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import BlockLayout
from twinpool.workers.transfer.pool import DevicePool, HostPool, attach, open_pool


def test_a_peer_reads_what_the_owner_writes() -> None:
    pool = HostPool(3, 4096)
    seen = attach(os.dup(pool.fd), 3, 4096)
    pool.data[2].fill_(7)
    assert (seen[2] == 7).all()
    assert not seen[:2].any()


def test_a_peer_can_neither_write_nor_resize() -> None:
    pool = HostPool(1, 4096)
    with pytest.raises(PermissionError):
        mmap.mmap(pool.fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.ftruncate(pool.fd, 0)
    with pytest.raises(ValueError, match="read-only"):
        attach(os.dup(pool.fd), 1, 4096)[0, 0] = 1


def test_memory_that_could_shrink_under_us_is_not_mapped() -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4096)
    with pytest.raises(ValueError, match="not sealed"):
        attach(fd, 1, 4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_memory_of_another_size_is_not_mapped() -> None:
    pool = HostPool(2, 4096)
    with pytest.raises(ValueError, match="8192 bytes, not 3 blocks of 4096"):
        attach(os.dup(pool.fd), 3, 4096)


def test_the_mapping_outlives_the_pool() -> None:
    pool = HostPool(1, 4096)
    pool.data.fill_(9)
    seen = attach(os.dup(pool.fd), 1, 4096)
    pool.close()
    pool.close()
    del pool
    assert (seen == 9).all()


def test_more_than_the_memory_there_is_names_the_key_to_change() -> None:
    with pytest.raises(ConfigError, match=r"1\.0 TiB .* lower kv_memory"):
        HostPool(1 << 20, 1 << 20)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0)])
def test_an_empty_pool_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        open_pool(*shape)


def test_host_checksum_is_xxh3_of_the_block() -> None:
    pool = HostPool(2, 1000)
    pool.data.copy_(torch.arange(2000).view(2, 1000) % 251)
    sums = [xxhash.xxh3_64_intdigest(bytes(block.tolist())) for block in pool.data]
    assert pool.checksums([0, 1]) == sums
    assert pool.checksum(1) == sums[1]


def test_device_checksum_is_the_weighted_sum_of_words() -> None:
    pool = DevicePool(2, 64, "cpu")
    pool.data.random_(0, 256)
    words = np.frombuffer(pool.data[1].numpy().tobytes(), dtype="<u8")
    assert pool.checksum(1) == sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**64


def test_device_checksum_sees_a_changed_byte_and_changed_places() -> None:
    pool = DevicePool(1, 64, "cpu")
    pool.data.copy_(torch.arange(64).view(1, 64))
    whole = pool.checksum(0)
    pool.data[0, 63] ^= 128
    assert pool.checksum(0) != whole
    pool.data.copy_(torch.arange(64).view(8, 8).flip(0).reshape(1, 64))
    assert pool.checksum(0) != whole


@pytest.mark.parametrize("size", [1, 64, 128, 200, 1000])
def test_sums_do_not_depend_on_how_many_are_made_at_a_time(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = DevicePool(6, 64, "cpu")
    pool.data.random_(0, 256)
    heads = HeadPool(pool, BlockLayout(lines=2, kv_heads=4, line_bytes=8), range(4), range(4))
    blocks = [5, 0, 3, 1, 2]
    expected = pool.checksums(blocks)
    monkeypatch.setattr("twinpool.workers.transfer.pool.SLICE_BYTES", size)
    assert pool.checksums(blocks) == heads.checksums(blocks) == expected
    assert pool.checksums([]) == heads.checksums([]) == []


def test_device_blocks_pass_through_host_memory() -> None:
    pool = DevicePool(4, 8, "cpu")
    view = pool.incoming(1, 2)
    view[:] = bytes(range(16))
    pool.landed(1, 2, view)
    assert bytes(pool.outgoing(1, 2)) == bytes(range(16))
    assert not pool.data[[0, 3]].any()


def test_device_blocks_are_made_of_words() -> None:
    with pytest.raises(ValueError, match="64-bit words"):
        DevicePool(1, 12, "cpu")


def test_available_memory_is_positive() -> None:
    assert memory.available_bytes() > 1 << 20


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (2048, "2.0 KiB"), (94 << 20, "94.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert memory.format_bytes(count) == text
