"""Line charts as SVG geometry: scales, ticks and paths. What they look like is in chart.html and style.css."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Point = tuple[float, float]
_T = TypeVar("_T")

WIDTH, HEIGHT = 360, 214
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 36  # margins; the chart is shown at about this size on a phone too
MOST_POINTS = 240  # of a line
MOST_ROWS = 24  # of a chart's table


@dataclass(frozen=True)
class Series:
    """One line.

    Attributes:
        name: For the legend and the table.
        points: (x, y), x ascending; y is finite.
        style: Which of the colours and dashes of style.css.
        band: (x, lower, upper) of an area around it.
        is_faint: Drawn thin, without an entry in the legend: one of many.
    """

    name: str
    points: Sequence[Point]
    style: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    is_faint: bool = False


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in pixels."""

    place: float
    label: str


@dataclass(frozen=True)
class Line:
    """A series, drawn: paths in pixels, and the places of its few points."""

    name: str
    style: int
    path: str
    band: str
    dots: Sequence[Point]
    is_faint: bool


@dataclass(frozen=True)
class Chart:
    """All that a template needs of a chart.

    Attributes:
        title: What is shown.
        x_label: Under it.
        summary: In words, for those who do not see it.
        lines: To draw.
        x_ticks: Below.
        y_ticks: At the left.
        columns: Heads of the table of numbers.
        rows: Its cells.
        note: Under the chart, small.
    """

    title: str
    x_label: str
    summary: str
    lines: Sequence[Line]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    @property
    def legend(self) -> Sequence[Line]:
        """The lines that have an entry in the legend."""
        return [line for line in self.lines if not line.is_faint]


def line_chart(
    title: str, x_label: str, series: Sequence[Series], *, is_log: bool = False, from_zero: bool = False, note: str = ""
) -> Chart | None:
    """A chart of lines over a common x.

    Args:
        title: What is shown, with its unit.
        x_label: What x is.
        series: Lines; those without points are left out.
        is_log: Both axes are logarithmic; values that are not > 0 are left out.
        from_zero: The y axis begins at 0.
        note: Under the chart.

    Returns:
        None if no line has a point.
    """
    series = [_positive(line) if is_log else line for line in series]
    series = [_thin(line) for line in series if line.points]
    if not series:
        return None
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points] + [y for line in series for band in line.band for y in band[1:]]
    x_scale = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, is_log, is_count=all(x == int(x) for x in xs))
    low, high = (0.0 if from_zero else min(ys)), max(ys)
    if not is_log:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
        low, high = (low if from_zero else low - room), high + room
    y_scale = _Scale(low, high, HEIGHT - BOTTOM, TOP, is_log)
    lines = [
        Line(
            line.name,
            line.style,
            "M" + "L".join(f"{x_scale(x):.1f} {y_scale(y):.1f}" for x, y in line.points),
            _area(line, x_scale, y_scale),
            [(round(x_scale(x), 1), round(y_scale(y), 1)) for x, y in line.points] if len(line.points) <= 12 else [],
            line.is_faint,
        )
        for line in series
    ]
    shown = [line for line in series if not line.is_faint] or series
    columns, rows = _table(x_label, shown)
    ends = "; ".join(
        f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}" for line in shown[:6]
    )
    return Chart(
        title, x_label, f"{title}, by {x_label}: {ends}", lines, x_scale.ticks(5), y_scale.ticks(5), columns, rows, note
    )


def number(value: float, digits: int = 4) -> str:
    """A number in a table or at a tick, without zeros that say nothing.

    Args:
        value: Any.
        digits: Of it that are shown, count, >= 4; two less where it needs a power of ten.
    """
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.{digits - 2}e}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Scale:
    """From values to pixels."""

    def __init__(self, low: float, high: float, start: float, end: float, is_log: bool, is_count: bool = False) -> None:
        self.low, self.high, self.start, self.end, self.is_log = low, high, start, end, is_log
        self.smallest_step = 1.0 if is_count else 0.0

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.is_log else v for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[Tick]:
        values = self._decades(count) if self.is_log else self._round_values(count)
        digits = next((n for n in range(4, 12) if len({number(value, n) for value in values}) == len(values)), 12)
        return [Tick(round(self(value), 1), number(value, digits)) for value in values]

    def _round_values(self, count: int) -> list[float]:
        step = max((self.high - self.low) / count, self.smallest_step) or 1.0
        power = 10.0 ** math.floor(math.log10(step))
        factors = (1, 2, 5, 10) if self.smallest_step else (1, 2, 2.5, 5, 10)
        step = next(factor * power for factor in factors if factor * power >= step * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def _decades(self, count: int) -> list[float]:
        """Powers of ten, or also their multiples where there are few of them."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
            values = [factor * 10.0**n for n in powers for factor in factors]
            values = [value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
            if len(values) >= 3:
                break
        return list(thin(values, count + 1)) or [self.low]


def _positive(line: Series) -> Series:
    return Series(
        line.name,
        [(x, y) for x, y in line.points if x > 0 and y > 0],
        line.style,
        [band for band in line.band if min(band) > 0],
        line.is_faint,
    )


def _thin(line: Series) -> Series:
    return Series(line.name, thin(line.points), line.style, thin(line.band), line.is_faint)


def thin(values: Sequence[_T], most: int = MOST_POINTS) -> Sequence[_T]:
    """At most so many of them, evenly spaced, the first and the last among them.

    Args:
        values: Any.
        most: Count, >= 2.
    """
    if len(values) <= most:
        return values
    return [values[round(n * (len(values) - 1) / (most - 1))] for n in range(most)]


def _area(line: Series, x_scale: _Scale, y_scale: _Scale) -> str:
    if not line.band:
        return ""
    upper = [f"{x_scale(x):.1f} {y_scale(high):.1f}" for x, _, high in line.band]
    lower = [f"{x_scale(x):.1f} {y_scale(low):.1f}" for x, low, _ in reversed(line.band)]
    return "M" + "L".join([*upper, *lower]) + "Z"


def _table(x_label: str, series: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    at = {line.name: dict(line.points) for line in series}
    places = thin(sorted({x for points in at.values() for x in points}), MOST_ROWS)
    rows = [[number(x), *(number(points[x]) if x in points else "" for points in at.values())] for x in places]
    return [x_label, *at], rows
