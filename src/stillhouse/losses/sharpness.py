"""Losses that lead to flat places: sharpness-aware gradients (GSAM, SAM), and a penalty on the gradient of the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError

EPSILON = 1e-12


def gsam(
    loss: Callable[[Sequence[Tensor]], Tensor],
    weights: Sequence[Tensor],
    *,
    rho: float,
    alpha: float,
    adaptive: bool = True,
) -> Float[Tensor, ""]:
    """The loss at ``weights``, with the gradient of surrogate gap guided sharpness-aware minimisation (GSAM, 2203.08065).

    With ``g0`` the gradient at the weights w and e the step of length ``rho`` that climbs most, the gradient is
    ``g1 - alpha p``: ``g1`` is that at ``w + e``, and ``p`` the part of ``g0`` that stands upright on ``g1``. So the loss
    around w falls, and its gap to the loss at w as well. ``e = rho w^2 g0 / || |w| g0 ||`` where ``adaptive`` (ASAM,
    2102.11600), else ``rho g0 / ||g0||``; norms are over all tensors together. ``alpha=0`` is SAM, ``rho=alpha=0`` the plain
    loss.

    Args:
        loss: the loss of weights in the same order; called twice, so it must draw nothing new (the same batch, augmented
            alike).
        weights: the trained tensors.
        rho: length of the climb.
        alpha: how much of the upright part to take away.
        adaptive: scale the climb by each weight.

    Raises:
        UserError: ``rho`` or ``alpha`` is negative.

    >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> value = gsam(lambda one: 0.5 * (torch.tensor([1.0, 3.0]) * one[0] ** 2).sum(), [w], rho=0.1, alpha=0.0, adaptive=False)
    >>> value.backward()
    >>> value.item(), [round(g, 4) for g in w.grad.tolist()]
    (2.0, [1.0316, 3.2846])
    """
    if rho < 0 or alpha < 0:
        raise UserError(f"rho and alpha of GSAM are 0 or more, not {rho:g} and {alpha:g}.")
    with torch.enable_grad():
        value = loss(weights)
    if rho == 0 and alpha == 0:
        return value
    g0 = torch.autograd.grad(value, weights)
    with torch.no_grad():
        scaled = [w.abs() * g for w, g in zip(weights, g0, strict=True)] if adaptive else list(g0)
        climb = rho / (_norm(scaled) + EPSILON)
        steps = [climb * g * w.square() if adaptive else climb * g for w, g in zip(weights, g0, strict=True)]
        perturbed = [(w + e).requires_grad_() for w, e in zip(weights, steps, strict=True)]
    with torch.enable_grad():
        g1 = torch.autograd.grad(loss(perturbed), perturbed)
    with torch.no_grad():
        n0, n1 = _norm(g0), _norm(g1)
        inner = torch.stack([(a * b).sum() for a, b in zip(g0, g1, strict=True)]).sum()
        along = inner / (n1 * n0 + EPSILON) * n0 / (n1 + EPSILON)
        gradient = [b - alpha * (a - along * b) for a, b in zip(g0, g1, strict=True)]
    # Differences from the weights themselves are zero and have the gradient that is asked for.
    moves = [((w - w.detach()) * g).sum() for w, g in zip(weights, gradient, strict=True)]
    return value.detach() + torch.stack(moves).sum()


def input_gradient_penalty(
    logits: Float[Tensor, "batch classes"],
    images: Float[Tensor, "batch channels height width"],
    norm: Literal["pixel", "image"] = "pixel",
) -> Float[Tensor, ""]:
    """``mean (||r|| - 1)^2`` with ``r`` the gradient of the sum of an image's logits with respect to its pixels.

    The penalty of WGAN-GP (1704.00028) on a classifier, as AST (2310.10541) smooths its experts with. Differentiable once
    more.

    Args:
        logits: of ``images``, with a graph to them.
        images: clean images that require a gradient.
        norm: one norm for each pixel over its channels, as the released code has it, or one for each image.

    Raises:
        UserError: the images require no gradient.

    >>> x = torch.tensor([[[[1.0, 2.0]]]], requires_grad=True)
    >>> input_gradient_penalty(x.flatten(1) @ torch.tensor([[3.0], [4.0]]), x, norm="image").item()
    16.0
    """
    if not images.requires_grad:
        raise UserError("A penalty on the gradient of the input needs floating-point images that require a gradient.")
    (r,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    lengths = torch.linalg.vector_norm(r, dim=1 if norm == "pixel" else (1, 2, 3))
    penalty: Tensor = (lengths - 1).square().mean()
    return penalty


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors]))
    return length
