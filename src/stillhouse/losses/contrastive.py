"""Contrastive losses of knowledge distillation: a student's embedding is to tell its own teacher's from the others'.

All is computed in float32 (float64 stays), also under autocast.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from stillhouse.errors import UserError


def info_nce(
    student: Float[Tensor, "nodes width"],
    teacher: Float[Tensor, "nodes width"],
    temperature: float | Float[Tensor, ""] = 0.1,
    *,
    false_negatives: float | None = None,
) -> Float[Tensor, ""]:
    """Which teacher's embedding is this student's? ``-mean_i log softmax_j(cos(s_i, t_j) / T)_i`` (arXiv 1807.03748).

    The global term of TRG (arXiv 2306.12442) over tokens of many samples, the student's projected to the teacher's width.

    Args:
        student: the student's embeddings or tokens.
        teacher: the teacher's, in the same order.
        temperature: high for coarse structure, low for hard negatives.
        false_negatives: leave out a negative whose teacher's cosine to the positive one is above this, such as the many
            tokens of one background.

    Raises:
        UserError: shapes that differ, fewer than 2 rows, or a temperature that is not above 0.

    >>> teacher = torch.eye(4)
    >>> round(info_nce(3 * teacher, teacher, temperature=1.0).item(), 4)  # log(e + 3) - 1
    0.7437
    """
    if student.shape != teacher.shape or student.dim() != 2 or len(student) < 2:
        raise UserError(
            f"info_nce: student and teacher are (nodes, width) of one shape and at least 2 nodes, not {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}; project the student's side."
        )
    if not isinstance(temperature, Tensor) and not 0 < temperature < math.inf:
        raise UserError(f"info_nce: temperature is above 0, not {temperature}.")
    a, b = F.normalize(_wide(student)), F.normalize(_wide(teacher))
    with torch.autocast(a.device.type, enabled=False):
        logits = a @ b.T / temperature
        if false_negatives is not None:
            alike = (b.detach() @ b.detach().T > false_negatives).fill_diagonal_(False)
            logits = logits.masked_fill(alike, -math.inf)
    return F.cross_entropy(logits, torch.arange(len(a), device=a.device))


def image_text(
    images: Float[Tensor, "pairs width"],
    texts: Float[Tensor, "pairs width"],
    scale: float | Float[Tensor, ""],
    *,
    same: Bool[Tensor, "pairs pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Which text belongs to this image, and which image to this text? CLIP's loss (arXiv 2103.00020, figure 3).

    The mean of the cross-entropies over the rows and over the columns of ``scale * images @ texts.T``.

    Args:
        images: normalised embeddings.
        texts: those of their texts, in the same order.
        scale: factor of the cosines, 1 / temperature.
        same: which texts are equal, so that each of them is a right answer; each pair only its own by default.

    Raises:
        UserError: shapes that differ, or fewer than 2 pairs.

    >>> eye = torch.eye(4)
    >>> round(image_text(eye, eye, 1.0).item(), 4)  # log(e + 3) - 1
    0.7437
    """
    if images.shape != texts.shape or images.dim() != 2 or len(images) < 2:
        raise UserError(
            "image_text: images and texts are (pairs, width) of one shape and at least 2 pairs, not "
            f"{tuple(images.shape)} and {tuple(texts.shape)}."
        )
    a, b = _wide(images), _wide(texts)
    with torch.autocast(a.device.type, enabled=False):
        logits = scale * (a @ b.T)
    wanted = torch.eye(len(a), dtype=logits.dtype, device=a.device) if same is None else same.to(logits.dtype)
    wanted = wanted / wanted.sum(1, keepdim=True)
    # Equal texts make a symmetric relation, so both sides have the same right answers.
    return (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted)) / 2


def noise_contrastive(
    scores: Float[Tensor, "batch candidates"], num_samples: int, log_normalizer: float | Float[Tensor, ""] = 0.0
) -> Float[Tensor, ""]:
    """Noise contrastive estimation with one positive and many negatives per row (CRD, arXiv 1910.10699, equation 18).

    With ``h = exp(score) / Z`` and m negatives drawn from ``num_samples`` samples alike, a candidate is the positive with
    probability ``h / (h + m / n)``. The loss is ``-log`` of that at the positive plus ``-log(1 - .)`` SUMMED over the
    negatives, a mean over rows: a binary cross-entropy of the logits ``score - log Z - log(m / n)``.

    Args:
        scores: similarity over temperature of an anchor with its candidates, the positive in column 0.
        num_samples: number n of samples that negatives are drawn from.
        log_normalizer: log Z, a constant; :func:`log_partition` of the first batch in CRD.

    Raises:
        UserError: no negatives.

    >>> round(noise_contrastive(torch.zeros(3, 5), num_samples=4).item(), 4)  # 5 log 2
    3.4657
    """
    if scores.dim() != 2 or scores.shape[1] < 2:
        raise UserError(
            f"noise_contrastive: scores are a positive and at least 1 negative per row, not of shape {tuple(scores.shape)}."
        )
    logits = _wide(scores) - log_normalizer - math.log((scores.shape[1] - 1) / num_samples)
    return F.softplus(-logits[:, 0]).mean() + F.softplus(logits[:, 1:]).sum(1).mean()


def log_partition(scores: Float[Tensor, "batch candidates"], num_samples: int) -> Float[Tensor, ""]:
    """``log(n mean(exp(score)))``: the constant log Z of :func:`noise_contrastive`, estimated on a batch, without gradient.

    Args:
        scores: similarity over temperature of anchors with their candidates.
        num_samples: number n of samples.

    >>> round(log_partition(torch.zeros(3, 5), num_samples=100).exp().item(), 3)
    100.0
    """
    flat = _wide(scores.detach()).flatten()
    return torch.logsumexp(flat, 0) - math.log(flat.numel()) + math.log(num_samples)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
