"""Losses of knowledge distillation on logits, beside the divergences: decoupled, correlated, standardised, binary.

Logits are ``(..., classes)``, rows being samples or positions. All is computed in float32 (float64 stays), also under
autocast; gradients go to every tensor that requires them, so compute a teacher under ``torch.no_grad``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.divergences import Mask, Reduction, Temperature, kl, reverse_kl


def label_smoothing(
    student_logits: Float[Tensor, "*rows classes"],
    labels: Int[Tensor, "*rows"] | Float[Tensor, "*rows classes"],
    smoothing: float = 0.1,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Cross-entropy with labels mixed with the uniform distribution: ``(1 - s) CE(y) + s mean_k(-log p_k)``.

    Rethinking the Inception Architecture (arXiv 1512.00567), section 7, whose epsilon is 0.1. As a control it tells how
    much of a distillation's gain is mere softening of labels.

    Args:
        student_logits: class logits.
        labels: class indices, or probabilities.
        smoothing: share s of the uniform distribution, 0 to 1.
        ignore_index: hard labels of this value do not count.
        reduction: over the rows that count; ``"none"`` has 0 at the others.

    Raises:
        UserError: shapes that do not match, or ``smoothing`` out of range.

    >>> round(label_smoothing(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), 0.1).item(), 4)
    0.2269
    """
    if not 0 <= smoothing <= 1:
        raise UserError(f"label_smoothing: smoothing lies between 0 and 1, not {smoothing}.")
    soft = labels.is_floating_point()
    expected = student_logits.shape if soft else student_logits.shape[:-1]
    if labels.shape != expected:
        raise UserError(
            f"label_smoothing: labels has the shape {tuple(labels.shape)}, but student_logits of shape "
            f"{tuple(student_logits.shape)} need {tuple(expected)}."
        )
    wide = _wide(student_logits)
    rows = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]),
        labels.to(wide.dtype).reshape(-1, wide.shape[-1]) if soft else labels.long().reshape(-1),
        label_smoothing=smoothing,
        ignore_index=ignore_index,
        reduction="none",
    ).view(student_logits.shape[:-1])
    return _reduced("label_smoothing", rows, None if soft else labels != ignore_index, reduction)


class DKDParts(NamedTuple):
    """The two halves of decoupled distillation, unweighted.

    Attributes:
        target: TCKD, what the teacher knows of how hard the sample is.
        non_target: NCKD, what it knows of the other classes among themselves.
    """

    target: Float[Tensor, "*reduced"]
    non_target: Float[Tensor, "*reduced"]


def dkd(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    labels: Int[Tensor, "*rows"],
    temperature: Temperature = 4.0,
    *,
    ignore_index: int = -100,
    mask: Mask | None = None,
    reduction: Reduction = "mean",
) -> DKDParts:
    """The parts of Decoupled Knowledge Distillation (arXiv 2203.08679, equation 7), each times ``T^2``.

    With ``b = (p_y, 1 - p_y)`` and ``h`` the softmax over the classes other than the label y: TCKD is
    ``KL(b_teacher || b_student)`` and NCKD ``KL(h_teacher || h_student)``. Plain KD is ``TCKD + (1 - p_y) NCKD`` of the
    teacher's p_y; the paper's loss is ``alpha TCKD + beta NCKD`` with alpha 1 and beta 8 (the official code's defaults at
    T 4), so that a sure teacher still teaches the other classes.

    Args:
        student_logits: the student's class logits.
        teacher_logits: the teacher's, of the same shape.
        labels: the class of each row.
        temperature: softmax temperature of both sides, one number or one per row.
        ignore_index: rows of this label do not count.
        mask: rows that count.
        reduction: over the rows that count.

    Raises:
        UserError: shapes that do not match, soft labels, or a label out of range (looked for on the CPU only).

    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])
    >>> parts = dkd(student, teacher, torch.tensor([0]), temperature=1.0)
    >>> [round(part.item(), 4) for part in parts]
    [0.2291, 0.1109]
    """
    rows, classes = student_logits.shape[:-1], student_logits.shape[-1]
    if teacher_logits.shape != student_logits.shape:
        raise UserError(
            f"dkd: student_logits has the shape {tuple(student_logits.shape)} but teacher_logits "
            f"{tuple(teacher_logits.shape)}."
        )
    if labels.is_floating_point() or labels.shape != rows:
        kind = "soft" if labels.is_floating_point() else "hard"
        raise UserError(
            f"dkd: labels are one class index per row, of shape {tuple(rows)}, not {kind} ones of shape "
            f"{tuple(labels.shape)}."
        )
    if classes < 2:
        raise UserError(f"dkd: there is no class besides the label's among {classes}.")
    valid = labels != ignore_index
    if mask is not None:
        if mask.shape != rows:
            raise UserError(f"dkd: mask has the shape {tuple(mask.shape)}, but the logits have the rows {tuple(rows)}.")
        valid = valid & mask.bool()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[valid & ((labels < 0) | (labels >= classes))]
        if len(wrong):
            raise UserError(f"dkd: labels holds {int(wrong[0])}, but there are {classes} classes, 0 to {classes - 1}.")
    at = labels.long().masked_fill(~valid, 0).unsqueeze(-1)
    scale = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) and temperature.dim() else temperature

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = _wide(logits).masked_fill(~valid.unsqueeze(-1), 0.0)
        # A class absent on both sides adds nothing to a divergence.
        others = logits.scatter(-1, at, -math.inf)
        return torch.cat([logits.gather(-1, at), scale * torch.logsumexp(others / scale, -1, keepdim=True)], -1), others

    (student, student_others), (teacher, teacher_others) = split(student_logits), split(teacher_logits)
    return DKDParts(
        kl(student, teacher, temperature, mask=valid, reduction=reduction),
        kl(student_others, teacher_others, temperature, mask=valid, reduction=reduction),
    )


class DISTParts(NamedTuple):
    """The two relations of DIST, unweighted.

    Attributes:
        inter: 1 minus the correlation over the classes of a sample, averaged over samples.
        intra: 1 minus the correlation over the samples of a class, averaged over classes.
    """

    inter: Float[Tensor, ""]
    intra: Float[Tensor, ""]


def dist(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    temperature: float = 1.0,
    *,
    eps: float = 1e-8,
) -> DISTParts:
    """Match how probabilities correlate, not their values (DIST, arXiv 2205.10536).

    Pearson's correlation of softened probabilities, over classes within a sample and over samples within a class, each
    ``T^2 (1 - correlation)``. The loss is ``beta inter + gamma intra``, in the official code with 1 and 1 at T 1. A linear
    change of a row of probabilities is free. Couples the samples of a batch.

    Args:
        student_logits: the student's class logits.
        teacher_logits: the teacher's.
        temperature: softmax temperature of both sides.
        eps: guard of the division by the norms, the official code's. Classes that both sides hold below about 1e-5 in the
            whole batch count little because of it.

    Raises:
        UserError: shapes that do not match, or a batch of one.

    >>> student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> parts = dist(student, teacher)
    >>> abs(round(parts.inter.item(), 4)), abs(round(parts.intra.item(), 4))  # two values always correlate fully
    (0.0, 0.0)
    """
    where = "dist"
    _check_pair(where, student_logits, teacher_logits)
    if student_logits.dim() != 2 or len(student_logits) < 2:
        raise UserError(
            f"{where}: logits are (batch, classes) with at least 2 samples, not {tuple(student_logits.shape)}."
        )
    _check_temperature(where, temperature)
    student = (_wide(student_logits) / temperature).softmax(-1)
    teacher = (_wide(teacher_logits) / temperature).softmax(-1)
    squared = temperature * temperature
    inter = 1 - pearson(student, teacher, dim=1, eps=eps).mean()
    intra = 1 - pearson(student, teacher, dim=0, eps=eps).mean()
    return DISTParts(squared * inter, squared * intra)


def pearson(
    first: Float[Tensor, "*shape"], second: Float[Tensor, "*shape"], *, dim: int = -1, eps: float = 1e-8
) -> Float[Tensor, "*reduced"]:
    """Pearson's correlation along a dimension; 0 where either side is constant.

    Args:
        first: values.
        second: values to compare with.
        dim: the dimension of what is correlated.
        eps: added to the product of the norms.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 7.0])).item(), 4)
    0.9934
    """
    first, second = _wide(first), _wide(second)
    first, second = first - first.mean(dim, keepdim=True), second - second.mean(dim, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    return (first * second).sum(dim) / (norms + eps)


def standardize(
    logits: Float[Tensor, "*rows classes"], *, center: bool = True, eps: float = 1e-7
) -> Float[Tensor, "*rows classes"]:
    """Logits divided by their standard deviation over the classes: each sample has a temperature of its own, on each side.

    Logit Standardization in Knowledge Distillation (arXiv 2403.01427), its Z-score: ``(z - mean) / std`` before the
    temperature, so ``kl(standardize(s), standardize(t), temperature=2.0)``. MIX-KD (arXiv 2211.03946) divides by the
    standard deviation alone, which is the same under a softmax, and uses the result in both terms at temperature 1 and
    without its square: ``kl(standardize(s), standardize(t), scale_by_temperature_squared=False)`` and
    ``cross_entropy(standardize(s), labels)``. The loss then is free of shift and scale of the logits. The deviation has
    Bessel's correction, and is not detached.

    Args:
        logits: class logits.
        center: subtract the mean.
        eps: added to the deviation, the official code's. Constant logits become 0 and are not divided, which would blow up
            their gradient.

    Raises:
        UserError: fewer than 2 classes.

    >>> [round(z, 4) for z in standardize(torch.tensor([3.0, 1.0, -1.0])).tolist()]
    [1.0, 0.0, -1.0]
    """
    if logits.dim() == 0 or logits.shape[-1] < 2:
        raise UserError(f"standardize: logits of shape {tuple(logits.shape)} have no deviation; it takes 2 classes.")
    logits = _wide(logits)
    deviation = logits.std(-1, keepdim=True)
    scale = torch.where(deviation > 0, deviation + eps, 1.0)
    return (logits - logits.mean(-1, keepdim=True) if center else logits) / scale


def logit_mse(
    student_logits: Float[Tensor, "*rows outputs"], teacher_logits: Float[Tensor, "*rows outputs"]
) -> Float[Tensor, ""]:
    """Mean squared difference of logits, over classes and rows (arXiv 2105.08919); regressors' outputs alike.

    It is what ``T^2 KL`` tends to for large temperatures on centred logits, up to the factor 2 times the classes.

    Args:
        student_logits: the student's.
        teacher_logits: the teacher's.

    Raises:
        UserError: shapes that do not match.

    >>> logit_mse(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])).item()
    2.5
    """
    _check_pair("logit_mse", student_logits, teacher_logits)
    return F.mse_loss(_wide(student_logits), _wide(teacher_logits))


def binary_kl(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float = 2.0,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Every class a binary question: ``T^2 sum_k KL(Bern(sigmoid(t_k / T)) || Bern(sigmoid(s_k / T)))`` (DHKD's BinaryKL).

    Dual-Head Knowledge Distillation (arXiv 2411.08937). Its least value, 0, is at ``s = t`` alone, while a softmax leaves
    a constant per row free.

    Args:
        student_logits: the auxiliary head's logits.
        teacher_logits: the teacher's.
        temperature: temperature of both sides.
        reduction: over rows; classes are summed.

    Raises:
        UserError: shapes that do not match, or a temperature that is not above 0.

    >>> round(binary_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]), temperature=1.0).item(), 4)
    0.3278
    """
    _check_pair("binary_kl", student_logits, teacher_logits)
    _check_temperature("binary_kl", temperature)
    student, teacher = _wide(student_logits) / temperature, _wide(teacher_logits) / temperature
    yes = teacher.sigmoid()
    rows = yes * (F.logsigmoid(teacher) - F.logsigmoid(student))
    rows = rows + (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return _reduced("binary_kl", temperature * temperature * rows.sum(-1), None, reduction)


def binary_kl_norm(
    student_logits: Float[Tensor, "*rows classes"],
    teacher_logits: Float[Tensor, "*rows classes"],
    temperature: float = 2.0,
    *,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Centred on the teacher: ``T^2 sum_k KL(Bern(1/2) || Bern(sigmoid(u_k)))`` with ``u = (s - t) / T`` (BinaryKL-Norm).

    The loss of DHKD (arXiv 2411.08937). Equal to ``T^2 sum_k log cosh(u_k / 2)``: ``(s - t)^2 / 8`` near 0 and
    ``T |s - t| / 2`` far from it, a smooth L1 whose gradient is ``T / 2 tanh(u / 2)``. The released code clamps sigmoids
    to [1e-8, 1 - 1e-8], which float32 cannot hold: there a difference of 34 gives infinity and one of -40 no gradient.
    Here it is right for all.

    Args:
        student_logits: the auxiliary head's logits.
        teacher_logits: the teacher's.
        temperature: temperature tau.
        reduction: over rows; classes are summed.

    Raises:
        UserError: shapes that do not match, or a temperature that is not above 0.

    >>> round(binary_kl_norm(torch.tensor([[2.0, 0.0]]), torch.zeros(1, 2), temperature=1.0).item(), 4)  # log cosh 1
    0.4338
    """
    _check_pair("binary_kl_norm", student_logits, teacher_logits)
    _check_temperature("binary_kl_norm", temperature)
    half = (_wide(student_logits) - _wide(teacher_logits)) / (2 * temperature)
    return _reduced("binary_kl_norm", temperature * temperature * _log_cosh(half).sum(-1), None, reduction)


def _log_cosh(x: Tensor) -> Tensor:
    """Exact in value and gradient both near 0, where log(1 + e^-2x) loses its digits, and far away."""
    near = torch.log1p(2 * torch.sinh(x.clamp(-1, 1) / 2).square())
    far = x.abs() + F.softplus(-2 * x.abs()) - math.log(2)
    return torch.where(x.abs() < 1, near, far)


def jeffreys(
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
    """The mean of both KL divergences, ``1/2 sum_k (t_k - s_k) log(t_k / s_k)``: what SSLD (arXiv 2103.05959) trains with.

    Its text says Jensen-Shannon, the official code computes this. A true JS (:func:`~stillhouse.losses.divergences.js`)
    is bounded by log 2 and a quarter as curved where the two agree, so it is no drop-in at the same learning rate.

    Arguments and errors are those of :func:`~stillhouse.losses.divergences.kl`.

    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> round(jeffreys(student, teacher).item(), 4) == round((0.3278 + 0.4338) / 2, 4)
    True
    """
    forward, backward = (
        divergence(
            student_logits,
            teacher_logits,
            temperature,
            scale_by_temperature_squared=scale_by_temperature_squared,
            mask=mask,
            weight=weight,
            reduction=reduction,
            chunk=chunk,
        )
        for divergence in (kl, reverse_kl)
    )
    return 0.5 * (forward + backward)


def ensemble_log_probabilities(
    teacher_logits: Sequence[Float[Tensor, "*rows classes"]],
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows classes"]:
    """Log of the mean of several teachers' PROBABILITIES (MEAL V2, arXiv 2009.08453): logits of one teacher for any loss.

    Not the softmax of mean logits, in which one sure teacher outvotes the others.

    Args:
        teacher_logits: logits of each teacher, of one shape.
        weights: each teacher's share, scaled to a sum of 1; equal ones by default.
        temperature: softmax temperature before the mean; the loss after it then takes temperature 1 on this side.

    Raises:
        UserError: no teacher, shapes that differ, or weights that are not one per teacher, at least 0 and not all 0.

    >>> sure, other = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> [round(p, 4) for p in ensemble_log_probabilities([sure, other]).exp()[0].tolist()]
    [0.6345, 0.3655]
    """
    if not teacher_logits:
        raise UserError("ensemble_log_probabilities: there is no teacher; pass the logits of at least one.")
    shapes = {tuple(logits.shape) for logits in teacher_logits}
    if len(shapes) > 1:
        raise UserError(f"ensemble_log_probabilities: the teachers' logits differ in shape: {sorted(shapes)}.")
    shares = [1.0] * len(teacher_logits) if weights is None else list(weights)
    if len(shares) != len(teacher_logits) or min(shares) < 0 or sum(shares) == 0:
        raise UserError(
            f"ensemble_log_probabilities: weights are one per teacher ({len(teacher_logits)}), at least 0 and not all "
            f"0, not {shares}."
        )
    _check_temperature("ensemble_log_probabilities", temperature)
    logs = [
        (_wide(logits) / temperature).log_softmax(-1) + math.log(share / sum(shares))
        for logits, share in zip(teacher_logits, shares, strict=True)
        if share > 0
    ]
    return torch.logsumexp(torch.stack(logs), 0)


def adversarial_logits(
    student_scores: Float[Tensor, "batch 2"], teacher_scores: Float[Tensor, "batch 2"]
) -> Float[Tensor, ""]:
    """The discriminator's loss of MEAL V2 (arXiv 2009.08453): whose logits are these?

    Binary cross-entropy of two outputs against (1, 0) for the student's rows and (0, 1) for the teacher's, averaged over
    rows and outputs. For the game of the paper the student's logits go through
    :func:`~stillhouse.modules.adversary.reverse_gradient` before the discriminator, so that it learns to deceive while the
    discriminator learns to tell; the released code lacks the reversal.

    Args:
        student_scores: the discriminator on the student's logits.
        teacher_scores: the discriminator on the teacher's.

    Raises:
        UserError: scores that are not two per row.

    >>> round(adversarial_logits(torch.zeros(4, 2), torch.zeros(4, 2)).item(), 4)  # it cannot tell
    0.6931
    """
    for name, scores in (("student_scores", student_scores), ("teacher_scores", teacher_scores)):
        if scores.dim() != 2 or scores.shape[1] != 2:
            raise UserError(f"adversarial_logits: {name} are two per row, (batch, 2), not {tuple(scores.shape)}.")
    signs = student_scores.new_tensor([-1.0, 1.0], dtype=torch.float32)
    # Cross-entropy of a logit x against 1 is softplus(-x), against 0 softplus(x).
    rows = torch.cat([F.softplus(_wide(student_scores) * signs), F.softplus(-_wide(teacher_scores) * signs)])
    return rows.mean()


def _reduced(where: str, rows: Tensor, counted: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if reduction != "mean":
        raise UserError(f"{where}: reduction is 'mean', 'sum' or 'none', not {reduction!r}.")
    return rows.mean() if counted is None else rows.sum() / counted.sum().clamp_min(1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_pair(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape or student.dim() == 0:
        raise UserError(
            f"{where}: student_logits has the shape {tuple(student.shape)} but teacher_logits {tuple(teacher.shape)}; "
            "they must agree."
        )


def _check_temperature(where: str, temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise UserError(f"{where}: temperature is above 0, not {temperature}.")
