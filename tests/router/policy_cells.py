"""Small pictures of a cell, to ask policies about."""

from __future__ import annotations

from tests.router.fake_worker import request_of, worker_up

from twinpool.router.kv_index import KvIndex
from twinpool.router.policy import Placement, Policy, View
from twinpool.router.pool import Pool
from twinpool.router.request import Bound, Request
from twinpool.router.worker import Worker

NOW = 100.0


def cell(*roles: str, blocks: int = 1000, max_batch: int = 64) -> View:
    """Workers 0.. with these roles ("both": both), 4000 tokens of KV each in blocks of 4; outputs of 100 tokens."""
    pool = Pool()
    for number, role in enumerate(roles):
        names = ("prefill", "decode") if role == "both" else (role,)
        pool.add(Worker(worker_up(number, *names, blocks=blocks, chunk_tokens=512, max_batch=max_batch)))
    return View(pool, KvIndex(), 0.001, 100)


def ask(prompt_len: int = 400, max_tokens: int = 50, *, rid: int = 1, session: str = "", itl_s: float = 0.1) -> Request:
    """A request whose blocks have hashes 0.. and whose first token is due in a second."""
    request = request_of(rid, prompt_len, max_tokens, hashes=list(range(prompt_len // 4)), itl_s=itl_s)
    request.session = session
    request.deadline = NOW + 1.0
    return request


def prompts(view: View, worker: int, count: int, tokens: int = 10, seconds: float = 0.01) -> None:
    """Commits prompts to a worker, now; ``tokens`` and ``seconds`` each."""
    for attempt in range(100, 100 + count):
        view.pool.workers[worker].book(attempt, attempt, tokens)
        view.pool.workers[worker].commit_prefill(attempt, seconds, tokens, 0, NOW)


def decoding(view: View, worker: int, count: int, context: int = 10, itl_s: float = 0.1) -> None:
    """Lets sequences decode on a worker."""
    for attempt in range(1000, 1000 + count):
        view.pool.workers[worker].book(attempt, attempt, context)
        view.pool.workers[worker].join_decode(attempt, context, itl_s)


def in_line(view: View, worker: int, tokens: int, seconds: float) -> None:
    """A request waits in a worker's line."""
    placement = Placement(worker, -1, "split", "", 0, seconds)
    view.pool.workers[worker].bind(Bound(ask(tokens), placement, tokens))


def cached(view: View, worker: int, blocks: int) -> None:
    """The first blocks of every prompt are cached there."""
    view.index.change(worker, list(range(blocks)), [], False)


def placed(policy: Policy, request: Request, view: View, now: float = NOW) -> Placement:
    """The placement, which must be one."""
    placement = policy.on_room(request, view, now)
    assert isinstance(placement, Placement)
    return placement
