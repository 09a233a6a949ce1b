"""Line charts and heat maps as inline SVG that fits any width: no library, no script needed.

A plot has no viewBox of its own, so its text keeps its size; positions are percentages, and only
the curves lie in a stretched coordinate system, with strokes that do not stretch. The script of
the page adds a cursor with the values under it, which it reads from each curve's data attributes.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

MOST_POINTS = 400  # of a curve; what has more is averaged
PEAK = 4.0  # an axis ends at the 98th percentile where a peak is so many times as high
FEW_POINTS = 40  # of a curve with a band, which shows each of them as a dot
LABEL_GAP = 8.0  # percent of the height of a plot between two labels
SIDE = 1000  # of the stretched coordinate system
Y_TICKS, X_TICKS = 5, 6


@dataclass(frozen=True)
class Line:
    """A curve; `colour` is a class of the style sheet. `errors` make a band around it."""

    label: str
    colour: str
    points: Sequence[tuple[int, float]]
    errors: Sequence[float] = ()
    faint: bool = False  # has neither label nor cursor
    end: str = ""  # what its label says beside its name


@dataclass(frozen=True)
class Chart:
    """A plot over steps. Names and units may hold any text."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    zero: str = ""  # what the zero line means, where that is drawn
    marks: Sequence[tuple[int, str]] = ()  # a step and what is said about it


@dataclass(frozen=True)
class HeatMap:
    """Cells (rows, columns), the first row at the bottom; None where nothing was measured.

    `signed` cells are good below zero and bad above; others are darker where they are greater.
    """

    title: str
    columns: Sequence[str]
    edges: Sequence[str]  # one more than rows, from below
    cells: Sequence[Sequence[float | None]]
    limit: float  # the value of the strongest colour
    signed: bool = False
    unit: str = ""


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float

    def share(self, value: float) -> float:
        return (value - self.low) / (self.high - self.low)


def line_chart(chart: Chart) -> str:
    """The figure of a chart; an empty string if it has no points."""
    lines = [_thinned(line) for line in chart.lines if line.points]
    if not lines:
        return ""
    steps = [step for line in lines for step, _ in line.points]
    x = _Scale(min(0, *steps), max(1, *steps))
    y, peak = _value_scale(lines, bool(chart.zero))
    note = f'<p class="quiet">The highest peak, {number(peak)}, is cut off.</p>' if peak else ""
    last = "; ".join(f"{ln.label} {number(ln.points[-1][1])}" for ln in lines if not ln.faint)
    legend = "".join(
        f'<li class="{line.colour}">{escape(line.label)} <b>{escape(line.end)}</b></li>'
        for line in lines
        if not line.faint
    )
    return (
        f'<figure class="chart"><figcaption>{escape(chart.title)}</figcaption>'
        f'<ul class="legend">{legend}</ul><svg class="plot" role="img" data-low="{x.low:g}" '
        f'data-high="{x.high:g}" data-unit="{escape(chart.unit)}" '
        f'aria-label="{escape(f"{chart.title}: {last}{chart.unit}")}">'
        f'<rect class="ground" width="100%" height="100%"/>{_axes(chart, x, y)}'
        f'<svg class="curves" viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" '
        f'width="100%" height="100%">{"".join(_curve(line, x, y) for line in lines)}</svg>'
        f'{_ends(lines, x, y)}<line class="cursor" y2="100%"/></svg>{note}</figure>'
    )


def heat_map(heat: HeatMap) -> str:
    """The figure of a heat map, each cell with its value as a tooltip, and in it if it is wide."""
    rows, columns = len(heat.cells), len(heat.columns)
    wide = columns <= 12
    cells = [
        _cell(heat, row, column, value, wide)
        for row, values in enumerate(heat.cells)
        for column, value in enumerate(values)
        if value is not None
    ]
    sides = [
        f'<text class="tick side" x="-8" y="{_percent(1 - row / rows)}">{escape(edge)}</text>'
        for row, edge in enumerate(heat.edges)
    ]
    every = max(1, math.ceil(columns / X_TICKS))
    below = [
        f'<text class="tick below" x="{_percent((column + 0.5) / columns)}" y="100%">'
        f"{escape(heat.columns[column])}</text>"
        for column in range(every - 1, columns, every)
    ]
    return (
        f'<figure class="chart"><figcaption>{escape(heat.title)}</figcaption>'
        f'<svg class="heat" role="img" aria-label="{escape(heat.title)}" height="{rows * 22}">'
        f"{''.join(cells + sides + below)}</svg></figure>"
    )


def number(value: float) -> str:
    """Four significant digits with a real minus, and no exponent where none is needed."""
    text = f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _thinned(line: Line) -> Line:
    """The line with at most MOST_POINTS points, each a mean, at the step of the last of them."""
    size = math.ceil(len(line.points) / MOST_POINTS)
    if size == 1:
        return line
    parts = [line.points[start : start + size] for start in range(0, len(line.points), size)]
    points = [(part[-1][0], statistics.fmean(value for _, value in part)) for part in parts]
    errors = [max(line.errors[i : i + size]) for i in range(0, len(line.errors), size)]
    return Line(line.label, line.colour, points, errors, line.faint, line.end)


def _value_scale(lines: Sequence[Line], zero: bool) -> tuple[_Scale, float]:
    """The vertical scale, and the highest peak if it does not fit: one would flatten the rest."""
    values = sorted(value for line in lines for _, value in line.points)
    bands = [
        value + sign * error
        for line in lines
        for (_, value), error in zip(line.points, line.errors, strict=False)
        for sign in (-1, 1)
    ]
    usual = values[int(0.98 * (len(values) - 1))]
    cut = len(values) > 20 and values[0] >= 0 and values[-1] > PEAK * usual > 0
    top = 1.5 * usual if cut else max(values + bands)
    bottom = min(values + bands)
    if zero:
        bottom, top = min(bottom, 0.0), max(top, 0.0)
    elif 0 <= bottom < 0.5 * top:
        bottom = 0.0
    margin = 0.06 * (top - bottom) or abs(top) or 1.0
    low = bottom if bottom == 0 and not zero else bottom - margin
    return _Scale(low, top + margin), values[-1] if cut else 0.0


def _ticks(scale: _Scale, most: int) -> list[float]:
    """At most so many round numbers within the scale."""
    rough = (scale.high - scale.low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _axes(chart: Chart, x: _Scale, y: _Scale) -> str:
    parts = []
    for value in _ticks(y, Y_TICKS):
        at = _percent(1 - y.share(value))
        kind = "zero" if value == 0 and chart.zero else "grid"
        parts.append(f'<line class="{kind}" x2="100%" y1="{at}" y2="{at}"/>')
        label = f"{number(value)}{chart.unit}"
        parts.append(f'<text class="tick side" x="-8" y="{at}">{escape(label)}</text>')
    if chart.zero:
        at = _percent(1 - y.share(0))
        parts.append(f'<text class="tick meaning" x="100%" y="{at}">{escape(chart.zero)}</text>')
    for value in _ticks(x, X_TICKS):
        at = _percent(x.share(value))
        parts.append(f'<text class="tick below" x="{at}" y="100%">{value:,.0f}</text>')
    for step, words in chart.marks:
        at = _percent(x.share(step))
        parts.append(
            f'<line class="mark" x1="{at}" x2="{at}" y2="100%">'
            f"<title>{escape(words)}</title></line>"
        )
    return "".join(parts)


def _curve(line: Line, x: _Scale, y: _Scale) -> str:
    """A path for the curve, broken where the other expert had its turn, and one for its band."""
    places = [(SIDE * x.share(step), SIDE * (1 - y.share(v))) for step, v in line.points]
    gaps = [b[0] - a[0] for a, b in pairwise(line.points)]
    usual = statistics.median(gaps) if gaps else 0
    moves = ["M", *("M" if gap > 3 * usual else "L" for gap in gaps)]
    path = "".join(f"{m}{px:.1f} {py:.1f}" for m, (px, py) in zip(moves, places, strict=True))
    if line.faint:
        return f'<path class="faint {line.colour}" d="{path}"/>'
    steps = " ".join(str(step) for step, _ in line.points)
    values = " ".join(f"{value:.5g}" for _, value in line.points)
    return (
        f'<g class="line {line.colour}" data-label="{escape(line.label)}" data-steps="{steps}" '
        f'data-values="{values}">{_band(line, places, y)}<path class="curve" d="{path}"/></g>'
    )


def _band(line: Line, places: Sequence[tuple[float, float]], y: _Scale) -> str:
    if not line.errors:
        return ""
    halves = [SIDE * error / (y.high - y.low) for error in line.errors]
    over = [f"{px:.1f} {py - half:.1f}" for (px, py), half in zip(places, halves, strict=True)]
    under = [f"{px:.1f} {py + half:.1f}" for (px, py), half in zip(places, halves, strict=True)]
    return f'<path class="band" d="M{"L".join(over + under[::-1])}Z"/>'


def _ends(lines: Sequence[Line], x: _Scale, y: _Scale) -> str:
    """Dots on what was measured, or at a curve's end; names beside the plot, none upon another."""
    named = [line for line in lines if not line.faint]
    dots = [
        f'<circle class="{line.colour}" cx="{_percent(x.share(step))}" '
        f'cy="{_percent(1 - y.share(value))}" r="3"/>'
        for line in named
        for step, value in (line.points if _measured(line) else line.points[-1:])
        if y.low <= value <= y.high
    ]
    wanted = [100 * (1 - y.share(line.points[-1][1])) for line in named]
    labels = [
        f'<text class="end {line.colour}" x="100%" dx="10" y="{place:.1f}%">'
        f'{escape(_short(line.label))} <tspan class="value">{escape(line.end)}</tspan></text>'
        for line, place in zip(named, _apart(wanted), strict=True)
    ]
    return "".join(dots + labels)


def _measured(line: Line) -> bool:
    """Whether each point stands for a measurement of its own."""
    return len(line.errors) > 0 and len(line.points) <= FEW_POINTS


def _apart(wanted: Sequence[float]) -> list[float]:
    """Places in percent near those wanted, LABEL_GAP apart, none below the plot if possible."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places = list(wanted)
    for above, below in pairwise(order):
        places[below] = max(places[below], places[above] + LABEL_GAP)
    limit = 100.0
    for index in reversed(order):
        places[index] = min(places[index], limit)
        limit = places[index] - LABEL_GAP
    return places


def _cell(heat: HeatMap, row: int, column: int, value: float, wide: bool) -> str:
    rows, columns = len(heat.cells), len(heat.columns)
    strength = min(1.0, abs(value) / heat.limit) if heat.limit else 0.0
    kind = ("bad" if value > 0 else "good") if heat.signed else "amount"
    left, top = column / columns, 1 - (row + 1) / rows
    words = f"step {heat.columns[column]}, σ {heat.edges[row]} to {heat.edges[row + 1]}: "
    rect = (
        f'<rect class="{kind}" x="{_percent(left)}" y="{_percent(top)}" '
        f'width="{_percent(1 / columns)}" height="{_percent(1 / rows)}" '
        f'fill-opacity="{0.06 + 0.9 * strength:.2f}">'
        f"<title>{escape(words)}{number(value)}{escape(heat.unit)}</title></rect>"
    )
    if not wide:
        return rect
    shade = " strong" if strength > 0.55 else ""
    text = (f"{value:+.0f}" if heat.signed else f"{value:.2f}").replace("-", "\N{MINUS SIGN}")
    return (
        f'{rect}<text class="cell{shade}" x="{_percent(left + 0.5 / columns)}" '
        f'y="{_percent(top + 0.5 / rows)}">{text}</text>'
    )


def _short(label: str) -> str:
    return label if len(label) <= 14 else f"{label[:13]}…"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
