"""The workers of a cell, and who of them takes what. Pure."""

from __future__ import annotations

from typing import Final

from twinpool.cost import Cost
from twinpool.router.worker import MEMORY_LIMIT, Worker

PROBE_TOKENS: Final = 512  # by which two measurements of one device are compared
UNLOADED_CHUNK: Final = 2048  # tokens a step of the prefill that the TTFT SLO is measured in


class Pool:
    """All workers of a cell. ``prefill`` and ``decode`` list those that may take new work, in order of id: borrowed."""

    __slots__ = ("changes", "common_room", "costs", "decode", "prefill", "prefill_mask", "version", "workers")

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.prefill: list[Worker] = []
        self.decode: list[Worker] = []
        self.prefill_mask = 0  # a bit for each id in ``prefill``
        self.costs: list[Cost] = []  # the different ones
        self.common_room = 0  # KV tokens that the largest worker of each pool could book
        self.version = 0  # counts changes of who is in which list, and of what they predict with
        self.changes: list[Worker] = []  # those that noted a change; whoever orders them clears it (policy/orders.py)

    def of(self, role: str) -> list[Worker]:
        """The list of one role."""
        return self.prefill if role == "prefill" else self.decode

    def add(self, worker: Worker) -> None:
        """A worker comes. Equal devices share one pace and the fastest measurement: noise only makes a step slower."""
        self.workers[worker.id] = worker
        worker.changes = self.changes
        alike = [other for other in self.workers.values() if other.device == worker.device]
        best = min((other.cost for other in alike), key=lambda cost: cost.prefill(PROBE_TOKENS, 0, PROBE_TOKENS))
        for other in alike:
            other.cost, other.pace = best, alike[0].pace
        self.sort()

    def remove(self, worker: int) -> Worker | None:
        """Take a worker out; None if it is not there."""
        gone = self.workers.pop(worker, None)
        self.sort()
        return gone

    def sort(self) -> None:
        """Roles changed, or a worker drains."""
        self.version += 1
        ready = [worker for _, worker in sorted(self.workers.items()) if not worker.draining]
        self.prefill = [worker for worker in ready if "prefill" in worker.roles]
        self.decode = [worker for worker in ready if "decode" in worker.roles]
        self.prefill_mask = sum([1 << worker.id for worker in self.prefill])
        self.costs = list({id(worker.cost): worker.cost for worker in self.workers.values()}.values())
        self.common_room = int(MEMORY_LIMIT * min(self.largest("prefill"), self.largest("decode")))

    def has(self, role: str) -> bool:
        """Whether any worker of that pool may take new work."""
        return bool(self.of(role))

    def unloaded_s(self, tokens: int) -> float:
        """Seconds of a prompt alone on the fastest worker, in the chunks that TTFT SLOs count in; 0 without workers."""
        return min([cost.prefill(tokens, 0, UNLOADED_CHUNK) for cost in self.costs], default=0.0)

    @property
    def prefill_share(self) -> float:
        """Share of the prefill workers, or of all where there are none, that have prompts to compute."""
        workers = self.prefill or self.decode
        busy = sum([1 for worker in workers if worker.prefills or worker.fills])
        return busy / len(workers) if workers else 1.0

    def largest(self, role: str) -> int:
        """KV tokens of the largest worker of a pool; 0 without one."""
        return max((worker.capacity for worker in self.of(role)), default=0)
