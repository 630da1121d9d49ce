"""How a training went through weight space: how even its steps were, how sharp the place where it ended."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError


def step_lengths(path: Float[Tensor, "epochs weights"]) -> Float[Tensor, " steps"]:
    """Distance between the weights of one epoch and of the next.

    Args:
        path: weights, from the initial ones on.

    Raises:
        UserError: there are fewer than two.

    >>> step_lengths(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])).tolist()
    [5.0, 1.0]
    """
    if len(path) < 2:
        raise UserError(f"A path has weights of at least two epochs, not {len(path)}.")
    return torch.stack([(after - before).norm() for before, after in pairwise(path)])


def variation(lengths: Float[Tensor, " steps"]) -> float:
    """Standard deviation over mean (coefficient of variation): 0 for a path of constant speed.

    >>> variation(torch.tensor([2.0, 2.0, 2.0])), variation(torch.tensor([1.0, 3.0]))
    (0.0, 0.5)
    """
    mean = float(lengths.double().mean())
    return float(lengths.double().std(correction=0)) / mean if mean else 0.0


def top_eigenvalue(
    loss: Callable[[Tensor], Tensor],
    weights: Float[Tensor, " weights"],
    *,
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> float:
    """The Hessian's eigenvalue of largest size at ``weights``, by power iteration on products of Hessian and vector.

    Args:
        loss: a function of flat weights to a scalar.
        weights: where.
        iterations: products to take.
        generator: source of the first direction; torch's global CPU generator by default.

    >>> quadratic = lambda w: 0.5 * (torch.tensor([1.0, -2.0, 7.0]) * w**2).sum()
    >>> round(top_eigenvalue(quadratic, torch.zeros(3)), 4)
    7.0
    """
    direction = torch.randn(len(weights), generator=generator).to(weights)
    direction /= direction.norm()
    at = weights.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(at), at, create_graph=True)
        found = 0.0
        for _ in range(iterations):
            (product,) = torch.autograd.grad(gradient @ direction, at, retain_graph=True)
            found = float(product @ direction)
            length = product.norm()
            if not length > 0:
                break
            direction = product / length
    return found
