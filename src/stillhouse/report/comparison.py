"""The page of a comparison: who is better, by how much, whether that is told from noise, and what it costs."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from stillhouse.report.charts import Dot, scatter
from stillhouse.report.formatting import GAVE_WAY, column, duration, number, signed, size
from stillhouse.report.page import build_from
from stillhouse.report.results import with_error

COSTS: dict[str, tuple[str, str, float, Callable[[float], str]]] = {
    "seconds": ("training time", "seconds of training", 1.0, duration),
    "peak_memory": ("peak memory", "MB held at once", 1e-6, lambda value: size(int(value))),
    "latency": ("CPU latency", "milliseconds for one sample", 1e3, duration),
    "parameters": ("parameters", "parameters", 1.0, lambda value: number(int(value))),
}
"""What a cost is called, its axis, the axis's unit, and how a value is written."""


def build_comparison(directory: Path) -> Path:
    """Write ``comparison.html`` from the ``comparison.json`` in a directory; returns the page.

    Raises:
        UserError: there is none.
    """
    return build_from(directory, "comparison", _view)


@dataclass(frozen=True)
class Track:
    """A row of a figure: places in per cent from its left end.

    Attributes:
        name: of the arm.
        role: what it is: ``line`` for the baseline, else better, worse or noise.
        text: what it comes to.
        dots: a place per seed, or of the mean.
        bar: from where to where an interval reaches.
        remark: said beside the text.
    """

    name: str
    role: str
    text: str
    dots: list[float]
    bar: tuple[float, float] | None
    remark: str = ""


def _view(found: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    arms: list[dict[str, Any]] = found["arms"]
    metric, line = found["metric"], found["baseline"]
    best = _best(arms, found)
    seeds = len(found["seeds"])
    data: Any = next((arm["recipe"]["data"] for arm in arms if "data" in arm["recipe"]), {})
    facts = [
        ("data", _told(data)),
        ("seeds of each arm", str(seeds)),
        ("ended", found["date"].replace("T", " ").replace("+00:00", " UTC")),
        ("machine", str(found["environment"].get("accelerator") or found["environment"].get("processor") or "-")),
        ("stillhouse", found["version"]),
    ]
    return {
        "title": _listed([arm["name"] for arm in arms]),
        "found": found,
        "quality": _readable(metric),
        "better": "larger is better" if found["mode"] == "max" else "smaller is better",
        "facts": facts,
        "headline": _headline(arms, found, best),
        "findings": list(
            zip((_role(arm, found) for arm in arms if arm["name"] != line), found["findings"], strict=True)
        ),
        "seeds": _seeds(arms, found),
        "teachers": _teachers(arms, found),
        "differences": _differences(arms, found),
        "zero": _axis(_reach(arms, metric))(0.0),
        "costs": {name: told[0] for name, told in COSTS.items() if any(arm["cost"].get(name) for arm in arms)},
        "rows": [_row(arm, found) for arm in arms],
        "panels": _panels(arms, found),
        "equal": [(name, _told(value)) for name, value in found["shared"].items() if name != "run" and _says(value)],
        "unlike": _unlike(arms, found),
        "others": _others(arms, found),
        "line": line,
        "repeat": shlex.join(map(str, found["command"])),
        "directory": str(directory),
        "versions": {str(k): v for k, v in found["environment"].items() if v is not None},
    }


def _headline(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any], best: Mapping[str, Any]) -> list[Any]:
    """(value, what it is, a remark) of what a reader wants first."""
    metric, quality = found["metric"], _readable(found["metric"])
    numbers = best["metrics"][metric]
    tiles = [(best["name"], f"best mean {quality}", _with_std(numbers))]
    told = best["differences"].get(metric)
    if told is not None:
        tiles.append((signed(told["mean"]), f"over {found['baseline']}", _sureness(told)))
    else:
        sure = [arm for arm in arms if arm["differences"].get(metric, {}).get("verdict") == "worse"]
        tiles.append((f"{len(sure)} of {len(arms) - 1}", f"worse than {best['name']}", "told from noise"))
    for name, value in found["teachers"].items():
        tiles.append((number(value), f"the {name}", quality))
    times = [arm["cost"]["seconds"] for arm in arms if arm["cost"].get("seconds")]
    if times:
        tiles.append((duration(max(times)), "the slowest training", f"the fastest takes {duration(min(times))}"))
    return tiles


def _verdict(told: Mapping[str, Any]) -> str:
    """How a difference is judged; what was written before there was a word for it is of one seed."""
    one = told["interval"] is None and told["verdict"] == "within noise"
    return "one seed" if one else str(told["verdict"])


def _failure(arm: Mapping[str, Any]) -> str | None:
    """Why an arm has no number at all; None where it has one."""
    failures = [run["failure"] for run in arm["runs"]]
    return str(failures[0]) if failures and all(failures) else None


def _sureness(told: Mapping[str, Any]) -> str:
    if told["interval"] is None:
        return f"{_verdict(told)}: no interval"
    low, high = told["interval"]
    return f"{signed(low)} to {signed(high)}" + ("" if _clear(told) else ", within noise")


def _clear(told: Mapping[str, Any]) -> bool:
    return told["verdict"] in ("better", "worse", "different")


def _best(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Mapping[str, Any]:
    sign = 1 if found["mode"] == "max" else -1
    ranked = [arm for arm in arms if arm["metrics"][found["metric"]]["mean"] is not None]
    return max(ranked, key=lambda arm: sign * arm["metrics"][found["metric"]]["mean"])


def _role(arm: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if arm["name"] == found["baseline"]:
        return "line"
    verdict = arm["differences"].get(found["metric"], {}).get("verdict", "")
    return verdict if verdict in ("better", "worse") else "noise"


def _axis(values: Iterable[float]) -> Callable[[float], float]:
    """Per cent from the left end, for values with a margin around them."""
    finite = [value for value in values if value is not None and math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 1e-6)
    return lambda value: round(100 * (value - low + margin) / (high - low + 2 * margin), 2)


def _measured(arms: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return [value for arm in arms for value in arm["metrics"][metric]["values"] if value is not None]


def _seeds(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[Track]:
    metric = found["metric"]
    at = _axis([*_measured(arms, metric), *found["teachers"].values()])
    tracks = []
    for arm in arms:
        numbers = arm["metrics"][metric]
        values = [value for value in numbers["values"] if value is not None]
        lost = len(numbers["values"]) - len(values)
        std = numbers["std"] or 0.0
        bar = (at(numbers["mean"] - std), at(numbers["mean"] + std)) if values and std else None
        if bar is not None:
            bar = (max(0.0, bar[0]), min(100.0, bar[1]))
        remark = f"{lost} failed" if lost else ""
        tracks.append(Track(arm["name"], _role(arm, found), _with_std(numbers), [at(v) for v in values], bar, remark))
    return tracks


def _teachers(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    at = _axis([*_measured(arms, found["metric"]), *found["teachers"].values()])
    return [(name, number(value), at(value)) for name, value in found["teachers"].items()]


def _reach(arms: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    told = [arm["differences"][metric] for arm in arms if metric in arm["differences"]]
    return [0.0, *(end for one in told for end in (one["interval"] or [one["mean"]]))]


def _differences(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[Track]:
    metric = found["metric"]
    at = _axis(_reach(arms, metric))
    tracks = []
    for arm in arms:
        told = arm["differences"].get(metric)
        if told is not None:
            bar = (at(told["interval"][0]), at(told["interval"][1])) if told["interval"] else None
            text, verdict = signed(told["mean"]), _verdict(told)
            tracks.append(Track(arm["name"], _role(arm, found), text, [at(told["mean"])], bar, verdict))
    return tracks


def _with_std(numbers: Mapping[str, Any]) -> str:
    if numbers["mean"] is None:
        return "-"
    return number(numbers["mean"]) if numbers["std"] is None else with_error(numbers["mean"], numbers["std"])


def _row(arm: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of quality and cost; a cost on whose front the arm lies is marked."""
    told = arm["differences"].get(found["metric"])
    costs = {}
    for name, (_, _, _, write) in COSTS.items():
        value = arm["cost"].get(name)
        costs[name] = (write(value) if value else "-", name in arm["front"])
    interval = told["interval"] if told else None
    failure = _failure(arm)
    verdict = "baseline" if arm["name"] == found["baseline"] else "no pair of runs" if told is None else _verdict(told)
    return {
        "name": arm["name"] + (f" {GAVE_WAY}" if arm["set_aside"] else ""),
        "quality": _with_std(arm["metrics"][found["metric"]]),
        "difference": signed(told["mean"]) if told else "",
        "interval": f"{interval[0]:+.2g} to {interval[1]:+.2g}" if interval else "",
        "verdict": verdict if failure is None else f"failed: {failure}",
        "failed": failure is not None,
        "role": _role(arm, found),
        "costs": costs,
    }


Table = tuple[str, list[str], list[list[str]]]
"""A title, columns and rows."""


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Quality and cost for a terminal; a cost on whose front an arm lies is followed by ``*``."""
    rows = [_row(arm, found) for arm in found["arms"]]
    count = len(found["seeds"])
    title = f"Mean and standard deviation over {count} seeds" if count > 1 else f"Seed {found['seeds'][0]}"
    # As short as it can be, and without blanks: a terminal of 80 columns is not to break it.
    short = [row["interval"].replace(" to +", "..").replace(" to ", "..") for row in rows]
    quality = [
        [row["name"], row["quality"], row["difference"], interval, row["verdict"]]
        for row, interval in zip(rows, short, strict=True)
    ]
    costs = [name for name in COSTS if any(arm["cost"].get(name) for arm in found["arms"])]
    marked = any(arm["front"] for arm in found["arms"])
    spent = [
        [row["name"], *(t + (" *" if front else "") for t, front in (row["costs"][n] for n in costs))] for row in rows
    ]
    return [
        (title, ["arm", found["metric"], "difference", "95 % interval", "verdict"], quality),
        ("Cost" + (" (* on the Pareto front)" if marked else ""), ["arm", *(COSTS[name][0] for name in costs)], spent),
    ]


def _panels(arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[tuple[str, Markup]]:
    """Quality against each cost in which the arms differ; those on the front are marked."""
    metric, panels = found["metric"], []
    for name, (title, across, unit, write) in COSTS.items():
        known = [arm for arm in arms if arm["cost"].get(name) and arm["metrics"][metric]["mean"] is not None]
        if not any(name in arm["front"] for arm in known):
            continue
        dots = [
            Dot(
                arm["name"],
                unit * arm["cost"][name],
                arm["metrics"][metric]["mean"],
                arm["metrics"][metric]["std"] or 0.0,
                ours=name in arm["front"],
            )
            for arm in known
        ]
        told = "; ".join(
            f"{arm['name']} {number(arm['metrics'][metric]['mean'])} at {write(arm['cost'][name])}" for arm in known
        )
        label = f"{_readable(metric)} against {title}: {told}."
        panels.append((title, scatter(dots, label=label, across=across, up=_readable(metric))))
    return panels


def _unlike(
    arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str]], str]]:
    """Per arm the fields that are not equal in all arms, and what was set aside or differs in the budget."""
    rows = []
    for arm in arms:
        fields = {
            k: v for k, v in arm["recipe"].items() if k not in ("method", "run", "compare_alone", *found["shared"])
        }
        told = [(name, _told(value)) for name, value in fields.items() if _says(value)]
        remarks = []
        if arm["set_aside"]:
            origin = _listed(sorted({arm["taken"][name] for name in arm["set_aside"]}))
            remarks.append(f"its own {_listed(arm['set_aside'])} gave way to that of {origin}")
        if arm["unequal"]:
            remarks.append(f"its budget differs: {arm['unequal']}")
        name = arm["name"] if arm["name"] == arm["method"] else f"{arm['name']} ({arm['method']})"
        rows.append((name, told, "; ".join(remarks)))
    return rows


def _others(
    arms: Sequence[Mapping[str, Any]], found: Mapping[str, Any]
) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Every other metric: per arm its mean with the deviation, the difference to the baseline, and how it is judged."""
    rows = []
    for metric in arms[0]["metrics"]:
        cells = []
        means = column([arm["metrics"][metric]["mean"] for arm in arms])
        for arm, mean in zip(arms, means, strict=True):
            told = arm["differences"].get(metric)
            std = arm["metrics"][metric]["std"]
            text = mean if std is None else with_error(arm["metrics"][metric]["mean"], std)
            verdict = "" if told is None or not _clear(told) or told["interval"] is None else told["verdict"]
            cells.append((text, signed(told["mean"]) if told else "", verdict))
        rows.append((metric, cells))
    return rows


def _told(value: Any) -> str:
    """A field's value in a line: a mapping by its kind or name and what else it says."""
    if isinstance(value, Mapping):
        kind = value.get("kind") or value.get("name") or ""
        rest = [f"{k}={_told(v)}" for k, v in value.items() if k not in ("kind", "name") and _says(v)]
        return " ".join([str(kind), *rest]).strip() if kind else ", ".join(rest)
    if isinstance(value, list):
        return "[" + ", ".join(map(_told, value)) + "]"
    return number(value) if isinstance(value, bool | float) else str(value)


def _says(value: Any) -> bool:
    """Whether a field is worth a line: one that is not set says nothing."""
    return value not in (None, [], {}, "")


def _readable(metric: str) -> str:
    return metric.replace("/", " ").replace("_", " ")


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
