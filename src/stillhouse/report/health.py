"""What a run's numbers say about its health: one check per way in which such runs quietly go wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from stillhouse.engine.health import SAMPLES, UNDER_TRAINED, Streaks, judge_terms
from stillhouse.report.formatting import number
from stillhouse.report.reading import RunFiles, Series, StageLog, UpdateLog, direction

DEAD = 1000.0
"""Where its share of the gradient was not sampled often enough for the engine's judgement, a term is called dead when another
one of its update adds this many times more to the loss."""

FALLING = 0.05
"""Share of the whole fall of a loss that may lie in its last fifth before the loss is said to be still falling."""

FAR = 0.6
"""The best measurement is far before the end when it lies before this part of the stage ..."""

LOST = 0.05
"""... and this share of the metric's range was lost again since, by more than one step between two measurements ..."""

COLLAPSED = 0.25
"""... or this share in whatever way."""


@dataclass(frozen=True)
class Check:
    """A check and what it found.

    Attributes:
        title: what holds, or does not.
        state: ``good``; ``warn``, with what was found; or ``open`` when there is nothing to judge by, with the reason.
        found: sentences.
    """

    title: str
    state: Literal["good", "warn", "open"]
    found: tuple[str, ...] = ()


def checks(run: RunFiles) -> list[Check]:
    """Every check, judged on this run."""
    metrics = run.metrics or {}
    weak, falling = _under_trained(run), _falling(run.stages)
    blind = "the student is under-trained"
    return [
        _judge(
            _finite(run),
            good="Every number is finite",
            bad="Some numbers are not finite",
            reason="no number was logged",
        ),
        _judge(
            _dead(run.stages),
            good="Every loss term counts",
            bad="A loss term looks dead",
            reason="no update has several terms",
        ),
        _judge(
            None if weak and not falling else falling,
            good="Training reached a plateau",
            bad="The loss was still falling at the end",
            reason=blind if weak else "no stage that ended was logged ten times",
        ),
        _judge(
            _best_long_ago(run.stages, run.recipe.get("keep")),
            good="The best step is near the end",
            bad="The best step was long before the end",
            reason="no stage that ended was measured four times, better told from worse",
        ),
        _judge(
            None if weak else _alone(metrics),
            good="Distillation is not worse than training alone",
            bad="Distillation is worse than training alone",
            reason=blind if weak else "no model was also trained alone",
        ),
        _judge(
            _teacher(metrics),
            good="The teacher is not worse than the student",
            bad="The teacher is worse than the student",
            reason="no teacher was measured beside a student",
        ),
        _judge(
            weak,
            good="The student learned",
            bad="The student is under-trained",
            reason="no student's accuracy was measured",
        ),
    ]


def _judge(found: Sequence[str] | None, *, good: str, bad: str, reason: str) -> Check:
    if found is None:
        return Check(good, "open", (f"Not judged: {reason}.",))
    return Check(bad, "warn", tuple(found)) if found else Check(good, "good")


def _under_trained(run: RunFiles) -> list[str] | None:
    """What the run itself said of a student that learned next to nothing."""
    if "accuracy" not in standings(run.metrics or {}).get("student", {}):
        return None
    return [f"{note[0].upper()}{note[1:]}" for note in run.notes if note.startswith(UNDER_TRAINED)]


def _finite(run: RunFiles) -> list[str] | None:
    series: dict[str, list[float]] = {}
    for stage in run.stages:
        logged = dict(stage.measured)
        for update in stage.updates.values():
            logged |= {f"{update.name}/{term.name}": term.values for term in update.terms.values()}
        series |= {f"{name} in stage {stage.name}": [v for _, v in values] for name, values in logged.items()}
    series |= {name: [v] for name, v in (run.metrics or {}).items() if isinstance(v, int | float)}
    if not series:
        return None
    broken = [name for name, values in series.items() if not all(map(math.isfinite, values))]
    if not broken:
        return []
    more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
    return [f"NaN or infinite: {', '.join(broken[:3])}{more}."]


def _dead(stages: Sequence[StageLog]) -> list[str] | None:
    """Terms that give next to nothing of the gradient, or nearly all of it; where that was not sampled, terms whose weighted
    size is, over the whole stage, a thousandth of another's."""
    updates = [(stage, update) for stage in stages for update in stage.updates.values() if len(update.terms) > 1]
    found = []
    for stage, update in updates:
        samples = _shares(update)
        judged = _by_gradient(stage, update, samples) if len(samples) >= SAMPLES else _by_size(stage, update)
        found += judged
    return found if updates else None


def _shares(update: UpdateLog) -> list[dict[str, float]]:
    """The terms' shares of the gradient, a mapping per sample, in order."""
    by_step: dict[int, dict[str, float]] = {}
    for name, term in update.terms.items():
        for step, share in term.shares:
            if math.isfinite(share):
                by_step.setdefault(step, {})[name] = share
    return [by_step[step] for step in sorted(by_step)]


def _by_gradient(stage: StageLog, update: UpdateLog, samples: Sequence[Mapping[str, float]]) -> list[str]:
    """What the engine says of them while it trains."""
    streaks = Streaks()
    said = [sentence for shares in samples for sentence in judge_terms(update.name, shares, streaks)]
    return [f"Stage {stage.name}: {sentence}" for sentence in said]


def _by_size(stage: StageLog, update: UpdateLog) -> list[str]:
    sizes = {}
    for name, term in update.terms.items():
        finite = [abs(v) for _, v in term.weighted if math.isfinite(v)]
        if finite:
            sizes[name] = median(finite)
    if not sizes:
        return []
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        f"Stage {stage.name}: {name} adds {_two(size)} to {_loss(update)} where {largest} adds "
        f"{_two(sizes[largest])}{_times(sizes[largest], size)}: it may do nothing; raise its weight, or set it to 0 and compare."
        for name, size in sizes.items()
        if sizes[largest] > DEAD * size
    ]


def _times(large: float, small: float) -> str:
    return f", {float(f'{large / small:.2g}'):,.0f} times as much" if small else ""


def _loss(update: UpdateLog) -> str:
    return "the loss" if update.name == "loss" else f"the loss of {update.name}"


def _two(value: float) -> str:
    return number(float(f"{value:.2g}"))


def _falling(stages: Sequence[StageLog]) -> list[str] | None:
    found, judged = [], False
    for stage in stages:
        for update in stage.updates.values():
            total = [(s, v) for s, v in update.total() if math.isfinite(v)]
            if not stage.ended or len(total) < 10:
                continue
            judged = True
            share = falling_share(total)
            if share > FALLING:
                found.append(
                    f"Stage {stage.name}: {_loss(update)} was still falling when training ended ({share:.0%} of "
                    "its whole fall came in the last fifth); more steps may help."
                )
    return found if judged else None


def falling_share(total: Series) -> float:
    """Share of a loss's whole fall that its last fifth brought; 0 where that fall is not clear of the noise.

    The fall is that of a least-squares line, and clear when its slope is three standard errors below 0.
    """
    last = total[-max(4, len(total) // 5) :]
    steps, values = [float(s) for s, _ in last], [v for _, v in last]
    mean_step, level = fmean(steps), fmean(values)
    spread = math.fsum((s - mean_step) ** 2 for s in steps)
    slope = math.fsum((s - mean_step) * (v - level) for s, v in zip(steps, values, strict=True)) / spread
    residuals = [v - level - slope * (s - mean_step) for s, v in zip(steps, values, strict=True)]
    error = math.sqrt(math.fsum(r * r for r in residuals) / (len(last) - 2) / spread)
    whole = fmean(v for _, v in total[: max(1, len(total) // 20)]) - values[-1]
    if whole <= 0 or slope >= -3 * error:
        return 0.0
    return min(1.0, -slope * (steps[-1] - steps[0]) / whole)


def _best_long_ago(stages: Sequence[StageLog], keep: Any) -> list[str] | None:
    found, judged = [], False
    for stage in stages:
        series = [(s, v) for s, v in stage.measured.get(stage.monitor or "", []) if math.isfinite(v)]
        if not stage.ended or len(series) < 4 or stage.best_step not in dict(series):
            continue
        judged = True
        best, (last_step, last) = dict(series)[stage.best_step], series[-1]
        values = [v for _, v in series]
        since = [v for s, v in series if s >= stage.best_step]
        lost, extent = abs(best - last), max(values) - min(values)
        largest = max((abs(a - b) for a, b in pairwise(since)), default=0.0)
        if stage.best_step <= FAR * last_step and (lost > COLLAPSED * extent or lost > max(LOST * extent, largest)):
            advice = (
                "the best weights were kept, and fewer steps would do"
                if keep == "best"
                else "keep=best or fewer steps would ship better weights"
            )
            found.append(
                f"Stage {stage.name}: {stage.monitor} was best at step {stage.best_step:,} of {last_step:,} "
                f"({number(best)}) and is {number(last)} at the end; {advice}."
            )
    return found if judged else None


def _alone(metrics: Mapping[str, Any]) -> list[str] | None:
    table = standings(metrics)
    pairs = [(name, f"{name}-alone") for name in table if f"{name}-alone" in table]
    compared = [(ours, alone, metric) for ours, alone in pairs if (metric := shared(table, ours, alone))]
    if not compared:
        return None
    return [
        f"The {ours} ({number(table[ours][metric])}) is below the line of the same network trained without a teacher "
        f"({number(table[alone][metric])}) in {metric}: on this data the distillation does harm."
        for ours, alone, metric in compared
        if _worse(table[ours][metric], table[alone][metric], metric)
    ]


def _teacher(metrics: Mapping[str, Any]) -> list[str] | None:
    table = standings(metrics)
    # Not a teacher made to do with less, such as fewer steps: that one is there to be beaten.
    teachers = [name for name in table if re.fullmatch(r"teacher(-\d+)?", name)]
    students = [name for name in table if name.startswith("student") and not name.endswith("-alone")]
    compared = [(t, s, metric) for t in teachers for s in students if (metric := shared(table, t, s))]
    if not compared:
        return None
    return [
        f"The {teacher} ({number(table[teacher][metric])}) is worse than the {student} ({number(table[student][metric])}) "
        f"in {metric}: a better teacher may help."
        for teacher, student, metric in compared
        if _worse(table[teacher][metric], table[student][metric], metric)
    ]


def standings(metrics: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Test measurements by model, from the numbers named ``test/<model>/<measurement>``."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        found = re.fullmatch(r"test/([^/]+)/(.+)", name)
        if found and isinstance(value, int | float) and math.isfinite(value):
            table.setdefault(found[1], {})[found[2]] = float(value)
    return table


def shared(table: Mapping[str, Mapping[str, float]], *models: str) -> str | None:
    """The first measurement that all models have and whose name tells what is better."""
    first = table[models[0]]
    return next((m for m in first if direction(m) and all(m in table[other] for other in models)), None)


def _worse(one: float, other: float, metric: str) -> bool:
    return direction(metric) * (one - other) < 0
