"""One request's story for a terminal of 80 columns: what its policy saw at each decision, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twinpool.router.policy.explain import LOCAL, DecodeRow, PromptRow
from twinpool.router.story import DECODE, NEVER, PLACED, REFUSED, Attempt, Look, Story

MOST_ROWS = 16  # of a table
NONE = "-"
Row = TypeVar("Row", bound=PromptRow | DecodeRow)
CHOSEN = "chosen"
EDGES = (
    ("placed", "placed_s"), ("decode room", "reserved_s"), ("fetch over", "fetch_ended_s"),
    ("prompt begins", "prefill_started_s"), ("first token", "first_s"), ("KV moved", "transferred_s"),
    ("decoding", "decoding_s"), ("over", "ended_s"),
)  # fmt: skip


def show(story: Story, console: Console | None = None) -> None:
    """Prints a story."""
    console = console or Console(highlight=False)
    for line in _head(story):
        console.print(escape(line))
    for attempt in range(1, len(story.attempts) + 2):
        for look in story.looks:
            if look.attempt == attempt:
                _show_look(look, console)
        if attempt <= len(story.attempts):
            _show_attempt(story, story.attempts[attempt - 1], console)
    console.print()
    for line in _end(story):
        console.print(escape(line))


def _head(story: Story) -> Iterable[str]:
    names = (("class", story.klass), ("tenant", story.tenant), ("session", story.session))
    about = "".join(f", {title} {name}" for title, name in names if name)
    resumed = f" ({story.resumed} of them brought along)" if story.resumed else ""
    yield f"request {story.id}: {story.prompt_tokens:,} prompt tokens, {story.max_tokens:,} of output at most{resumed}"
    yield f"policy {story.policy}{about}"
    yield f"SLO: first token within {_ms(story.ttft_slo_s)} ms, {_ms(story.itl_slo_s)} ms between tokens"
    if story.ahead:
        yield f"{story.ahead:,} waited before it when it arrived"
    if story.asked:
        yield f"the policy was asked {story.asked:,} times in vain; {story.passed:,} times others might go before it"
    if story.late_s >= 0.0:
        yield f"{_ms(story.late_s)} ms after arrival it could not be in time any more"


# --- looks ----------


def _show_look(look: Look, console: Console) -> None:
    what = f"Attempt {look.attempt}" if look.kind in (PLACED, DECODE) else _not_placed(look.kind)
    console.print(f"\n[bold]{what}, {_ms(look.at_s)} ms after arrival[/bold]: {escape(look.reason)}")
    if look.prompt:
        console.print(_prompt_table(look))
    if look.decoders and look.path != LOCAL:
        console.print()
        console.print(_decode_table(look))


def _not_placed(kind: str) -> str:
    return "Refused" if kind == REFUSED else "Waits"


def _prompt_table(look: Look) -> Table:
    table = _table("prompt at", "path", "cached", "free in", "prompt", "first in", "in hand", "KV %", "")
    taken = _taken(look)
    rows = _kept(look.prompt, taken)
    for row in rows:
        note = CHOSEN if row is taken else row.why_not or _fetch_of(row)
        times = (row.free_s, row.prompt_s, row.first_s, row.slack_s)
        cells = [f"{row.cached:,}", *map(_ms, times), f"{100.0 * row.memory:.0f}"]
        table.add_row(escape(row.name), row.path, *cells, escape(note))
    _rest(table, len(look.prompt) - len(rows))
    return table


def _fetch_of(row: PromptRow) -> str:
    return f"{row.fetched:,} from {row.source}" if row.fetched else ""


def _taken(look: Look) -> PromptRow | None:
    """The row of the worker that was chosen, as ``witness`` found it."""
    own = [row for row in look.prompt if row.worker == look.prefill]
    return min(own, key=lambda row: abs(row.first_s - look.first_s), default=None)


def _decode_table(look: Look) -> Table:
    table = _table("decode at", "batch", "step", "ITL ratio", "KV ratio", "larger", "")
    taken = next((row for row in look.decoders if row.worker == look.decode), None)
    rows = _kept(look.decoders, taken)
    for row in rows:
        ratios = [f"{ratio:.3f}" for ratio in (row.itl, row.memory, row.score)]
        note = CHOSEN if row is taken else row.why_not
        table.add_row(escape(row.name), str(row.batch), _ms(row.step_s), *ratios, escape(note))
    _rest(table, len(look.decoders) - len(rows))
    return table


def _table(*titles: str) -> Table:
    """Names left, figures right, a note at the end."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for number, title in enumerate(titles):
        figures = 0 < number < len(titles) - 1 and title != "path"
        table.add_column(title, justify="right" if figures else "left", no_wrap=bool(title), overflow="fold")
    return table


def _kept(rows: list[Row], taken: Row | None) -> list[Row]:
    """The first ones, and the one that was chosen."""
    if taken is None or taken in rows[:MOST_ROWS]:
        return rows[:MOST_ROWS]
    return [*rows[: MOST_ROWS - 1], taken]


def _rest(table: Table, count: int) -> None:
    if count > 0:
        table.add_row(f"{count:,} more: see --json")


# --- what came of it ----------


def _show_attempt(story: Story, attempt: Attempt, console: Console) -> None:
    edges = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title, align in (("ms after arrival", "left"), ("", "right"), ("", "left")):
        edges.add_column(title, justify=align)  # type: ignore[arg-type]
    for title, name in EDGES:
        stamp: float = getattr(attempt, name)
        if stamp >= 0.0:
            edges.add_row(title, _ms(stamp), escape(_beside(attempt, name)))
    console.print()
    console.print(edges)
    look = story.placing(attempt.number)
    if look is not None:
        console.print()
        console.print(_comparison(look, attempt))


def _beside(attempt: Attempt, edge: str) -> str:
    """A word beside a stamp: where, or why."""
    if edge == "prefill_started_s":
        return attempt.prefill
    if edge == "transferred_s" and attempt.kv_bytes:
        return f"{attempt.kv_bytes:,} bytes, {attempt.backend}"
    if edge == "fetch_ended_s":
        return f"{attempt.fetched:,} tokens from {attempt.source}" if attempt.fetched else attempt.fetch_outcome
    if edge in ("reserved_s", "decoding_s"):
        return attempt.decode
    return attempt.outcome if edge == "ended_s" else ""


def _comparison(look: Look, attempt: Attempt) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("", "predicted", "actual"):
        table.add_column(title, justify="right" if title else "left")
    cached = NONE if attempt.cached < 0 else f"{attempt.cached:,}"
    first_s = look.at_s + look.first_s if look.first_s >= 0.0 else NEVER
    table.add_row("cached tokens", f"{look.cached:,}", cached)
    if attempt.source:
        table.add_row("fetch, ms", _known(attempt.fetch_predicted_s), _known(attempt.fetch_s))
    table.add_row("prompt, ms of steps", _known(look.prompt_s), _known(attempt.compute_s))
    table.add_row("first token, ms after arrival", _known(first_s), _known(attempt.first_s))
    return table


def _end(story: Story) -> Iterable[str]:
    if story.shown_s >= 0.0:
        spare = story.ttft_slo_s - story.shown_s
        verdict = f"{_ms(abs(spare))} ms {'before' if spare >= 0.0 else 'after'} its deadline"
        yield f"TTFT {_ms(story.shown_s)} ms, {verdict}"
        held_s = story.shown_s - story.attempts[0].first_s
        if story.attempts[0].first_s >= 0.0 and held_s > 0.0:
            yield f"its first token was held for {_ms(held_s)} ms, for the sake of the gap after it"
    if story.itl_s >= 0.0:
        yield f"{story.tokens:,} tokens, {_ms(story.itl_s)} ms between them on average, {_ms(story.itl_slo_s)} wanted"
    if story.losses or len(story.attempts) > 1:
        yield f"{len(story.attempts)} attempts, {story.losses} lost by a fault"
    if not story.over:
        yield "not over at the end of what is known"
    elif story.code:
        yield f"{story.code} {story.ended} after {_ms(story.ended_s)} ms: {story.message}"
    else:
        yield f"finished ({story.ended}) after {_ms(story.ended_s)} ms"


def _ms(seconds: float) -> str:
    """Milliseconds with a tenth where that can be read; ``never`` for infinity."""
    ms = 1000.0 * seconds
    if abs(ms) == float("inf"):
        return "never"
    return f"{ms:,.1f}" if abs(ms) < 1000.0 else f"{ms:,.0f}"


def _known(seconds: float) -> str:
    return _ms(seconds) if seconds >= 0.0 else NONE
