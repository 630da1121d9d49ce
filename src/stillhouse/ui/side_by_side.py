"""Several runs side by side: their numbers, their curves in one chart each, their pictures, and where their recipes differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.report.charts import Line, chart, spans_decades
from stillhouse.report.curves import COLORS, Panel
from stillhouse.report.formatting import column, duration, number, size
from stillhouse.report.pictures import Album, Picture, samples_of
from stillhouse.report.reading import RunFiles, Series, StageLog, direction

AT_ONCE = COLORS
"""So many runs are compared at once: a colour each."""

CHARTS = 36
"""So many charts are shown, those that most runs share first."""

ALIKE = 3
"""Of more stages than this that differ by a number, only the last is drawn."""

PICTURES = 12
"""So many rows of pictures are shown."""


@dataclass(frozen=True)
class Row:
    """A row of a table with a cell per run: (text, whether it is the best)."""

    name: str
    cells: list[tuple[str, bool]]


@dataclass(frozen=True)
class Pictured:
    """A picture of one name, of each run that has it."""

    name: str
    cells: list[tuple[str, Picture | None]]


def numbers(runs: Mapping[str, RunFiles]) -> list[Row]:
    """The final numbers, those that say what is better with the best marked, and the costs."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.metrics or {}))
    shared = {name: sum(name in (run.metrics or {}) for run in runs.values()) for name in names}
    # The runs' own test numbers first, then what most of them have.
    names.sort(key=lambda name: (not (name.startswith("test/") and name.count("/") == 1), -shared[name]))
    rows = []
    for name in names[:60]:
        values = [(run.metrics or {}).get(name) for run in runs.values()]
        known = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
        sign = direction(name)
        best = max(known, key=lambda v: sign * v) if sign and len(set(known)) > 1 else None
        cells = column([value if value is not None else "-" for value in values])
        rows.append(
            Row(name, [(text, value is not None and value == best) for text, value in zip(cells, values, strict=True)])
        )
    seconds = [math.fsum(v for v in run.cost.values() if math.isfinite(v)) for run in runs.values()]
    rows.append(Row("training and measuring", [(duration(value) if value else "-", False) for value in seconds]))
    if any(run.memory for run in runs.values()):
        peaks = [max(run.memory.values()) if run.memory else None for run in runs.values()]
        rows.append(Row("peak memory", [(size(int(value)) if value else "-", False) for value in peaks]))
    return rows


def charts(runs: Mapping[str, RunFiles]) -> list[Panel]:
    """A chart per term and measurement with a line per run; validation first, and what most runs have."""
    series: dict[str, dict[str, Series]] = {}
    for label, run in runs.items():
        for name, values in _series(run).items():
            series.setdefault(name, {})[label] = values
    order = sorted(series, key=lambda name: (-len(series[name]), "validation/" not in name))
    colors = {label: i % COLORS for i, label in enumerate(runs)}
    return [_chart(name, series[name], colors) for name in order[:CHARTS]]


def _chart(name: str, lines: Mapping[str, Series], colors: Mapping[str, int]) -> Panel:
    steps = max(values[-1][0] for values in lines.values())
    log = spans_decades([v for values in lines.values() for _, v in values])
    ends = ", ".join(f"{label} ends at {number(values[-1][1])}" for label, values in lines.items())
    drawn = [Line(label, values, colors[label]) for label, values in lines.items()]
    return Panel(name, chart(drawn, label=f"{name} over steps: {ends}.", steps=steps, log=log), "", log=log)


def _series(run: RunFiles) -> dict[str, Series]:
    """Terms and measurements of a run by name; with the stage's name where several stages have them."""
    found: dict[str, list[tuple[StageLog, Series]]] = {}
    for stage in run.stages:
        for update in stage.updates.values():
            for term in update.terms.values():
                found.setdefault(f"{update.name}/{term.name}", []).append((stage, term.values))
        for name, values in stage.measured.items():
            found.setdefault(name, []).append((stage, values))
    named = {}
    for name, places in found.items():
        for stage, values in places[-1:] if len(places) > ALIKE else places:
            named[name if len(places) == 1 else f"{stage.name}: {name}"] = values
    return named


def pictures(places: Mapping[str, Path]) -> tuple[list[Pictured], int]:
    """Pictures of the results, then the last ones of the training, by name; and how many names were left out."""
    found: dict[str, dict[str, Path]] = {}
    for label, place in places.items():
        result = place / "result"
        for path in [*sorted(result.glob("*.png")), *sorted(result.glob("*/*.png"))]:
            found.setdefault(path.relative_to(result).with_suffix("").as_posix(), {})[label] = path
        for (stage, name), frames in samples_of(place / "samples").items():
            found.setdefault(f"{stage}: {name} at the last step shown", {})[label] = frames[-1][1]
    order = sorted(found, key=lambda name: -len(found[name]))
    album = Album()
    rows = []
    for name in order[:PICTURES]:
        given = found[name]
        cells = [(label, album.picture(given[label], name) if label in given else None) for label in places]
        rows.append(Pictured(name, cells))
    return rows, max(0, len(order) - PICTURES)


def differences(runs: Mapping[str, RunFiles]) -> tuple[list[Row], list[Row]]:
    """The keys of the recipes whose values differ, and those that only some of the recipes have."""
    flat = [dict(_flat(run.recipe)) for run in runs.values()]
    keys = list(dict.fromkeys(key for recipe in flat for key in recipe))
    differ, partly = [], []
    for key in keys:
        values = [recipe.get(key) for recipe in flat]
        row = Row(key, [(value if value is not None else "-", False) for value in values])
        if None in values:
            partly.append(row)
        elif len(set(values)) > 1:
            differ.append(row)
    return differ, partly


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """A recipe as (dotted key, value in words)."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
        return
    if isinstance(value, list):
        yield prefix, ", ".join(_word(item) for item in value) or "none"
        return
    yield prefix, _word(value)


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return number(value) if isinstance(value, bool) else str(value)


def labels(names: Sequence[str]) -> dict[str, str]:
    """A short label per run: what of its path tells it from the others.

    >>> labels(["a/kd/seed-0", "a/kd/seed-1"])
    {'a/kd/seed-0': 'seed-0', 'a/kd/seed-1': 'seed-1'}
    >>> labels(["kd/0", "sinkd/0"])
    {'kd/0': 'kd/0', 'sinkd/0': 'sinkd/0'}
    """
    for depth in range(1, max(name.count("/") for name in names) + 2):
        short = ["/".join(name.split("/")[-depth:]) for name in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: name for name in names}
