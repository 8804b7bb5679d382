"""The page around the charts: one file of HTML that needs nothing else, in light and in dark.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which readers with any kind of colour blindness can
tell apart; their yellow is left out, which is too pale for lines. In the dark the order changes, so that the first
ones are the bright ones. The page forbids itself to load anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twinpool.sim.report_svg import LEVELS, text

LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DARK = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#FFFFFF")
DASHES = ("none", "9 4", "2 4", "10 4 2 4", "5 2")

STYLE = """
:root { color-scheme: light dark; }
:root { --ink: #1b1b1b; --quiet: #5a5a5a; --paper: #ffffff; --grid: #dddddd; --shade: #0072B2; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem 1.2rem 4rem; }
h1 { font-size: 1.6rem; margin: .6rem 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.6rem 0 .2rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; } .facts, figcaption { color: var(--quiet); font-size: .9rem; }
.notice { border-left: 4px solid var(--s1); padding-left: .7rem; }
figure { margin: .6rem 0 1rem; overflow-x: auto; } svg { display: block; min-width: 34rem; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; } svg .ticks text { fill: var(--quiet); }
svg text.end { text-anchor: end; } svg text.mid, svg text.name { text-anchor: middle; }
svg text.small { font-size: 9px; }
svg text.rule-name { fill: var(--quiet); paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
.grid path { stroke: var(--grid); fill: none; } .frame { stroke: var(--quiet); fill: none; }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; stroke-linejoin: round; stroke-dasharray: var(--d); }
.mark { fill: var(--c); stroke: var(--c); stroke-width: 1.6; }
.bar { fill: var(--c); fill-opacity: .35; stroke: var(--c); stroke-dasharray: var(--d); }
.rule { stroke: var(--quiet); fill: none; stroke-dasharray: 3 3; }
.bound { stroke: var(--ink); stroke-width: 3; fill: none; }
.cell { fill: var(--shade); }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } th, td { padding: .18rem .5rem; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child { text-align: left; } thead th { color: var(--quiet); font-weight: 600; } td { white-space: nowrap; }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--quiet); }
"""


def style_sheet() -> str:
    """The page's styles: fixed ones, and those of the series and shades."""
    dashes = [f".d{i} {{ --d: {dash}; }}" for i, dash in enumerate(DASHES)]
    series = [f".s{i} {{ --c: var(--s{i}); }}" for i in range(len(LIGHT))]
    shades = [f".o{level} {{ fill-opacity: {level / LEVELS:.2f}; }}" for level in range(LEVELS + 1)]
    dark = f":root {{ --ink: #e8e8e8; --quiet: #a8a8a8; --paper: #161616; --grid: #383838; --shade: {DARK[0]}; }}"
    return "\n".join([
        STYLE.strip(), *dashes, *series, *shades, _palette(LIGHT),
        "@media (prefers-color-scheme: dark) {", dark, _palette(DARK), "}",
        "@media print { details > * { display: block; } }",
    ])  # fmt: skip


def _palette(colours: Sequence[str]) -> str:
    return ":root { " + " ".join(f"--s{i}: {colour};" for i, colour in enumerate(colours)) + " }"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of words, the first of each being its name. ``words``: sentences rather than figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False

    def html(self) -> str:
        """The table."""
        head = "".join(f'<th scope="col">{text(word)}</th>' for word in self.head)
        rows = "\n".join(f"<tr>{self._row(row)}</tr>" for row in self.rows)
        kind = ' class="words"' if self.words else ""
        return f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'

    @staticmethod
    def _row(row: Sequence[str]) -> str:
        name, *cells = row
        return f'<th scope="row">{text(name)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in cells)


@dataclass(frozen=True, slots=True)
class Section:
    """One question: charts first, each with a line below it, then the figures."""

    name: str  # of the anchor
    title: str
    intro: str
    charts: Sequence[tuple[str, str]] = ()  # SVG, and what is said below it
    table: Table | None = None
    open: bool = False  # the figures are seen at once

    def html(self) -> str:
        """The section."""
        parts = [f'<section id="{text(self.name)}">', f"<h2>{text(self.title)}</h2>", f"<p>{text(self.intro)}</p>"]
        for chart, below in self.charts:
            caption = f"<figcaption>{text(below)}</figcaption>" if below else ""
            parts.append(f"<figure>{chart}{caption}</figure>")
        if self.table is not None and self.open:
            parts.append(self.table.html())
        elif self.table is not None:
            parts.append(f"<details><summary>The figures</summary>{self.table.html()}</details>")
        return "\n".join([*parts, "</section>"])


@dataclass(frozen=True, slots=True)
class Page:
    """The whole file."""

    title: str
    facts: Sequence[str]
    reading: Sequence[str]  # how to read it
    notices: Sequence[str]
    sections: Sequence[Section]

    def html(self) -> str:
        """Everything, from the first byte to the last."""
        head = [
            "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{text(self.title)}</title>", f"<style>\n{style_sheet()}\n</style>", "</head>", "<body>",
        ]  # fmt: skip
        top = [f"<h1>{text(self.title)}</h1>", *(f'<p class="facts">{text(fact)}</p>' for fact in self.facts)]
        top.append(f"<p>{text(' '.join(self.reading))}</p>")
        top += [f'<p class="notice">{text(notice)}</p>' for notice in self.notices]
        links = " · ".join(f'<a href="#{text(part.name)}">{text(part.title)}</a>' for part in self.sections)
        body = [f"<header>{chr(10).join(top)}</header>", f"<nav>{links}</nav>", "<main>"]
        return "\n".join([*head, *body, *(part.html() for part in self.sections), "</main>", "</body>", "</html>", ""])
