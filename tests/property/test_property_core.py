"""The core under chaos: whatever workers and clients do, every request ends once, soon, and nothing is left behind."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import BLOCK, FakeWorker, request_of, worker_up

from twinpool.router import events as ev
from twinpool.router.policy import LeastSeconds
from twinpool.router.request import Phase, Request
from twinpool.router.state import Limits

IDS = st.integers(0, 5)
GAPS = st.sampled_from([0.0, 0.0005, 0.003, 0.011, 0.025, 0.05, 0.4])
PICK = st.integers(0, 1 << 16)
ROLES = st.sampled_from([("prefill",), ("decode",), ("prefill", "decode")])
BLOCKS = st.sampled_from([9, 24, 64])
FAULTS = st.sampled_from(["no_room", "mute", "bad_pull"])
RECOVERY_S = 60.0  # far more than all requests of a run take one after another
LATE = (ev.Reserved, ev.NoRoom, ev.Progressed, ev.BlocksReady, ev.BlocksVerified, ev.BlocksBad, ev.Emitted, ev.Ended,
        ev.Short)  # fmt: skip


class CoreMachine(RuleBasedStateMachine):
    """Clients, workers and faults in any order; ``FakeCluster`` checks after every event."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FakeCluster()
        self.rid = 0

    @initialize(
        paths=st.sampled_from(["auto", "split", "local"]),
        max_queue=st.sampled_from([2, 100]),
        held=st.integers(0, 3),
        blocks=st.tuples(BLOCKS, BLOCKS),
    )
    def start(self, paths: str, max_queue: int, held: int, blocks: tuple[int, int]) -> None:
        self.cluster = FakeCluster(LeastSeconds(paths), Limits(max_queue=max_queue))
        self.cluster.held = held
        self.cluster.join(worker_up(0, "prefill", blocks=blocks[0]))
        self.cluster.join(worker_up(1, "decode", blocks=blocks[1], max_batch=2))

    def teardown(self) -> None:
        """The chaos stops and both pools have workers."""
        cluster = self.cluster
        cluster.faults = dict.fromkeys(cluster.faults, 0)
        for worker in cluster.workers.values():
            worker.latency_s = 0.001
        cluster.join(worker_up(100, "prefill"))
        cluster.join(worker_up(101, "decode"))
        cluster.run_until_ended(RECOVERY_S)
        cluster.run(2.0)
        cluster.check_empty()
        assert not cluster.expired, "a lease ran out that the core should have renewed"

    def worker(self, pick: int) -> FakeWorker:
        workers = list(self.cluster.workers.values())
        return workers[pick % len(workers)]

    def running(self) -> list[Request]:
        return list(self.cluster.core.state.requests.values())

    def known(self) -> set[int]:
        """Numbers that mean something to the core."""
        state = self.cluster.core.state
        return {*state.by_attempt, *state.loans, *state.moves}

    # --- clients ----------

    @rule(
        prompt=st.integers(1, 80), output=st.integers(1, 12), ttft_s=st.sampled_from([0.0, 0.05, 1.0]),
        itl_s=st.sampled_from([0.005, 0.02, 0.1]), give_up_s=st.sampled_from([0.02, 3.0, 1e9]),
        queue_s=st.sampled_from([0.0, 0.5, 1e9]), resumed=st.integers(0, 3), stop=st.integers(1, 20),
    )  # fmt: skip
    def submit(
        self,
        prompt: int,
        output: int,
        ttft_s: float,
        itl_s: float,
        give_up_s: float,
        queue_s: float,
        resumed: int,
        stop: int,
    ) -> None:
        self.rid += 1
        self.cluster.stops[self.rid] = resumed + stop
        now = self.cluster.now
        hashes = list(range(prompt // BLOCK))
        request = request_of(
            self.rid, prompt, resumed + output, ttft_s=ttft_s, itl_s=itl_s, resumed=resumed,
            give_up=now + give_up_s, queue_until=now + queue_s, hashes=hashes,
        )  # fmt: skip
        self.cluster.submit(request)

    @rule(count=st.integers(2, 6), prompt=st.integers(5, 30), output=st.integers(2, 8), wait_s=GAPS)
    def burst(self, count: int, prompt: int, output: int, wait_s: float) -> None:
        """Some alike at once, as only many at once fill a queue and memory."""
        for _ in range(count):
            self.rid += 1
            self.cluster.submit(request_of(self.rid, prompt, output))
        self.cluster.run(wait_s)

    @rule(pick=PICK)
    def cancel(self, pick: int) -> None:
        self.cluster.deliver(ev.Cancel(pick % (self.rid + 2)))

    # --- workers ----------

    @rule(worker=IDS, roles=ROLES, blocks=BLOCKS, max_batch=st.integers(1, 4))
    def join(self, worker: int, roles: tuple[str, ...], blocks: int, max_batch: int) -> None:
        if worker not in self.cluster.workers:
            self.cluster.join(worker_up(worker, *roles, blocks=blocks, max_batch=max_batch))

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK)
    def kill(self, pick: int) -> None:
        self.cluster.kill(self.worker(pick).up.worker)

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK)
    def drain(self, pick: int) -> None:
        self.cluster.deliver(ev.WorkerDraining(self.worker(pick).up.worker))

    @rule(
        prompt=st.integers(1, 40), output=st.integers(6, 12), roles=ROLES, blocks=BLOCKS, wait_s=GAPS,
        drains=st.booleans(),
    )  # fmt: skip
    def move_one_that_decodes(
        self, prompt: int, output: int, roles: tuple[str, ...], blocks: int, wait_s: float, drains: bool
    ) -> None:
        """A sequence decodes, another worker comes, and its own leaves, or runs out of memory."""
        self.rid += 1
        request = request_of(self.rid, prompt, output, hashes=list(range(prompt // BLOCK)))
        self.cluster.submit(request)
        for _ in range(20):
            if request.over or request.phase == Phase.DECODING:
                break
            self.cluster.run(0.01)
        unused = next((worker for worker in range(8) if worker not in self.cluster.workers), None)
        if unused is not None:
            self.join(unused, roles, blocks, 4)
        if request.phase == Phase.DECODING and request.decode in self.cluster.workers:
            self.cluster.deliver(
                ev.WorkerDraining(request.decode) if drains else ev.Short(request.decode, request.attempt)
            )
        self.cluster.run(wait_s)

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK, roles=ROLES)
    def change_roles(self, pick: int, roles: tuple[str, ...]) -> None:
        self.cluster.deliver(ev.RolesSet(self.worker(pick).up.worker, roles))

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK, latency_s=st.sampled_from([0.0, 0.001, 0.3, 1.2]))
    def slow_down(self, pick: int, latency_s: float) -> None:
        self.worker(pick).latency_s = latency_s

    @rule(fault=FAULTS, count=st.integers(1, 5))
    def go_wrong(self, fault: str, count: int) -> None:
        self.cluster.faults[fault] += count

    @precondition(lambda self: any(worker.jobs for worker in self.cluster.workers.values()))
    @rule(pick=PICK, fault=st.booleans())
    def give_up(self, pick: int, fault: bool) -> None:
        """A worker preempts an attempt, or cannot compute it."""
        pairs = [(worker, attempt) for worker in self.cluster.workers.values() for attempt in worker.jobs]
        worker, attempt = pairs[pick % len(pairs)]
        worker.lose(attempt, "ENGINE" if fault else "preempted", counts=fault)

    @precondition(lambda self: any(worker.jobs for worker in self.cluster.workers.values()))
    @rule(pick=PICK)
    def warn(self, pick: int) -> None:
        """A worker says that memory will not last for an attempt, whatever that is."""
        pairs = [(worker, attempt) for worker in self.cluster.workers.values() for attempt in worker.jobs]
        worker, attempt = pairs[pick % len(pairs)]
        worker.say(ev.Short(worker.up.worker, attempt))

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK, hashes=st.lists(st.integers(0, 9), max_size=3), reset=st.booleans())
    def cache(self, pick: int, hashes: list[int], reset: bool) -> None:
        self.cluster.deliver(ev.KvChanged(self.worker(pick).up.worker, hashes, [], reset))

    @precondition(lambda self: self.cluster.workers)
    @rule(pick=PICK, depth=st.integers(0, 20), lent=st.sampled_from([0, 2, 5, 1000]))
    def cache_prefix(self, pick: int, depth: int, lent: int) -> None:
        """A worker says that it has so much of every prompt, and has less."""
        self.cluster.lent = lent
        self.cluster.deliver(ev.KvChanged(self.worker(pick).up.worker, list(range(depth)), [], True))

    @precondition(lambda self: self.cluster.workers)
    @rule(
        pick=PICK, prompt=st.integers(40, 80), depth=st.integers(5, 20), lent=st.sampled_from([0, 3, 1000]), wait_s=GAPS
    )
    def come_back(self, pick: int, prompt: int, depth: int, lent: int, wait_s: float) -> None:
        """A conversation of which one worker has a part, or says so."""
        self.cache_prefix(pick, depth, lent)
        self.rid += 1
        self.cluster.submit(request_of(self.rid, prompt, 6, hashes=list(range(prompt // BLOCK))))
        self.cluster.run(wait_s)

    @precondition(lambda self: self.cluster.heard)
    @rule(pick=PICK)
    def speak_late(self, pick: int) -> None:
        """Once more a word about an attempt that is over by now, also of workers that are gone."""
        event = self.cluster.heard[pick % len(self.cluster.heard)]
        if isinstance(event, LATE) and event.attempt not in self.known():
            before = self.cluster.core.state.next_attempt
            self.cluster.deliver(event)
            assert self.cluster.core.state.next_attempt == before, "a late word must change nothing"

    # --- time ----------

    @rule(seconds=GAPS)
    def wait(self, seconds: float) -> None:
        self.cluster.run(seconds)

    @rule(seconds=st.sampled_from([2.0, 5.0, 12.0]))
    def wait_long(self, seconds: float) -> None:
        self.cluster.run(seconds)


def run_machine(examples: int) -> None:
    machine = CoreMachine.TestCase
    machine.settings = settings(
        max_examples=examples, stateful_step_count=40, deadline=None, derandomize=examples < 500
    )
    machine().runTest()


def test_chaos() -> None:
    run_machine(250)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_much_chaos() -> None:
    run_machine(1500)


assert 0.97 * 64 * BLOCK > 80 + 3 + 12, "the largest request must fit the workers of the recovery"


def test_what_two_prompts_leave_of_their_last_blocks_is_no_room() -> None:
    """Found by the machine: 17 + 17 tokens fit into 36, but not 5 + 5 blocks of 4 into 9, and it tried for ever."""
    cluster = FakeCluster()
    cluster.join(worker_up(0, "prefill", blocks=9))
    cluster.join(worker_up(1, "decode", blocks=64)).latency_s = 0.05
    for rid in (1, 2):
        cluster.submit(request_of(rid, 17, 3, ttft_s=0.0))
    cluster.run_until_ended(5.0)
    assert not any(isinstance(event, ev.NoRoom) for event in cluster.heard)


def test_a_reservation_that_is_lost_while_its_prompt_is_on_the_way() -> None:
    """Found by the machine: the fetch had found nothing, and the worker computed for nobody."""
    state = CoreMachine()
    state.start(paths="auto", max_queue=2, held=0, blocks=(24, 9))
    state.wait_long(4.0)
    state.join(worker=2, roles=("decode",), blocks=24, max_batch=1)
    state.come_back(pick=1, prompt=40, depth=5, lent=0, wait_s=0.003)
    state.drain(pick=0)
    state.drain(pick=0)
    state.give_up(pick=0, fault=False)
    state.teardown()
