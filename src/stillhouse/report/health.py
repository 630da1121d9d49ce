"""What a run's numbers say about its health: rules over the log, each a sentence when it fires."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def findings(rows: Sequence[Row], metrics: Mapping[str, float]) -> list[str]:
    """Sentences about terms without weight, unfinished training, overfitting, and teachers that do not help."""
    said = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        said += _dead_terms(stage, own) + _still_falling(stage, own) + _best_long_ago(stage, own)
    return said + _useless_teacher(metrics)


def terms(row: Row) -> dict[str, float]:
    """The weighted loss terms in a row by name: the logged scale, or the value itself where the weight is 1."""
    names = [k for k in row if k.count("/") == 1 and not k.startswith(("validation/", "test/"))]
    return {name: row.get(f"{name}/scale", row[name]) for name in names if _is_term(row, name)}


def _is_term(row: Row, name: str) -> bool:
    return isinstance(row[name], int | float) and not name.endswith("/lr")


def _dead_terms(stage: str, rows: Sequence[Row]) -> list[str]:
    said = []
    trained = [row for row in rows if terms(row)]
    late = trained[len(trained) // 2 :]
    updates = dict.fromkeys(name.split("/")[0] for row in late for name in terms(row))
    for update in updates:
        sizes: dict[str, list[float]] = {}
        for row in late:
            for name, value in terms(row).items():
                if name.startswith(update + "/"):
                    sizes.setdefault(name, []).append(abs(value))
        means = {name: sum(values) / len(values) for name, values in sizes.items()}
        largest = max(means, key=lambda name: means[name])
        for name, mean in means.items():
            if means[largest] > 1000 * mean:
                said.append(
                    f"{stage}: the weighted term {name} ({mean:.2g}) is more than a thousand times smaller than {largest} "
                    f"({means[largest]:.2g}), so it hardly trains anything."
                )
    return said


def _still_falling(stage: str, rows: Sequence[Row]) -> list[str]:
    totals = [sum(found.values()) for row in rows if (found := terms(row))]
    if len(totals) < 10:
        return []
    tenth = max(1, len(totals) // 10)
    last, before = sum(totals[-tenth:]) / tenth, sum(totals[-2 * tenth : -tenth]) / tenth
    span = max(totals) - min(totals)
    if span > 0 and before - last > 0.05 * span:
        return [f"{stage}: the loss was still falling at the end; more steps may help."]
    return []


def _best_long_ago(stage: str, rows: Sequence[Row]) -> list[str]:
    measured = [(row["step"], row["validation/accuracy"]) for row in rows if "validation/accuracy" in row]
    if len(measured) < 5:
        return []
    best_step, best = max(measured, key=lambda pair: pair[1])
    end_step, end = measured[-1]
    if best_step < 0.5 * end_step and best - end > 0.01:
        return [
            f"{stage}: validation accuracy was best at step {best_step} ({best:.3f}) and is {end:.3f} at the end; "
            "keep=best or fewer steps would keep it."
        ]
    return []


def _useless_teacher(metrics: Mapping[str, float]) -> list[str]:
    said = []
    student, alone = metrics.get("test/student/accuracy"), metrics.get("test/student-alone/accuracy")
    teacher = metrics.get("test/teacher/accuracy")
    if student is not None and alone is not None and student < alone:
        said.append(f"the student ({student:.4f}) is below the same network trained without a teacher ({alone:.4f}).")
    if student is not None and teacher is not None and teacher < student:
        said.append(f"the teacher ({teacher:.4f}) is worse than the student ({student:.4f}) on this data.")
    return said
