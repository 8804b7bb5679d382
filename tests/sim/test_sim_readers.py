"""Readers: every trace format as published, and every mistake in it."""

from __future__ import annotations

import contextlib
import gzip
from array import array
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twinpool.errors import ConfigError
from twinpool.router.cell import Slo, Submission
from twinpool.router.fanout import Fanout
from twinpool.router.flow import Flow
from twinpool.router.request import Request
from twinpool.router.stream import OutStream
from twinpool.sampling import SamplingParams
from twinpool.sim import readers
from twinpool.sim.readers import read_trace
from twinpool.sim.trace import Trace, is_chained
from twinpool.sim.trace_columns import TraceError

FIRST = '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}'
SECOND = '{"timestamp": 1500, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]}'
MOONCAKE_TEXT = f"{FIRST}\n{SECOND}\n"
AZURE_TEXT = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:59:59.9799600,4808,10\r\n"
    "2023-11-16 19:00:04.0319600,3180,8\r\n"
    "2023-11-17 00:00:00.0000001,110,27"
)
AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
AZURE_ARRIVALS = [0.0, 4.052, 18000.0200401]
BURST_TEXT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,230,1317,API log\n"
)
BAILIAN_TEXT = (
    '{"chat_id": 7, "parent_chat_id": -1, "timestamp": 0.25, "input_length": 33, "output_length": 3, "type": "text", '
    '"turn": 1, "hash_ids": [10, 11, 12]}\n'
    '{"chat_id": 9, "parent_chat_id": 7, "timestamp": 3.5, "input_length": 48, "output_length": 4, "type": "text", '
    '"turn": 2, "hash_ids": [10, 11, 13]}\n'
)


def read(folder: Path, text: str | bytes, *, skip_bad: bool = False) -> tuple[Trace, list[str]]:
    path = folder / "some.thing"  # names say nothing
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    trace, notices = read_trace(path, skip_bad=skip_bad)
    trace.check_integrity()
    return trace, [notice.removeprefix(f"{path}: ") for notice in notices]


# --- formats ------------------------------------------------------------------------------------------------------


def test_mooncake(tmp_path: Path) -> None:
    trace, notices = read(tmp_path, MOONCAKE_TEXT)
    assert (trace.name, trace.block_tokens, len(trace), notices) == ("some", 512, 2, [])
    assert (trace.arrival.tolist(), trace.prompt.tolist(), trace.output.tolist()) == ([0, 1.5], [1100, 1024], [5, 7])
    assert [trace.block_hashes(i) for i in range(2)] == [[0, 1], [0, 3]]  # full blocks only
    assert trace.tail is not None
    assert trace.tail.tolist() == [2, -1]
    assert (trace.after, trace.think, trace.session, trace.klass, trace.tenant) == (None,) * 5


def test_our_own_fields(tmp_path: Path) -> None:
    lines = (
        '{"timestamp":0.001,"input_length":40,"output_length":5,"hash_ids":[4,5],"block_tokens":16,"session":"a"}\n\n'
        '{"timestamp":9,"input_length":47,"output_length":5,"hash_ids":[4,5,6],"block_tokens":16,"session":"a",'
        '"after":0,"think":1.25,"class":"batch","tenant":"acme"}\n'
    )
    trace, _ = read(tmp_path, lines)
    assert trace.block_tokens == 16
    assert trace.arrival.tolist() == [0.000001, 0.009]
    assert (trace.after, trace.think) == (array("q", [-1, 0]), array("d", [0, 1.25]))
    assert (trace.session, trace.klass, trace.tenant) == (["a", "a"], ["", "batch"], ["", "acme"])


@pytest.mark.parametrize(
    "text",
    [
        AZURE_TEXT,
        AZURE_TEXT.replace("1-16 ", "1-16T").replace("1-17 ", "1-17T"),
        AZURE_TEXT.replace(",4808", "+00:00,4808").replace(",3180", "+00:00,3180").replace(",110", "+00:00,110"),
        AZURE_TEXT.replace(",4808", "Z,4808").replace(",3180", "Z,3180").replace(",110", "Z,110"),
        AZURE_TEXT.replace("2023-11-16 18:59:59.9799600,", '"2023-11-16 13:59:59.97996-05:00",').replace(
            ",3180", "Z,3180"
        ),
        "\ufeff" + AZURE_TEXT,
    ],
)
def test_azure_stamps(tmp_path: Path, text: str) -> None:
    trace, notices = read(tmp_path, text)
    assert trace.arrival.tolist() == AZURE_ARRIVALS
    assert (trace.prompt.tolist(), trace.output.tolist(), notices) == ([4808, 3180, 110], [10, 8, 27], [])
    assert (trace.block_tokens, trace.offsets.tolist(), trace.tail) == (0, [0, 0, 0, 0], None)


def test_azure_without_fraction(tmp_path: Path) -> None:
    rows = "2024-05-10 00:00:00+00:00,1,2\n2024-05-10 00:00:00.009930+00:00,1,2\n"
    assert read(tmp_path, AZURE_HEADER + rows)[0].arrival.tolist() == [0.0, 0.00993]


def test_burstgpt(tmp_path: Path) -> None:
    trace, _ = read(tmp_path, BURST_TEXT)
    assert (trace.arrival.tolist(), trace.prompt.tolist(), trace.output.tolist()) == ([0, 40.5], [472, 1087], [18, 230])
    second = BURST_TEXT.replace("Timestamp,", "Timestamp,Session ID,").replace("5,ChatGPT", "5,s1,ChatGPT")
    assert read(tmp_path, second.replace("45.5,", "45.5,,"))[0].session == ["s1", ""]


def test_bailian(tmp_path: Path) -> None:
    trace, _ = read(tmp_path, BAILIAN_TEXT)
    assert (trace.block_tokens, trace.arrival.tolist()) == (16, [0.25, 3.5])
    assert [trace.block_hashes(i) for i in range(2)] == [[10, 11], [10, 11, 13]]
    assert trace.session == ["7", "7"]


@pytest.mark.parametrize("text", [MOONCAKE_TEXT, AZURE_TEXT, BURST_TEXT, BAILIAN_TEXT])
def test_gzip_and_slabs_change_nothing(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = read(tmp_path, text)
    assert read(tmp_path, gzip.compress(text.encode())) == plain
    monkeypatch.setattr(readers, "SLAB", 7)
    assert read(tmp_path, text) == plain
    assert read(tmp_path, "\n" + text.replace("\n", "\n \n") + "\n") == plain  # blank lines


# --- the router's request log -------------------------------------------------------------------------------------


def log_line(i: int, prompt: int, output: int, hashes: int, arrival: float, outcome: str = "ok") -> str:
    sampling = SamplingParams(max_tokens=50)
    submission = Submission(
        request_id=f"r{i}",
        prompt=array("I", [1]) * prompt,
        sampling=sampling,
        slo=Slo(ttft_s=1, ttft_factor=2, itl_s=0.05),
        tenant="acme",
        klass="batch",
        session="s",
    )
    flow = Flow(submission, OutStream(0, lambda: None, Fanout()), arrival)
    flow.output.extend([3] * output)
    request = Request(i, prompt, 50, [(1 << 61) + j for j in range(hashes)], ttft_s=1, ttft_factor=2, itl_s=0.05)
    request.arrival = arrival
    return flow.record(request, outcome, 1.7e9 + arrival + 2, arrival + 2) + "\n"


def test_request_log(tmp_path: Path) -> None:
    # written as requests end; the second was resumed, so its hashes go on into its output; the last was refused
    text = log_line(0, 100, 20, 6, 5.25) + log_line(1, 70, 40, 6, 1.5) + log_line(2, 31, 0, 1, 2.0, "OVERLOADED")
    trace, notices = read(tmp_path, text)
    assert trace.block_tokens == 16
    assert trace.arrival.tolist() == [0, 0.5, 3.75]
    assert (trace.prompt.tolist(), trace.output.tolist()) == ([70, 31, 100], [40, 30, 20])
    assert [len(trace.block_hashes(i)) for i in range(3)] == [4, 1, 6]
    assert (trace.tenant, trace.klass, trace.session) == (["acme"] * 3, ["batch"] * 3, ["s"] * 3)
    assert notices == [
        "1 requests drew no token (refused or lost); they count with the mean output of the others, 30 tokens"
    ]


def test_block_size_of_a_request_log(tmp_path: Path) -> None:
    assert read(tmp_path, log_line(0, 1000, 9, 31, 0.0))[0].block_tokens == 32  # 1000 // 31 is not 16
    assert (
        read(tmp_path, log_line(0, 1000, 9, 10, 0.0).replace('{"v"', '{"block_tokens":100,"v"'))[0].block_tokens == 100
    )
    with pytest.raises(ConfigError, match="fit no block size"):
        read(tmp_path, log_line(0, 1000, 1, 10, 0.0))
    with pytest.raises(ConfigError, match="nothing tells how long answers are"):
        read(tmp_path, log_line(0, 1000, 0, 62, 0.0))


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("\n  \n", "the file is empty"),
        (AZURE_HEADER, "no requests in it"),
        ("a,b\n1,2\n", "line 1: no header of a trace: columns are a, b; wanted are TIMESTAMP, ContextTokens"),
        ('{"a": 1}\n', "line 1: no format known here"),
        ("[1]\n", "line 1: no format known here"),
        ('{"timestamp": 0, "input_le', "line 1: no JSON"),
        (MOONCAKE_TEXT + "{oops}\n", "line 3: no JSON"),
        (MOONCAKE_TEXT + "[]\n", "line 3: no JSON object"),
        (MOONCAKE_TEXT.replace("7", "0"), "line 2: output_length is 0, but .* at least 1 token; --skip-bad"),
        (MOONCAKE_TEXT.replace("1024", "0"), "line 2: input_length is 0"),
        (MOONCAKE_TEXT.replace("1500", "-1"), "line 2: timestamp is -1: expected float >= 0"),
        (MOONCAKE_TEXT.replace("1500", '"noon"'), 'line 2: timestamp is "noon": expected float, got str'),
        (MOONCAKE_TEXT.replace("1500", "1e999"), "line 2: "),
        (MOONCAKE_TEXT.replace("[0, 3]", "[0, null]"), "line 2: hash_ids is .*: expected int, got null"),
        (f'{FIRST}\n{{"timestamp": 1, "input_length": 4}}', "line 2: output_length is missing"),
        (f'{FIRST}\n{SECOND[:-1]}, "after": 1}}', "line 2: after is 1: one follows a record above it"),
        (f'{FIRST}\n{SECOND[:-1]}, "block_tokens": 16}}', "line 2: block_tokens is 16, but 512 above"),
        (AZURE_HEADER + "2023-11-16 18:17:03.97,5\n", "line 2: 2 columns where the header has 3"),
        (AZURE_TEXT.replace(",27", ",0"), "line 4: GeneratedTokens is 0"),
        (AZURE_TEXT.replace(",27", ",-3"), "line 4: GeneratedTokens is '-3'"),
        (AZURE_TEXT.replace(",27", ",9999999999999999"), "line 4: GeneratedTokens is 9999999999999999: too many"),
        (AZURE_TEXT.replace("19:00:04", "19:00:64"), "line 3: TIMESTAMP is .* wanted is a time like"),
        (AZURE_TEXT.replace("19:00:04", "25:00:04"), "line 3: TIMESTAMP is .* wanted is a time like"),
        (AZURE_TEXT.replace("11-17", "02-30"), "line 4: TIMESTAMP is .* wanted is a time like"),
        (AZURE_TEXT.replace("19:00:04.03", "19:00:04,03"), "line 3: 4 columns"),
        (BURST_TEXT.replace("45.5", "-45.5"), "line 3: Timestamp is -45.5: wanted are seconds, 0 or more"),
        (BURST_TEXT.replace("45.5", "nan"), "line 3: Timestamp is nan"),
        (BURST_TEXT.replace(",230,", ",0,"), "line 3: Response tokens is 0"),
        (BAILIAN_TEXT.replace("3.5", "-3.5"), "line 2: timestamp is -3.5"),
        (gzip.compress(MOONCAKE_TEXT.encode() * 99)[:-20], "gzip data is cut short or damaged"),
        (b"\x1f\x8bnothing", "gzip data is cut short or damaged"),
        (b"\xff\xfe\x00\x01\n", "line 1: no header of a trace"),
        (MOONCAKE_TEXT.encode() + b'{"timestamp": 1, "session": "\xff"}', "line 3: "),
    ],
)
def test_mistakes(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith(str(tmp_path / "some.thing"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.sampled_from([MOONCAKE_TEXT, AZURE_TEXT, BURST_TEXT, BAILIAN_TEXT]),
    cut=st.integers(0, 400),
    length=st.integers(0, 6),
    patch=st.one_of(st.binary(max_size=6), st.sampled_from([b"-", b"0", b"1e99", b"null", b"{", b'"', b",", b"\n"])),
    skip_bad=st.booleans(),
)
def test_damage_is_told_or_read(tmp_path: Path, text: str, cut: int, length: int, patch: bytes, skip_bad: bool) -> None:
    data = text.encode()
    with contextlib.suppress(ConfigError):
        read(tmp_path, data[:cut] + patch + data[cut + length :], skip_bad=skip_bad)  # checks what it read


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_trace(path)


def test_skipped_lines_are_counted(tmp_path: Path) -> None:
    trace, notices = read(tmp_path, f"oops\n{FIRST}\n{{\n{SECOND}\n".replace("oops", '{"timestamp": '), skip_bad=True)
    assert (len(trace), notices) == (2, ["2 bad lines left out (lines 1, 3)"])
    csv, notices = read(tmp_path, AZURE_TEXT.replace("4808", "x"), skip_bad=True)
    assert (csv.arrival.tolist(), notices) == ([0.0, 17995.9680401], ["1 bad lines left out (lines 2)"])
    with pytest.raises(TraceError, match="no requests in it"):
        read(tmp_path, AZURE_HEADER + "x,y,z\n", skip_bad=True)


def test_followers_of_skipped_lines(tmp_path: Path) -> None:
    own = '{{"timestamp":{0},"input_length":{1},"output_length":1,"after":{2},"think":1}}\n'
    rows = [(0, 1, -1), (1, 1, 0), (2, 0, 1), (3, 1, 2), (4, 1, 9), (5, 1, 3), (6, 1, 1)]
    trace, _ = read(tmp_path, "".join(own.format(*row) for row in rows), skip_bad=True)
    # records 2 (no prompt) and 4 (follows one below) are gone: 3 lost whom it follows
    assert trace.after == array("q", [-1, 0, -1, 2, 1])


def test_unsorted_is_sorted_with_a_notice(tmp_path: Path) -> None:
    third = '{"timestamp": 700, "input_length": 513, "output_length": 1, "hash_ids": [0, 9], "after": 1, "think": 2}'
    trace, notices = read(tmp_path, f"{SECOND}\n{FIRST}\n{third}\n")
    assert notices == ["1 requests come before the one above them; sorted by arrival"]
    assert trace.arrival.tolist() == [0, 0.7, 1.5]
    assert [trace.block_hashes(i) for i in range(3)] == [[0, 1], [0], [0, 3]]
    assert (trace.after, trace.think) == (array("q", [-1, 0, -1]), array("d", [0, 2, 0]))
    late = third.replace('"after": 1', '"after": 0')  # arrives before the one it follows: that is its lower bound
    assert read(tmp_path, f"{SECOND}\n{late}\n")[0].arrival.tolist() == [1.5, 1.5]


def test_ids_out_of_range_are_folded(tmp_path: Path) -> None:
    big = 2**64 - 5
    text = MOONCAKE_TEXT.replace("[0, 1, 2]", f"[{big}, 1, 2]").replace("[0, 3]", "[-5, 3]")
    trace, notices = read(tmp_path, text)
    assert trace.hashes.tolist() == [2**62 - 5, 1, 2**62 - 5, 3]
    assert notices == ["hash ids outside of 0 to 2**62 - 1 were cut to their low 62 bits"]


def test_ids_of_contents_become_ids_of_prefixes(tmp_path: Path) -> None:
    text = MOONCAKE_TEXT.replace("[0, 3]", "[3, 1]") + SECOND.replace("[0, 3]", "[3, 1]")  # 1 follows 0, and 3
    trace, notices = read(tmp_path, text)
    assert "name the contents of one block" in notices[0]
    assert is_chained(trace)
    first, second, third = (trace.block_hashes(i) for i in range(3))
    assert second == third
    assert set(first).isdisjoint(second)
    repeated = MOONCAKE_TEXT.replace("[0, 3]", "[3, 3]")
    assert len(set(read(tmp_path, repeated)[0].block_hashes(1))) == 2
