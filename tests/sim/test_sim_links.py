"""Links: what the formula of the module's docstring says, on cases that can be done by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twinpool.sim.links import Links

Transfers = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 1000), st.floats(0.0, 5.0)), max_size=30
)


def test_idle_links_move_at_the_speed_of_the_slower_one() -> None:
    links = Links([100.0, 50.0])
    assert links.book(0, 1, 100, 3.0) == 5.0


def test_what_shares_an_end_waits_and_what_does_not_goes_on() -> None:
    links = Links([100.0] * 4)
    assert links.book(0, 1, 100, 0.0) == 1.0
    assert links.book(0, 2, 100, 0.5) == 2.0  # behind the first at the sender
    assert links.book(3, 2, 50, 0.5) == 2.0  # the receiver is busy to 1.5 only: nothing is reserved for later
    assert links.book(3, 1, 100, 4.0) == 5.0


def test_a_link_that_moves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="worker 1"):
        Links([1.0, 0.0])


@given(Transfers)
def test_nothing_is_faster_than_its_links_nor_earlier_than_what_came_before(
    transfers: list[tuple[int, int, int, float]],
) -> None:
    links = Links([100.0, 200.0, 400.0])
    now, carried = 0.0, [0.0] * 3
    for sender, receiver, nbytes, pause in transfers:
        now += pause
        done = links.book(sender, receiver, nbytes, now)
        for end in {sender, receiver}:
            carried[end] += nbytes / (100.0 * 2**end)
        assert done >= now + nbytes / (100.0 * 2 ** min(sender, receiver)) - 1e-9
        assert done <= now + max(carried) + 1e-9
