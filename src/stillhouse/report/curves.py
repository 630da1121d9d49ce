"""A run's log as figures: per stage the loss with its terms, the measurements with what they are held against."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from stillhouse.report.charts import Line, chart, spans_decades
from stillhouse.report.formatting import number
from stillhouse.report.reading import RunFiles, Series, StageLog, UpdateLog

COLORS = 8
"""Colours of lines in the style sheet."""

OVERLAID = 2
"""More than so many stages that differ only in their numbers share one figure."""


@dataclass(frozen=True)
class Panel:
    """A small chart with its heading and, below it, what it comes to."""

    title: str
    svg: Markup
    ends: str = ""
    log: bool = False


@dataclass(frozen=True)
class TermRow:
    """A row beside the chart of a loss: how a term is drawn, its weight, its values and its shares at the end."""

    color: int
    name: str
    weight: str
    first: str
    last: str
    share: str
    gradient: str


@dataclass(frozen=True)
class Loss:
    """The chart of one update's loss, a row per term, and where they were sampled the shares of its gradient."""

    panel: Panel
    rows: list[TermRow]
    shares: Panel | None = None


@dataclass(frozen=True)
class Curves:
    """The figures of one stage, or of several alike."""

    title: str
    detail: str
    losses: list[Loss] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    rates: list[str] = field(default_factory=list)


def curves(run: RunFiles) -> list[Curves]:
    """The figures of a run, in the order of its stages."""
    groups: dict[Any, list[StageLog]] = {}
    for stage in run.stages:
        terms = tuple((name, *update.terms) for name, update in stage.updates.items())
        groups.setdefault((re.sub(r"\d+", "#", stage.name), terms, tuple(stage.measured)), []).append(stage)
    found = []
    for alike in groups.values():
        found += [_overlaid(alike)] if len(alike) > OVERLAID else [_single(stage, run) for stage in alike]
    return found


def _single(stage: StageLog, run: RunFiles) -> Curves:
    steps = stage.planned or stage.reached
    detail = f"{stage.reached:,} steps" if stage.ended else f"step {stage.reached:,}"
    if stage.planned and stage.planned != stage.reached:
        detail += f" of {stage.planned:,}" + (", stopped early" if stage.ended else "")
    updates = list(stage.updates.values())
    losses = [_loss(update, stage.name, steps) for update in updates if len(update.terms) > 1]
    panels = [_only_term(update, stage.name, steps) for update in updates if len(update.terms) == 1]
    shown = [name for name in stage.measured if _main(name) is None or _main(name) not in stage.measured]
    panels += [_measured(name, stage, run, steps) for name in shown]
    rates = []
    for update in updates:
        for name, series in update.rates.items():
            title = f"learning rate of {name}" + (f" ({update.name})" if len(updates) > 1 else "")
            if len({value for _, value in series}) > 1:
                panels.append(_rate(title, series, stage.name, steps))
            else:
                rates.append(f"{title}: {number(series[0][1])} throughout")
    return Curves(stage.name, detail, losses, panels, rates)


def _loss(update: UpdateLog, stage: str, steps: int) -> Loss:
    terms = list(update.terms.values())
    log = spans_decades([v for term in terms for _, v in term.weighted])
    ends = {term.name: term.weighted[-1][1] for term in terms}
    whole = math.fsum(abs(v) for v in ends.values() if math.isfinite(v))
    told = ", ".join(f"{name} ends at {number(end)}" for name, end in ends.items())
    svg = chart(
        [Line(term.name, term.weighted, i % COLORS) for i, term in enumerate(terms)],
        label=f"Loss of {update.name} in stage {stage}, weighted terms over steps: {told}.",
        steps=steps,
        width=430,
        log=log,
    )
    rows = []
    for i, term in enumerate(terms):
        share = _percent(abs(ends[term.name]) / whole) if whole and math.isfinite(ends[term.name]) else "-"
        first, last = number(term.values[0][1]), number(term.values[-1][1])
        weight, gradient = number(float(f"{term.weight:.4g}")), _percent(term.shares[-1][1]) if term.shares else ""
        rows.append(TermRow(i % COLORS, term.name, weight, first, last, share, gradient))
    return Loss(Panel(update.name, svg, log=log), rows, _shares(update, stage, steps))


def _shares(update: UpdateLog, stage: str, steps: int) -> Panel | None:
    lines = [Line(term.name, term.shares, i % COLORS) for i, term in enumerate(update.terms.values()) if term.shares]
    if sum(len(line.points) > 1 for line in lines) < 2:
        return None
    told = ", ".join(f"{line.name} ends at {_percent(line.points[-1][1])}" for line in lines)
    label = f"Share of each term in the gradient of {update.name} in stage {stage} over steps: {told}."
    return Panel(f"{update.name}: share of the gradient", chart(lines, label=label, steps=steps), told)


def _percent(share: float) -> str:
    if not math.isfinite(share):
        return "-"
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _only_term(update: UpdateLog, stage: str, steps: int) -> Panel:
    (term,) = update.terms.values()
    log = spans_decades([v for _, v in term.values])
    first, last = number(term.values[0][1]), number(term.values[-1][1])
    label = f"Loss of {update.name} in stage {stage}, its only term {term.name} over steps: from {first} to {last}."
    svg = chart([Line(term.name, term.values)], label=label, steps=steps, log=log)
    return Panel(f"{update.name}: {term.name}", svg, f"from {first} to {last}", log=log)


def _measured(name: str, stage: StageLog, run: RunFiles, steps: int) -> Panel:
    series = stage.measured[name]
    last = series[-1]
    best = None
    if name == stage.monitor and stage.best_step is not None:
        best = next(((s, v) for s, v in series if s == stage.best_step), None)
    ends = f"{number(series[0][1])} at step {series[0][0]:,}, {number(last[1])} at step {last[0]:,}"
    peak = f", best {number(best[1])} at step {best[0]:,}" if best is not None else ""
    held = held_against(name, stage, run, steps)
    told = "".join(f"; {other} {number(values[-1][1])}" for other, values in held.items())
    label = f"{name} in stage {stage.name} over steps: {ends}{peak}{told}."
    lines = [Line(other, values, reference=True) for other, values in held.items()]
    svg = chart([*lines, Line(name, series)], label=label, steps=steps, best=best)
    return Panel(name, svg, f"last {number(last[1])}{peak}{told}")


def held_against(name: str, stage: StageLog, run: RunFiles, steps: int) -> dict[str, Series]:
    """What a measurement of a stage is to be compared with, by name: as a stage logged it, or as it was measured at the end.

    That is, the first that is there: lines that the stage logged, measurements of other models in the same stage, the
    curve of a student trained alone within the run, and final numbers named ``validation/<model>/<measurement>``, as levels.
    """
    found = {other: list(values) for other, values in stage.lines.get(name, {}).items()}
    for other, values in stage.measured.items():
        if _main(other) == name:
            found.setdefault(other.split("/")[1], list(values))
    for nested in run.stages:
        home, inside, _ = nested.name.partition(" / ")
        if inside and home.endswith("-alone") and name in nested.measured and " / " not in stage.name:
            found.setdefault(home, [(s, v) for s, v in nested.measured[name] if s <= steps])
    for other, value in (run.metrics or {}).items():
        if (
            _main(other) == name
            and isinstance(value, int | float)
            and other.split("/")[1] not in ("student", stage.name)
        ):
            found.setdefault(other.split("/")[1], [(0, float(value)), (steps, float(value))])
    return {other: values for other, values in found.items() if any(math.isfinite(v) for _, v in values)}


def _main(name: str) -> str | None:
    """``validation/accuracy`` for ``validation/teacher/accuracy``, and nothing for names of other forms."""
    parts = name.split("/")
    return f"{parts[0]}/{parts[2]}" if len(parts) == 3 and parts[0] == "validation" else None


def _rate(title: str, series: Series, stage: str, steps: int) -> Panel:
    ends = f"from {number(series[0][1])} to {number(series[-1][1])}"
    label = f"{title} in stage {stage} over steps: {ends}, at most {number(max(v for _, v in series))}."
    return Panel(title, chart([Line("learning rate", series, 6)], label=label, steps=steps), ends)


def _overlaid(stages: Sequence[StageLog]) -> Curves:
    """Many stages that differ only in their numbers: a line each, in one chart per term and measurement."""
    steps = max(stage.planned or stage.reached for stage in stages)
    panels = []
    for name, lines in series_of(stages).items():
        ends = [values[-1][1] for values in lines if math.isfinite(values[-1][1])] or [math.nan]
        label = (
            f"{name} of {len(lines)} stages over steps: they end between {number(min(ends))} and {number(max(ends))}."
        )
        log = spans_decades([v for values in lines for _, v in values])
        svg = chart([Line(name, values) for values in lines], label=label, steps=steps, log=log, faint=True)
        panels.append(Panel(name, svg, f"last from {number(min(ends))} to {number(max(ends))}", log=log))
    title = f"{stages[0].name} to {stages[-1].name}"
    return Curves(title, f"{len(stages)} stages of up to {steps:,} steps, a line each", panels=panels)


def series_of(stages: Sequence[StageLog]) -> Mapping[str, list[Series]]:
    """Terms (``update/term``) and measurements by name, a series per stage that has it."""
    series: dict[str, list[Series]] = {}
    for stage in stages:
        for update in stage.updates.values():
            for term in update.terms.values():
                series.setdefault(f"{update.name}/{term.name}", []).append(term.values)
        for name, values in stage.measured.items():
            series.setdefault(name, []).append(values)
    return series
