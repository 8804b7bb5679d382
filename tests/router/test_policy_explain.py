"""The tables of an explanation: the figures that ``least_seconds`` compares, and why a worker was no candidate."""

from __future__ import annotations

import math

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tests.router.policy_views import NOW, ask, busy, cell, decoding

from twinpool.router.policy import LeastSeconds, Passed, Placement, Refusal, View, make_policy
from twinpool.router.policy import explain as ex
from twinpool.router.policy.explain import DecodeRow, PromptRow, decode_rows, prompt_rows, row_of, why_waits
from twinpool.router.request import NOBODY, Request

SAME_S = 1e-9
ROLES = ("prefill", "decode", "both")


def prompts(view: View, request: Request, policy: LeastSeconds | None = None) -> dict[tuple[int, str], PromptRow]:
    rows = prompt_rows(policy or LeastSeconds(), request, view, NOW)
    return {(row.worker, row.path): row for row in rows}


def decoders(view: View, request: Request) -> dict[int, DecodeRow]:
    return {row.worker: row for row in decode_rows(LeastSeconds(), request, view)}


# --- why a worker is no candidate ----------


def test_a_free_worker_is_a_candidate_with_all_figures() -> None:
    view, request = cell("prefill", "decode"), ask(400, 50)
    view.index.change(0, list(range(25)), [], False)
    row = prompts(view, request)[0, "split"]
    worker = view.pool.workers[0]
    assert (row.name, row.why_not, row.cached, row.free_s) == ("w0", "", 100, 0.0)
    assert row.prompt_s == row.first_s == worker.prefill_s(300, 100)
    assert row.slack_s == pytest.approx(1.0 - row.first_s)
    assert row.memory == 400 / worker.limit


def test_why_no_prompt_goes_to_a_prefill_worker() -> None:
    view = cell("prefill", "prefill", "prefill", "prefill", "prefill", "decode", blocks=200)
    workers = view.pool.workers
    busy(view, 0, 0.021)
    workers[1].full = True
    workers[2].book(7, 7, 500)
    workers[3].draining = True
    view.pool.sort()
    why = {worker: row.why_not for (worker, path), row in prompts(view, ask(400)).items() if path == "split"}
    assert why == {0: "busy over 20 ms", 1: ex.SAID_FULL, 2: ex.NO_MEMORY, 3: ex.DRAINS, 4: ""}
    assert prompts(view, ask(790))[4, "split"].why_not == ex.TOO_SMALL
    assert prompts(cell("prefill"), ask())[0, "split"].why_not == ex.NO_DECODER
    assert prompts(cell("prefill"), ask(400, 1))[0, "split"].why_not == ""


def test_why_no_prompt_goes_to_a_decode_worker() -> None:
    view = cell(*["decode"] * 7)
    workers = view.pool.workers
    busy(view, 0, 0.5)
    workers[6].book(6, 6, 10)
    workers[6].commit_prefill(6, 0.01, 10, 0, NOW, fills=True)
    workers[1].book(7, 7, int(workers[1].limit) - 400)
    workers[2].full = True
    decoding(view, 3, 8, itl_s=9.0)
    decoding(view, 4, 2, itl_s=0.012)
    why = {worker: row.why_not for (worker, path), row in prompts(view, ask()).items() if path == "local"}
    assert why == {
        0: "busy over 20 ms", 1: ex.NO_MEMORY, 2: ex.SAID_FULL, 3: ex.BATCH_FULL, 4: ex.SMALL_CHUNK, 5: "",
        6: ex.PROMPTS,
    }  # fmt: skip
    assert prompts(view, ask(3900, 50))[5, "local"].why_not == ex.TOO_SMALL
    view.pool.workers[5].book(8, 8, int(0.6 * workers[5].capacity))
    assert prompts(view, ask(2000, 50))[5, "local"].why_not == ex.NO_MEMORY


def test_a_local_worker_that_is_earlier_needs_time_in_hand() -> None:
    view = cell("prefill", "decode")
    busy(view, 0, 0.019)
    first_s = prompts(view, ask())[1, "local"].first_s
    tight = ask(deadline=NOW + 1.04 * first_s)
    assert prompts(view, tight)[1, "local"].why_not == ex.MARGIN
    assert prompts(view, ask(deadline=NOW + 1.06 * first_s))[1, "local"].why_not == ""
    answer = LeastSeconds().on_room(tight, view, NOW)
    assert not isinstance(answer, Placement) or answer.path == "split"


def test_paths_of_the_policy() -> None:
    view, request = cell("prefill", "decode", "both"), ask()
    assert set(prompts(view, request, LeastSeconds("split"))) == {(0, "split"), (2, "split")}
    assert set(prompts(view, request, LeastSeconds("local"))) == {(1, "local"), (2, "local")}
    assert len(prompts(view, request)) == 4


def test_why_nothing_is_decoded_at_a_worker() -> None:
    view = cell("decode", "decode", "decode", "decode", "decode", "prefill")
    workers = view.pool.workers
    workers[0].full = workers[1].draining = True
    workers[2].book(7, 7, 3700)
    decoding(view, 3, 8, itl_s=9.0)
    decoding(view, 4, 4, itl_s=0.009)
    view.pool.sort()
    rows = decoders(view, ask())
    assert {worker: row.why_not for worker, row in rows.items()} == {
        0: ex.SAID_FULL, 1: ex.DRAINS, 2: ex.NO_MEMORY, 3: ex.BATCH_FULL, 4: ex.BREAKS_ITL,
    }  # fmt: skip
    assert rows[4].itl > 1.0 > rows[4].memory
    assert rows[4].batch == 4


# --- why it waits, in words ----------


def sentence(view: View, request: Request, paths: str = "auto") -> str:
    policy = LeastSeconds(paths, fetch="off")
    answer = policy.on_room(request, view, NOW)
    assert not isinstance(answer, Placement)
    return why_waits(policy, request, prompt_rows(policy, request, view, NOW), answer)


def test_waiting_in_words() -> None:
    view = cell("prefill", "prefill", "decode")
    busy(view, 0, 0.03)
    view.index.change(0, list(range(100)), [], False)
    view.pool.workers[2].full = True
    assert sentence(view, ask()).startswith("w0 is busy and still earlier: ")
    busy(view, 1, 0.03)
    assert sentence(view, ask()) == "no worker has room for it: others may go before it"
    assert "at least: it goes behind all that can be in time" in sentence(cell("prefill", "decode"), ask(deadline=NOW))
    crowded = cell("prefill", "decode")
    crowded.pool.workers[0].book(7, 7, 1999)
    crowded.pool.workers[1].full = True
    assert "too much KV waits" in sentence(crowded, ask(), "split")
    assert why_waits(LeastSeconds(), ask(), [], Refusal("no", 1.0)) == "no"


# --- the same figures as the policy's ----------


@st.composite
def cells(draw: st.DrawFn) -> tuple[View, Request]:
    """Any cell of up to five workers, with work of all kinds in it."""
    roles = draw(st.lists(st.sampled_from(ROLES), min_size=1, max_size=5))
    view = cell(*roles, round_trip_s=draw(st.sampled_from((0.001, 0.05))))
    for number, worker in view.pool.workers.items():
        worker.full = draw(st.integers(0, 9)) == 0
        worker.draining = draw(st.integers(0, 9)) == 0
        worker.pace.prefill = draw(st.sampled_from((1.0, 1.3)))
        if draw(st.booleans()):
            busy(view, number, draw(st.sampled_from((0.004, 0.02, 0.06, 0.3))), attempt=50 + number)
        if "decode" in worker.roles and draw(st.booleans()):
            decoding(view, number, draw(st.integers(1, 8)), draw(st.integers(1, 300)), draw(st.sampled_from((0.02, 1))))
        if draw(st.integers(0, 3)) == 0:
            worker.book(9, 9, draw(st.integers(0, 3000)))
        view.index.change(number, list(range(draw(st.integers(0, 60)))), [], False)
    view.pool.sort()
    request = ask(draw(st.integers(1, 3900)), draw(st.integers(1, 200)), deadline=NOW + draw(st.floats(-0.1, 2.0)))
    request.late = draw(st.booleans())
    return view, request


@given(cells(), st.sampled_from(("auto", "split", "local")))
def test_the_rows_are_what_the_policy_decides_by(drawn: tuple[View, Request], paths: str) -> None:
    view, request = drawn
    policy = LeastSeconds(paths)
    answer = policy.on_room(request, view, NOW)
    rows = prompt_rows(policy, request, view, NOW)
    event(type(answer).__name__)
    if isinstance(answer, Placement):
        check_placement(answer, rows, view, request)
    else:
        assert not isinstance(answer, Refusal)
        check_wait(answer, rows, view, request)
        assert why_waits(policy, request, rows, answer)


def check_placement(answer: Placement, rows: list[PromptRow], view: View, request: Request) -> None:
    """The chosen worker is a candidate with the same prediction, and none is earlier."""
    row = row_of(rows, answer)
    assert row is not None
    assert row.why_not == ""
    assert (row.cached, row.prompt_s) == (answer.cached, answer.seconds)
    assert f"first token in {1000 * row.first_s:.0f} ms" in answer.reason
    if not any(other.why_not == ex.MARGIN for other in rows):
        assert row.first_s <= min(other.first_s for other in rows if not other.why_not) + SAME_S
    if answer.path == "split" and request.left > 1:
        able = [other for other in decode_rows(LeastSeconds(), request, view) if not other.why_not]
        assert answer.decode == (able[0].worker if able else NOBODY)


def check_wait(answer: Passed | None, rows: list[PromptRow], view: View, request: Request) -> None:
    """No candidate, or one that a rule about busy workers, deadlines or waiting KV kept back."""
    able = [row for row in rows if not row.why_not]
    never = ("", ex.DRAINS, ex.TOO_SMALL, ex.NO_DECODER)  # any other prefill worker will have room some time
    soonest = min([row.first_s for row in rows if row.path == "split" and row.why_not not in never], default=math.inf)
    later = [row for row in able if row.slack_s < SAME_S or soonest < row.first_s + SAME_S]
    nowhere = all(row.why_not for row in decode_rows(LeastSeconds(), request, view))
    assert nowhere or not able or (later == able and answer is not None)


def test_kv_that_waits_goes_first() -> None:
    view, request = cell("prefill", "decode"), ask()
    assert decoders(view, request)[1].why_not == ""
    other = ask()
    other.rid = 2
    view.unhomed = {2: other}
    assert decoders(view, request)[1].why_not == ex.IN_LINE
    assert decoders(view, other)[1].why_not == "", "it is the one that waits"
    answer = LeastSeconds("split").on_room(request, view, NOW)
    assert isinstance(answer, Placement)
    assert answer.decode == NOBODY


def test_a_decode_worker_is_given_its_next_prompt_just_in_time() -> None:
    view, request = cell("decode", "prefill"), ask()
    busy(view, 1, 0.5)
    busy(view, 0, 0.1)
    assert not isinstance(LeastSeconds().on_room(request, view, NOW), Placement)
    view = cell("decode", "prefill")
    busy(view, 1, 0.5)
    busy(view, 0, 0.01)
    answer = LeastSeconds().on_room(request, view, NOW)
    assert isinstance(answer, Placement)
    assert (answer.prefill, answer.path) == (0, "local")


def test_where_no_decode_worker_has_room_it_decodes_where_it_is_computed() -> None:
    view, request = cell("prefill", "prefill", "decode"), ask()
    view.pool.workers[2].full = True
    busy(view, 0, 0.5)
    answer = LeastSeconds().on_room(request, view, NOW)
    assert isinstance(answer, Placement)
    assert (answer.prefill, answer.decode, answer.path) == (1, 1, "local")
    assert answer.reason.endswith("no decode worker has room")
    view.pool.workers[1].book(7, 7, 3700)  # nor has that one, for the answer
    answer = LeastSeconds().on_room(request, view, NOW)
    assert not isinstance(answer, Placement) or answer.decode == NOBODY


@given(cells())
def test_decode_rows_are_the_scores_of_the_policy(drawn: tuple[View, Request]) -> None:
    view, request = drawn
    need = request.length + request.output_to_come
    for row in decode_rows(LeastSeconds(), request, view):
        worker = view.pool.workers[row.worker]
        score = LeastSeconds()._decode_score(worker, request, need)
        if not worker.draining:
            assert score == (math.inf if row.why_not else row.score)


# --- other policies ----------


@pytest.mark.parametrize("name", ["round_robin", "dynamo", "mooncake_conductor", "sglang_cache_aware"])
def test_other_policies_have_the_same_facts(name: str) -> None:
    view, request = cell("prefill", "prefill", "decode"), ask()
    busy(view, 0, 0.5)
    view.pool.workers[1].draining = True
    view.pool.sort()
    policy = make_policy(name)
    rows = {row.worker: row for row in prompt_rows(policy, request, view, NOW)}
    assert {worker: row.why_not for worker, row in rows.items()} == {0: "", 1: ex.DRAINS, 2: ex.OUT}
    assert rows[0].free_s == pytest.approx(0.5)
    answer = policy.on_room(request, view, NOW)
    assert not isinstance(answer, Placement) or row_of(list(rows.values()), answer) is rows[0]


def test_colocated_takes_workers_that_decode() -> None:
    rows = prompt_rows(make_policy("colocated"), ask(), cell("prefill", "both"), NOW)
    assert [(row.worker, row.path, row.why_not) for row in rows] == [(1, "local", ""), (0, "split", ex.OUT)]
