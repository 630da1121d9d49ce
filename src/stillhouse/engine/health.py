"""Signs that a training goes wrong in silence: terms without effect, a student behind its reference lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

DEAD = 1e-3
"""A term is dead when this share of its update's gradient is more than it ever gives in :data:`SAMPLES` samples."""

DOMINATING = 0.99
"""A term dominates when it gives more than this share in :data:`SAMPLES` samples, and other terms are there."""

SAMPLES = 3
"""Samples in a row."""

MARGIN = 0.01
"""How clearly a number must lie on the wrong side of a line: by more than this share of the line's value ..."""

MEASUREMENTS = 3
"""... in so many measurements in a row."""


UNDER_TRAINED = "the student is under-trained"
"""Begins the note about a student that learned next to nothing, by which nothing can be said of the distillation."""


@dataclass(frozen=True)
class Line:
    """A reference for a stage's monitored number; the stage says once in words when it lies on the wrong side of it.

    Attributes:
        values: a number, or (step, value) pairs in order, such as :meth:`~stillhouse.engine.Result.curve` gives. Between
            steps it runs straight; before its first step it says nothing, after its last one it stays.
        trained_should_be: what is trained should be ``worse`` than the line (a teacher) or ``better`` (a student without
            one).
        warning: the sentence to say, of which the numbers follow in brackets.
    """

    values: float | Sequence[tuple[int, float]]
    trained_should_be: Literal["worse", "better"]
    warning: str

    def at(self, step: int) -> float | None:
        """The line's value at a step.

        >>> Line([(10, 0.5), (20, 0.7)], "better", "it is below").at(15)
        0.6
        """
        if isinstance(self.values, int | float):
            return float(self.values)
        before = [(s, v) for s, v in self.values if s <= step]
        after = [(s, v) for s, v in self.values if s > step]
        if not before:
            return None
        (left, low), (right, high) = before[-1], after[0] if after else before[-1]
        return low if right == left else low + (high - low) * (step - left) / (right - left)

    def crossed(self, value: float, step: int, mode: Literal["max", "min"]) -> bool:
        """Whether ``value`` lies clearly on the wrong side at ``step``."""
        line = self.at(step)
        if line is None or not math.isfinite(line) or not math.isfinite(value):
            return False
        better = value - line if mode == "max" else line - value
        return (better if self.trained_should_be == "worse" else -better) > MARGIN * abs(line)


@dataclass
class Streaks:
    """How often in a row something was seen, and of what it was said: what a warning needs to remember.

    Attributes:
        counts: sightings in a row by sign.
        said: signs of which it was said.
    """

    counts: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def seen(self, sign: str, now: bool, enough: int) -> bool:
        """Note whether a sign is there; true when it has been there ``enough`` times in a row and was not yet said."""
        self.counts[sign] = self.counts.get(sign, 0) + 1 if now else 0
        if self.counts[sign] < enough or sign in self.said:
            return False
        self.said.append(sign)
        return True

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"counts": dict(self.counts), "said": list(self.said)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        self.counts, self.said = dict(state["counts"]), list(state["said"])


def judge_terms(update: str, shares: Mapping[str, float], streaks: Streaks) -> list[str]:
    """Sentences about the terms of an update, from one more sample of their shares of its gradient."""
    if len(shares) < 2:
        return []
    which = "the loss" if update == "loss" else f"the loss of {update}"
    found = [
        f"{name} gives {percent(share)} of the gradient of {which}, {SAMPLES} samples in a row: it may do nothing; raise "
        "its weight, or set it to 0 and compare."
        for name, share in shares.items()
        if streaks.seen(f"dead {update}/{name}", share < DEAD, SAMPLES)
    ]
    for name, share in shares.items():
        dominates = streaks.seen(f"dominating {update}/{name}", share > DOMINATING, SAMPLES)
        # Where all others are dead that was said, and is the same.
        if dominates and not all(f"dead {update}/{other}" in streaks.said for other in shares if other != name):
            found.append(
                f"{name} gives {percent(share)} of the gradient of {which}, {SAMPLES} samples in a row: the other terms "
                "hardly count; lower its weight, or raise theirs."
            )
    return found


def judge_lines(
    lines: Mapping[str, Line], metric: str, value: float, step: int, mode: Literal["max", "min"], streaks: Streaks
) -> list[str]:
    """Sentences about reference lines, from one more measurement."""
    return [
        f"{line.warning} ({metric} {value:.4g}, and {name} {line.at(step):.4g} at the same step, {step:,}; so it was "
        f"{MEASUREMENTS} times in a row)."
        for name, line in lines.items()
        if streaks.seen(f"line {name}", line.crossed(value, step, mode), MEASUREMENTS)
    ]


def learned_little(
    accuracy: float, most_frequent: float, samples: int, *, teacher: float | None = None, hurried: bool = False
) -> bool:
    """Whether a classifier learned so little that its training is to blame, whatever its loss was.

    Args:
        accuracy: its accuracy.
        most_frequent: the accuracy of always naming the most frequent class.
        samples: how many were measured.
        teacher: the accuracy of its teacher, if it has one.
        hurried: whether nobody chose its learning rate and length, and the defaults are for a network that is trained already.
            It then also learned little if it is not half as far from naming the most frequent class as its teacher.

    >>> learned_little(0.52, 0.50, 400), learned_little(0.60, 0.50, 400)
    (True, False)
    >>> learned_little(0.60, 0.50, 400, teacher=0.95, hurried=True)
    True
    """
    noise = 2 * math.sqrt(most_frequent * (1 - most_frequent) / max(1, samples))
    gained = accuracy - most_frequent
    if gained <= max(0.02, noise):
        # Where hardly more can be had, as with one class in nearly all samples, little is no sign.
        return teacher is None or teacher - most_frequent > 2 * max(0.02, noise)
    return hurried and teacher is not None and gained < 0.5 * (teacher - most_frequent)


def percent(share: float) -> str:
    """A share for people.

    >>> percent(0.00012), percent(0.9987), percent(0.0)
    ('0.012 %', '99.87 %', '0 %')
    """
    return f"{float(f'{100 * share:.2g}') if share < 0.1 else round(100 * share, 2):g} %"
