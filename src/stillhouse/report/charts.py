"""Line charts as inline SVG: light, equal for equal numbers, coloured by the page's style sheet (so dark pages work)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from stillhouse.report.formatting import compact, short, ticks

HEIGHT = 168
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 22
POINTS = 240
"""A line with more points is drawn as means over as many equal parts, with a band from the least to the largest value."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line.

    Attributes:
        name: its name.
        points: in order of steps.
        color: the number of a colour of the style sheet.
        reference: something to hold the others against: thin, grey, its name written at its end.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    reference: bool = False


@dataclass(frozen=True)
class Dot:
    """A named point of a scatter; ``error`` reaches up and down from ``y``, ``ours`` marks what the page is about."""

    name: str
    x: float
    y: float
    error: float = 0.0
    ours: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis: from data to the picture, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies in the picture."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the axis, about ``count`` of them.

        >>> Axis(0.0, 480.0, 0, 1).ticks(4)
        [0.0, 200.0, 400.0]
        >>> Axis(0.002, 3.0, 0, 1, log=True).ticks(4)
        [0.01, 0.1, 1.0]
        """
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            stride = max(1, math.ceil((last - first) / count))
            return [float(f"1e{power}") for power in range(first, last + 1, stride)]
        rough = (self.high - self.low) / count
        scale = 10.0 ** math.floor(math.log10(rough))
        step = next(m * scale for m in (1, 2, 5, 10) if m * scale >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(n * step, 2 - math.floor(math.log10(step))) for n in range(first, last + 1)]


def chart(
    lines: Sequence[Line],
    *,
    label: str,
    steps: float,
    width: int = 320,
    log: bool = False,
    best: Point | None = None,
    faint: bool = False,
) -> Markup:
    """Draw lines over a shared axis of steps.

    Args:
        lines: the lines; values that are not finite leave gaps.
        label: what a reader who cannot see it is told.
        steps: right end of the step axis.
        width: of the picture in its own units; the height is :data:`HEIGHT`, and text is as large in any width.
        log: a logarithmic value axis, where the values span two decades and more.
        best: a point to mark.
        faint: many alike lines: thin, of one colour, without values under the pointer.
    """
    finite = [v for line in lines for _, v in line.points if math.isfinite(v)]
    if not finite:
        return Markup("")
    x = Axis(0, max(steps, 1), LEFT, width - RIGHT)
    y = _values(finite, log=log)
    parts = [_grid(x, y)]
    readout = []
    for line in lines:
        thin, band = _thinned(line.points, POINTS // 4 if faint else POINTS)
        color = "faint" if faint else "reference" if line.reference else f"c{line.color}"
        if band and not faint:
            upper = " ".join(_at(x, y, s, high) for s, _, high in band)
            lower = " ".join(_at(x, y, s, low) for s, low, _ in reversed(band))
            parts.append(f'<polygon class="band {color}" points="{upper} {lower}"/>')
        for segment in _segments(thin):
            dots = len(segment) == 1 or (len(thin) <= 16 and not faint and not line.reference)
            if len(segment) > 1:
                parts.append(f'<polyline class="line {color}" points="{" ".join(_at(x, y, *p) for p in segment)}"/>')
            if dots:
                parts += [f'<circle class="dot {color}" cx="{x(s):.1f}" cy="{y(v):.1f}" r="2"/>' for s, v in segment]
        finite_points = [(s, v) for s, v in thin if math.isfinite(v)]
        readout.append(
            {"name": line.name, "x": [short(s) for s, _ in finite_points], "y": [short(v) for _, v in finite_points]}
        )
    if best is not None and math.isfinite(best[1]):
        parts.append(f'<circle class="best" cx="{x(best[0]):.1f}" cy="{y(best[1]):.1f}" r="3.6"/>')
    parts += _names([line for line in lines if line.reference], x, y)
    values = {"lines": json.dumps(readout), "left": LEFT, "right": width - RIGHT, "steps": short(x.high)}
    data = Markup(" ").join(Markup('data-{}="{}"').format(name, value) for name, value in values.items())
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" {}>{}</svg>').format(
        width, HEIGHT, label, "" if faint else data, Markup("".join(parts))
    )


def scatter(dots: Sequence[Dot], *, label: str, across: str, up: str, width: int = 400) -> Markup:
    """Draw named points, the values across them on a logarithmic axis where they differ threefold.

    Args:
        dots: the points; those that are not finite are left out.
        label: what a reader who cannot see it is told.
        across: what the values across are.
        up: what the values upwards are.
        width: of the picture in its own units.
    """
    dots = [dot for dot in dots if math.isfinite(dot.x) and math.isfinite(dot.y)]
    if not dots:
        return Markup("")
    xs = [dot.x for dot in dots]
    ys = [value for dot in dots for value in (dot.y - dot.error, dot.y + dot.error)]
    log = min(xs) > 0 and max(xs) >= 3 * min(xs)
    if log:
        x = Axis(min(xs) / 1.6, max(xs) * 1.6, LEFT, width - RIGHT, log=True)
    else:
        margin = 0.15 * (max(xs) - min(xs)) or max(abs(max(xs)) * 0.1, 1e-6)
        x = Axis(min(xs) - margin, max(xs) + margin, LEFT, width - RIGHT)
    top = Axis(0, 1, HEIGHT - BOTTOM - 14, TOP + 12)
    y = _values(ys, log=False)
    y = Axis(y.low, y.high, top.start, top.end)
    parts = [_grid(x, y, floor=top.start)]
    parts.append(f'<text class="tick" x="{x.end}" y="{HEIGHT - 2}" text-anchor="end">{escape(across)}</text>')
    parts.append(f'<text class="tick" x="{LEFT}" y="{TOP}" dy="0.3em">{escape(up)}</text>')
    taken: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: (not dot.ours, dot.x)):
        across_at, up_at, kind = x(dot.x), y(dot.y), "ours" if dot.ours else "other"
        if dot.error:
            ends = f'y1="{y(dot.y - dot.error):.1f}" y2="{y(dot.y + dot.error):.1f}"'
            parts.append(f'<line class="whisker {kind}" x1="{across_at:.1f}" x2="{across_at:.1f}" {ends}/>')
        parts.append(f'<circle class="point {kind}" cx="{across_at:.1f}" cy="{up_at:.1f}" r="4.5"/>')
        left = across_at > width * 0.65
        name_at = up_at
        while any(abs(name_at - other) < 12 and abs(across_at - place) < 110 for place, other in taken):
            name_at += 12
        taken.append((across_at, name_at))
        place = (
            f'x="{across_at + (-9 if left else 9):.1f}" y="{name_at:.1f}" text-anchor="{"end" if left else "start"}"'
        )
        parts.append(f'<text class="name {kind}" {place} dy="0.34em">{escape(dot.name)}</text>')
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, HEIGHT, label, Markup("".join(parts))
    )


def spans_decades(values: Sequence[float]) -> bool:
    """Whether positive values differ a hundredfold, so that a linear axis would hide the smaller ones."""
    finite = [v for v in values if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= 100


def _values(finite: Sequence[float], *, log: bool) -> Axis:
    low, high = min(finite), max(finite)
    bottom, top = HEIGHT - BOTTOM, TOP
    if log and spans_decades(finite):
        return Axis(low / 1.25, high * 1.25, bottom, top, log=True)
    # Rounding noise of a constant is no shape to show.
    margin = 0.06 * (high - low) if high - low > 1e-9 * max(abs(low), abs(high)) else max(abs(high) * 0.1, 1e-6)
    return Axis(low - margin, high + margin, bottom, top)


def _names(lines: Sequence[Line], x: Axis, y: Axis) -> list[str]:
    """The names of references at their ends, none over another."""
    ends = [(y(v), line.name) for line in lines for _, v in list(line.points)[-1:] if math.isfinite(v)]
    parts, lowest = [], -math.inf
    for level, name in sorted(ends):
        at = min(max(level - 4, lowest + 11, TOP + 8), HEIGHT - BOTTOM - 2)
        lowest = at
        parts.append(f'<text class="tick" x="{x.end}" y="{at:.1f}" text-anchor="end">{escape(name)}</text>')
    return parts


def _grid(x: Axis, y: Axis, floor: float = HEIGHT - BOTTOM) -> str:
    parts = []
    marks = y.ticks(4)
    for tick, text in zip(marks, ticks(marks), strict=True):
        level = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.end}" y1="{level}" y2="{level}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{level}" dy="0.34em" text-anchor="end">{text}</text>')
    for tick in x.ticks(4):
        at = x(tick)
        anchor = "end" if at > x.end - 8 else "start" if at < LEFT + 4 else "middle"
        parts.append(f'<text class="tick" x="{at:.1f}" y="{floor + 16}" text-anchor="{anchor}">{compact(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{x.end}" y1="{floor}" y2="{floor}"/>')
    return "".join(parts)


def _at(x: Axis, y: Axis, step: float, value: float) -> str:
    return f"{x(step):.1f},{y(value):.1f}"


def _segments(points: Sequence[Point]) -> Iterator[list[Point]]:
    segment: list[Point] = []
    for step, value in points:
        if math.isfinite(value):
            segment.append((step, value))
        elif segment:
            yield segment
            segment = []
    if segment:
        yield segment


def _thinned(points: Sequence[Point], count: int) -> tuple[list[Point], list[tuple[float, float, float]]]:
    """At most ``count`` points, and where some were left out the band that they lie in."""
    if len(points) <= count:
        return list(points), []
    thin, band = [], []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        step = part[-1][0]
        values = [v for _, v in part if math.isfinite(v)]
        if not values:
            thin.append((step, math.nan))
            continue
        thin.append((step, math.fsum(values) / len(values)))
        band.append((step, min(values), max(values)))
    return thin, band
