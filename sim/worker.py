"""One emulated worker: what ``workers/worker.py`` does with the same messages at the same times.

Here are its messages; ``steps.py`` says what is computed when, ``memory.py`` has the blocks. A transfer takes as long
as the links say, what arrives is always right, and leases never run out: the router renews them.
"""

from __future__ import annotations

from mypy_extensions import mypyc_attr

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.sim.decode import Batch
from twinpool.sim.gaps import Runs
from twinpool.sim.members import Members
from twinpool.sim.memory import Memory
from twinpool.sim.net import Net
from twinpool.sim.result import WorkerTotals
from twinpool.sim.sequence import HELD, WAITING, Sequence
from twinpool.sim.steps import Steps


@mypyc_attr(allow_interpreted_subclasses=True)
class SimWorker:
    """See the module's docstring. ``unit_tokens``: prompt tokens of one hash, a multiple of ``block_size``; 0: none."""

    __slots__ = (
        "_block_bytes", "_cached_tokens", "_members", "_memory", "_net", "_received_bytes", "_size", "_steps", "_unit",
        "_unit_blocks", "id", "runs",
    )  # fmt: skip

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
        eviction: str = "lru",
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
        self._cached_tokens = 0
        self._received_bytes = 0
        self._memory = Memory(id, blocks, self._unit_blocks, net.kv, eviction)
        batch = Batch(cost, self.runs, block_size)
        self._members = Members(id, net, cost, self._memory, batch, block_size, chunk_tokens)
        self._steps = Steps(id, net, cost, self._memory, batch, self._members, max_batch, block_size)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody refers to, as of the last thing that happened here."""
        return self._memory.available

    @property
    def cached_units(self) -> int:
        """Units in the prefix cache."""
        return self._memory.cached_units

    def total(self, totals: WorkerTotals) -> None:
        """Adds what this worker did so far: one that died and came back did it as two. Of sending the links know."""
        steps = self._steps
        totals.busy_prefill_s += steps.prefill_s
        totals.busy_decode_s += steps.decode_s
        totals.busy_mixed_s += steps.mixed_s
        totals.computed_tokens += self._members.prompts.tokens
        totals.cached_tokens += self._cached_tokens
        totals.received_bytes += self._received_bytes
        totals.blocks = self._memory.blocks
        totals.peak_blocks = max(totals.peak_blocks, self._memory.peak)

    # --- what the router says ----------

    def take(self, action: ev.Action | ev.Send, now: float) -> None:
        """A message from the router; those that mean nothing to an emulated worker are ignored."""
        self._memory.now = now
        if isinstance(action, ev.SendPull):
            self._pull(action, now)
        elif isinstance(action, ev.SendPrefill):
            self._prefill(action, now)
        elif isinstance(action, ev.SendReserve):
            self._reserve(action, now)
        elif isinstance(action, ev.SendLend):
            self._lend(action, now)
        elif isinstance(action, ev.SendDecode):
            self._decode(action, now)
        elif isinstance(action, (ev.SendRelease, ev.SendCancel)):
            self._steps.forget(action.attempt, now)
        elif isinstance(action, ev.SendYield):
            self._steps.give_up(action.attempt, now)

    def _reusable(self, sequence: Sequence) -> int:
        """Units that may come from the cache or be received into it: the last token is always computed, or moved."""
        if not self._unit:
            return 0
        return min(len(sequence.hashes), (sequence.length - 1) // self._unit)

    def _no_room(self, attempt: int, blocks: int, now: float) -> None:
        self._net.tell(ev.NoRoom(self.id, attempt), now)
        self._steps.report_room(blocks, now)

    def _reserve(self, action: ev.SendReserve, now: float) -> None:
        sequence = Sequence(action.attempt, action.request, action.request.length, HELD)
        sequence.reusable = self._reusable(sequence)
        tight = self._steps.sync(now, action.blocks)
        units = self._memory.book(sequence.hashes, sequence.reusable, action.blocks)
        if units < 0:
            self._no_room(action.attempt, action.blocks, now)
            return
        sequence.blocks = action.blocks
        sequence.sealed = units
        sequence.full = sequence.received = held = units * self._unit_blocks
        self._members.held[action.attempt] = sequence
        if tight:
            self._steps.taken(now)
        self._net.tell(ev.Reserved(self.id, action.attempt, held), now)

    def _lend(self, action: ev.SendLend, now: float) -> None:
        """Holds what is cached of these units for a worker that will pull it, and announces it."""
        hashes = action.request.hashes
        units = self._memory.match(hashes, action.hashes)
        blocks = units * self._unit_blocks
        if units:
            sequence = Sequence(action.attempt, action.request, action.request.length, HELD)
            sequence.lent = True
            tight = self._steps.sync(now, blocks)
            self._memory.book(hashes, units, blocks)
            sequence.blocks = sequence.full = sequence.received = blocks
            sequence.sealed = units
            self._members.held[action.attempt] = sequence
            if tight:
                self._steps.taken(now)
        self._net.tell(ev.BlocksReady(self.id, action.attempt, 0, blocks, bytes(4 * blocks), b""), now)

    def _prefill(self, action: ev.SendPrefill, now: float) -> None:
        request = action.request
        sequence = Sequence(action.attempt, request, request.length, WAITING)
        total = -(-(sequence.length + action.decode) // self._size)
        reusable = self._reusable(sequence)
        reserved = self._members.held.get(action.attempt)
        more = total
        if reserved is not None:  # it is used up, and its blocks are kept if they can be
            more = max(total, reserved.blocks)
            self._steps.forget(action.attempt, now)
        self._steps.sync(now, more)
        units = self._memory.book(sequence.hashes, reusable, more)
        if units < 0 and more > total:
            more = total
            units = self._memory.book(sequence.hashes, reusable, more)
        if units < 0:
            self._no_room(action.attempt, total, now)
            return
        sequence.blocks = more
        sequence.sealed = units
        sequence.full = units * self._unit_blocks
        sequence.cached = sequence.computed = units * self._unit
        sequence.misjudged = sequence.cached != action.cached
        sequence.local = action.decode
        sequence.transfer = action.transfer
        if self._net.work:
            sequence.work = self._net.work[request.rid]
        sequence.left = self._net.outputs[request.rid] - request.emitted
        if units and action.transfer:
            self._members.prompts.announce(sequence, now)
        self._cached_tokens += sequence.cached
        self._members.add(sequence)
        self._steps.interrupt(now)

    def _pull(self, action: ev.SendPull, now: float) -> None:
        sequence = self._members.held.get(action.attempt)
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
        sequence = self._members.held.get(action.attempt)
        if sequence is None:
            return
        request = action.request
        sequence.length = request.prompt_len + request.emitted
        sequence.left = self._net.outputs[request.rid] - request.emitted
        sequence.expects_decode = True
        self._start_if_here(sequence, now)

    def _start_if_here(self, sequence: Sequence, now: float) -> None:
        if sequence.received * self._size >= sequence.length - 1:
            self._members.decode(sequence)
            self._steps.interrupt(now)

    # --- what happens ----------

    def wake(self, now: float) -> None:
        """The time that was wished for has come."""
        self._steps.wake(now)

    def pulled(self, attempt: int, first: int, count: int, nbytes: int, seconds: float, now: float) -> None:
        """Blocks ``first``.. of a reservation are here."""
        sequence = self._members.held.get(attempt)
        if sequence is None:
            return  # cancelled meanwhile
        self._memory.now = now
        self._received_bytes += nbytes
        self._receive(sequence, first, first + count)
        received = sequence.received
        sequence.full = max(sequence.full, min(received, (sequence.prompt_len - 1) // self._size))
        if self._unit:
            units = min(received // self._unit_blocks, sequence.reusable)
            if units > sequence.sealed:
                if self._memory.holds(sequence.hashes[sequence.sealed]):
                    self._steps.sync(now, 0)  # what came is of no use, so its blocks are free
                self._memory.seal(sequence, units)
                self._steps.gave_back(now)
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

    def snapshot(self, now: float) -> list[int]:
        """All that is in the prefix cache; changes that have not been told yet never will be, since they are in it."""
        self._memory.now = now
        self._steps.sync(now, self._memory.blocks)
        return self._memory.snapshot()

    def stop(self, now: float) -> None:
        """It dies. Tokens that had left are told; all else is forgotten."""
        self._memory.now = now
        self._steps.stop(now)
        self._memory.forget()

    def stall(self, now: float, seconds: float) -> None:
        """It computes nothing for so long."""
        self._steps.stall(now, seconds)
