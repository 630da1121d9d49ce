"""Optimisers and schedules as fields: what a method writes down, what the engine builds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.spec import Spec


class Optimizer(Spec):
    """An optimiser, its schedule and its clipping, for one group of parameters of one update."""

    name: Literal["sgd", "adam", "adamw"] = Field("adamw", description="the algorithm")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, an L2 term for sgd and adam")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of sgd")
    nesterov: bool = Field(False, description="Nesterov momentum of sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of adam and adamw")
    eps: float = Field(1e-8, gt=0, description="denominator guard of adam and adamw")
    schedule: Literal["constant", "cosine", "linear", "step", "table"] = Field(
        "constant", description="shape of the learning rate after warm-up; cosine and linear end at 0 (see stretch)"
    )
    stretch: float = Field(
        1.0, ge=1, description="length of 'cosine' and 'linear' in trainings: at 2 a cosine ends at half of its peak"
    )
    warmup: int = Field(0, ge=0, description="firings over which the learning rate rises linearly from 0")
    milestones: tuple[float, ...] = Field(
        (0.5,), description="fractions of training at which 'step' multiplies by gamma"
    )
    gamma: float = Field(0.1, gt=0, le=1, description="factor of the 'step' schedule")
    table: tuple[tuple[int, int, float], ...] = Field(
        (), description="of the 'table' schedule: (first epoch, last epoch, learning rate) rows, from 0 without gaps"
    )
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the group's gradient")
    clip_value: float | None = Field(None, gt=0, description="largest absolute value of each gradient element")

    @model_validator(mode="after")
    def _table_is_whole(self) -> Self:
        if (self.schedule == "table") != bool(self.table):
            raise ValueError("the schedule 'table' and the field 'table' belong together; give both or neither")
        expected = 0
        for first, last, lr in self.table:
            if first != expected:
                raise ValueError(
                    f"table: the row ({first}, {last}, {lr:g}) starts at epoch {first} where epoch {expected} is next; rows "
                    "start at 0 and touch"
                )
            if last < first or lr <= 0:
                raise ValueError(
                    f"table: the row ({first}, {last}, {lr:g}) ends before it starts, or its rate is not above 0"
                )
            expected = last + 1
        return self

    def covers(self, total: int, per_epoch: int) -> None:
        """Check that a table reaches to the last of ``total`` firings, of which ``per_epoch`` make a pass over the data.

        Raises:
            UserError: it ends before.
        """
        last = (total - 1) // per_epoch
        if self.table and self.table[-1][1] < last:
            raise UserError(
                f"optimizer.table: it ends with epoch {self.table[-1][1]}, and the training has epochs 0 to {last}; add a row."
            )

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The torch optimiser over ``parameters``, fused where the parameters' device has fused kernels."""
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        shared: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": fused}
        if self.name == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=self.nesterov, **shared)
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(parameters, betas=self.betas, eps=self.eps, **shared)

    def scaled(self, factor: float) -> Optimizer:
        """The same with every learning rate times ``factor``."""
        table = tuple((first, last, lr * factor) for first, last, lr in self.table)
        return self.model_copy(update={"lr": self.lr * factor, "table": table})

    @property
    def constant(self) -> bool:
        """True when the learning rate never changes."""
        return self.schedule == "constant" and self.warmup == 0

    def lr_at(self, firing: int, total: int, per_epoch: int = 1) -> float:
        """Learning rate of firing number ``firing`` of ``total``, of which ``per_epoch`` make a pass over the data.

        >>> [round(Optimizer(lr=1.0, schedule="linear").lr_at(i, 4), 2) for i in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        >>> stepped = Optimizer(schedule="table", table=((0, 1, 0.01), (2, 2, 0.001)))
        >>> [stepped.lr_at(i, 6, per_epoch=2) for i in range(6)]
        [0.01, 0.01, 0.01, 0.01, 0.001, 0.001]
        """
        if firing < self.warmup:
            return self.lr * (firing + 1) / self.warmup
        progress = (firing - self.warmup) / max(1, total - self.warmup)
        stretched = progress / self.stretch
        match self.schedule:
            case "cosine":
                return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, stretched)))
            case "linear":
                return self.lr * max(0.0, 1 - stretched)
            case "step":
                return self.lr * self.gamma ** sum(progress >= milestone for milestone in self.milestones)
            case "table":
                epoch = min(firing // per_epoch, self.table[-1][1])
                return next(lr for first, last, lr in self.table if first <= epoch <= last)
            case _:
                return self.lr


def sgd(lr: float, **fields: Any) -> Optimizer:
    """Short for ``Optimizer(name="sgd", ...)``."""
    return Optimizer(name="sgd", lr=lr, **fields)


def adam(lr: float, **fields: Any) -> Optimizer:
    """Short for ``Optimizer(name="adam", ...)``."""
    return Optimizer(name="adam", lr=lr, **fields)


def adamw(lr: float, **fields: Any) -> Optimizer:
    """Short for ``Optimizer(name="adamw", ...)``."""
    return Optimizer(name="adamw", lr=lr, **fields)


class Ramp(Spec):
    """A number that moves with the progress of a stage."""

    start: float = Field(description="value at the start")
    end: float = Field(description="value at the end")
    shape: Literal["linear", "cosine"] = Field("linear", description="how it moves between them")
    begin: float = Field(0.0, ge=0, le=1, description="progress at which it starts to move")
    until: float = Field(1.0, ge=0, le=1, description="progress at which it arrives")
    by: Literal["step", "epoch"] = Field("step", description="move at every step, or once per pass over the data")

    def at(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1].

        >>> Ramp(start=1.0, end=0.0).at(0.25)
        0.75
        """
        width = max(self.until - self.begin, 1e-12)
        moved = min(1.0, max(0.0, (progress - self.begin) / width))
        if self.shape == "cosine":
            moved = 0.5 * (1 - math.cos(math.pi * moved))
        return self.start + (self.end - self.start) * moved


def _not_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a weight is a number or a schedule, not yes or no")
    return value


def _not_negative(value: float | Ramp) -> float | Ramp:
    ends = (value.start, value.end) if isinstance(value, Ramp) else (value,)
    if min(ends) < 0:
        raise ValueError(f"a weight is 0 or more, not {min(ends):g}")
    return value


Weight = Annotated[float | Ramp, BeforeValidator(_not_boolean), AfterValidator(_not_negative)]
"""A loss weight: a number of at least 0, or a schedule of progress."""


def weight_at(weight: float | Ramp, step: int, steps: int, per_epoch: int) -> float:
    """The value of a weight at a step of ``steps``, of which ``per_epoch`` make a pass over the data.

    >>> ramp = Ramp(start=0.0, end=1.0, until=0.5, by="epoch")
    >>> [weight_at(ramp, step, steps=8, per_epoch=2) for step in range(6)]
    [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    """
    if not isinstance(weight, Ramp):
        return weight
    return weight.at((step if weight.by == "step" else step // per_epoch * per_epoch) / steps)
