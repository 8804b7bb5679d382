"""What all baseline policies share: deterministic choices, sound placements, and every request served to its end."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.router.fake_cluster import FakeCluster
from tests.router.fake_worker import COST, request_of, worker_up
from tests.router.policy_cells import NOW, ask, cached, cell, decoding, in_line, placed, prompts

from twinpool.router import events as ev
from twinpool.router.policy import POLICIES, make_policy
from twinpool.router.policy.baselines import INFOS
from twinpool.router.request import NOBODY

NAMES = [info.name for info in INFOS]
SPLIT = ("prefill", "prefill", "decode", "decode")


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lower_id(name: str) -> None:
    view = cell(*SPLIT)
    first = [placed(make_policy(name), ask(), view) for _ in range(3)]
    assert first[0] == first[1] == first[2]
    if name not in ("random", "power_of_two", "session"):
        assert first[0].prefill == (2 if name == "colocated" else 0)
        assert make_policy(name).decode_for(ask(), view, NOW) == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_is_booked(name: str) -> None:
    view = cell(*SPLIT)
    for worker in (0, 1, 2, 3):
        cached(view, worker, 50)
    placement = placed(make_policy(name), ask(), view)
    assert placement.cached == 200
    assert placement.seconds == pytest.approx(COST.prefill(200, 200, 512))
    assert placement.path == ("local" if name == "colocated" else "split")
    assert placement.reason.startswith(name)
    assert (placement.prefill == placement.decode) == (placement.path == "local")


@pytest.mark.parametrize("name", NAMES)
def test_workers_of_both_pools_do_both(name: str) -> None:
    view = cell("both", "both")
    many, one = placed(make_policy(name), ask(), view), placed(make_policy(name), ask(max_tokens=1), view)
    assert (many.path, many.decode) == ("local", many.prefill)
    assert one.path == "local"


@pytest.mark.parametrize("name", NAMES)
def test_empty_pools_are_waited_for(name: str) -> None:
    policy = make_policy(name)
    assert policy.on_room(ask(), cell("prefill"), NOW) is None
    assert policy.decode_for(ask(), cell("prefill"), NOW) == NOBODY
    if name != "colocated":
        assert policy.on_room(ask(), cell("decode"), NOW) is None
        assert placed(policy, ask(max_tokens=1), cell("prefill")).decode == NOBODY


@pytest.mark.parametrize("name", NAMES)
def test_workers_that_are_too_small_are_left_out(name: str) -> None:
    view = cell("prefill", "prefill", "decode", "decode")
    for small in (0, 2):
        view.pool.workers[small].limit = 420
    placement = placed(make_policy(name), ask(421, 50), view)
    assert placement.prefill in (1, 3)
    assert placement.decode in (3, NOBODY)
    # 400 tokens are expected and would fit, up to 600 may come.
    assert make_policy(name).decode_for(ask(300, 300), view, NOW) == 3
    # Prompt fits, prompt and answer do not: one worker of both pools must hand over.
    both = cell("both", "decode")
    both.pool.workers[0].limit = 420
    split = placed(make_policy(name), ask(406, 50), both)
    assert split.path == ("local" if name == "colocated" else "split")
    assert split.decode in (1, NOBODY)


@pytest.mark.parametrize("name", NAMES)
def test_decode_workers_without_room_are_left_out(name: str) -> None:
    view = cell("prefill", "decode", "decode", max_batch=4)
    policy = make_policy(name)
    decoding(view, 1, 4)
    assert policy.decode_for(ask(), view, NOW) == 2
    view.pool.workers[2].book(7, 7, 3880 - 456)
    assert policy.decode_for(ask(406, 50), view, NOW) == 2
    assert policy.decode_for(ask(407, 50), view, NOW) == NOBODY
    request = ask(407, 50)
    request.attempt = 7  # what waits there already
    assert policy.decode_for(request, view, NOW) == 2


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_bound_at_arrival_however_long_the_line(name: str) -> None:
    view = cell("prefill", "decode")
    parameters = {"refuse": 0} if name == "mooncake_conductor" else None
    policy = make_policy(name, parameters)
    assert policy.early
    for worker in (0, 1):
        prompts(view, worker, 100, 38, 1.0)
        in_line(view, worker, 3000, 9.0)
    assert placed(policy, ask(), view).prefill == (1 if name == "colocated" else 0)
    assert policy.next_room(view, NOW) == math.inf


# --- whole lives ----------

LAYOUTS = (SPLIT, ("both", "both", "both"), ("prefill", "both", "decode"), ("both",))


def variants() -> list[tuple[str, dict[str, float | int | str]]]:
    """Every policy, the ones with other ways to decide once for each way."""
    found: list[tuple[str, dict[str, float | int | str]]] = []
    for name, info in POLICIES.items():
        found.append((name, {}))
        for key, parameter in info.parameters.items():
            others = [choice for choice in parameter.choices if choice != parameter.default]
            found += [(name, {key: choice}) for choice in others]
    return [*found, ("mooncake_conductor", {"refuse": 0}), ("colocated", {"chunk": 8}), ("lmetric", {"queued": 1})]


def up(worker: int, role: str) -> ev.WorkerUp:
    return worker_up(worker, *(("prefill", "decode") if role == "both" else (role,)), max_batch=3)


JOB = st.tuples(
    st.integers(1, 120),  # prompt tokens
    st.integers(1, 12),  # output tokens
    st.floats(0.0, 0.2),  # seconds before it
    st.integers(0, 3),  # which prompts share blocks
)


@settings(max_examples=120, deadline=None)
@given(
    variant=st.sampled_from(variants()),
    roles=st.sampled_from(LAYOUTS),
    jobs=st.lists(JOB, min_size=1, max_size=14),
    stop=st.none() | st.tuples(st.integers(0, 3), st.floats(0.0, 0.5)),
    no_room=st.integers(0, 2),
)
def test_every_request_ends_well(
    variant: tuple[str, dict[str, float | int | str]],
    roles: tuple[str, ...],
    jobs: list[tuple[int, int, float, int]],
    stop: tuple[int, float] | None,
    no_room: int,
) -> None:
    """Memory runs short, a worker dies and comes back under the same id, caches change: nobody is forgotten."""
    name, parameters = variant
    if name == "least_seconds" and parameters.get("paths") == "local":
        roles = ("both", "both", "both")
    cluster = FakeCluster(make_policy(name, parameters))
    cluster.faults["no_room"] = no_room
    for worker, role in enumerate(roles):
        cluster.join(up(worker, role))
    if stop is not None:
        gone, after = stop[0] % len(roles), stop[1]
        cluster.at(after, lambda: cluster.kill(gone))
        cluster.at(after + 0.3, lambda: ignore(cluster.join(up(gone, roles[gone]))))
    for rid, (prompt, output, delay, family) in enumerate(jobs):
        cluster.run(delay)
        hashes = [1000 * family + block for block in range(prompt // 4)]
        cluster.submit(request_of(rid, prompt, output, hashes=hashes))
        worker = rid % len(roles)
        if worker in cluster.workers:
            cluster.deliver(ev.KvChanged(worker, hashes[: rid + 1], hashes[rid + 1 :], False))
    cluster.run_until_ended(60.0)
    cluster.run(1.0)
    cluster.check_empty()
    for known in cluster.core.state.pool.workers.values():
        assert known.pending == 0
        assert not known.bound
    refused = [end.reason for end in cluster.ended.values() if isinstance(end, ev.Refuse)]
    if variant == ("mooncake_conductor", {}):
        assert set(refused) <= {"POLICY"}
    elif variant == ("least_seconds", {"late": "refuse"}):  # a dead worker makes others late
        assert set(refused) <= {"LATE"}
    else:
        assert not refused


def ignore(_: object) -> None:
    """For callbacks that must return nothing."""


@pytest.mark.parametrize("name", NAMES)
def test_lines_are_first_come_first_served(name: str) -> None:
    cluster = FakeCluster(make_policy(name, {"refuse": 0} if name == "mooncake_conductor" else None))
    cluster.join(worker_up(0))
    requests = [cluster.submit(request_of(rid, 100, 3)) for rid in range(9)]
    (worker,) = cluster.core.state.pool.workers.values()
    assert [bound.request.rid for bound in worker.bound] == list(range(2, 9))  # 248 tokens of KV: two at a time
    assert worker.active == 9
    assert len(cluster.core.state.queue) == 0
    cluster.run_until_ended(60.0)
    started = [request.placed_at for request in requests]
    assert started == sorted(started)
