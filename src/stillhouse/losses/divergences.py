"""Cross-entropies and divergences between the class distributions of a student and a teacher.

Every function takes logits ``(..., classes)`` whose leading shape is that of the samples, positions or tokens ("rows"):

- It computes in float32 (float64 inputs stay float64), also under autocast.
- ``temperature`` softens both sides: one number, or a tensor with one per row.
- ``mask`` (boolean or 0/1 integers, like an attention mask) says which rows count; what lies under a masked row is
  never looked at, not even a NaN. ``weight`` is the importance of each row. ``reduction="mean"`` divides by the sum of
  the weights that count, and is 0 when none does; ``"sum"`` does not divide; ``"none"`` gives the weighted rows, with 0
  at masked ones.
- Gradients go to every tensor that requires them: compute a teacher under ``torch.no_grad`` or detach it.
- ``chunk`` is a number of rows to handle at once. With it no float32 tensor of all rows x classes exists besides inputs
  and their gradients; each chunk is computed twice.
- A class whose logit is ``-inf`` on both sides is absent, as with a restricted vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError

Reduction = Literal["mean", "sum", "none"]
Temperature = float | Float[Tensor, "*rows"]
Mask = Bool[Tensor, "*rows"] | Int[Tensor, "*rows"]


class Divergence(Protocol):
    """What all of :data:`DIVERGENCES` have in common, so that a method can let its user choose."""

    def __call__(
        self,
        student_logits: Float[Tensor, "*rows classes"],
        teacher_logits: Float[Tensor, "*rows classes"],
        temperature: Temperature = 1.0,
        *,
        scale_by_temperature_squared: bool = ...,
        mask: Mask | None = None,
        weight: Float[Tensor, "*rows"] | None = None,
        reduction: Reduction = "mean",
        chunk: int | None = None,
    ) -> Float[Tensor, "*reduced"]: ...


def cross_entropy(
    student_logits: Float[Tensor, "*rows classes"],
    labels: Int[Tensor, "*rows"] | Float[Tensor, "*rows classes"],
    *,
    ignore_index: int = -100,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """Cross-entropy with hard (integer) labels, or soft ones (floats, a distribution per row).

    Args:
        student_logits: class logits.
        labels: class indices, or probabilities (mixup, learned labels).
        ignore_index: hard labels of this value are masked.
        mask: rows that count; see the module for this and the rest.
        weight: importance of each row.
        reduction: over rows.
        chunk: rows handled at once.

    Raises:
        UserError: shapes that do not match, or a label out of range (looked for on the CPU only).

    >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    >>> round(cross_entropy(logits, torch.tensor([0, 0])).item(), 4)
    1.1269
    >>> round(cross_entropy(logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]])).item(), 4)
    0.6269
    """
    where = "cross_entropy"
    if labels.is_floating_point():
        _check_shapes(where, "student_logits", student_logits, "labels", labels)
        return _evaluate(where, _soft_label_rows, student_logits, labels, 1.0, False, mask, weight, reduction, chunk)
    rows, num_classes = student_logits.shape[:-1], student_logits.shape[-1]
    if labels.shape != rows:
        raise UserError(
            f"{where}: labels has the shape {tuple(labels.shape)}, but student_logits has the rows {tuple(rows)} "
            f"of {num_classes} classes; hard labels are one integer per row, soft ones a float per class."
        )
    valid = labels != ignore_index
    if mask is not None:
        _check_rows(where, "mask", mask, rows)
        valid = valid & mask.bool()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[valid & ((labels < 0) | (labels >= num_classes))]
        if len(wrong):
            raise UserError(
                f"{where}: labels holds {int(wrong[0])}, but student_logits has {num_classes} classes, 0 to "
                f"{num_classes - 1}."
            )
    labels = labels.long().masked_fill(~valid, 0)
    return _evaluate(where, _hard_label_rows, student_logits, labels, 1.0, False, valid, weight, reduction, chunk)


def soft_cross_entropy(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Temperature = 1.0,
    *,
    scale_by_temperature_squared: bool = False,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """``-sum_k t_k log s_k`` of the softened teacher ``t`` and student ``s`` (SinKD, arXiv 2402.17110, L_KD).

    It is :func:`kl` plus the teacher's entropy, so its gradient to the student is the same; but SinKD does not multiply
    by the squared temperature, and neither does the default here.

    Args:
        student_logits: the student's class logits.
        teacher_logits: the teacher's, of the same shape.
        temperature: softmax temperature of both sides.
        scale_by_temperature_squared: multiply each row by its squared temperature.
        mask: rows that count; see the module for this and the rest.
        weight: importance of each row.
        reduction: over rows.
        chunk: rows handled at once.

    Raises:
        UserError: shapes that do not match, or a temperature that is not above 0.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(soft_cross_entropy(student, teacher, temperature=2.0).item(), 4)
    0.8133
    """
    where, squared = "soft_cross_entropy", scale_by_temperature_squared
    _check_shapes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    rows_of = _soft_cross_entropy_rows
    return _evaluate(
        where, rows_of, student_logits, teacher_logits, temperature, squared, mask, weight, reduction, chunk
    )


def kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Temperature = 1.0,
    *,
    scale_by_temperature_squared: bool = True,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """Forward divergence ``KL(teacher || student)``: the student is to cover all that the teacher does.

    Args:
        student_logits: the student's class logits.
        teacher_logits: the teacher's, of the same shape.
        temperature: softmax temperature of both sides.
        scale_by_temperature_squared: multiply each row by its squared temperature, so that gradients keep their size
            when the temperature changes (Hinton et al., arXiv 1503.02531, section 2).
        mask: rows that count; see the module for this and the rest.
        weight: importance of each row.
        reduction: over rows.
        chunk: rows handled at once.

    Raises:
        UserError: shapes that do not match, or a temperature that is not above 0.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> round(kl(student, teacher).item(), 4)
    0.3278
    >>> round(kl(student, teacher, temperature=4.0).item(), 4)
    0.4848
    """
    where, squared = "kl", scale_by_temperature_squared
    _check_shapes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    return _evaluate(
        where, _kl_rows, student_logits, teacher_logits, temperature, squared, mask, weight, reduction, chunk
    )


def reverse_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Temperature = 1.0,
    *,
    scale_by_temperature_squared: bool = True,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """Reverse divergence ``KL(student || teacher)``: the student is to stay where the teacher is, and may drop modes.

    Arguments and errors are those of :func:`kl`.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> round(reverse_kl(student, teacher).item(), 4)
    0.4338
    """
    where, squared = "reverse_kl", scale_by_temperature_squared
    _check_shapes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    return _evaluate(
        where, _reverse_kl_rows, student_logits, teacher_logits, temperature, squared, mask, weight, reduction, chunk
    )


def js(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Temperature = 1.0,
    *,
    beta: float = 0.5,
    scale_by_temperature_squared: bool = True,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """Generalised Jensen-Shannon divergence (as in GKD, arXiv 2306.13649), in which ``beta`` weighs the teacher.

    ``beta KL(teacher || m) + (1 - beta) KL(student || m)`` with ``m = beta teacher + (1 - beta) student``. Divided by
    ``beta`` it tends to :func:`kl` for small ``beta``, and divided by ``1 - beta`` to :func:`reverse_kl` for large.

    Args:
        student_logits: the student's class logits.
        teacher_logits: the teacher's, of the same shape.
        temperature: softmax temperature of both sides.
        beta: the teacher's share of the mixture, between 0 and 1, both exclusive (at the ends it is 0 everywhere).
        scale_by_temperature_squared: multiply each row by its squared temperature, as in :func:`kl`.
        mask: rows that count; see the module for this and the rest.
        weight: importance of each row.
        reduction: over rows.
        chunk: rows handled at once.

    Raises:
        UserError: ``beta`` is out of range, and as in :func:`kl`.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> round(js(student, teacher).item(), 4), round(js(student, teacher, beta=0.1).item(), 4)
    (0.0895, 0.0299)
    """
    where, squared = "js", scale_by_temperature_squared
    if not 0 < beta < 1:
        raise UserError(f"{where}: beta lies between 0 and 1, not {beta}; for the limits use kl and reverse_kl.")
    _check_shapes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    rows_of = functools.partial(_js_rows, beta=beta)
    return _evaluate(
        where, rows_of, student_logits, teacher_logits, temperature, squared, mask, weight, reduction, chunk
    )


def total_variation(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: Temperature = 1.0,
    *,
    scale_by_temperature_squared: bool = False,
    mask: Mask | None = None,
    weight: Float[Tensor, "*rows"] | None = None,
    reduction: Reduction = "mean",
    chunk: int | None = None,
) -> Float[Tensor, "*reduced"]:
    """Total variation distance ``0.5 sum_k |t_k - s_k|``, between 0 and 1.

    ``1 - total_variation`` is the chance that speculative decoding accepts a draft token. Unlike the others it is
    homogeneous of degree one in small differences, so by default nothing multiplies it; other arguments and errors are
    those of :func:`kl`.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> round(total_variation(student, teacher).item(), 4)
    0.3808
    """
    where, squared = "total_variation", scale_by_temperature_squared
    _check_shapes(where, "student_logits", student_logits, "teacher_logits", teacher_logits)
    rows_of = _total_variation_rows
    return _evaluate(
        where, rows_of, student_logits, teacher_logits, temperature, squared, mask, weight, reduction, chunk
    )


DIVERGENCES: Mapping[str, Divergence] = MappingProxyType(
    {"kl": kl, "reverse_kl": reverse_kl, "js": js, "tv": total_variation}
)
"""The divergences by the names that recipes use. Pass ``scale_by_temperature_squared`` when they are to be compared."""


def annealed_temperature(start: float, progress: float | Float[Tensor, ""]) -> float | Float[Tensor, ""]:
    """A temperature that falls linearly from ``start`` to 1 (SinKD): ``T(e) = start + (1 - start) e / (E - 1)``.

    Args:
        start: temperature at the beginning, above 0.
        progress: how much of the training is over, 0 to 1: the paper's ``e / (E - 1)`` for epoch e of E, or the
            engine's share of steps.

    Raises:
        UserError: ``start`` is not above 0, or ``progress`` is a number outside 0 to 1.

    >>> [annealed_temperature(4.0, epoch / 2) for epoch in range(3)]
    [4.0, 2.5, 1.0]
    """
    if not 0 < start < math.inf:
        raise UserError(f"annealed_temperature: start is above 0, not {start}.")
    if not isinstance(progress, Tensor) and not 0 <= progress <= 1:
        raise UserError(f"annealed_temperature: progress lies between 0 and 1, not {progress}.")
    return start + (1.0 - start) * progress


# The rows of each loss, from float32 logits that are already divided by the temperature. A difference of logarithms is
# infinite or undefined only where its factor is 0: there the term is 0, in value and gradient.


def _hard_label_rows(student: Tensor, labels: Tensor) -> Tensor:
    flat = F.cross_entropy(student.reshape(-1, student.shape[-1]), labels.reshape(-1), reduction="none")
    return flat.view(labels.shape)


def _soft_label_rows(student: Tensor, labels: Tensor) -> Tensor:
    log_student = student.log_softmax(-1)
    return -(labels * log_student.masked_fill(log_student.isneginf() & (labels == 0), 0.0)).sum(-1)


def _soft_cross_entropy_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return _soft_label_rows(student, teacher.softmax(-1))


def _kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl_of_logs(teacher.log_softmax(-1), student.log_softmax(-1))


def _reverse_kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return _kl_of_logs(student.log_softmax(-1), teacher.log_softmax(-1))


def _js_rows(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    mixture = beta * log_teacher.exp() + (1 - beta) * log_student.exp()
    log_mixture = mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()
    return beta * _kl_of_logs(log_teacher, log_mixture) + (1 - beta) * _kl_of_logs(log_student, log_mixture)


def _total_variation_rows(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1)


def _kl_of_logs(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill_(p == 0, 0.0)).sum(-1)


RowLoss = Callable[[Tensor, Tensor], Tensor]


def _evaluate(
    where: str,
    rows_of: RowLoss,
    student: Tensor,
    target: Tensor,
    temperature: Temperature,
    squared: bool,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: Reduction,
    chunk: int | None,
) -> Tensor:
    """Rows of a loss, in one go or by chunks, then weights, mask and reduction."""
    shape = student.shape[:-1]
    if student.numel() == 0:
        raise UserError(f"{where}: student_logits is empty, of shape {tuple(student.shape)}.")
    if reduction not in ("mean", "sum", "none"):
        raise UserError(f"{where}: reduction is 'mean', 'sum' or 'none', not {reduction!r}.")
    if isinstance(temperature, Tensor):
        if temperature.dim():
            _check_rows(where, "temperature", temperature, shape)
        temperature = temperature.expand(shape)
        if temperature.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature > 0).all()):
            raise UserError(f"{where}: temperature is above 0 everywhere, but goes down to {float(temperature.min())}.")
    elif not 0 < temperature < math.inf:
        raise UserError(f"{where}: temperature is above 0, not {temperature}.")
    if mask is not None:
        _check_rows(where, "mask", mask, shape)
        mask = mask.bool()

    if chunk is None:
        rows = _rows(rows_of, student, target, temperature, mask)
    elif chunk < 1:
        raise UserError(f"{where}: chunk is a number of rows of at least 1, not {chunk}.")
    else:
        rows = _Chunked.apply(rows_of, chunk, student, target, temperature, mask)  # type: ignore[no-untyped-call]
    if squared:
        rows = rows * (temperature * temperature)

    if weight is not None:
        _check_rows(where, "weight", weight, shape)
        weight = weight.to(rows) if mask is None else weight.to(rows).masked_fill(~mask, 0.0)
        rows = rows * weight
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if weight is not None:
        return rows.sum() / weight.sum().clamp_min(torch.finfo(rows.dtype).tiny)
    return rows.mean() if mask is None else rows.sum() / mask.sum().clamp_min(1)


def _rows(rows_of: RowLoss, student: Tensor, target: Tensor, temperature: Temperature, mask: Tensor | None) -> Tensor:
    if mask is not None:
        student = student.masked_fill(~mask[..., None], 0.0)
        if target.is_floating_point():
            target = target.masked_fill(~mask[..., None], 0.0)
    student = _wide(student)
    if target.is_floating_point():
        target = _wide(target)
    if isinstance(temperature, Tensor):
        student, target = student / temperature[..., None], target / temperature[..., None]
    elif temperature != 1:
        student, target = student / temperature, target / temperature
    rows = rows_of(student, target)
    return rows if mask is None else rows.masked_fill(~mask, 0.0)


class _Chunked(torch.autograd.Function):
    """Rows of a loss, a chunk at a time; the backward computes each chunk again and writes into one gradient."""

    @staticmethod
    def forward(ctx: Any, rows_of: RowLoss, chunk: int, *inputs: Tensor | float | None) -> Tensor:
        ctx.rows_of, ctx.chunk = rows_of, chunk
        ctx.constants = [None if isinstance(x, Tensor) else (x,) for x in inputs]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        shape = inputs[0].shape[:-1]  # type: ignore[union-attr]
        parts = [_rows(rows_of, *_take(inputs, at)) for at in _chunks(shape, chunk, inputs[0].device)]  # type: ignore[union-attr]
        return torch.cat(parts).view(shape)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if constant is None else constant[0] for constant in ctx.constants]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if torch.is_grad_enabled():
            # create_graph=True: in one go, which can be differentiated again. The inputs are aliased because one may
            # depend on another, and that path is not this function's.
            inputs = [x.view_as(x) if i in wanted else x for i, x in enumerate(inputs)]
            rows = _rows(ctx.rows_of, *inputs)
            found = iter(torch.autograd.grad(rows, [inputs[i] for i in wanted], grad_rows, create_graph=True))
            return None, None, *(next(found) if i in wanted else None for i in range(len(inputs)))
        grads: list[Tensor | None] = [torch.empty_like(x) if i in wanted else None for i, x in enumerate(inputs)]
        for at in _chunks(grad_rows.shape, ctx.chunk, grad_rows.device):
            parts = _take(inputs, at)
            for i in wanted:
                parts[i].requires_grad_()
            with torch.enable_grad():
                rows = _rows(ctx.rows_of, *parts)
            by_part = torch.autograd.grad(rows, [parts[i] for i in wanted], grad_rows[at])
            for i, part in zip(wanted, by_part, strict=True):
                grads[i][at] = part  # type: ignore[index]
        return None, None, *grads


def _chunks(shape: torch.Size, chunk: int, device: torch.device) -> list[tuple[Tensor, ...]]:
    """Indices of consecutive rows; gathering by them spares strided logits (shifted by a token, say) a full copy."""
    rows = torch.arange(shape.numel(), device=device)
    return [torch.unravel_index(part, shape) for part in torch.split(rows, chunk)]


def _take(inputs: Any, at: tuple[Tensor, ...]) -> list[Any]:
    return [x.detach()[at] if isinstance(x, Tensor) else x for x in inputs]


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_shapes(where: str, first: str, a: Tensor, second: str, b: Tensor) -> None:
    if a.dim() == 0 or b.dim() == 0 or a.shape[-1] != b.shape[-1]:
        sizes = [t.shape[-1] if t.dim() else 0 for t in (a, b)]
        raise UserError(
            f"{where}: {first} has {sizes[0]} classes but {second} has {sizes[1]}; crop or map both to one output "
            "space."
        )
    if a.shape != b.shape:
        raise UserError(f"{where}: {first} has the shape {tuple(a.shape)} but {second} has {tuple(b.shape)}.")


def _check_rows(where: str, name: str, tensor: Tensor, rows: torch.Size) -> None:
    if tensor.shape != rows:
        raise UserError(
            f"{where}: {name} has the shape {tuple(tensor.shape)}, but the logits have the rows {tuple(rows)}."
        )
