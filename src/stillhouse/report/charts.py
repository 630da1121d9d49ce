"""Line charts as inline SVG: light, equal for equal numbers, coloured by the page's style sheet (so dark pages work)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from stillhouse.report.formatting import compact, short, ticks

HEIGHT = 168
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 8, 22
POINTS = 240
"""A line with more points is drawn as means over as many equal parts, with a band from the least to the largest value."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A named line; ``color`` is the number of a colour of the style sheet."""

    name: str
    points: Sequence[Point]
    color: int = 0


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
    width: int = 360,
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
        color = "faint" if faint else f"c{line.color}"
        if band and not faint:
            upper = " ".join(_at(x, y, s, high) for s, _, high in band)
            lower = " ".join(_at(x, y, s, low) for s, low, _ in reversed(band))
            parts.append(f'<polygon class="band {color}" points="{upper} {lower}"/>')
        for segment in _segments(thin):
            dots = len(segment) == 1 or (len(thin) <= 16 and not faint)
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
    values = {"lines": json.dumps(readout), "left": LEFT, "right": width - RIGHT, "steps": short(x.high)}
    data = Markup(" ").join(Markup('data-{}="{}"').format(name, value) for name, value in values.items())
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}" {}>{}</svg>').format(
        width, HEIGHT, label, "" if faint else data, Markup("".join(parts))
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


def _grid(x: Axis, y: Axis) -> str:
    parts = []
    marks = y.ticks(4)
    for tick, text in zip(marks, ticks(marks), strict=True):
        level = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.end}" y1="{level}" y2="{level}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{level}" dy="0.34em" text-anchor="end">{text}</text>')
    for tick in x.ticks(4):
        at = x(tick)
        anchor = "end" if at > x.end - 8 else "start" if tick == 0 else "middle"
        parts.append(f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{compact(tick)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{x.end}" y1="{base}" y2="{base}"/>')
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
