"""Matching of gradients: how far those of tiny images are from those of real ones ("Dataset Condensation", 2006.05929)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from stillhouse.errors import UserError

GradientDistance = Literal["layers", "mse", "cosine"]

EPS = 1e-6
"""Guard of the division by norms, as published."""


def gradient_matching(
    synthetic: Sequence[Tensor], real: Sequence[Tensor], distance: GradientDistance = "layers"
) -> Tensor:
    """The distance of two gradients of one network, a tensor per parameter.

    ``layers`` is the paper's (equation 9): one minus the cosine for each output node of each layer, summed over nodes and
    layers; biases and the scales of normalisations (parameters of one dimension) are left out. ``mse`` is the squared L2
    distance of the whole, ``cosine`` one minus the cosine of the whole; both have every parameter.

    Args:
        synthetic: gradients that are moved, usually with a graph.
        real: gradients to be met.
        distance: which one.

    Raises:
        UserError: the gradients do not belong together, or no parameter has two dimensions.

    >>> weight, bias = torch.eye(2), torch.ones(2)
    >>> gradient_matching([weight, bias], [torch.tensor([[2.0, 0.0], [0.0, -1.0]]), -bias]).round(decimals=4)
    tensor(2.)
    """
    if [part.shape for part in synthetic] != [part.shape for part in real]:
        raise UserError("The gradients to be matched are of different parameters.")
    if distance != "layers":
        ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (synthetic, real))
        return (ours - theirs).square().sum() if distance == "mse" else _apart(ours, theirs)
    pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(synthetic, real, strict=True) if a.ndim > 1]
    if not pairs:
        raise UserError(
            "The layer-wise distance of gradients needs a weight with two dimensions, such as a linear layer's."
        )
    return torch.stack([_apart(a, b).sum() for a, b in pairs]).sum()


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """One minus the cosine along the last dimension."""
    cosine: Tensor = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + EPS)
    return 1 - cosine
