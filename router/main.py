"""A router process: one cell and its edge. Ready once a real request has passed through both pools."""

from __future__ import annotations

import asyncio
import logging
import secrets
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from twinpool.config import ClusterConfig
from twinpool.errors import TwinpoolError
from twinpool.router.cell import Slo, Submission
from twinpool.router.core import Core
from twinpool.router.decision_log import DecisionLog
from twinpool.router.dispatch import Dispatcher
from twinpool.router.edge.server import EdgeServer
from twinpool.router.links import LinkSettings, listen
from twinpool.router.metrics import Metrics
from twinpool.router.policy.registry import DEFAULT, make_policy
from twinpool.router.request_log import RequestLog
from twinpool.router.roster import Roster
from twinpool.router.state import Limits
from twinpool.sampling import SamplingParams
from twinpool.tokenizer import load_tokenizer

log = logging.getLogger("twinpool.router")

PROBE_EVERY_S, PROBE_MAX_S = 0.1, 5.0
PROBE_S = 60.0
PROBE_BLOCKS = 2  # of prompt: KV must move


@dataclass(frozen=True, slots=True)
class RouterAddresses:
    """Real addresses ("host:port") of everything a router listens on."""

    inference: str
    vllm: str
    admin: str
    metrics: str
    workers: str


async def serve(
    config: ClusterConfig,
    *,
    token: str,
    stop: asyncio.Event,
    started: Callable[[RouterAddresses], None],
    ready: Callable[[], None],
) -> None:
    """Serve until ``stop``, then drain. ``started`` is called once all ports are open, ``ready`` at the first proof.

    Raises ConfigError for anything the operator must mend.
    """
    tokenizer = await asyncio.to_thread(load_tokenizer, None if config.model.path is None else str(config.model.path))
    requests = RequestLog(config.edge.request_log)
    core, decisions = _core(config)
    cell = _cell(config, core, requests, decisions)
    edge = EdgeServer(cell, config, tokenizer, Metrics())
    addresses = await edge.start()
    links, workers = await listen(cell, _link_settings(config, token), config.link.listen)
    probe = asyncio.create_task(_prove(cell, edge, config, ready), name="readiness")
    try:
        started(RouterAddresses(*addresses, workers=workers))
        await stop.wait()
        log.info("draining")
        probe.cancel()
        if not await edge.drain(config.edge.drain_ms / 1000):
            log.warning("some requests did not end within edge.drain_ms (%.0f): cancelled", config.edge.drain_ms)
        cell.refuse_new("this router is draining: try another")  # not before: running calls may submit more sequences
    finally:
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        await edge.stop()
        links.close()
        for _, member in cell.roster:
            member.link.close()
        requests.close()
        if decisions is not None:
            decisions.close()


def _core(config: ClusterConfig) -> tuple[Core, DecisionLog | None]:
    """The core, and the log of it if one is wanted."""
    scheduling = config.scheduling
    limits = Limits(
        max_queue=scheduling.max_queue,
        max_losses=scheduling.max_attempts,
        no_worker_wait_s=scheduling.no_worker_wait_ms / 1000,
        lease_s=config.link.lease_ms / 1000,
    )
    own = {"paths": scheduling.path, "fetch": "on" if scheduling.fetch else "off"}
    parameters = (own if scheduling.policy == DEFAULT else {}) | scheduling.parameters
    core = Core(make_policy(scheduling.policy, parameters), limits)
    core.state.next_attempt += secrets.randbits(31)  # workers may still be ending what an earlier router numbered
    if scheduling.decision_log is None:
        return core, None
    return core, DecisionLog(scheduling.decision_log, core, scheduling.policy, parameters)


def _cell(config: ClusterConfig, core: Core, requests: RequestLog, decisions: DecisionLog | None) -> Dispatcher:
    # Not the size of the vocabulary: a model's head may be padded beyond its tokenizer.
    settled: dict[str, object] = {"dtype": config.model.dtype, "block_size": config.worker.block_size}
    return Dispatcher(
        core,
        Roster(settled),
        requests,
        ranks={name: rank for rank, name in enumerate(config.scheduling.classes)},
        transfer_timeout_s=config.transfer.timeout_ms / 1000,
        decide=decisions.decide if decisions is not None else None,
        name=decisions.name if decisions is not None else None,
    )


def _link_settings(config: ClusterConfig, token: str) -> LinkSettings:
    link = config.link
    return LinkSettings(token, link.heartbeat_ms / 1000, link.dead_after_ms / 1000, link.lease_ms / 1000)


async def _prove(cell: Dispatcher, edge: EdgeServer, config: ClusterConfig, ready: Callable[[], None]) -> None:
    """Readiness follows proof: a synthetic request through the pools whenever they came (back) to have workers."""
    proved = False
    pause = PROBE_EVERY_S
    while True:
        await asyncio.sleep(pause)
        pool = cell.core.state.pool
        served = pool.has("decode") and (pool.has("prefill") or config.scheduling.path == "local")
        if served and not proved:
            proved = await _probe(cell, config)
            pause = PROBE_EVERY_S if proved else min(PROBE_MAX_S, 2 * pause)
            if proved:
                await edge.set_ready(True)
                ready()
        elif proved and not served:
            proved = False
            await edge.set_ready(False)


async def _probe(cell: Dispatcher, config: ClusterConfig) -> bool:
    model = cell.model
    assert model is not None
    length = min(PROBE_BLOCKS * model.block_size + 1, model.max_context - 2)
    submission = Submission(
        request_id="readiness-probe",
        prompt=array("I", [token % model.vocab_size for token in range(1, length + 1)]),
        sampling=SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True),
        slo=Slo(ttft_s=PROBE_S, ttft_factor=0.0, itl_s=PROBE_S),
        klass=config.scheduling.default_class,
        salt="twinpool-readiness",
        deadline_s=PROBE_S,
    )
    try:
        async for _ in cell.submit(submission):
            pass
    except TwinpoolError as error:
        log.warning("the readiness request failed: %s", error.message)
        return False
    return True
