"""Losses that turn a trained network back into images (DeepInversion, arXiv 1912.08795; SRe2L, arXiv 2306.13092)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

Layer = tuple[Float[Tensor, "batch channels *positions"], Float[Tensor, " channels"], Float[Tensor, " channels"]]
"""What a batch norm reads, and the mean and variance that it remembers."""


def batch_norm_matching(layers: Iterable[Layer], first: float = 1.0) -> Float[Tensor, ""]:
    """How far the statistics of a batch are from those that batch norms remember of their training.

    ``sum_l || mean_l - running mean_l ||_2 + || var_l - running var_l ||_2``, with the variance over batch and positions
    without Bessel's correction. The samples of the batch are coupled.

    Args:
        layers: for each batch norm its input, its running mean and its running variance.
        first: factor on the first layer's share (released code of SRe2L: 10).

    >>> x = torch.tensor([[0.0], [2.0]])
    >>> batch_norm_matching([(x, torch.tensor([1.0]), torch.tensor([3.0]))]).item()
    2.0
    """
    terms = []
    for place, (read, mean, variance) in enumerate(layers):
        values = read if read.dtype == torch.float64 else read.float()
        dims = [dim for dim in range(values.dim()) if dim != 1]
        found_variance, found_mean = torch.var_mean(values, dims, correction=0)
        apart = torch.linalg.vector_norm(found_mean - mean) + torch.linalg.vector_norm(found_variance - variance)
        terms.append(first * apart if place == 0 else apart)
    return torch.stack(terms).sum()


def roughness(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Total variation in the L2 sense: the norm over the batch of the differences to the next pixel, in four directions.

    Right, down and both diagonals, each a norm of its own, added up.

    >>> roughness(torch.ones(2, 3, 4, 4)).item()
    0.0
    """
    x = images if images.dtype == torch.float64 else images.float()
    differences = (
        x[..., :, :-1] - x[..., :, 1:],
        x[..., :-1, :] - x[..., 1:, :],
        x[..., 1:, :-1] - x[..., :-1, 1:],
        x[..., :-1, :-1] - x[..., 1:, 1:],
    )
    return torch.stack([torch.linalg.vector_norm(difference) for difference in differences]).sum()


def mean_norm(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """The L2 norm of an image, averaged over the batch.

    >>> mean_norm(torch.ones(2, 1, 2, 2)).item()
    2.0
    """
    x = images if images.dtype == torch.float64 else images.float()
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.mean()
