"""Each baseline's rule against choices worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.router.fake_worker import COST
from tests.router.policy_cells import NOW, ask, cached, cell, decoding, in_line, placed, prompts

from twinpool.router.policy import make_policy
from twinpool.router.policy.base import Refusal, cached_tokens
from twinpool.router.policy.baselines.at_arrival import queue_seconds
from twinpool.router.policy.baselines.colocated import Colocated
from twinpool.router.policy.baselines.match import Memory
from twinpool.router.policy.baselines.pd import MooncakeConductor, free_percent, tokens_per_s
from twinpool.router.policy.baselines.preble import Preble

# --- simple rules ----------


def test_round_robin() -> None:
    for name in ("round_robin", "vllm_pd"):
        policy, view = make_policy(name), cell("prefill", "prefill", "prefill", "decode", "decode")
        prompts(view, 1, 9)
        pairs = [(p.prefill, p.decode) for p in (placed(policy, ask(), view) for _ in range(6))]
        assert pairs == [(0, 3), (1, 4), (2, 3), (0, 4), (1, 3), (2, 4)]
        assert [policy.decode_for(ask(), view, NOW) for _ in range(3)] == [3, 4, 3]


def test_random_is_uniform_seeded_and_the_same_when_asked_again() -> None:
    view = cell("prefill", "prefill", "prefill", "decode", "decode")
    policy, same, other = (make_policy("random", {"seed": seed}) for seed in (3, 3, 4))
    requests = [ask(8, rid=rid) for rid in range(3000)]
    chosen = [placed(policy, request, view).prefill for request in requests]
    assert chosen == [placed(same, request, view).prefill for request in reversed(requests)][::-1]
    assert chosen != [placed(other, request, view).prefill for request in requests]
    assert all(900 < count < 1100 for count in Counter(chosen).values())
    decoders = Counter(policy.decode_for(request, view, NOW) for request in requests)
    assert all(1400 < count < 1600 for count in decoders.values())
    retried = requests[0]
    draws = set()
    for retried.attempts in range(20):
        draws.add(placed(policy, retried, view).prefill)
    assert draws == {0, 1, 2}


def test_least_requests_counts_the_line() -> None:
    view = cell("prefill", "prefill", "decode", "decode")
    prompts(view, 0, 2)
    prompts(view, 1, 1, 3000)
    decoding(view, 2, 1)
    policy = make_policy("least_requests")
    assert placed(policy, ask(), view).prefill == 1
    in_line(view, 1, 10, 0.1)
    in_line(view, 1, 10, 0.1)
    assert placed(policy, ask(), view).prefill == 0
    assert policy.decode_for(ask(), view, NOW) == 3


def test_least_tokens() -> None:
    view = cell("prefill", "prefill", "decode", "decode")
    prompts(view, 0, 3, 10)
    prompts(view, 1, 1, 31)
    decoding(view, 2, 1, 300)
    decoding(view, 3, 5, 50)
    policy = make_policy("least_tokens")
    assert placed(policy, ask(), view).prefill == 0
    in_line(view, 0, 2, 0.1)
    assert placed(policy, ask(), view).prefill == 1
    assert policy.decode_for(ask(), view, NOW) == 3


def test_power_of_two() -> None:
    view = cell("prefill", "prefill", "prefill", "decode")
    prompts(view, 0, 2)
    prompts(view, 1, 1)
    policy = make_policy("power_of_two")
    chosen = Counter(placed(policy, ask(8, rid=rid), view).prefill for rid in range(3000))
    assert chosen[0] == 0  # the busiest of three is never the better of two
    assert 900 < chosen[1] < 1100  # only when drawn with 0: one pair of three
    assert policy.decode_for(ask(), view, NOW) == 3


def test_a_session_stays_and_moves_only_if_its_worker_goes() -> None:
    view = cell(*["prefill"] * 5, "decode")
    policy = make_policy("session")
    names = [f"session {number}" for number in range(1000)]
    homes = {name: placed(policy, ask(8, session=name), view).prefill for name in names}
    assert all(150 < count < 250 for count in Counter(homes.values()).values())
    prompts(view, 0, 5)
    view.pool.remove(3)
    for name, home in homes.items():
        now_at = placed(policy, ask(8, session=name), view).prefill
        assert now_at == home if home != 3 else now_at != 3
    assert placed(policy, ask(8), view).prefill == 1  # without a session: fewest requests


# --- cache or load ----------


def test_sglang_cache_aware() -> None:
    view = cell("prefill", "prefill", "prefill", "decode")
    policy = make_policy("sglang_cache_aware")
    cached(view, 2, 51)
    prompts(view, 2, 32)
    assert placed(policy, ask(), view).prefill == 2  # 204 of 400 tokens; 32 more requests are not too many
    cached(view, 2, 50)
    view.index.change(2, [], [50], False)
    assert placed(policy, ask(), view).prefill == 0  # 200 are no more than half
    cached(view, 2, 51)
    in_line(view, 2, 1, 0.1)
    assert placed(policy, ask(), view).prefill == 0  # 33 are
    for worker in (0, 1):
        prompts(view, worker, 30)
    in_line(view, 2, 1, 0.1)
    assert placed(policy, ask(), view).prefill == 2
    loose = make_policy("sglang_cache_aware", {"balance_abs": 3, "balance_rel": 1.1})
    assert placed(loose, ask(), view).prefill == 0  # 34 > 1.1 * 30
    assert placed(make_policy("sglang_cache_aware", {"balance_abs": 3, "balance_rel": 1.2}), ask(), view).prefill == 2


def test_what_was_routed_counts_at_once() -> None:
    view = cell("prefill", "prefill", "decode")
    for name in ("sglang_cache_aware", "llm_d"):
        routed = make_policy(name, {"matches": "routed"})
        first = placed(routed, ask(), view).prefill
        assert first == 0
        view.pool.workers[0].book(7, 7, 1)  # one more request than the other
        assert placed(routed, ask(), view).prefill == 0  # nothing was reported yet
        assert placed(make_policy(name), ask(), view).prefill == 1
        view.pool.workers[0].forget(7, NOW)
        cached(view, 1, 100)  # and this is not looked at
        assert placed(routed, ask(), view).prefill == 0
        view.index.forget(1)


def test_memory_drops_leaves_of_the_oldest_prompt_first() -> None:
    view = cell("prefill", "prefill")
    worker, other = view.pool.workers[0], view.pool.workers[1]
    memory = Memory(tokens=20)  # five blocks

    def depth(hashes: list[int]) -> int:
        memory.check_integrity()
        return cached_tokens(worker, 100, memory.stairs(hashes, [worker, other])) // 4

    memory.sent(worker, [1, 2, 3])
    memory.sent(worker, [1, 2, 13])
    assert (depth([1, 2, 3]), depth([1, 2, 13])) == (3, 3)
    memory.sent(worker, [4, 5])
    assert (depth([1, 2, 3]), depth([1, 2, 13]), depth([4, 5])) == (2, 3, 2)
    memory.sent(worker, list(range(20, 28)))  # longer than all memory: its beginning stays
    assert (depth([1]), depth([4]), depth(list(range(20, 28)))) == (0, 0, 5)
    memory.sent(other, [1])
    view.pool.remove(0)
    replaced = cell("prefill").pool.workers[0]
    assert memory.stairs([20], [replaced, other]) == []
    assert memory.stairs([1], [replaced, other])[0].mask == 0b10


def test_lmetric() -> None:
    view = cell("prefill", "prefill", "decode")
    cached(view, 0, 75)  # 100 tokens left, 400 on the other
    prompts(view, 0, 3)
    policy = make_policy("lmetric")
    assert placed(policy, ask(), view).prefill == 0  # 100 * 4 = 400 * 1
    in_line(view, 0, 500, 0.1)
    assert placed(policy, ask(), view).prefill == 1
    prompts(view, 1, 1)
    assert placed(policy, ask(), view).prefill == 0  # 100 * 5 < 400 * 2
    assert placed(make_policy("lmetric", {"queued": 1}), ask(), view).prefill == 1  # 630 * 5 > 410 * 2


def test_llm_d_scores_both_pools() -> None:
    view = cell("prefill", "prefill", "prefill", "decode", "decode", "decode")
    policy = make_policy("llm_d")
    for first in (0, 3):
        cached(view, first, 51)
        decoding(view, first, 2)
        decoding(view, first + 1, 1)
    assert placed(policy, ask(), view).prefill == 0  # 1.02 + 0 > 1
    assert policy.decode_for(ask(), view, NOW) == 3
    cached(view, 1, 27)
    assert placed(policy, ask(), view).prefill == 1  # 0.54 + 0.5
    view.index.forget(0)
    view.index.forget(3)
    assert placed(policy, ask(), view).prefill == 1
    assert policy.decode_for(ask(), view, NOW) == 5
    assert placed(make_policy("llm_d", {"prefix_weight": 0.9}), ask(), view).prefill == 2


def test_preble_exploits_or_explores() -> None:
    view = cell("prefill", "prefill", "decode")
    policy = Preble(window_s=10.0)
    seconds = COST.prefill(400, 0, 512)
    assert [placed(policy, ask(), view).prefill for _ in range(3)] == [0, 1, 0]
    cached(view, 0, 51)
    assert placed(policy, ask(), view).prefill == 0  # 204 matched, whatever the load
    short = COST.prefill(196, 204, 512)
    window = policy._window
    assert window.seconds == pytest.approx({"w0": 2 * seconds + short, "w1": seconds})
    assert window.hit_share("w0") == pytest.approx(204 / 1200)
    cached(view, 0, 50)
    view.index.change(0, [], [50], False)
    left = COST.prefill(200, 200, 512)
    assert 2 * seconds + short + (204 / 1200 + 1) * left > 2 * seconds
    assert placed(policy, ask(), view).prefill == 1  # half is not more than half
    assert placed(policy, ask(), view, NOW + 11.0).prefill == 0  # all that is forgotten
    assert window.seconds == pytest.approx({"w0": left})


def test_preble_counts_the_answer_where_one_worker_gives_it() -> None:
    policy = Preble()
    placed(policy, ask(400, 50), cell("both", "both"))
    assert policy._window.seconds == pytest.approx({"w0": COST.prefill(400, 0, 512) + 50 * COST.decode(1, 400)})


# --- two pools ----------


def test_dynamo() -> None:
    view = cell("prefill", "prefill", "decode", "decode")
    cached(view, 0, 50)
    prompts(view, 0, 1, 200)
    policy = make_policy("dynamo")
    assert placed(policy, ask(), view).prefill == 0  # (200 + 200) / 4 = (0 + 400) / 4
    in_line(view, 0, 1, 0.1)
    assert placed(policy, ask(), view).prefill == 1
    decoding(view, 2, 1, 41)
    decoding(view, 3, 4, 10)
    assert policy.decode_for(ask(), view, NOW) == 3  # 11 blocks and 10
    both = cell("both", "both")
    decoding(both, 0, 1, 80)  # 20 blocks
    prompts(both, 1, 1, 60)  # 15 blocks
    assert placed(policy, ask(), both).prefill == 1
    assert placed(make_policy("dynamo", {"overlap_weight": 2.0}), ask(), both).prefill == 0


def test_aibrix_prefill() -> None:
    view = cell("prefill", "prefill", "prefill", "decode")
    policy = make_policy("aibrix_pd")
    cached(view, 2, 6)  # 6 % less is worth 0.6 of Q / max Q
    prompts(view, 0, 7)
    prompts(view, 1, 10)
    prompts(view, 2, 10)
    assert placed(policy, ask(), view).prefill == 2  # 10.7, 11 and 9.4 + 1
    for _ in range(3):
        in_line(view, 2, 1, 0.1)
    assert placed(policy, ask(), view).prefill == 0  # 13 of mean 10, deviation 2.4: left out
    assert placed(make_policy("aibrix_pd", {"deviations": 2.0}), ask(), view).prefill == 2
    for _ in range(30):
        in_line(view, 1, 1, 0.1)
    assert placed(make_policy("aibrix_pd", {"deviations": 10.0}), ask(), view).prefill == 0  # 40 - 7 > 32


def test_aibrix_decode() -> None:
    view = cell("prefill", "decode", "decode", "decode")
    policy = make_policy("aibrix_pd")
    decoding(view, 1, 4, 100)
    decoding(view, 3, 2, 1000)
    assert policy.decode_for(ask(), view, NOW) == 2  # idle
    decoding(view, 2, 3, 600)
    one, two, three = (view.pool.workers[number] for number in (1, 2, 3))
    assert [free_percent(worker) for worker in (one, two, three)] == [90.0, 55.0, 50.0]
    rates = [tokens_per_s(worker) for worker in (one, two, three)]
    fastest = 4 / COST.decode(4, 400)
    assert rates == pytest.approx([fastest, 3 / COST.decode(3, 1800), 2 / COST.decode(2, 2000)])
    scores = [
        1.0,
        (0.75 + 1 - rates[1] / fastest) / (55 / 90),
        (0.5 + 1 - rates[2] / fastest) / (50 / 90),
    ]
    assert policy.decode_for(ask(), view, NOW) == 1 + scores.index(min(scores)) == 1
    assert make_policy("aibrix_pd", {"throughput_gap": 100.0}).decode_for(ask(), view, NOW) == 3  # the slowest
    assert make_policy("aibrix_pd", {"decode_gap": 2}).decode_for(ask(), view, NOW) == 3  # fewest requests
    full = cell("decode").pool.workers[0]
    full.book(1, 1, 4000)
    assert free_percent(full) == 0.1


def test_mooncake_takes_the_earliest_first_token() -> None:
    view = cell("prefill", "prefill", "decode", "decode")
    policy = MooncakeConductor()
    cached(view, 1, 50)
    prompts(view, 1, 1, 10, 0.01)
    decoding(view, 2, 2, 100)
    assert COST.prefill(200, 200, 512) + 0.01 < COST.prefill(400, 0, 512)
    placement = placed(policy, ask(), view)
    assert (placement.prefill, placement.decode) == (1, 3)
    in_line(view, 1, 100, 0.015)
    assert queue_seconds(view.pool.workers[1], NOW + 0.004) == pytest.approx(0.021)
    assert placed(policy, ask(), view).prefill == 0


def test_mooncake_refuses_what_would_be_late() -> None:
    view = cell("prefill", "decode")
    seconds = COST.prefill(400, 0, 512)
    prompts(view, 0, 1, 10, 1.2 - seconds)
    policy, request = MooncakeConductor(), ask()
    refusal = policy.on_room(request, view, NOW)
    assert isinstance(refusal, Refusal)
    assert refusal.retry_s == pytest.approx(0.2)
    assert "after 1.20 s and wanted within 1.00 s" in refusal.message
    assert placed(MooncakeConductor(refuse=0), request, view).prefill == 0
    request.attempts = 1
    assert placed(policy, request, view).prefill == 0


@pytest.mark.parametrize("roles", [("prefill", "decode"), ("both",)])
def test_mooncake_refuses_what_would_be_slow(roles: tuple[str, ...]) -> None:
    view = cell(*roles)
    decoding(view, len(roles) - 1, 5, 100)
    step = COST.decode(6, 900)
    policy = MooncakeConductor()
    assert placed(policy, ask(itl_s=1.01 * step), view).prefill == 0
    refusal = policy.on_room(ask(itl_s=0.99 * step), view, NOW)
    assert isinstance(refusal, Refusal)
    assert "between tokens" in refusal.message
    assert placed(policy, ask(max_tokens=1, itl_s=0.99 * step), cell("prefill", "decode")).prefill == 0


def test_colocated_predicts_the_first_token() -> None:
    view = cell("decode", "decode")
    one, two = view.pool.workers[0], view.pool.workers[1]
    policy = Colocated()
    request = ask(itl_s=0.03)
    prompts(view, 0, 2, 100, 0.05)
    assert policy.ttft(request, one, 0, NOW) == pytest.approx(0.1 + COST.prefill(400, 0, 512))
    decoding(view, 1, 4, 100, itl_s=0.03)
    chunk = COST.largest_chunk(0.027, 200, 4, 400)
    steps = -(-400 // chunk)
    assert steps > 1
    step = COST.step([(chunk, 200)], 4, 400)
    assert policy.ttft(request, two, 0, NOW) == pytest.approx(COST.decode(4, 400) / 2 + steps * step)
    assert placed(policy, request, view).prefill == 1
    fixed = COST.decode(4, 400) / 2 + 4 * COST.step([(100, 200)], 4, 400)
    assert Colocated(chunk=100).ttft(request, two, 0, NOW) == pytest.approx(fixed)
    hopeless = ask(itl_s=0.001)  # a block a step goes on all the same
    assert policy.ttft(hopeless, two, 0, NOW) > 100 * COST.decode(4, 400)


def test_colocated_leaves_prefill_workers_idle() -> None:
    policy = Colocated()
    assert policy.needs(ask()) == (("decode",),)
    assert placed(policy, ask(), cell("prefill", "decode")).prefill == 1
    assert make_policy("dynamo").needs(ask()) == (("prefill", "decode"),)
    assert make_policy("dynamo").needs(ask(max_tokens=1)) == (("prefill",),)
