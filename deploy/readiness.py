"""Ready means served: every worker has registered, and a real request went through both pools and came back."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Callable

from twinpool.client import AsyncAdminClient, AsyncClient, request
from twinpool.config import ClusterConfig, PoolsConfig
from twinpool.errors import InvalidRequest, Overloaded, Unavailable
from twinpool.proto.twinpool.v1.inference_pb2 import Finished, Model

POLL_S = 0.1
PROBE_TIMEOUT_S = 120.0
PROBE_TOKENS = (33, 640, 2100)  # short prompts may be computed where they are decoded, so longer ones follow

Say = Callable[[str], None]


async def until_ready(inference: str, admin: str, config: ClusterConfig, say: Say) -> Finished:
    """Wait for all workers, then for an answer; returns the end of the request that proved it. Never times out."""
    await _until_joined(admin, config.pools, say)
    async with AsyncClient(inference) as client:
        while True:
            try:
                return await _prove(client, config, say)
            except (Unavailable, Overloaded) as error:
                say(f"not serving yet: {error.message}")
                await asyncio.sleep(max(POLL_S, error.retry_s or 0.0))


async def _until_joined(admin: str, pools: PoolsConfig, say: Say) -> None:
    wanted = pools.prefill.workers + pools.decode.workers + pools.both.workers
    seen = -1
    async with AsyncAdminClient(admin) as client:
        while seen < wanted:
            try:
                joined = sum(worker.state == "ready" for worker in (await client.status()).workers)
            except Unavailable:
                joined = 0
            if joined != seen:
                say(f"{joined} of {wanted} workers have joined")
            seen = joined
            await asyncio.sleep(POLL_S if seen < wanted else 0)


async def _prove(client: AsyncClient, config: ClusterConfig, say: Say) -> Finished:
    model = await client.model()
    two_pools = config.pools.prefill.workers > 0 and config.pools.decode.workers > 0
    split_wanted = two_pools and config.scheduling.path != "local"
    finished = await _probe(client, model, PROBE_TOKENS[0])
    for length in PROBE_TOKENS[1:]:
        if finished.route.path == "split" or not split_wanted or length + 2 > model.max_context:
            break
        try:
            finished = await _probe(client, model, length)
        except InvalidRequest:  # more than the KV memory of a worker holds
            break
    if split_wanted and finished.route.path != "split":
        say(f"no request went through both pools yet: {finished.route.path_reason}")
    return finished


async def _probe(client: AsyncClient, model: Model, length: int) -> Finished:
    prompt = [random.randrange(model.vocab_size) for _ in range(length)]
    probe = request(token_ids=prompt, max_tokens=2, temperature=0.0, ignore_eos=True, cache_salt=uuid.uuid4().hex)
    finished = Finished()
    async for event in client.generate(probe, timeout_s=PROBE_TIMEOUT_S):
        if isinstance(event, Finished):
            finished = event
    return finished
