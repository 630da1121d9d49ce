"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

GAVE_WAY = "\N{DAGGER}"
"""Marks an arm of a comparison some of whose fields are another arm's, as the notes say."""

NOTHING = 1e-14
"""Numbers nearer to 0 than this are sums that were rounded."""


def number(value: Any) -> str:
    """A cell: integers with separators, other numbers with four significant digits, text as it is.

    >>> number(94186), number(0.9916434), number(3.2e-7), number(94186.0), number(True), number(-3.7e-17)
    ('94,186', '0.9916', '3.2e-07', '94,186', 'yes', '0')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "NaN")
    if abs(value) < NOTHING or (1000 <= abs(value) < 1e15 and value == int(value)):
        return f"{round(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def signed(value: float) -> str:
    """A difference, with its sign.

    >>> signed(0.01234), signed(-2.0), signed(-3.7e-17)
    ('+0.0123', '-2', '0')
    """
    return f"{value:+.3g}" if abs(value) >= NOTHING else "0"


def column(values: Sequence[Any]) -> list[str]:
    """The cells of a column, decimals aligned where its numbers are of like size.

    >>> column([0.3949, 0.231, 0.0178])
    ['0.3949', '0.2310', '0.0178']
    >>> column([12.5, "-", 3])
    ['12.50', '-', '3.00']
    >>> column([29.8912, 0.0713, 1.0])
    ['29.89', '0.0713', '1']
    """
    numbers = [v for v in values if _is_finite(v)]
    sizes = [abs(v) for v in numbers if abs(v) >= NOTHING]
    if not sizes or all(isinstance(v, int) for v in numbers) or max(sizes) >= 100 * min(sizes):
        return [number(v) for v in values]
    decimals = max(0, 3 - math.floor(math.log10(max(sizes))))
    if decimals > 6:
        return [number(v) for v in values]
    # Not "-0.000".
    return [f"{v if abs(v) >= NOTHING else 0:,.{decimals}f}" if _is_finite(v) else number(v) for v in values]


def compact(value: float) -> str:
    """A tick.

    >>> [compact(v) for v in (0.0, 0.25, 1500.0, 20000.0, 2000000.0, 0.0001)]
    ['0', '0.25', '1.5k', '20k', '2M', '1e-4']
    """
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1000 * unit:
            return f"{value / unit:g}{suffix}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e12):
        return scientific(value)
    return f"{value:g}"


def ticks(values: Sequence[float]) -> list[str]:
    """The ticks of one axis: where one of them needs an exponent, all small ones have one.

    >>> ticks([0.0, 0.0005, 0.001])
    ['0', '5e-4', '1e-3']
    """
    plain = [compact(value) for value in values]
    if not any("e-" in text for text in plain):
        return plain
    return [scientific(v) if 0 < abs(v) < 0.1 else text for v, text in zip(values, plain, strict=True)]


def scientific(value: float) -> str:
    """A number with an exponent, as short as it can be.

    >>> scientific(0.00025)
    '2.5e-4'
    """
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short(value: float) -> float | int:
    """A number for embedding: five significant digits."""
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded == int(rounded) and abs(rounded) < 1e15 else rounded


def duration(seconds: float) -> str:
    """A time.

    >>> [duration(s) for s in (0.0042, 0.1234, 2.46, 59.99, 75, 3700, 200000)]
    ['4.2 ms', '123 ms', '2.5 s', '1 min 0 s', '1 min 15 s', '1 h 1 min', '2 d 7 h']
    """
    if seconds < 0.9995:
        return f"{1e3 * seconds:.{2 if seconds < 0.01 else 3}g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: int) -> str:
    """A number of bytes, in the units of disks.

    >>> [size(n) for n in (1, 999, 14512, 3_800_000)]
    ['1 byte', '999 bytes', '14.5 kB', '3.8 MB']
    """
    if count < 1000:
        return f"{count} byte" if count == 1 else f"{count} bytes"
    for unit, suffix in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {suffix}"
    return f"{count / 1e3:.1f} kB"


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
