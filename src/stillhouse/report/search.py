"""The page of a search: the best values, what each field did, every trial."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from stillhouse.report.charts import Axis, Line, chart
from stillhouse.report.formatting import compact, duration, number, ticks
from stillhouse.report.page import build_from

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26


def build_search(directory: Path) -> Path:
    """Write ``search.html`` from the ``search.json`` in a directory; returns the page.

    Raises:
        UserError: there is none.
    """
    return build_from(directory, "search", _view)


def trials_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: every trial, the best first, those without a number last."""
    keys = [one["key"] for one in found["ranges"]]
    sign = 1 if found["mode"] == "max" else -1
    ranked = sorted(found["trials"], key=lambda t: (t["value"] is None, -sign * (t["value"] or 0.0), t["run"]))
    rows = [
        [
            trial["run"] + (" *" if trial["run"] == found["best"]["run"] else ""),
            number(trial["value"]) if trial["value"] is not None else trial["state"],
            *(number(trial["values"].get(key)) for key in keys),
            duration(trial["seconds"]),
        ]
        for trial in ranked
    ]
    return ["trial", found["metric"], *keys, "time"], rows


def _view(found: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    trials, best = found["trials"], found["best"]
    states = {state: sum(trial["state"] == state for trial in trials) for state in ("finished", "pruned", "failed")}
    quality = found["metric"].replace("/", " ").replace("_", " ")
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    columns, rows = trials_table(found)
    return {
        "title": f"Search for {found['recipe']['method']}",
        "found": found,
        "quality": quality,
        "headline": [
            (number(best["value"]), f"best {quality}", best["run"]),
            (str(len(trials)), "trials", counted),
            *((number(value), key, "in the best trial") for key, value in best["values"].items()),
        ],
        "slices": [(one["key"], _slice(one, trials, best["run"], quality)) for one in found["ranges"]],
        "course": _course(trials, found["mode"], quality),
        "columns": columns,
        "rows": rows,
        "ranges": [_told(one) for one in found["ranges"]],
        "run_best": shlex.join(["stillhouse", "run", str(directory / "best.yaml")]),
        "repeat": shlex.join(map(str, found["command"])),
        "directory": str(directory),
        "versions": {str(k): v for k, v in found["environment"].items() if v is not None},
    }


def _told(one: Mapping[str, Any]) -> tuple[str, str]:
    if one["choices"]:
        return one["key"], "one of " + ", ".join(one["choices"])
    return one["key"], f"{one['low']:g} to {one['high']:g}" + (", drawn over the logarithm" if one["log"] else "")


def _slice(one: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], best: str, quality: str) -> Markup:
    """The number of each trial over the values of one field; trials that were given up are hollow, where they stood then."""
    points = []
    for trial in trials:
        last = trial["value"] if trial["value"] is not None else next((r[2] for r in reversed(trial["measured"])), None)
        if last is not None and one["key"] in trial["values"]:
            points.append((trial["values"][one["key"]], last, trial["state"], trial["run"] == best))
    if not points:
        return Markup("")
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    margin = 0.08 * (high - low) or max(abs(high) * 0.1, 1e-6)
    y = Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = []
    marks = y.ticks(4)
    for tick, text in zip(marks, ticks(marks), strict=True):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y(tick):.1f}" dy="0.34em" text-anchor="end">{text}</text>')
    if one["choices"]:
        step = (WIDTH - RIGHT - LEFT) / len(one["choices"])
        places = {choice: LEFT + step * (number_ + 0.5) for number_, choice in enumerate(one["choices"])}
        named = [(place, str(choice)) for choice, place in places.items()]
        at = places.__getitem__
    else:
        x = Axis(one["low"], one["high"], LEFT + 6, WIDTH - RIGHT - 6, log=one["log"])
        named = [(x(tick), compact(tick)) for tick in x.ticks(4)]
        at = x  # type: ignore[assignment]
    parts += [
        f'<text class="tick" x="{place:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(text)}</text>'
        for place, text in named
    ]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    for value, result, state, is_best in sorted(points, key=lambda point: point[3]):
        kind = "chosen" if is_best else "tried" if state == "finished" else "dropped"
        radius = 5.5 if is_best else 4
        parts.append(f'<circle class="{kind}" cx="{at(value):.1f}" cy="{y(result):.1f}" r="{radius}"/>')
    chosen = next((number(point[0]) for point in points if point[3]), "none")
    label = f"{quality} of {len(points)} trials over {one['key']}; the best trial has {chosen}."
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("".join(parts))
    )


def _course(trials: Sequence[Mapping[str, Any]], mode: str, quality: str) -> Markup:
    """The best number after each trial."""
    best: list[tuple[float, float]] = []
    for count, trial in enumerate(trials, 1):
        value = trial["value"]
        known = best[-1][1] if best else None
        if value is not None and (known is None or (value > known) == (mode == "max")):
            known = value
        if known is not None:
            best.append((count, known))
    if len(best) < 2:
        return Markup("")
    label = f"Best {quality} after each trial: {number(best[0][1])} after {best[0][0]:.0f}, {number(best[-1][1])} in the end."
    return chart([Line("best so far", best)], label=label, steps=len(trials), width=WIDTH)
