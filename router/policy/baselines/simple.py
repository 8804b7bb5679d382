"""Rules that every load balancer has: in turn, at random, least of something, by session."""

from __future__ import annotations

import zlib

from twinpool.router.kv_index import Stair
from twinpool.router.policy.base import NOBODY, View
from twinpool.router.policy.baselines.at_arrival import AtArrival, first_least, least_active
from twinpool.router.policy.baselines.info import Parameter, PolicyInfo
from twinpool.router.request import Request
from twinpool.router.worker import Worker

_MASK = (1 << 64) - 1
PREFILL, DECODE = 0, 1  # draws for the two pools differ


def mix(value: int) -> int:
    """64 well mixed bits of an int (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def below(bits: int, count: int) -> int:
    """64 random bits as a number of 0..count - 1."""
    return (bits * count) >> 64


def draw(seed: int, request: Request, pool: int) -> int:
    """64 random bits of one decision: the same again for the same attempt, however often it is asked for."""
    return mix(mix(mix(seed) ^ request.rid) ^ (2 * request.attempts + pool))


class RoundRobin(AtArrival):
    """In turn over prefill workers, in turn over decode workers, whatever their load."""

    __slots__ = ("_decode_turn", "_turn")

    name = "round_robin"

    def __init__(self) -> None:
        self._turn = 0
        self._decode_turn = 0

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """The next one."""
        worker = workers[self._turn % len(workers)]
        self._turn += 1
        return worker

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """The next one with room."""
        worker = workers[self._decode_turn % len(workers)]
        self._decode_turn += 1
        return worker

    def decode_at_once(self, request: Request, view: View, now: float) -> int:
        """The next one. If it has no memory when the prompt is sent, ``decode_for`` takes another."""
        most = request.length + request.left
        workers = [worker for worker in view.pool.decode if worker.could_fit(most)]
        return self.choose_decode(request, workers, view, now).id if workers else NOBODY


class Random(AtArrival):
    """Any worker with equal chance."""

    __slots__ = ("seed",)

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """Any."""
        return workers[below(draw(self.seed, request, PREFILL), len(workers))]

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """Any with room."""
        return workers[below(draw(self.seed, request, DECODE), len(workers))]


class LeastRequests(AtArrival):
    """Fewest requests, in both pools."""

    __slots__ = ()

    name = "least_requests"

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """Least Q."""
        return least_active(workers)


class LeastTokens(AtArrival):
    """Fewest prompt tokens to compute; for decode fewest tokens in KV."""

    __slots__ = ()

    name = "least_tokens"

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """Least A."""
        return first_least(workers, [worker.pending for worker in workers])

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """Least context of what decodes there."""
        return first_least(workers, [worker.context for worker in workers])


class PowerOfTwo(AtArrival):
    """Of two workers drawn at random the one with fewer requests."""

    __slots__ = ("seed",)

    name = "power_of_two"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """Less Q of two."""
        return self._of_two(workers, draw(self.seed, request, PREFILL))

    def choose_decode(self, request: Request, workers: list[Worker], view: View, now: float) -> Worker:
        """Less Q of two with room."""
        return self._of_two(workers, draw(self.seed, request, DECODE))

    @staticmethod
    def _of_two(workers: list[Worker], bits: int) -> Worker:
        if len(workers) == 1:
            return workers[0]
        one = below(bits, len(workers))
        other = below(mix(bits), len(workers) - 1)
        if other >= one:
            other += 1
        return least_active([workers[min(one, other)], workers[max(one, other)]])


class Session(AtArrival):
    """All requests of a session to one worker (rendezvous hashing); without a session to the least busy one."""

    __slots__ = ()

    name = "session"

    def choose(self, request: Request, workers: list[Worker], stairs: list[Stair], view: View, now: float) -> Worker:
        """The worker whose name and the session's give the largest hash: it moves only if that worker goes."""
        if not request.session:
            return least_active(workers)
        key = zlib.crc32(request.session.encode()) << 32
        best, best_weight = workers[0], -1
        for worker in workers:
            weight = mix(key | zlib.crc32(worker.name.encode()))
            if weight > best_weight:
                best, best_weight = worker, weight
        return best


_SEED = Parameter(0, 0, 1 << 31, "of the draws; a request's draw depends on it, the request's number and attempt only")
_TEXTBOOK = "common to all gateways"
_NO_PD = "decode: fewest requests, as routers do for prefill and decode pools"

INFOS = (
    PolicyInfo("round_robin", "in turn, both pools", _TEXTBOOK, "weights", RoundRobin),
    PolicyInfo("random", "any worker, both pools", _TEXTBOOK, "weights", Random, {"seed": _SEED}),
    PolicyInfo("least_requests", "fewest requests, both pools", _TEXTBOOK, "nothing", LeastRequests),
    PolicyInfo(
        "least_tokens",
        "fewest prompt tokens to compute; decode: fewest tokens in KV",
        _TEXTBOOK,
        "nothing",
        LeastTokens,
    ),
    PolicyInfo(
        "power_of_two",
        "the less busy of two drawn at random, both pools",
        "Mitzenmacher, IEEE Transactions on Parallel and Distributed Systems 12(10), 2001",
        "nothing",
        PowerOfTwo,
        {"seed": _SEED},
    ),
    PolicyInfo(
        "session",
        "a session stays with one prefill worker; without one: fewest requests",
        "vLLM production stack 0.1.5, vllm_router/routers/routing_logic.py, SessionRouter",
        f"a hash ring (rendezvous hashing moves as few sessions); lowest QPS is fewest requests. {_NO_PD}",
        Session,
    ),
)
