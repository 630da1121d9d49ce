"""What came out of a run: its tables with their errors, its models on one line, and the few numbers to begin with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from stillhouse.report.formatting import column, duration, number, size
from stillhouse.report.health import shared, standings
from stillhouse.report.reading import RunFiles, direction

ERRORS = ("std", "standard deviation", "standard error", "sem")
"""Names of columns and measurements that are the error of what they stand beside."""


@dataclass(frozen=True)
class Cells:
    """A table ready to print: per row its label, whether it ships, and (text, exact value or None) per other cell."""

    title: str
    columns: list[str]
    rows: list[tuple[str, bool, list[tuple[str, Any]]]]
    numeric: list[bool]


def cells(table: Mapping[str, Any], ships: Set[str]) -> Cells:
    """A table of the run, an error put behind the number that it belongs to."""
    rows = [list(row) for row in table.get("rows") or []]
    columns = [str(name) for name in table.get("columns") or []]
    width = max([len(columns), *map(len, rows)])
    rows = [row + [""] * (width - len(row)) for row in rows]
    columns += [""] * (width - len(columns))
    printed = [column([row[i] for row in rows]) for i in range(width)]
    exact: list[list[Any]] = [[row[i] for row in rows] for i in range(width)]
    is_number = [any(isinstance(value, int | float) for value in values) for values in exact]
    for i in range(width - 1, 1, -1):
        if is_number[i] and is_number[i - 1] and is_error(columns[i], columns[i - 1]):
            columns[i - 1] += f" ± {columns[i].removeprefix(columns[i - 1]).strip()}"
            pairs = zip(exact[i - 1], exact[i], strict=True)
            printed[i - 1] = [with_error(value, error) for value, error in pairs]
            exact[i - 1] = [f"{value} ± {error}" for value, error in zip(exact[i - 1], exact[i], strict=True)]
            del columns[i], printed[i], exact[i], is_number[i]
    return Cells(
        title=str(table.get("title") or ""),
        columns=columns,
        rows=[
            (printed[0][r], str(row[0]) in ships, [(printed[i][r], exact[i][r]) for i in range(1, len(columns))])
            for r, row in enumerate(rows)
        ]
        if columns
        else [],
        numeric=is_number,
    )


def is_error(name: str, of: str) -> bool:
    """Whether a column holds the errors of the one before it.

    >>> is_error("std", "mean"), is_error("accuracy std", "accuracy"), is_error("recall", "precision")
    (True, True, False)
    """
    return name.removeprefix(of).strip(" ()_-/").lower() in ERRORS


def with_error(value: Any, error: Any) -> str:
    """A number and its error, both to the error's second digit.

    >>> with_error(0.47214484, 0.0125348), with_error(29.8912, 0.5), with_error(3, "-"), with_error(0.5, 0.0)
    ('0.472 ± 0.013', '29.89 ± 0.50', '3', '0.5 ± 0')
    """
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (value, error)):
        return number(value)
    if error <= 0:
        return f"{number(value)} ± {number(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}" if decimals <= 6 else f"{number(value)} ± {number(error)}"


@dataclass(frozen=True)
class Place:
    """A model on the line: its value as text, where it is in per cent, and the reach of its error likewise."""

    name: str
    text: str
    at: float
    low: float
    high: float
    ours: bool


@dataclass(frozen=True)
class Lineup:
    """Models on one line by their main test measurement, and how much of the teacher's lead the student took over."""

    metric: str
    rows: list[Place]
    sentence: str
    errors: bool


def main_metric(table: Mapping[str, Mapping[str, float]]) -> str | None:
    """The measurement that models are ordered by: the first of the first model that has one which says what is better."""
    return next((found for name in table if (found := shared(table, name))), None)


def errors_of(table: Mapping[str, Mapping[str, float]], metric: str) -> dict[str, float]:
    """The error of a measurement by model, where one was written down beside it."""
    names = [f"{metric}{joint}{error}" for joint in ("_", "/", " ") for error in ERRORS]
    # A bare error belongs to the only other number.
    found: dict[str, float] = {}
    for model, numbers in table.items():
        bare = ["std"] if len(numbers) == 2 else []
        error = next((numbers[name] for name in [*names, *bare] if name in numbers), None)
        if error is not None and metric in numbers:
            found[model] = abs(error)
    return found


def ours(metrics: Mapping[str, Any]) -> str | None:
    """The model that the run is about: the student, or whose number is also the run's own."""
    table = standings(metrics)
    metric = main_metric(table)
    if "student" in table or metric is None:
        return "student" if "student" in table else None
    headline = metrics.get(f"test/{metric}")
    return next((name for name, numbers in table.items() if numbers.get(metric) == headline), None)


def lineup(metrics: Mapping[str, Any], samples: int | None = None) -> Lineup | None:
    """The models that were tested alike, on so many samples, best first; None where there are not two that differ."""
    table = standings(metrics)
    metric = main_metric(table)
    if metric is None:
        return None
    values = {name: numbers[metric] for name, numbers in table.items() if metric in numbers}
    errors = errors_of(table, metric)
    low = min(value - errors.get(name, 0.0) for name, value in values.items())
    high = max(value + errors.get(name, 0.0) for name, value in values.items())
    if len(values) < 2 or high == low:
        return None
    printed = dict(zip(values, column(list(values.values())), strict=True))
    printed |= {name: with_error(values[name], error) for name, error in errors.items()}
    order = sorted(values, key=lambda name: -direction(metric) * values[name])

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 1)

    about = ours(metrics)
    rows = []
    for name in order:
        value, error = values[name], errors.get(name, 0.0)
        rows.append(Place(name, printed[name], place(value), place(value - error), place(value + error), name == about))
    return Lineup(metric, rows, gap(values, metric, samples), bool(errors))


def gap(values: Mapping[str, float], metric: str, samples: int | None = None) -> str:
    """How much of the teacher's lead over the same student trained alone the student takes over, where that can be told.

    Args:
        values: the measurement by model.
        metric: what is measured.
        samples: of the test split; an accuracy on so many is off by chance, with another set of as many.

    >>> gap({"teacher": 0.95, "student-alone": 0.80, "student": 0.90}, "accuracy", 10_000)
    "The student takes over 67% of the teacher's lead over the same student trained alone (60% to 73% by the size of the test \
set; seeds may differ by more)."
    >>> gap({"teacher": 0.95, "student-alone": 0.90, "student": 0.91}, "accuracy", 300)
    "The student's gain over the same student trained alone, 0.01, is within the noise of 300 test samples."
    """
    if not {"student", "student-alone", "teacher"} <= set(values):
        return ""
    lead = direction(metric) * (values["teacher"] - values["student-alone"])
    gain = direction(metric) * (values["student"] - values["student-alone"])
    if lead <= 0 or gain <= 0:
        return ""
    shares = [values[name] for name in ("student", "student-alone")]
    noise = 0.0
    if samples and metric == "accuracy" and all(0 <= share <= 1 for share in shares):
        # As if the two were measured on different samples, which errs on the side of doubt.
        noise = 1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / samples)
    if gain <= noise:
        return (
            f"The student's gain over the same student trained alone, {number(round(gain, 6))}, is within the noise of "
            f"{samples:,} test samples."
        )
    if gain > lead:
        return "The student is better than its teacher in this run."
    told = f"The student takes over {gain / lead:.0%} of the teacher's lead over the same student trained alone"
    if noise:
        low, high = max(0.0, gain - noise) / lead, (gain + noise) / lead
        return f"{told} ({low:.0%} to {high:.0%} by the size of the test set; seeds may differ by more)."
    return f"{told}, in this one run."


@dataclass(frozen=True)
class Figure:
    """A number to begin with: large, with its name and a remark."""

    value: str
    name: str
    remark: str = ""


def headline(run: RunFiles) -> list[Figure]:
    """The few numbers that a reader wants first: quality, size, speed, time, memory."""
    metrics = run.metrics or {}
    table = standings(metrics)
    metric, about = main_metric(table), ours(metrics)
    figures = []
    if metric is not None and about is not None:
        others = [name for name in ("teacher", "student-alone", "start", "real") if metric in table.get(name, {})]
        value, error = table[about][metric], errors_of(table, metric).get(about)
        told = ", ".join(f"{name} {number(table[name][metric])}" for name in others if name != about)
        text = number(value) if error is None else with_error(value, error)
        figures.append(Figure(text, f"test {metric.replace('_', ' ')} of {about}", told))
    else:
        named = [(name, value) for name, value in metrics.items() if direction(name) and isinstance(value, float)]
        unlike = [(name, value) for name, value in named if not name.startswith("parameters")]
        figures += [Figure(number(value), name.replace("_", " ")) for name, value in unlike[:3]]
    figures += _ratios(run, about)
    seconds = math.fsum(v for v in run.cost.values() if math.isfinite(v))
    if seconds:
        figures.append(Figure(duration(seconds), "training and measuring" if run.finished else "so far"))
    if run.memory:
        figures.append(Figure(size(int(max(run.memory.values()))), "peak memory"))
    return figures


def _ratios(run: RunFiles, about: str | None) -> list[Figure]:
    """How much smaller and faster than its teacher the model is."""
    found = []
    for quantity, kind, unit in (
        ({k: float(v) for k, v in run.parameters.items()}, "smaller", "parameters"),
        (latencies(run), "faster", "ms a sample"),
        (_evaluations(run), "fewer evaluations", "a sample"),
    ):
        mine, theirs = quantity.get(about or ""), quantity.get("teacher")
        if mine and theirs and theirs / mine >= 1.1:
            times = theirs / mine
            remark = f"{number(_whole(mine))} of {number(_whole(theirs))} {unit}"
            found.append(Figure(f"{times:.1f}×" if times < 10 else f"{times:,.0f}×", kind, remark))
    return found


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def latencies(run: RunFiles) -> dict[str, float]:
    """Milliseconds a sample by model, from the tables that have such a column."""
    found: dict[str, float] = {}
    for table in run.tables:
        columns = [str(name).lower() for name in table.get("columns") or []]
        at = next((i for i, name in enumerate(columns) if "latency" in name and "ms" in name), None)
        for row in table.get("rows") or []:
            if at is not None and at < len(row) and isinstance(row[at], int | float):
                found.setdefault(str(row[0]), float(row[at]))
    return found


def _evaluations(run: RunFiles) -> dict[str, float]:
    prefix = "nfe/"
    told = {k.removeprefix(prefix): v for k, v in (run.metrics or {}).items() if k.startswith(prefix)}
    return {name: float(value) for name, value in told.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class Costing:
    """A model with its quality and what it costs; what is not known is None."""

    name: str
    quality: float | None
    error: float | None
    parameters: int | None
    latency: float | None
    evaluations: float | None
    seconds: float | None
    memory: float | None
    ours: bool


def costing(run: RunFiles) -> tuple[str | None, list[Costing]]:
    """The main measurement, and every model that was tested by it, cost beside quality."""
    metrics = run.metrics or {}
    table = standings(metrics)
    metric, about = main_metric(table), ours(metrics)
    errors = errors_of(table, metric) if metric else {}
    speed, evaluations = latencies(run), _evaluations(run)
    rows = []
    for name in dict.fromkeys([*table, *run.parameters]):
        parts = _made_by(name, run)
        seconds = [run.cost[part] for part in parts if part in run.cost]
        peaks = [run.memory[part] for part in parts if part in run.memory]
        row = Costing(
            name,
            table.get(name, {}).get(metric or ""),
            errors.get(name),
            run.parameters.get(name),
            speed.get(name),
            evaluations.get(name),
            math.fsum(seconds) if seconds else None,
            max(peaks) if peaks else None,
            name == about,
        )
        known = (row.parameters, row.latency, row.evaluations, row.seconds, row.memory)
        if any(value is not None for value in known) and (metric is None or row.quality is not None):
            rows.append(row)
    return metric, rows


def _made_by(name: str, run: RunFiles) -> Sequence[str]:
    """The yields that made a model: the run or stage of its name, else the stages that trained it."""
    for item in run.yields:
        if item.get("name") == name:
            return [name]
    return [
        str(item.get("name"))
        for item in run.yields
        if str((item.get("modules") or {}).get(name, "")).startswith("trained ")
    ]
