"""Pools: what peers can and cannot do with shared KV memory, and what the checksums see."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest
import torch
import xxhash

from twinpool.errors import ConfigError
from twinpool.kernels.reference import sum_weights
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
    halves = np.frombuffer(pool.data[1].numpy().tobytes(), dtype="<i4")
    weights = sum_weights(8, "cpu").tolist()
    assert pool.checksum(1) == sum(int(half) * weight for half, weight in zip(halves, weights, strict=True)) % 2**64


def test_device_checksum_sees_a_changed_byte_and_changed_places() -> None:
    pool = DevicePool(1, 64, "cpu")
    pool.data.copy_(torch.arange(64).view(1, 64))
    whole = pool.checksum(0)
    pool.data[0, 63] ^= 128
    assert pool.checksum(0) != whole
    pool.data.copy_(torch.arange(64).view(8, 8).flip(0).reshape(1, 64))
    assert pool.checksum(0) != whole


def test_the_host_sums_as_the_device_does() -> None:
    pool = DevicePool(6, 192, "cpu")
    pool.data.random_(0, 256)
    layout = BlockLayout(lines=6, kv_heads=4, line_bytes=8)
    heads = HeadPool(pool, layout, range(4), range(4))
    blocks = [5, 0, 3, 1, 2]
    assert heads.checksums(blocks) == pool.checksums(blocks)
    halves = [heads.part(range(*ends)).checksums(blocks) for ends in ((0, 1), (1, 4))]
    assert [sum(both) % 2**64 for both in zip(*halves, strict=True)] == pool.checksums(blocks)
    assert pool.checksums([]) == heads.checksums([]) == []


def test_blocks_packed_here_are_unpacked_there() -> None:
    layout = BlockLayout(lines=6, kv_heads=4, line_bytes=8)
    slot = torch.zeros(1000, dtype=torch.uint8)
    for make in (HostPool, lambda blocks, size: DevicePool(blocks, size, "cpu")):
        pools = [make(6, 192) for _ in range(2)]
        pools[0].data.random_(0, 256)
        whole = [HeadPool(pool, layout, range(4), range(4)) for pool in pools]
        for source, target in (pools, whole, [pool.part(range(1, 3)) for pool in whole]):
            pools[1].data.zero_()
            source.pack([5, 0, 3], slot)
            assert target.unpack(slot, [1, 4, 2]) == source.checksums([5, 0, 3])
            assert torch.equal(target.data[[1, 4, 2]], source.data[[5, 0, 3]])
            assert not pools[1].data[[0, 3, 5]].any()


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
