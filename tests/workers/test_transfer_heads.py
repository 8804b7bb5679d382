"""KV moves between workers of any numbers of ranks: each gets its heads byte for byte, and blocks verify whole."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest
import torch

from twinpool.errors import ConfigError, TransferError
from twinpool.kernels.reference import MASK_64
from twinpool.workers.ranks.kv import Identity, RankKv, join_addresses, split_addresses
from twinpool.workers.transfer.base import Peer
from twinpool.workers.transfer.heads import HeadPool
from twinpool.workers.transfer.layout import BlockLayout, held_heads, originals
from twinpool.workers.transfer.pool import DevicePool, HostPool
from twinpool.workers.transfer.service import TransferConfig

BLOCKS = 12
SOURCE, TARGET = [3, 4, 5, 9, 0], [7, 8, 1, 2, 11]
BACKENDS = ("shm", "tcp", "gloo")


class Ranks:
    """All ranks of one worker, in one process."""

    def __init__(self, name: str, layout: BlockLayout, ranks: int, backend: str) -> None:
        self.layout = layout
        self.held = [held_heads(layout.kv_heads, rank, ranks) for rank in range(ranks)]
        self.pools = [
            HeadPool(HostPool(BLOCKS, layout.block_bytes(len(held))), layout, held, held) for held in self.held
        ]
        identity = Identity(name, 1, name.encode().ljust(32))
        config = TransferConfig(backends=(backend,))
        self.kv = [RankKv(pool, rank, ranks, config, identity) for rank, pool in enumerate(self.pools)]
        self.peer = Peer(*identity, addresses={})

    async def start(self, stack: AsyncExitStack) -> None:
        """Listen; ``peer`` is what others need."""
        for kv in self.kv:
            stack.push_async_callback(kv.close)
        self.peer = self.peer._replace(addresses=join_addresses([await kv.start() for kv in self.kv]))

    def fill(self, whole: torch.Tensor) -> None:
        """Write every rank's share of ``whole`` uint8 [blocks, lines, heads, line_bytes]."""
        for pool in self.pools:
            pool.data.copy_(whole[:, :, pool.held.start : pool.held.stop])

    def sums(self, blocks: Sequence[int]) -> list[int]:
        """Of whole blocks."""
        parts = [self.pools[rank].checksums(blocks) for rank in originals(self.layout.kv_heads, len(self.pools))]
        return [sum(column) & MASK_64 for column in zip(*parts, strict=True)]


def whole_blocks(layout: BlockLayout) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    shape = (BLOCKS, layout.lines, layout.kv_heads, layout.line_bytes)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kv_heads", "source", "target"), [(3, 1, 2), (3, 4, 2), (3, 2, 4), (8, 8, 2), (4, 2, 8)])
async def test_every_rank_gets_its_heads(backend: str, kv_heads: int, source: int, target: int) -> None:
    layout = BlockLayout(lines=6, kv_heads=kv_heads, line_bytes=512)
    whole = whole_blocks(layout)
    async with AsyncExitStack() as stack:
        giver, taker = Ranks("giver", layout, source, backend), Ranks("taker", layout, target, backend)
        giver.fill(whole)
        await giver.start(stack)
        for kv in taker.kv:
            stack.push_async_callback(kv.close)
        pulled = await asyncio.gather(*(kv.pull(giver.peer, SOURCE, TARGET, 20.0) for kv in taker.kv))
        for rank, pool in enumerate(taker.pools):
            own = whole[:, :, pool.held.start : pool.held.stop]
            assert torch.equal(pool.data[TARGET], own[SOURCE])
            assert not pool.data[[i for i in range(BLOCKS) if i not in TARGET]].any()
            assert pulled[rank].sums == pool.checksums(TARGET)
            assert pulled[rank].bytes == len(SOURCE) * pool.block_bytes
        assert taker.sums(TARGET) == giver.sums(SOURCE)
        assert {part.backend for part in pulled} == {backend}


def test_a_block_has_one_sum_however_it_is_split() -> None:
    layout = BlockLayout(lines=4, kv_heads=8, line_bytes=64)
    whole = whole_blocks(layout)
    pool = DevicePool(BLOCKS, layout.block_bytes(8), "cpu")
    pool.data.copy_(whole.view(BLOCKS, -1))
    expected = pool.checksums(range(BLOCKS))
    for ranks in (1, 2, 4, 8, 16):
        split = Ranks("any", layout, ranks, "shm")
        split.fill(whole)
        assert split.sums(range(BLOCKS)) == expected
        split.pools[-1].data[5, 3, 0, 7] += 1
        if ranks <= 8:  # else the last rank holds a replica
            found = split.sums(range(BLOCKS))
            assert [block for block in range(BLOCKS) if found[block] != expected[block]] == [5]


@pytest.mark.parametrize("backend", ["shm", "tcp"])
async def test_another_layout_is_refused_by_both_names(backend: str) -> None:
    async with AsyncExitStack() as stack:
        giver = Ranks("giver", BlockLayout(lines=6, kv_heads=4, line_bytes=512), 2, backend)
        await giver.start(stack)
        taker = Ranks("taker", BlockLayout(lines=8, kv_heads=4, line_bytes=512), 2, backend)
        stack.push_async_callback(taker.kv[1].close)
        with pytest.raises(
            TransferError, match=r"blocks are \(6144, 'sum-64', \(2, 4\)\), ours \(8192, 'sum-64', \(2, 4\)\)"
        ):
            await taker.kv[1].pull(giver.peer, SOURCE, TARGET, 20.0)
        taker = Ranks("taker", BlockLayout(lines=6, kv_heads=8, line_bytes=512), 2, backend)
        stack.push_async_callback(taker.kv[1].close)
        with pytest.raises(TransferError, match=r"blocks are \(6144, 'sum-64', \(2, 4\)\), ours .* \(4, 8\)\)"):
            await taker.kv[1].pull(giver.peer, SOURCE, TARGET, 20.0)


async def test_backends_must_agree_on_the_number_of_ranks() -> None:
    layout = BlockLayout(lines=6, kv_heads=4, line_bytes=512)
    async with AsyncExitStack() as stack:
        one, two = Ranks("one", layout, 1, "tcp"), Ranks("two", layout, 2, "tcp")
        await one.start(stack)
        stack.push_async_callback(two.kv[0].close)
        peer = one.peer._replace(addresses={"tcp": one.peer.addresses["tcp"], "shm": "a,b"})
        with pytest.raises(TransferError, match=r"addresses of \[1, 2\] ranks"):
            await two.kv[0].pull(peer, SOURCE, TARGET, 20.0)


def test_addresses_go_rank_by_rank() -> None:
    ranks = [{"shm": "/a", "tcp": "h:1"}, {"shm": "/b", "tcp": "h:2"}]
    joined = join_addresses(ranks)
    assert joined == {"shm": "/a,/b", "tcp": "h:1,h:2"}
    assert split_addresses(Peer("w", 1, b"", joined)) == ranks


def test_lines_must_be_whole_words() -> None:
    layout = BlockLayout(lines=2, kv_heads=2, line_bytes=12)
    with pytest.raises(ConfigError, match="not whole 64-bit words"):
        HeadPool(HostPool(2, layout.block_bytes(2)), layout, range(2), range(2))
    with pytest.raises(ValueError, match="not among"):
        HeadPool(HostPool(2, 64), BlockLayout(2, 4, 16), range(2, 4), range(2, 4)).part(range(1, 3))
