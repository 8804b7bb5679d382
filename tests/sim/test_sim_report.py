"""The report: its axes and marks, and the page as a reader's machine sees it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.sim.real_traces import MOONCAKE, real_trace
from tests.sim.report_traffic import SETTINGS, traffic
from typer.testing import CliRunner

from twinpool.cli import sim, sim_report
from twinpool.errors import ConfigError
from twinpool.sim.readers import read_trace
from twinpool.sim.report import Plan, Report, gather
from twinpool.sim.report_axes import Axis, linear, logarithmic, milliseconds, percent, plain, seconds
from twinpool.sim.report_sections import page_of
from twinpool.sim.report_svg import COLOURS, DASHES, SHAPES, Caption, Line, line_chart, look, marker
from twinpool.sim.report_workers import MOST_ROWS, folded
from twinpool.sim.settings import Settings
from twinpool.sim.trace_write import write_trace

NAUGHTY = '<b>&"quoted"\''
VOID = {"meta", "path"}


@contextmanager
def no_progress(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    yield lambda done: None


RUNS_ONLY = Plan(loads=False, splits=False)


def made(plan: Plan, labels: dict[str, Settings], requests: int = 160) -> Report:
    return gather(traffic(requests), [*labels.items()], plan, no_progress, {"twinpool": "1.2.3"})


# --- axes and marks -----------------------------------------------------------------------------------------------


@given(st.floats(1e-6, 1e9), st.floats(0.001, 1e6))
def test_ticks_lie_on_their_axis(low: float, factor: float) -> None:
    values = [np.array([low, low * (1.0 + factor)])]
    for axis in (linear("x", values, plain), logarithmic("x", values, plain, 1e-9)):
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 14
        assert all(axis.low * 0.99 <= tick <= axis.high * 1.01 for tick in ticks)
        assert [axis.place(value) for value in (axis.low, axis.high)] == pytest.approx([0.0, 1.0])


def test_figures_as_words() -> None:
    assert [plain(value) for value in (0.0, 1234567.0, 0.012345, 12.0, None, math.nan)] == [
        "0", "1,234,567", "0.0123", "12", "-", "-",
    ]  # fmt: skip
    assert [seconds(value) for value in (2e-4, 0.05, 1.0, 20.0)] == ["200 µs", "50 ms", "1 s", "20 s"]
    assert [milliseconds(value) for value in (9.87, 1234.5, None)] == ["9.9", "1,234", "-"]
    assert [percent(value) for value in (0.5, None)] == ["50.0 %", "-"]


def test_no_two_series_look_the_same() -> None:
    looks = {(look(i), marker(i, 0.0, 0.0)) for i in range(COLOURS * DASHES * SHAPES)}
    assert len(looks) == COLOURS * DASHES * SHAPES
    for ways in (COLOURS, DASHES, SHAPES):  # neighbours differ in all three
        assert ways >= 5


def test_nan_breaks_a_line() -> None:
    axis = Axis("x", 0.0, 3.0, plain)
    line = Line("a", np.arange(4.0), np.array([1.0, math.nan, 2.0, 3.0]), 0, (0, 1))
    drawn = re.findall(r'class="line" d="([^"]*)"', line_chart(Caption("c", "t", "d"), axis, axis, [line]))[1]
    assert (drawn.count("M"), drawn.count("L")) == (2, 1)


def test_many_workers_are_folded() -> None:
    names = [f"d{i}" for i in range(512)]
    labels, rows = folded(names, np.arange(512.0)[:, None] * np.ones(3))
    assert len(labels) == len(rows) == MOST_ROWS
    assert labels[0] == "d0-d12"
    assert rows[0].tolist() == [6.0] * 3
    assert folded(names[:3], np.ones((3, 2)))[0] == names[:3]


# --- the page -----------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Reads a page as HTML: every element is closed in its order; what it names, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.referred: list[str] = []
        self.attributes: set[str] = set()
        self.seen: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes.update(name for name, _ in attrs)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name == "aria-labelledby":
                self.referred += (value or "").split()
            elif name == "href":
                assert (value or "").startswith("#")
                self.referred.append((value or "")[1:])
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] != "style":
            self.words.append(data)


def check(page: str) -> Reader:
    """Well-formed, of one piece, and every chart can be heard."""
    read = Reader(page)
    assert len(set(read.ids)) == len(read.ids)
    assert set(read.referred) <= set(read.ids)
    assert not re.search(r"https?:|//|url\(|@import|javascript:", page)
    assert not {"script", "img", "link", "iframe", "object", "use", "image"} & set(read.seen)
    assert not {name for name in read.attributes if name.startswith("on") or name in ("src", "srcset", "style")}
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == read.seen.count("svg")
    for chart in charts:
        assert re.search(r'<svg viewBox="0 0 [\d.]+ [\d.]+" role="img" aria-labelledby="\S+-title \S+-desc">', chart)
        assert re.search(r"<title id=[^>]*>[^<]+</title>\n<desc id=[^>]*>[^<]+</desc>", chart)
        assert "nan" not in chart
        assert "inf" not in chart.replace("information", "")
    return read


def test_page_is_whole_and_escapes_names() -> None:
    report = made(RUNS_ONLY, {NAUGHTY: SETTINGS, "round_robin": replace(SETTINGS, policy="round_robin")})
    report = replace(report, trace=NAUGHTY, notices=[NAUGHTY])
    page = page_of(report).html()
    read = check(page)
    assert NAUGHTY not in page
    assert "<b>" not in page
    assert sum(NAUGHTY in words for words in read.words) > 20
    wanted = {
        "glance",
        "ttft",
        "itl",
        "course",
        "deciles",
        "queues",
        "utilisation",
        "cache",
        "transfer",
        "cost",
        "settings",
    }
    assert wanted <= set(read.ids)
    assert not {"capacity", "ratio", "load"} & set(read.ids)
    assert "twinpool 1.2.3" in " ".join(read.words)
    for run in report.runs:
        assert run.summary["digest"] in page
    assert "prefers-color-scheme: dark" in page
    assert page == page_of(report).html()


def test_utilisation_is_left_out_where_it_is_not_known() -> None:
    report = made(RUNS_ONLY, {"x": SETTINGS})
    report = replace(report, runs=[replace(run, busy=None) for run in report.runs])
    assert "utilisation" not in check(page_of(report).html()).ids


def test_one_request_and_none_served() -> None:
    slow = replace(SETTINGS, ttft_s=1e-6, ttft_factor=0.0, itl_s=1e-6)
    tight = replace(SETTINGS, kv_tokens=1024)
    for count, settings in ((1, SETTINGS), (1, tight), (3, slow)):
        check(page_of(made(RUNS_ONLY, {"x": settings}, count)).html())


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.jsonl"
    write_trace(traffic(), path, "mooncake")
    return path


def command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(sim.app, ["report", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


FLAGS = ("--prefill", 2, "--decode", 2, "--profile", SETTINGS.profile, "--no-loads", "--no-splits")


def test_command_writes_a_page_and_json(trace_file: Path, tmp_path: Path) -> None:
    assert sim_report.versions()["twinpool"]
    pages = []
    for name in ("a.html", "b.html"):
        target = tmp_path / name
        status, stdout, stderr = command(
            trace_file, "-o", target, "--policy", "least_seconds", "--policy", "round_robin", *FLAGS, "--json", "-"
        )
        assert status == 0, stderr
        figures = json.loads(stdout)
        assert [run["label"] for run in figures["runs"]] == ["least_seconds", "round_robin"]
        assert figures["runs"][0]["requests"] == 160
        assert not any("wall" in key for run in figures["runs"] for key in run)
        pages.append(target.read_text())
        check(pages[-1])
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--policy", "least_seconds", "--policy", "random", "--param", "a=1"), "--param belongs to one policy"),
        (("--policy", "nosuch"), "least_seconds"),
        (("--profile", "nosuch"), "h100_sxm"),
    ],
)
def test_command_refuses(trace_file: Path, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    target = tmp_path / "report.html"
    status, stdout, stderr = command(trace_file, "-o", target, *flags, "--no-loads", "--no-splits")
    assert (status, stdout) == (2, "")
    assert said in stderr
    assert not target.exists()


def test_command_refuses_a_folder_before_it_runs(trace_file: Path, tmp_path: Path) -> None:
    assert "name a file in it" in command(trace_file, "-o", tmp_path)[2]
    assert "there is no folder" in command(trace_file, "-o", tmp_path / "no" / "report.html")[2]


# --- with searches ------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.timeout(300)
def test_capacities_loads_and_the_ratio_curve() -> None:
    chosen = {"least_seconds": SETTINGS, "round_robin": replace(SETTINGS, policy="round_robin")}
    report = made(Plan(target=0.9, processes=2), chosen)
    assert report.notices == []
    assert [each.label for each in report.ceilings] == [*chosen]
    assert [(each.prefill, each.decode) for each in report.ratio] == [(1, 3), (2, 2), (3, 1)]
    for each in [*report.ceilings, *report.ratio]:
        assert 0.0 < each.speed <= each.bound * 1.005
    assert report.ratio[1] == report.ceilings[0]
    speeds = [[speed for speed, _ in curve.points] for curve in report.loads]
    assert speeds[0] == speeds[1] == sorted(speeds[0])
    own = next(summary for speed, summary in report.loads[0].points if speed == 1.0)
    assert own == report.runs[0].summary
    read = check(page_of(report).html())
    assert {"capacity", "ratio", "load"} <= set(read.ids)
    assert json.loads(json.dumps(report.figures()))["ratio"][0]["prefill"] == 1


@pytest.mark.full
@pytest.mark.timeout(300)
def test_what_cannot_be_found_is_told_and_left_out() -> None:
    hopeless = replace(SETTINGS, itl_s=1e-6)
    report = made(Plan(processes=2), {"x": hopeless})
    assert report.ceilings == report.ratio == []
    assert "Capacities are left out" in report.notices[0]
    assert len(report.loads[0].points) > 3
    check(page_of(report).html())
    few = made(Plan(loads=False, gpus=1, target=0.9, processes=2), {"x": SETTINGS})
    assert "a split needs two" in few.notices[0]
    check(page_of(few).html())


@pytest.mark.full
@pytest.mark.timeout(600)
def test_real_trace_fits_in_two_megabytes() -> None:
    trace, _ = read_trace(real_trace(MOONCAKE), spread_seed=0)
    chosen = [(name, Settings(policy=name)) for name in ("least_seconds", "round_robin", "least_tokens")]
    report = gather(trace, chosen, RUNS_ONLY, no_progress, {})
    page = page_of(report).html()
    check(page)
    assert len(page.encode()) < 2_000_000


def test_unknown_profile_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="h100_sxm"):
        made(RUNS_ONLY, {"x": replace(SETTINGS, profile="nosuch")})
