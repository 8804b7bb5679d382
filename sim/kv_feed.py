"""Changes of prefix caches on their way to a router that may miss some of them.

Every message of a worker has a number (``workers/kv_events.py``). The router takes one whose number is the next, and
any that says everything (``reset``). Any other it drops, and asks the worker for everything (``router/dispatch.py``).
So a loss is noticed when the next message comes, and until the answer is there all that come are dropped, each with a
question of its own; meanwhile the router goes on with what it knew. An answer may be lost like any message. However
much is cached, an answer is one message here.
"""

from __future__ import annotations

import random

from twinpool.router import events as ev


class KvFrame:
    """A message. ``life``: of the worker, as counted by the driver; ``number``: -1 before it has left."""

    __slots__ = ("event", "life", "number")

    def __init__(self, life: int, event: ev.KvChanged) -> None:
        self.life = life
        self.event = event
        self.number = -1


class KvFeed:
    """Numbers, losses and gaps; who carries the messages, and when, is the driver's business.

    ``loss``: share of messages that are lost. Which ones follows from ``seed``, the life of the worker and the number
    of the message, never from the order among workers.
    """

    __slots__ = ("_heard", "_loss", "_rngs", "_seed", "_sent", "asked", "dropped", "lost", "sent")

    def __init__(self, loss: float, seed: int) -> None:
        self.sent = 0  # messages that left
        self.lost = 0  # of them, those that never come
        self.dropped = 0  # of them, those that came after a gap
        self.asked = 0  # snapshots that were sent
        self._loss = loss
        self._seed = seed
        self._rngs: dict[int, random.Random] = {}  # by life, as all below
        self._sent: dict[int, int] = {}  # the last number
        self._heard: dict[int, int] = {}  # the last one that the router took

    def leaves(self, frame: KvFrame) -> bool:
        """A worker sends it, and gives it its number; whether it will arrive. What says nothing is never sent."""
        event, life = frame.event, frame.life
        if not (event.stored or event.removed or event.reset):
            return False
        frame.number = self._sent[life] = self._sent.get(life, -1) + 1
        self.sent += 1
        rng = self._rngs.get(life)
        if rng is None:
            rng = self._rngs[life] = random.Random(f"kv {self._seed} {life}")
        if rng.random() < self._loss:
            self.lost += 1
            return False
        return True

    def taken(self, frame: KvFrame) -> bool:
        """It has come; whether the router takes it. If not, it asks for everything."""
        life = frame.life
        if frame.number != self._heard.get(life, -1) + 1 and not frame.event.reset:
            self.dropped += 1
            return False
        self._heard[life] = frame.number
        return True

    def in_step(self, life: int) -> bool:
        """Whether the router has taken the last message that this worker sent."""
        return self._heard.get(life, -1) == self._sent.get(life, -1)
