"""One emulated worker: what ``workers/worker.py`` does with the same messages at the same times.

Here are its messages; ``steps.py`` says what is computed when, ``memory.py`` has the blocks. A transfer takes as long
as the links say, what arrives is always right, and leases never run out: the router renews them.
"""

from __future__ import annotations

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.sim.gaps import Runs
from twinpool.sim.memory import Memory
from twinpool.sim.net import Net
from twinpool.sim.sequence import HELD, WAITING, Sequence
from twinpool.sim.steps import Steps


class SimWorker:
    """See the module's docstring. ``unit_tokens``: prompt tokens of one hash, a multiple of ``block_size``; 0: none."""

    __slots__ = ("_block_bytes", "_memory", "_net", "_size", "_steps", "_unit", "_unit_blocks", "id", "runs")

    def __init__(
        self,
        id: int,
        net: Net,
        cost: Cost,
        *,
        blocks: int,
        block_size: int,
        unit_tokens: int,
        block_bytes: int,
        chunk_tokens: int,
        max_batch: int,
    ) -> None:
        """Raises ValueError where a unit is not made of whole blocks, or there is nothing to work with."""
        if min(blocks, block_size, chunk_tokens, max_batch) < 1 or unit_tokens < 0 or unit_tokens % block_size:
            raise ValueError(
                f"a worker needs blocks, chunks and a batch, and units of whole blocks: not {blocks} blocks of "
                f"{block_size} tokens, units of {unit_tokens}, chunks of {chunk_tokens} and a batch of {max_batch}"
            )
        self.id = id
        self.runs = Runs()
        self._net = net
        self._size = block_size
        self._unit = unit_tokens
        self._unit_blocks = unit_tokens // block_size
        self._block_bytes = block_bytes
        self._memory = Memory(id, blocks, self._unit_blocks, net.kv)
        self._steps = Steps(
            id, net, cost, self._memory, self.runs,
            block_size=block_size, chunk_tokens=chunk_tokens, max_batch=max_batch,
        )  # fmt: skip

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody refers to, as of the last thing that happened here."""
        return self._memory.available

    @property
    def cached_units(self) -> int:
        """Units in the prefix cache."""
        return self._memory.cached_units

    # --- what the router says ----------

    def take(self, action: ev.Action, now: float) -> None:
        """A message from the router; those that mean nothing to an emulated worker are ignored."""
        self._memory.now = now
        if isinstance(action, ev.SendPull):
            self._pull(action, now)
        elif isinstance(action, ev.SendPrefill):
            self._prefill(action, now)
        elif isinstance(action, ev.SendReserve):
            self._reserve(action, now)
        elif isinstance(action, ev.SendDecode):
            self._decode(action, now)
        elif isinstance(action, ev.SendRelease | ev.SendCancel):
            self._steps.forget(action.attempt, now)

    def _reusable(self, sequence: Sequence) -> int:
        """Units that may come from the cache or be received into it: the last token is always computed, or moved."""
        if not self._unit:
            return 0
        return min(len(sequence.hashes), (sequence.length - 1) // self._unit)

    def _no_room(self, attempt: int, now: float) -> None:
        self._net.tell(ev.NoRoom(self.id, attempt), now)
        self._steps.report_soon(now)

    def _reserve(self, action: ev.SendReserve, now: float) -> None:
        sequence = Sequence(action.attempt, action.request, action.request.length, HELD)
        sequence.reusable = self._reusable(sequence)
        self._steps.sync(now)
        units = self._memory.book(sequence.hashes, sequence.reusable, action.blocks)
        if units < 0:
            self._no_room(action.attempt, now)
            return
        sequence.blocks = action.blocks
        sequence.sealed = units
        sequence.full = sequence.received = held = units * self._unit_blocks
        self._steps.held[action.attempt] = sequence
        self._steps.taken()
        self._net.tell(ev.Reserved(self.id, action.attempt, held), now)

    def _prefill(self, action: ev.SendPrefill, now: float) -> None:
        request = action.request
        sequence = Sequence(action.attempt, request, request.length, WAITING)
        total = -(-(sequence.length + action.decode) // self._size)
        reusable = self._reusable(sequence)
        reserved = self._steps.held.get(action.attempt)
        more = total
        if reserved is not None:  # it is used up, and its blocks are kept if they can be
            more = max(total, reserved.blocks)
            self._steps.forget(action.attempt, now)
        self._steps.sync(now)
        units = self._memory.book(sequence.hashes, reusable, more)
        if units < 0 and more > total:
            more = total
            units = self._memory.book(sequence.hashes, reusable, more)
        if units < 0:
            self._no_room(action.attempt, now)
            return
        sequence.blocks = more
        sequence.sealed = units
        sequence.full = units * self._unit_blocks
        sequence.cached = sequence.computed = units * self._unit
        sequence.misjudged = sequence.cached != action.cached
        sequence.local = action.decode
        sequence.transfer = action.transfer
        sequence.left = self._net.outputs[request.rid] - request.emitted
        if units and action.transfer:
            self._steps.announce(sequence, now)
        self._steps.add(sequence, now)

    def _pull(self, action: ev.SendPull, now: float) -> None:
        sequence = self._steps.held.get(action.attempt)
        if sequence is None:
            return  # cancelled while the message was under way
        first, count = action.first, len(action.blocks) // 4
        end = first + count
        early = any(first < stop and start < end for start, stop in sequence.early)
        if early or not sequence.received <= first <= end <= sequence.blocks:
            self._net.tell(ev.BlocksBad(self.id, action.attempt, "RANGE"), now)
            return
        nbytes = count * self._block_bytes
        when = self._net.link(action.peer, self.id, nbytes, now)
        self._net.transferred(self.id, action.attempt, first, count, nbytes, now, when)

    def _decode(self, action: ev.SendDecode, now: float) -> None:
        sequence = self._steps.held.get(action.attempt)
        if sequence is None:
            return
        request = action.request
        sequence.length = request.prompt_len + request.emitted
        sequence.left = self._net.outputs[request.rid] - request.emitted
        sequence.expects_decode = True
        self._start_if_here(sequence, now)

    def _start_if_here(self, sequence: Sequence, now: float) -> None:
        if sequence.received * self._size >= sequence.length - 1:
            self._steps.decode(sequence, now)

    # --- what happens ----------

    def wake(self, now: float) -> None:
        """The time that was wished for has come."""
        self._steps.wake(now)

    def pulled(self, attempt: int, first: int, count: int, nbytes: int, seconds: float, now: float) -> None:
        """Blocks ``first``.. of a reservation are here."""
        sequence = self._steps.held.get(attempt)
        if sequence is None:
            return  # cancelled meanwhile
        self._memory.now = now
        self._receive(sequence, first, first + count)
        received = sequence.received
        sequence.full = max(sequence.full, min(received, (sequence.prompt_len - 1) // self._size))
        if self._unit:
            units = min(received // self._unit_blocks, sequence.reusable)
            if units > sequence.sealed:
                double = self._memory.seal(sequence.hashes, sequence.sealed, units)
                sequence.sealed = units
                if double:
                    self._steps.sync(now)
                    self._memory.give(double)
        self._net.tell(ev.BlocksVerified(self.id, attempt, first, count, nbytes, seconds, "sim"), now)
        if sequence.expects_decode:
            self._start_if_here(sequence, now)

    @staticmethod
    def _receive(sequence: Sequence, first: int, end: int) -> None:
        """Count a range in; what comes before one in front of it has to wait."""
        if first > sequence.received:
            sequence.early.append((first, end))
            return
        sequence.received = max(sequence.received, end)
        early = sequence.early
        while early:
            later = [span for span in early if span[0] > sequence.received]
            if len(later) == len(early):
                break
            sequence.received = max([sequence.received, *[stop for start, stop in early if start <= sequence.received]])
            early = later
        sequence.early = early

    def stop(self, now: float) -> None:
        """It dies. Tokens that had left are told; all else is forgotten."""
        self._memory.now = now
        self._steps.stop(now)
        self._memory.forget()

    def stall(self, now: float, seconds: float) -> None:
        """It computes nothing for so long."""
        self._steps.stall(now, seconds)
