"""A worker process: load the model, allocate KV, dial the router, serve until told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from typing import NoReturn

import msgspec
import torch

from twinpool.config import ClusterConfig
from twinpool.proto import frames
from twinpool.tokenizer import load_tokenizer
from twinpool.workers.blocks import BlockPool
from twinpool.workers.build import Machine, Place, build
from twinpool.workers.link import RouterLink, connect
from twinpool.workers.scheduler import Scheduler
from twinpool.workers.step_log import StepLog, WorkerLine
from twinpool.workers.worker import Parts, Worker

log = logging.getLogger("twinpool.worker")

ROLES = {"prefill": ("prefill",), "decode": ("decode",), "both": ("prefill", "decode")}


async def serve(config: ClusterConfig, *, role: str, name: str, join: str, token: str, stop: asyncio.Event) -> None:
    """Serve as ``name`` in the pool(s) of ``role`` for the router at ``join`` until ``stop``, then drain.

    Raises ConfigError for anything the operator must mend: model, memory, addresses, or a router that refuses us.
    """
    tokenizer = load_tokenizer(None if config.model.path is None else str(config.model.path))
    epoch = time.time_ns()
    machine = await build(config, tokenizer, Place(role, name, epoch))
    step_log: StepLog | None = None
    try:
        await machine.transfer.start()
        books = BlockPool(machine.blocks, machine.engine.info.block_size, config.worker.eviction)
        scheduler = Scheduler(books, machine.cost, config.worker.chunk_tokens, config.worker.max_batch)
        hello = _hello(config, machine, role, name, token, epoch)
        parts = Parts(machine.engine, scheduler, machine.sums, machine.transfer, tokenizer)
        step_log = _step_log(config, hello)
        lost = None if machine.crew is None else machine.crew.lost
        await _live(parts, hello, join, stop, step_log, lost)
    finally:
        if step_log is not None:
            step_log.close()
        await machine.close()


def _hello(config: ClusterConfig, machine: Machine, role: str, name: str, token: str, epoch: int) -> frames.Hello:
    info = machine.engine.info
    return frames.Hello(
        version=frames.VERSION,
        worker=name,
        epoch=epoch,
        token=token,
        roles=ROLES[role],
        model=frames.Model(
            name=config.model.name or info.name,
            fingerprint=info.fingerprint,
            dtype=info.dtype,
            layout=info.layout,
            block_size=info.block_size,
            block_bytes=info.block_bytes,
            vocab_size=info.vocab_size,
            max_context=min(info.max_context, frames.MAX_CONTEXT),
            eos_ids=info.eos_ids,
        ),
        blocks=machine.blocks,
        device=_device_name(config, config.pools.ranks(role)),
        cost=machine.cost,
        chunk_tokens=config.worker.chunk_tokens,
        max_batch=config.worker.max_batch,
        kv_addresses=machine.transfer.addresses,
        kv_secret=machine.transfer.secret,
        pid=os.getpid(),
    )


def _step_log(config: ClusterConfig, hello: frames.Hello) -> StepLog | None:
    path = config.worker.step_log
    if path is None:
        return None
    model = hello.model
    line = WorkerLine(hello.worker, hello.device, model.name, hello.blocks, model.block_size, model.block_bytes,
                      hello.chunk_tokens, hello.max_batch, hello.cost)  # fmt: skip
    return StepLog(path, line)


def _device_name(config: ClusterConfig, ranks: int) -> str:
    """Model of the GPU or CPU, with the threads that compute, and how often; "emulated" where nothing does."""
    if config.worker.engine == "emulated":
        return "emulated"
    times = f"{ranks} x " if ranks > 1 else ""
    if config.worker.device.startswith("cuda"):
        return times + torch.cuda.get_device_name(config.worker.device)
    return f"{times}{platform.machine()} CPU, {config.worker.threads} thread(s)"


class _Wire:
    """The link of the moment; frames for none are dropped."""

    def __init__(self) -> None:
        self.link: RouterLink | None = None

    def joined(self, link: RouterLink) -> None:
        self.link = link

    def send(self, frame: frames.Frame) -> None:
        if self.link is not None:
            self.link.send(frame)

    def flush(self) -> None:
        if self.link is not None:
            self.link.flush()


async def _live(
    parts: Parts,
    hello: frames.Hello,
    join: str,
    stop: asyncio.Event,
    step_log: StepLog | None = None,
    lost: asyncio.Future[NoReturn] | None = None,
) -> None:
    """Dial, serve, dial again when the router is gone; on ``stop``, or drained by the router, leave in good order.

    Raises what ended the steps, or what ``lost`` says of another rank.
    """
    wire = _Wire()
    worker = Worker(parts, wire.send, wire.flush)
    worker.step_log = step_log
    steps = asyncio.create_task(_steps(worker, lost), name="steps")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    drained = asyncio.create_task(worker.drained.wait(), name="drained")
    try:
        while not (stopping.done() or drained.done()):
            now = msgspec.structs.replace(hello, roles=worker.roles or hello.roles)
            dialling = asyncio.create_task(connect(join, now, worker.take, wire.joined))
            await asyncio.wait((dialling, stopping, steps), return_when=asyncio.FIRST_COMPLETED)
            if not dialling.done():
                dialling.cancel()
                break
            link = dialling.result()
            log.info("joined the router at %s as %s", join, hello.worker)
            await asyncio.wait((link.closed, stopping, drained, steps), return_when=asyncio.FIRST_COMPLETED)
            if (stopping.done() or drained.done()) and not link.closed.done():
                await _leave(worker, wire, link, steps)
            worker.reset()
            if steps.done():
                break
        if steps.done():
            steps.result()  # whatever ended it
    finally:
        for task in (steps, stopping, drained):
            task.cancel()
        await asyncio.gather(steps, stopping, drained, return_exceptions=True)


async def _steps(worker: Worker, lost: asyncio.Future[NoReturn] | None) -> None:
    """Compute until cancelled. Raises what ended that, first of all what is ``lost``."""
    running = asyncio.create_task(worker.run())
    try:
        await asyncio.wait((running,) if lost is None else (lost, running), return_when=asyncio.FIRST_COMPLETED)
        if lost is not None and lost.done():
            lost.result()
        running.result()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _leave(worker: Worker, wire: _Wire, link: RouterLink, steps: asyncio.Task[None]) -> None:
    """Ask for no more work, finish what runs, say goodbye."""
    wire.send(frames.Leaving(reason="stopped"))
    drained = asyncio.create_task(worker.drained.wait())
    await asyncio.wait((drained, link.closed, steps), return_when=asyncio.FIRST_COMPLETED)
    drained.cancel()
    wire.send(frames.Goodbye(reason="drained"))
    link.close()
    await asyncio.wait((link.closed,), timeout=1.0)
