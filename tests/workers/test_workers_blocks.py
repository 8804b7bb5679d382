"""The block pool: states of a block, prefix cache, eviction order, events, integrity."""

import pytest

from twinpool.workers.blocks import NO_HASH, BlockPool, IntegrityError


def sealed(pool: BlockPool, hashes: list[int]) -> list[int]:
    """A referenced, sealed chain of blocks."""
    table, held = pool.book(hashes, len(hashes))
    for index in range(held, len(hashes)):
        table[index] = pool.seal(table[index], hashes[index])
    return table


def cache(pool: BlockPool, hashes: list[int]) -> None:
    pool.release(sealed(pool, hashes))


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        BlockPool(0, 16)
    with pytest.raises(ValueError, match="blocks of 0"):
        BlockPool(4, 0)


def test_allocate_gives_distinct_blocks_until_none_is_free() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert pool.free_blocks == 1
    assert not pool.can_allocate(2)
    with pytest.raises(ValueError, match="2 blocks wanted, 1 free"):
        pool.allocate(2)
    assert pool.can_allocate(1)
    pool.check_integrity([blocks])


def test_blocks_that_are_not_sealed_are_free_after_release() -> None:
    pool = BlockPool(4, 16)
    pool.release(pool.allocate(4))
    assert pool.free_blocks == 4
    assert pool.cached_blocks == 0
    pool.check_integrity([])


def test_sealed_blocks_stay_cached_and_are_found_by_their_prefix() -> None:
    pool = BlockPool(4, 16)
    table = sealed(pool, [11, 12, 13])
    pool.release(table)
    assert pool.free_blocks == 4
    assert pool.cached_hashes() == [11, 12, 13]
    assert pool.match([11, 12, 99, 13]) == 2
    assert pool.match([12, 13]) == 2  # the caller's hashes are chained, so this is another prompt
    assert pool.match([99]) == 0
    assert pool.acquire([11, 12, 99]) == table[:2]
    assert pool.free_blocks == 2
    pool.check_integrity([table[:2]])


def test_a_shared_block_is_idle_only_after_its_last_release() -> None:
    pool = BlockPool(2, 16)
    table = sealed(pool, [1])
    assert pool.acquire([1]) == table
    pool.release(table)
    assert pool.free_blocks == 1
    pool.check_integrity([table])
    pool.release(table)
    assert pool.free_blocks == 2


def test_eviction_starts_at_the_tail_of_the_oldest_visit() -> None:
    pool = BlockPool(5, 16)
    cache(pool, [1, 2, 3])
    cache(pool, [11, 12])
    pool.acquire([1])
    pool.release(pool.acquire([1])[:1])  # still referenced above: no new visit
    assert pool.drain_events().stored == [1, 2, 3, 11, 12]
    pool.allocate(1)
    assert pool.drain_events() == ([], [3])
    pool.allocate(2)
    assert pool.drain_events() == ([], [2, 12])
    pool.check_integrity()


def test_a_new_visit_makes_a_prefix_the_youngest() -> None:
    pool = BlockPool(4, 16)
    cache(pool, [1, 2])
    cache(pool, [11, 12])
    pool.release(pool.acquire([1, 2]))
    pool.allocate(3)
    assert pool.drain_events().removed == [12, 11, 2]
    assert pool.match([1]) == 1


def test_booking_takes_the_cached_prefix_and_never_evicts_it() -> None:
    pool = BlockPool(4, 16)
    cache(pool, [1, 2])
    pool.allocate(2)
    assert not pool.can_book([1, 2], 3)
    with pytest.raises(ValueError, match="3 blocks wanted, 2 cached, 2 free"):
        pool.book([1, 2], 3)
    assert pool.match([1, 2]) == 2
    assert pool.can_book([1, 2], 2)
    assert pool.can_book([1, 9], 2)  # block 2 goes
    booking = pool.book([1, 9], 2)
    assert booking.held == 1
    assert pool.match([1, 2]) == 1


def test_booking_counts_blocks_in_use_as_no_cost() -> None:
    pool = BlockPool(3, 16)
    table = sealed(pool, [1, 2])
    assert pool.can_book([1, 2], 3)
    assert pool.book([1, 2], 3).table[:2] == table
    assert pool.free_blocks == 0


def test_booking_never_takes_more_than_asked() -> None:
    pool = BlockPool(3, 16)
    cache(pool, [1, 2, 3])
    assert pool.book([1, 2, 3], 2).held == 2
    assert pool.free_blocks == 1


def test_sealing_under_a_known_hash_moves_the_reference_to_the_first() -> None:
    pool = BlockPool(3, 16)
    (first,) = sealed(pool, [1])
    (second,) = pool.allocate(1)
    assert pool.seal(second, 1) == first
    assert pool.free_blocks == 2
    assert pool.cached_blocks == 1
    pool.check_integrity([[first], [first]])
    assert pool.drain_events().stored == [1]


def test_sealing_onto_an_idle_block_takes_it_out_of_the_eviction_order() -> None:
    pool = BlockPool(2, 16)
    (second,) = pool.allocate(1)
    cache(pool, [1])
    block = pool.seal(second, 1)
    assert block != second
    pool.check_integrity([[block]])


def test_sealing_twice_is_harmless_and_under_two_hashes_an_error() -> None:
    pool = BlockPool(2, 16)
    (block,) = pool.allocate(1)
    assert pool.seal(block, 1) == block
    assert pool.seal(block, 1) == block
    with pytest.raises(ValueError, match="another hash"):
        pool.seal(block, 2)
    with pytest.raises(ValueError, match="not referenced"):
        pool.seal(1 - block, 3)


def test_one_release_too_many_is_an_error() -> None:
    pool = BlockPool(2, 16)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often"):
        pool.release(blocks)


def test_sums_live_as_long_as_the_content() -> None:
    pool = BlockPool(1, 16)
    (block,) = sealed(pool, [1])
    assert pool.sums[block] is None
    pool.sums[block] = 77
    pool.release([block])
    assert pool.acquire([1]) == [block]
    assert pool.sums[block] == 77
    pool.release([block])
    assert pool.allocate(1) == [block]
    assert pool.sums[block] is None


def test_events_are_drained_once() -> None:
    pool = BlockPool(1, 16)
    cache(pool, [1])
    pool.allocate(1)
    assert pool.drain_events() == ([1], [1])
    assert pool.drain_events() == ([], [])


def test_check_integrity_names_each_fault() -> None:
    pool = BlockPool(4, 16)
    table = sealed(pool, [1, 2])
    with pytest.raises(IntegrityError, match="1 references, 0 owners") as caught:
        pool.check_integrity([table[:1]])
    assert len(caught.value.faults) == 1
    pool._free.append(pool._free[0])
    pool._free.append(table[0])
    pool._by_hash[9] = table[1]
    with pytest.raises(IntegrityError) as caught:
        pool.check_integrity()
    text = str(caught.value)
    assert "twice in the free list" in text
    assert f"block {table[0]}: 1 references, free True" in text
    assert "hash 9 leads to" in text


def test_check_integrity_finds_an_idle_block_without_hash() -> None:
    pool = BlockPool(1, 16)
    cache(pool, [1])
    pool._hashes[0] = NO_HASH
    with pytest.raises(IntegrityError, match="idle but not sealed"):
        pool.check_integrity()


def test_unsealed_blocks_are_not_found_again_and_not_lost() -> None:
    pool = BlockPool(4, 4)
    table = pool.allocate(3)
    for block, value in zip(table, (11, 12, 13), strict=True):
        pool.seal(block, value)
    pool.drain_events()
    pool.unseal(table[1:])  # still referred to
    assert pool.match([11, 12, 13]) == 1
    assert sorted(pool.drain_events().removed) == [12, 13]
    pool.check_integrity([table])
    pool.release(table)
    pool.unseal(table)  # idle, free, free
    assert (pool.match([11]), pool.free_blocks, pool.cached_blocks) == (0, 4, 0)
    pool.check_integrity([])
