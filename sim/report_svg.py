"""Charts as SVG: lines, bars and strips. Plain text without scripts; colours come from the page's style sheet.

What tells two series apart is said three times, for readers who see few colours: class ``s0``, ``s1``, ... gives the
colour, and a dash pattern and the shape of the markers go with it. Every chart has a title and a description for those
who hear it. Coordinates are rounded to a tenth of a unit, of which a chart is ``WIDTH`` wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

from twinpool.sim.gaps import Floats
from twinpool.sim.report_axes import Axis, Formatter

WIDTH, HEIGHT = 760.0, 320.0
LEFT, RIGHT, BELOW = 66.0, 14.0, 46.0
LETTER, LINE = 6.7, 18.0  # about the width of a letter, and the height of a line of text
COLOURS, DASHES, SHAPES = 7, 5, 8  # how many there are: no two of the first 280 series look the same
LEVELS = 12  # shades of a strip
LEAST = 0.002  # of the full shade, that is shown
BAR = 26.0


def text(value: str) -> str:
    """The text as it may stand in the page."""
    return escape(value, quote=True)


def number(value: float) -> str:
    """A coordinate."""
    short = f"{value:.1f}".removesuffix(".0")
    return "0" if short == "-0" else short


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """A series: ``style`` chooses its look, ``marks`` are the places of its points that get a marker."""

    label: str
    x: Floats
    y: Floats
    style: int
    marks: Sequence[int] = ()
    hints: Sequence[str] = ()  # one a mark: what is told when it is pointed at


@dataclass(frozen=True, slots=True)
class Rule:
    """A straight line at a value of one axis, with what it means."""

    label: str
    value: float
    upright: bool


@dataclass(frozen=True, slots=True)
class Caption:
    """What a chart is called and what it shows, for those who hear it. ``name`` is unique in its page."""

    name: str
    title: str
    description: str

    def wrap(self, height: float, body: Sequence[str]) -> str:
        """The chart."""
        name = text(self.name)
        box = f"0 0 {number(WIDTH)} {number(height)}"
        return "\n".join([
            f'<svg viewBox="{box}" role="img" aria-labelledby="{name}-title {name}-desc">',
            f'<title id="{name}-title">{text(self.title)}</title>',
            f'<desc id="{name}-desc">{text(self.description)}</desc>',
            *body,
            "</svg>",
        ])  # fmt: skip


def marker(style: int, x: float, y: float, size: float = 4.2) -> str:
    """Path of the marker of a style around a point."""
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)), 2: ((0, -1.25), (1.15, 0.9), (-1.15, 0.9)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)), 4: ((0, 1.25), (1.15, -0.9), (-1.15, -0.9)),
        5: ((-1.4, -0.45), (1.4, -0.45), (1.4, 0.45), (-1.4, 0.45)),
        6: ((-0.45, -1.4), (0.45, -1.4), (0.45, 1.4), (-0.45, 1.4)),
        7: ((-1.3, -1.3), (1.3, 1.3), (-1.3, 1.3), (1.3, -1.3)),
    }.get(style % SHAPES)  # fmt: skip
    if corners is None:
        left, across = number(x - size), number(2 * size)
        half = number(size)
        return f"M{left} {number(y)}a{half} {half} 0 1 0 {across} 0a{half} {half} 0 1 0 -{across} 0z"
    return "M" + "L".join(f"{number(x + size * dx)} {number(y + size * dy)}" for dx, dy in corners) + "z"


def look(style: int) -> str:
    """Classes of a style: colour and dashes."""
    return f"s{style % COLOURS} d{style % DASHES}"


def line_chart(
    caption: Caption, x: Axis, y: Axis, lines: Sequence[Line], rules: Sequence[Rule] = (), height: float = HEIGHT
) -> str:
    """Lines over two axes, with a legend above them. A nan breaks a line."""
    legend, top = _legend([(line.label, line.style) for line in lines])
    bottom = top + height - BELOW
    to_x = _scaled(x, LEFT, WIDTH - RIGHT)
    to_y = _scaled(y, bottom, top)
    body = [*legend, *_axes(x, y, to_x, to_y, top, bottom)]
    for rule in rules:
        body += _rule(rule, to_x, to_y, top, bottom)
    for line in lines:
        body += _drawn(line, to_x, to_y)
    return caption.wrap(bottom + BELOW, body)


def _scaled(axis: Axis, start: float, end: float) -> Formatter:
    return lambda value: number(start + (end - start) * axis.place(value))


def _legend(entries: Sequence[tuple[str, int]]) -> tuple[list[str], float]:
    """The legend, wrapped, and where it ends."""
    parts: list[str] = []
    x, y = LEFT, 14.0
    for label, style in entries:
        width = 44.0 + LETTER * len(label) + 14.0
        if x + width > WIDTH and x > LEFT:
            x, y = LEFT, y + LINE
        parts.append(
            f'<g class="{look(style)}"><path class="line" d="M{number(x)} {number(y - 4)}h36"/>'
            f'<path class="mark" d="{marker(style, x + 18, y - 4)}"/></g>'
            f'<text x="{number(x + 44)}" y="{number(y)}">{text(label)}</text>'
        )
        x += width
    return parts, y + 16.0


def _axes(x: Axis, y: Axis, to_x: Formatter, to_y: Formatter, top: float, bottom: float) -> list[str]:
    parts = ['<g class="grid">']
    for tick in y.ticks():
        parts.append(f'<path d="M{number(LEFT)} {to_y(tick)}H{number(WIDTH - RIGHT)}"/>')
    for tick in x.ticks():
        parts.append(f'<path d="M{to_x(tick)} {number(top)}V{number(bottom)}"/>')
    parts.append('</g><g class="ticks">')
    for tick in y.ticks():
        parts.append(f'<text class="end" x="{number(LEFT - 7)}" y="{to_y(tick)}" dy="4">{text(y.form(tick))}</text>')
    parts += _across(x, to_x, bottom)
    parts.append("</g>")
    middle = number((top + bottom) / 2)
    parts.append(f'<path class="frame" d="M{number(LEFT)} {number(top)}V{number(bottom)}H{number(WIDTH - RIGHT)}"/>')
    parts.append(f'<text class="name" transform="translate(14 {middle}) rotate(-90)">{text(y.title)}</text>')
    return parts


def _across(x: Axis, to_x: Formatter, bottom: float) -> list[str]:
    """Texts below an axis: ticks that have room, and the title."""
    parts, free = [], -math.inf
    for tick in x.ticks():
        shown, place = x.form(tick), float(to_x(tick))
        half = 0.5 * LETTER * len(shown)
        if place - half > free:
            parts.append(f'<text class="mid" x="{number(place)}" y="{number(bottom + 17)}">{text(shown)}</text>')
            free = place + half + 6.0
    middle = number((LEFT + WIDTH - RIGHT) / 2)
    parts.append(f'<text class="name" x="{middle}" y="{number(bottom + 37)}">{text(x.title)}</text>')
    return parts


def _rule(rule: Rule, to_x: Formatter, to_y: Formatter, top: float, bottom: float) -> list[str]:
    if rule.upright:
        place = float(to_x(rule.value))
        path = f"M{number(place)} {number(top)}V{number(bottom)}"
        left = place + LETTER * len(rule.label) + 8 < WIDTH - RIGHT
        side, at = ("start", place + 5) if left else ("end", place - 5)
        words = f'<text class="{side} rule-name" x="{number(at)}" y="{number(bottom - 8)}">{text(rule.label)}</text>'
    else:
        place = float(to_y(rule.value))
        path = f"M{number(LEFT)} {number(place)}H{number(WIDTH - RIGHT)}"
        at = place - 5 if place - top > 16 else place + 14
        words = (
            f'<text class="end rule-name" x="{number(WIDTH - RIGHT - 4)}" y="{number(at)}">{text(rule.label)}</text>'
        )
    return [f'<path class="rule" d="{path}"/>', words]


def _drawn(line: Line, to_x: Formatter, to_y: Formatter) -> list[str]:
    points = [
        f"{to_x(float(x))} {to_y(float(y))}" if math.isfinite(x) and math.isfinite(y) else ""
        for x, y in zip(line.x, line.y, strict=True)
    ]
    path = "".join(f"{'L' if before else 'M'}{point}" for before, point in pairwise(["", *points]) if point)
    if not path:
        return []
    parts = [f'<g class="{look(line.style)}"><path class="line" d="{path}"/>']
    hints = line.hints or [""] * len(line.marks)
    for at, hint in zip(line.marks, hints, strict=True):
        if points[at]:
            x, y = map(float, points[at].split())
            told = f"<title>{text(hint)}</title>" if hint else ""
            parts.append(f'<path class="mark" d="{marker(line.style, x, y)}">{told}</path>')
    return [*parts, "</g>"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar: its name, its length, what is written behind it, and where a bound of it lies."""

    label: str
    value: float
    written: str
    style: int
    bound: float | None = None


def bar_chart(caption: Caption, axis: Axis, bars: Sequence[Bar]) -> str:
    """Bars from left to right, one below the other; a bound is a thick upright line."""
    left = 20.0 + LETTER * max((len(bar.label) for bar in bars), default=0)
    right = WIDTH - 20.0 - LETTER * max((len(bar.written) for bar in bars), default=0)
    left = min(left, WIDTH / 2)
    bottom = 8.0 + BAR * len(bars)
    to_x = _scaled(axis, left, right)
    parts = ['<g class="grid">', *(f'<path d="M{to_x(tick)} 4V{number(bottom)}"/>' for tick in axis.ticks()), "</g>"]
    parts += ['<g class="ticks">', *_across(axis, to_x, bottom), "</g>"]
    for i, bar in enumerate(bars):
        y = 8.0 + BAR * i
        end = to_x(bar.value)
        box = f"M{number(left)} {number(y + 3)}H{end}v16H{number(left)}z"
        parts.append(f'<text class="end" x="{number(left - 8)}" y="{number(y + 15)}">{text(bar.label)}</text>')
        parts.append(
            f'<g class="{look(bar.style)}"><path class="bar" d="{box}"/>'
            f'<path class="mark" d="{marker(bar.style, float(end), y + 11)}"/></g>'
        )
        if bar.bound is not None:
            parts.append(f'<path class="bound" d="M{to_x(bar.bound)} {number(y)}v22"/>')
        behind = max(float(end), float(to_x(bar.bound)) if bar.bound is not None else 0.0)
        parts.append(f'<text x="{number(behind + 10)}" y="{number(y + 15)}">{text(bar.written)}</text>')
    return caption.wrap(bottom + BELOW, parts)


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """A row of a strip chart: values from 0 to 1 in columns of equal width, and what is written behind them."""

    label: str
    values: Floats
    written: str


def strip_chart(caption: Caption, x: Axis, strips: Sequence[Strip], scale: tuple[str, str]) -> str:
    """A row a series, the stronger its colour the higher the value; ``scale`` is what no and full shade mean."""
    left = 16.0 + LETTER * max((len(strip.label) for strip in strips), default=0)
    right = WIDTH - 16.0 - LETTER * max((len(strip.written) for strip in strips), default=0)
    row = 18.0 if len(strips) <= 24 else 10.0
    top = 28.0
    bottom = top + row * len(strips)
    parts = _shades(left, scale)
    for i, strip in enumerate(strips):
        parts += _strip(strip, left, right, top + row * i, row)
    parts.append(f'<path class="frame" d="M{number(left)} {number(top)}V{number(bottom)}H{number(right)}"/>')
    parts += ['<g class="ticks">', *_across(x, _scaled(x, left, right), bottom), "</g>"]
    return caption.wrap(bottom + BELOW, parts)


def _shades(left: float, scale: tuple[str, str]) -> list[str]:
    none, full = scale
    start = left + LETTER * len(none) + 8
    cells = "".join(
        f'<path class="cell o{level}" d="M{number(start + 14 * level)} 6h14v12h-14z"/>' for level in range(LEVELS + 1)
    )
    end = start + 14 * (LEVELS + 1) + 8
    frame = f'<path class="frame" d="M{number(start)} 6h{14 * (LEVELS + 1)}v12h-{14 * (LEVELS + 1)}z"/>'
    words = f'<text x="{number(left)}" y="16">{text(none)}</text><text x="{number(end)}" y="16">{text(full)}</text>'
    return [cells, frame, words]


def _strip(strip: Strip, left: float, right: float, y: float, row: float) -> list[str]:
    """One path a shade: stretches of the same shade in a row are one rectangle."""
    level = np.rint(strip.values * LEVELS).astype(int).clip(0, LEVELS)
    level[(level == 0) & (strip.values > LEAST)] = 1  # a little is not nothing
    changes = [0, *(np.flatnonzero(np.diff(level)) + 1).tolist(), len(level)]
    step = (right - left) / max(1, len(level))
    paths: dict[int, str] = {}
    for start, end in pairwise(changes):
        if level[start]:
            width = number(step * (end - start))
            cell = f"M{number(left + step * start)} {number(y + 1)}h{width}v{number(row - 2)}h-{width}z"
            paths[int(level[start])] = paths.get(int(level[start]), "") + cell
    parts = [f'<path class="cell o{shade}" d="{path}"/>' for shade, path in sorted(paths.items())]
    small = ' class="small"' if row < 14.0 else ""
    base = number(y + 0.5 * row + 4)
    parts.append(
        f'<text class="end{" small" if small else ""}" x="{number(left - 6)}" y="{base}">{text(strip.label)}</text>'
    )
    parts.append(f'<text{small} x="{number(right + 6)}" y="{base}">{text(strip.written)}</text>')
    return parts
