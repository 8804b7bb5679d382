"""Who is on an emulated worker: held, waiting, decoding; how they come and go, and what the router hears of it."""

from __future__ import annotations

from twinpool.cost import Cost
from twinpool.router import events as ev
from twinpool.sim.decode import Batch
from twinpool.sim.memory import Memory
from twinpool.sim.net import Net
from twinpool.sim.prompts import Prompts
from twinpool.sim.seats import Seats
from twinpool.sim.sequence import GONE, HELD, NEVER, RUNNING, Sequence
from twinpool.workers.preemption import first_to_go, to_warn


class Members:
    """See the module's docstring. ``held``: sequences that are in no step, reserved for or computed.

    ``joining`` are those of ``running`` that decode from the next plan on; ``fresh`` those that draw their first token
    here in the step that runs; ``leaving`` are gone, but in the step that runs, so that their blocks are still in use.
    """

    __slots__ = (
        "_batch", "_id", "_memory", "_net", "_order", "_size", "fresh", "held", "joining", "leaving", "prompts",
        "running", "seats", "spare", "turn",
    )  # fmt: skip

    def __init__(
        self, id: int, net: Net, cost: Cost, memory: Memory, batch: Batch, block_size: int, chunk_tokens: int
    ) -> None:
        self.held: dict[int, Sequence] = {}
        self.prompts = Prompts(id, net, cost, memory, block_size, chunk_tokens)
        self.running: dict[int, Sequence] = {}
        self.seats = Seats(id, net, batch)
        self.joining: list[Sequence] = []
        self.fresh: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self.turn = 0  # the next one
        self.spare = 0  # blocks that may be taken after a plan that warned before the next warning
        self._id = id
        self._net = net
        self._memory = memory
        self._batch = batch
        self._size = block_size
        self._order = 0

    # --- they come ----------

    def add(self, sequence: Sequence) -> None:
        """A prompt whose blocks are booked."""
        sequence.order = self._order
        self._order += 1
        self.prompts.add(sequence)

    def decode(self, sequence: Sequence) -> None:
        """A sequence that was held and whose blocks are all here; ``length`` and ``left`` are set."""
        del self.held[sequence.attempt]
        sequence.order = self._order
        self._order += 1
        sequence.fresh = True
        self._seat(sequence)

    def _seat(self, sequence: Sequence) -> None:
        sequence.turn = self.turn
        self.turn += 1
        self.running[sequence.attempt] = sequence
        self.joining.append(sequence)

    def join(self) -> None:
        """A step is planned: who waits for that decodes."""
        batch = self._batch
        for sequence in self.joining:
            batch.join(sequence)
            if sequence.fresh:
                self.fresh.append(sequence)
        self.joining.clear()

    def take_turns(self, max_batch: int) -> None:
        """More decode than fit into a step, or did so a moment ago."""
        self.turn = self.seats.take_turns(self.running, max_batch, self.turn)
        here = self.seats.chosen if self.seats.crowded else self.running.values()
        self.fresh = [sequence for sequence in here if sequence.fresh]  # some came before and had to wait

    # --- they go ----------

    def stop_decoding(self, sequence: Sequence) -> bool:
        """One that is not ``running`` any more; whether it is in the step that runs. Settle that before."""
        if sequence.join == NEVER:
            self.joining.remove(sequence)
            return False
        self._leave(sequence)
        return self.seats.decodes(sequence)

    def _leave(self, sequence: Sequence) -> None:
        """Out of the batch, at its last boundary."""
        batch = self._batch
        self.seats.close(sequence)
        if batch.step > sequence.join:
            sequence.full = (sequence.length + batch.step - sequence.join - 1) // self._size
        batch.leave(sequence, GONE)

    def preempt(self, now: float) -> int:
        """Between two steps the youngest sequence of the lowest class has to go; how many blocks it wanted itself."""
        worst = first_to_go([*self.prompts.all(), *self.running.values()])
        wanted = 0
        if worst.state == RUNNING:
            del self.running[worst.attempt]
            self.tell_tokens(worst, now)
            wanted = int(self._batch.needs_block(worst))
            self._leave(worst)
            worst.blocks -= wanted  # counted, but never taken
        else:
            self.prompts.take_out(worst.attempt)
            worst.state = GONE
        self._memory.release(worst)
        self._net.tell(ev.AttemptLost(self._id, worst.attempt, "preempted", False), now)
        return wanted

    def warn(self, now: float) -> None:
        """After a plan's growth left too few blocks: see ``preemption.py``. All tokens are told of before."""
        batch, running = self._batch, list(self.running.values())
        free = self._memory.available
        warned = to_warn(running, [batch.blocks(sequence) for sequence in running], free)
        if warned:
            for sequence in running:
                self.tell_tokens(sequence, now)
            for sequence in warned:
                self._net.tell(ev.Short(self._id, sequence.attempt), now)
        known = [sequence for sequence in running if sequence.warned]
        spare = free + sum([batch.blocks(sequence) for sequence in known]) - len(running)
        self.spare = NEVER if len(known) == len(running) else spare

    def die(self, now: float) -> None:
        """Tokens that were drawn have left; all else is forgotten."""
        for sequence in self.running.values():
            if sequence.join != NEVER:
                self.tell_tokens(sequence, now)
                self.seats.close(sequence)
        self.held.clear()
        self.prompts.clear()
        self.running.clear()
        self.joining.clear()

    # --- a step is over ----------

    def finish(self, seconds: float, predicted: float, now: float) -> None:
        """The batch has gone on; what that means for each, and what is told of it, in the order of worker.py."""
        batch, prompts = self._batch, self.prompts
        if self.leaving:
            for sequence in self.leaving:
                self._memory.release(sequence)
            self.leaving.clear()
        if prompts.chunks:
            drawn = prompts.computed(seconds, predicted, now)
            if self.fresh or batch.ends_at <= batch.step:
                drawn += self._drawn()
            if drawn:
                self._speak(drawn, now)
            if prompts.ready:
                prompts.announce_ready(now)
        elif self.fresh or batch.ends_at <= batch.step:
            self._speak(self._drawn(), now)

    def _drawn(self) -> list[Sequence]:
        """Decoding sequences of which the router must hear: first tokens here and last ones, in the batch's order."""
        batch = self._batch
        fresh, self.fresh = self.fresh, []
        if fresh:
            fresh = [sequence for sequence in fresh if sequence.state == RUNNING]
            if self._memory.unit_blocks:
                for sequence in fresh:  # the last token of a prompt is never reused, but its unit may be full now
                    if sequence.sealed < len(sequence.hashes):
                        self._memory.seal(sequence, len(sequence.hashes))
            if batch.ends_at > batch.step:
                return fresh
        drawn = batch.ended()
        if fresh:
            drawn += [sequence for sequence in fresh if sequence.end != batch.step]
        if len(drawn) > 1:
            drawn.sort(key=_turn)
        return drawn

    def _speak(self, drawn: list[Sequence], now: float) -> None:
        """These drew a token that is told of; those that are over are freed."""
        batch = self._batch
        over: list[Sequence] = []
        for sequence in drawn:
            if sequence.state != RUNNING:
                if self._first_token(sequence, now):
                    over.append(sequence)
                continue
            if sequence.fresh:
                self.seats.first_token(sequence)
            self.tell_tokens(sequence, now)
            if sequence.end == batch.step:
                over.append(sequence)
                del self.running[sequence.attempt]
                self._leave(sequence)
                self._memory.release(sequence)
        for sequence in over:
            request = sequence.request
            reason = "length" if self._net.outputs[request.rid] >= request.max_tokens else "stop"
            self._net.tell(ev.Ended(self._id, sequence.attempt, reason), now)

    def _first_token(self, sequence: Sequence, now: float) -> bool:
        """A prompt is computed; whether that was all."""
        self._net.tell(ev.Emitted(self._id, sequence.attempt, 1), now)
        self.prompts.take_out(sequence.attempt)
        sequence.left -= 1
        if sequence.left <= 0:
            sequence.state = GONE
            self._memory.release(sequence)
            return True
        if sequence.local:
            sequence.length += 1
            self._seat(sequence)
        else:
            sequence.state = HELD
            sequence.received = -(-sequence.computed // self._size)
            self.held[sequence.attempt] = sequence
        return False

    def tell_tokens(self, sequence: Sequence, now: float) -> None:
        """Those it has drawn since it joined and the router has not heard of."""
        count = self._batch.step - sequence.join - sequence.told
        if count > 0:
            sequence.told += count
            self._net.tell(ev.Emitted(self._id, sequence.attempt, count), now)


def _turn(sequence: Sequence) -> int:
    return sequence.turn
