"""Redundancy reduction: two views of a sample agree in every component, and no two components say the same."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError


def cross_correlation(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"], eps: float = 1e-5
) -> Float[Tensor, "width width"]:
    """Correlation over the batch between each component of one embedding and each of another.

    Each component is standardised over the batch as by a batch norm without parameters (the variance divides by the number
    of samples, ``eps`` is added to it). Computed in float32 (float64 stays), also under autocast.

    Raises:
        UserError: shapes that differ, or fewer than 2 samples.

    >>> cross_correlation(torch.tensor([[1.0], [-1.0]]), torch.tensor([[-3.0], [3.0]])).round(decimals=3).item()
    -1.0
    """
    if first.shape != second.shape or first.dim() != 2 or len(first) < 2:
        raise UserError(
            "cross_correlation: both sides are (batch, width) of one shape and at least 2 samples, not "
            f"{tuple(first.shape)} and {tuple(second.shape)}."
        )
    with torch.autocast(first.device.type, enabled=False):
        a, b = (_standardised(side if side.dtype == torch.float64 else side.float(), eps) for side in (first, second))
        return a.T @ b / len(a)


def barlow_twins(
    first: Float[Tensor, "batch width"], second: Float[Tensor, "batch width"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two terms of Barlow Twins (arXiv 2103.03230, equation 1), summed over components as there.

    With C the :func:`cross_correlation` of the embeddings of two views: ``sum_i (1 - C_ii)^2`` (invariance) and
    ``sum_{i != j} C_ij^2`` (redundancy), which the paper weighs by 0.0051.

    Args:
        first: embeddings of one view of each sample.
        second: those of another, in the same order.

    Returns:
        Invariance and redundancy.

    >>> eye = torch.eye(4).repeat(8, 1)
    >>> [round(term.item(), 3) for term in barlow_twins(eye, eye)]  # components of one-hot rows correlate by -1/3
    [0.0, 1.333]
    """
    matrix = cross_correlation(first, second)
    diagonal = matrix.diagonal()
    return (1 - diagonal).square().sum(), matrix.square().sum() - diagonal.square().sum()


def _standardised(x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + eps).sqrt()
