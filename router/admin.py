"""The service ``twinpool.v1.Admin``: what operators see and may do, on a port of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from twinpool.errors import InvalidRequest
from twinpool.proto.twinpool.v1 import admin_pb2 as pb
from twinpool.proto.twinpool.v1 import admin_pb2_grpc
from twinpool.router.cell import Cell, CellStatus, WorkerView
from twinpool.router.edge.status import Context

ROLES = ("prefill", "decode")


class AdminService(admin_pb2_grpc.AdminServicer):
    """Handlers of ``twinpool.v1.Admin``; ``ready`` tells whether the inference ports take requests."""

    def __init__(self, cell: Cell, ready: Callable[[], bool]) -> None:
        self._cell = cell
        self._ready = ready

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.Status:
        """Workers, queue and counters as they are now."""
        return status_message(self._cell.status(), self._ready())

    async def DrainWorker(self, request: pb.DrainWorkerRequest, context: Context) -> pb.DrainWorkerResponse:
        """Take no new work on a worker."""
        self._cell.drain_worker(request.worker)
        return pb.DrainWorkerResponse()

    async def SetRole(self, request: pb.SetRoleRequest, context: Context) -> pb.SetRoleResponse:
        """Move a worker to other pools."""
        roles = tuple(dict.fromkeys(request.roles))
        if not roles or not set(roles) <= set(ROLES):
            raise InvalidRequest(f"roles must be one or both of {', '.join(ROLES)}", reason="BAD_ROLES")
        self._cell.set_roles(request.worker, roles)
        return pb.SetRoleResponse()

    async def WatchRequests(
        self, request: pb.WatchRequestsRequest, context: Context
    ) -> AsyncIterator[pb.RequestRecord]:
        """The request log as it is written."""
        async for line in self._cell.watch():
            yield pb.RequestRecord(json=line)


def status_message(status: CellStatus, ready: bool) -> pb.Status:
    """A cell's status on the wire."""
    model = status.model
    return pb.Status(
        router=status.router,
        model=model.name if model else "",
        model_version=model.fingerprint if model else "",
        ready=ready,
        queued=status.queued,
        active=status.active,
        completed=status.completed,
        refused=status.refused,
        cancelled=status.cancelled,
        resumed=status.resumed,
        workers=[_worker_message(worker) for worker in status.workers],
    )


def _worker_message(worker: WorkerView) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        worker=worker.worker,
        roles=worker.roles,
        state=worker.state,
        blocks=worker.blocks,
        free_blocks=worker.free_blocks,
        cached_blocks=worker.cached_blocks,
        running=worker.running,
        waiting=worker.waiting,
        step_ms=worker.step_s * 1e3,
        leaked_blocks=worker.leaked_blocks,
        pid=worker.pid,
        last_seen_ms=worker.last_seen_s * 1e3,
    )
