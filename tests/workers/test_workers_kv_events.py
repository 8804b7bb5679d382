"""KvEvents batches: netting, numbering, limits, snapshots."""

from array import array

from twinpool.proto.frames import KvEvents, encode
from twinpool.workers.kv_events import MAX_HASHES, KvEventLog


def column(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]


def content(frame: KvEvents) -> tuple[int, list[int], list[int], bool]:
    return frame.sequence, column(frame.stored), column(frame.removed), frame.reset


def test_changes_become_one_frame_and_are_gone() -> None:
    log = KvEventLog()
    log.record([5, 6], [9])
    assert len(log) == 3
    assert [content(f) for f in log.frames()] == [(0, [5, 6], [9], False)]
    assert len(log) == 0
    assert log.frames() == []


def test_changes_that_undo_each_other_are_not_mentioned() -> None:
    log = KvEventLog()
    log.record([5], [5])  # stored, then evicted
    log.record([], [7])
    log.record([7], [])  # evicted, then stored again
    log.record([8, 8], [8])  # stored, evicted, stored again
    assert [content(f) for f in log.frames()] == [(0, [8], [], False)]


def test_large_batches_are_cut_and_numbered_without_gaps() -> None:
    log = KvEventLog(limit=2)
    log.record([1, 2, 3], [4, 5])
    assert [content(f) for f in log.frames()] == [
        (0, [1, 2], [], False),
        (1, [3], [4], False),
        (2, [], [5], False),
    ]
    log.record([6], [])
    assert [f.sequence for f in log.frames()] == [3]


def test_a_snapshot_starts_from_nothing_and_replaces_what_was_pending() -> None:
    log = KvEventLog(limit=2)
    log.record([1], [2])
    assert [content(f) for f in log.snapshot([1, 3, 4])] == [(0, [1, 3], [], True), (1, [4], [], False)]
    assert log.frames() == []
    assert [content(f) for f in log.snapshot([])] == [(2, [], [], True)]


def test_a_full_frame_is_below_the_frame_limit() -> None:
    log = KvEventLog()
    log.record(range(1 << 61, (1 << 61) + MAX_HASHES), [])
    (frame,) = log.frames()
    assert array("Q", column(frame.stored))[0] == 1 << 61
    assert encode(frame)
