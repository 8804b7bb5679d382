"""When KV has crossed: every worker has one link, and what it sends and receives goes over it one after the other.

The rule, booked when a transfer is asked for and work-conserving (nothing is reserved for later)::

    busy[end] = max(busy[end], now) + bytes / bytes_per_s[end]     for both ends
    done      = max(busy[sender], busy[receiver])

A transfer therefore takes bytes / bytes_per_s of the slower end where both are idle, and waits for whatever its ends
carry already.
"""

from __future__ import annotations

from collections.abc import Sequence


class Links:
    """One link a worker; ``bytes_per_s[worker]`` is its speed, above 0. All times in seconds. Pure."""

    __slots__ = ("_busy", "_bytes_per_s", "sent")

    def __init__(self, bytes_per_s: Sequence[float]) -> None:
        """Raises ValueError where a speed is not above 0."""
        for worker, speed in enumerate(bytes_per_s):
            if not speed > 0.0:
                raise ValueError(f"the link of worker {worker} moves {speed} bytes a second: it must be more than 0")
        self._bytes_per_s = list(bytes_per_s)
        self._busy = [0.0] * len(self._bytes_per_s)
        self.sent = [0] * len(self._bytes_per_s)  # bytes, by sender

    def book(self, sender: int, receiver: int, nbytes: int, now: float) -> float:
        """Put ``nbytes`` on both ends' links; returns when the last byte is there. ``now`` never goes back.

        A worker that sends to itself books its link once.
        """
        self.sent[sender] += nbytes
        done = self._carry(sender, nbytes, now)
        return done if sender == receiver else max(done, self._carry(receiver, nbytes, now))

    def _carry(self, worker: int, nbytes: int, now: float) -> float:
        busy = self._busy[worker]
        done = (now if now > busy else busy) + nbytes / self._bytes_per_s[worker]
        self._busy[worker] = done
        return done
