"""Views of small cells, made by hand, for tests of policies."""

from __future__ import annotations

from tests.router.fake_worker import COST, request_of, worker_up

from twinpool.router.kv_index import KvIndex
from twinpool.router.policy import View
from twinpool.router.pool import Pool
from twinpool.router.request import Request
from twinpool.router.worker import Worker

NOW = 100.0


def cell(*roles: str, blocks: int = 1000, round_trip_s: float = 0.001, max_batch: int = 8) -> View:
    """Workers 0.. with these roles ("both": both), 4000 tokens of KV each, chunks of 512; outputs of 100 tokens."""
    pool = Pool()
    for number, role in enumerate(roles):
        names = ("prefill", "decode") if role == "both" else (role,)
        up = worker_up(number, *names, blocks=blocks, chunk_tokens=512, max_batch=max_batch)
        pool.add(Worker(up))
    return View(pool, KvIndex(), round_trip_s, 100)


def ask(prompt_len: int = 400, max_tokens: int = 50, *, deadline: float = NOW + 1.0, itl_s: float = 0.1) -> Request:
    request = request_of(1, prompt_len, max_tokens, hashes=list(range(prompt_len // 4)), itl_s=itl_s)
    request.deadline = deadline
    return request


def busy(view: View, worker: int, seconds: float, attempt: int = 50) -> None:
    """Commits prompt work to a worker, now; of as many tokens as take so long."""
    view.pool.workers[worker].book(attempt, attempt, 10)
    view.pool.workers[worker].commit_prefill(attempt, seconds, round(seconds / COST.a), 0, NOW)


def decoding(view: View, worker: int, count: int, context: int = 100, itl_s: float = 0.1) -> None:
    """Lets sequences decode on a worker."""
    for attempt in range(1000, 1000 + count):
        view.pool.workers[worker].book(attempt, attempt, context)
        view.pool.workers[worker].join_decode(attempt, context, itl_s)
