"""Who is in the cell: worker links by id, the model they agreed on, and what each says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from twinpool import blockhash
from twinpool.errors import NotFound
from twinpool.proto import frames
from twinpool.router.cell import CellModel, WorkerView
from twinpool.router.worker import Worker

if TYPE_CHECKING:
    from twinpool.router.links import WorkerLink

MODEL_FIELDS = ("fingerprint", "dtype", "layout", "block_size", "block_bytes", "vocab_size")
MAX_ROOTS = 10_000


class Member:
    """One connected worker."""

    __slots__ = ("hello", "kv_sequence", "link", "report")

    def __init__(self, link: WorkerLink, hello: frames.Hello) -> None:
        self.link = link
        self.hello = hello
        self.report: frames.Report | None = None
        self.kv_sequence = -1

    def view(self, worker: Worker, now: float) -> WorkerView:
        """For operators."""
        report = self.report
        return WorkerView(
            worker=self.hello.worker,
            roles=worker.roles,
            state="draining" if worker.draining else "ready",
            blocks=self.hello.blocks,
            free_blocks=report.free if report else self.hello.blocks,
            cached_blocks=report.cached if report else 0,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            step_s=report.step_s if report else 0.0,
            leaked_blocks=report.leaked if report else 0,
            pid=self.hello.pid,
            last_seen_s=now - self.link.last_seen,
            prefill_pace=worker.pace.prefill,
            decode_pace=worker.pace.decode,
        )


class Roster:
    """Members of a cell; ids are dense and are used again. The first worker settles the model."""

    def __init__(self, expected: dict[str, object]) -> None:
        """``expected``: fields of Hello.model that the config settles already."""
        self.model: CellModel | None = None
        self._expected = dict(expected)
        self._members: dict[int, Member] = {}
        self._roots: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[tuple[int, Member]]:
        return iter(list(self._members.items()))

    def get(self, worker: int) -> Member | None:
        """The member with this id."""
        return self._members.get(worker)

    def named(self, name: str) -> int:
        """Id of a worker. Raises NotFound with the names there are."""
        for worker, member in self._members.items():
            if member.hello.worker == name:
                return worker
        names = ", ".join(sorted(member.hello.worker for member in self._members.values())) or "none"
        raise NotFound(f"no worker {name!r} is connected; connected: {names}", reason="NO_SUCH_WORKER")

    def mismatch(self, hello: frames.Hello) -> str | None:
        """What about the worker's model differs from the cell's, both sides' values; None if nothing."""
        wrong = [
            f"{field}: the cell has {value}, the worker {getattr(hello.model, field)}"
            for field, value in self._expected.items()
            if getattr(hello.model, field) != value
        ]
        return "the worker's model does not match the cell's: " + "; ".join(wrong) if wrong else None

    def holder_of(self, name: str) -> Member | None:
        """The connected worker of that name."""
        return next((member for member in self._members.values() if member.hello.worker == name), None)

    def add(self, link: WorkerLink, hello: frames.Hello) -> int:
        """A worker is in; returns its id."""
        model = hello.model
        if self.model is None:
            self._expected |= {field: getattr(model, field) for field in MODEL_FIELDS}
            self.model = CellModel(model.name, model.fingerprint, model.dtype, model.vocab_size, model.max_context,
                                   model.eos_ids, model.block_size)  # fmt: skip
        worker = next(i for i in range(len(self._members) + 1) if i not in self._members)
        self._members[worker] = Member(link, hello)
        return worker

    def remove(self, link: WorkerLink) -> bool:
        """The worker is gone; False if it was not in."""
        member = self._members.get(link.id)
        if member is None or member.link is not link:
            return False
        del self._members[link.id]
        return True

    def root(self, salt: str) -> bytes | None:
        """Key of block hashes under a salt; None before there is a model."""
        model = self.model
        if model is None:
            return None
        key = self._roots.get(salt)
        if key is None:
            key = blockhash.root(model.fingerprint, model.block_size, model.dtype, salt)
            if len(self._roots) < MAX_ROOTS:
                self._roots[salt] = key
        return key
