"""Softmax temperatures as a field: a number, a schedule, or each sample's own deviation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator
from torch import Tensor

from stillhouse.engine import Ramp, Run
from stillhouse.engine.optim import weight_at
from stillhouse.losses.logit_matching import standardize


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it is a number above 0, a schedule, or std, not yes or no")
    return value


def _above_zero(value: float | Ramp | Literal["std"]) -> float | Ramp | Literal["std"]:
    for end in (value.start, value.end) if isinstance(value, Ramp) else (value,):
        if not isinstance(end, str) and end <= 0:
            raise ValueError(f"expected more than 0, not {end:g}")
    return value


Temperature = Annotated[
    float | Ramp | Literal["std"],
    BeforeValidator(_no_switch),
    AfterValidator(_above_zero),
]
"""A softmax temperature of both sides: a number above 0; ``{start, end, ...}``, which moves during the training; or ``std``,
the deviation of each sample's logits over its classes, on each side its own (arXiv 2211.03946, arXiv 2403.01427)."""


def softened(
    student: Tensor, teacher: Tensor, temperature: float | Ramp | Literal["std"], run: Run
) -> tuple[Tensor, Tensor, float]:
    """Both logits, and the number that a loss is to divide them by at this step.

    With ``std`` the logits come back divided by their own deviations, and the number is 1: no squared temperature then
    multiplies a loss. The student's deviation has a gradient. Samples whose logits are all equal have none and stay undivided;
    how many there were is logged now and then (``std/constant``).
    """
    if temperature != "std":
        return student, teacher, temperature_at(temperature, run)
    step = run.step + 1
    if step == run.steps or step % run.settings.log_every == 0:
        number = run.gather((student.detach().std(-1) == 0).float().sum()[None]).sum()
        if number:
            run.log({"stage": run.stage, "step": step, "std/constant": float(number)})
    return standardize(student), standardize(teacher), 1.0


def temperature_at(temperature: float | Ramp, run: Run) -> float:
    """The number that a temperature is at this step of a stage."""
    return weight_at(temperature, run.step, run.steps, run.per_epoch)
