"""Leases: expiry, renewal, lazy deletion."""

import pytest

from twinpool.workers.blocks import IntegrityError
from twinpool.workers.leases import LeaseTable


def test_expired_takes_out_what_ran_out_earliest_first() -> None:
    table = LeaseTable()
    table.grant(1, now=0.0, lease_s=3.0)
    table.grant(2, now=0.0, lease_s=1.0)
    table.grant(3, now=0.0, lease_s=3.0)
    assert table.expired(0.5) == []
    assert table.expired(3.0) == [2, 1, 3]
    assert len(table) == 0
    assert table.expired(9.0) == []


@pytest.mark.parametrize(("lease_s", "expiry"), [(10.0, 11.0), (0.5, 1.5)])
def test_renewal_counts_from_now_longer_or_shorter(lease_s: float, expiry: float) -> None:
    table = LeaseTable()
    table.grant(1, now=0.0, lease_s=5.0)
    assert table.renew(1, now=1.0, lease_s=lease_s)
    assert table.next_expiry() == expiry
    assert table.expired(expiry - 0.1) == []
    assert table.expired(expiry) == [1]


def test_renew_and_release_know_only_what_was_granted() -> None:
    table = LeaseTable()
    assert not table.renew(7, now=0.0, lease_s=1.0)
    assert not table.release(7)
    table.grant(7, now=0.0, lease_s=1.0)
    assert 7 in table
    assert table.release(7)
    assert 7 not in table
    assert table.next_expiry() is None
    assert table.expired(2.0) == []


def test_a_lease_granted_again_after_release_does_not_end_with_the_old_one() -> None:
    table = LeaseTable()
    table.grant(1, now=0.0, lease_s=1.0)
    table.release(1)
    table.grant(1, now=0.5, lease_s=1.0)
    assert table.expired(1.0) == []
    assert table.expired(1.5) == [1]


def test_the_heap_stays_small_under_renewals() -> None:
    table = LeaseTable()
    table.grant(1, now=0.0, lease_s=1.0)
    for tick in range(10_000):
        table.renew(1, now=float(tick), lease_s=1.0)
    assert len(table._heap) < 100
    table.check_integrity()
    assert table.expired(10_000.0) == [1]


def test_check_integrity_finds_a_lease_that_cannot_expire() -> None:
    table = LeaseTable()
    table.grant(1, now=0.0, lease_s=1.0)
    table._heap.clear()
    with pytest.raises(IntegrityError, match="lease 1"):
        table.check_integrity()
