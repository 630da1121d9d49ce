"""A small critic of logits and the reversal of its gradient (MEAL V2, arXiv 2009.08453)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import UserError


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.scale * grad, None


def reverse_gradient(x: Float[Tensor, "*shape"], scale: float = 1.0) -> Float[Tensor, "*shape"]:
    """The same values, with the gradient turned around: what comes before ascends the loss that what follows descends.

    Domain-Adversarial Training of Neural Networks (arXiv 1505.07818).

    Args:
        x: values.
        scale: factor of the reversed gradient.

    >>> x = torch.ones(2, requires_grad=True)
    >>> torch.autograd.grad((3 * reverse_gradient(x)).sum(), x)[0].tolist()
    [-3.0, -3.0]
    """
    reversed_: Tensor = _Reversal.apply(x, scale)  # type: ignore[no-untyped-call]
    return reversed_


class LogitDiscriminator(nn.Module):
    """Tells a student's logits from a teacher's: C to C/K to C/K^2 to 2, with ReLUs between.

    For 1000 classes and K = 8 the widths are 1000-125-15-2; widths below 2 are raised to 2. The released code has a ReLU
    behind the outputs too, which can leave all scores 0 for good; it is left out unless asked for. The loss is
    :func:`~stillhouse.losses.logit_matching.adversarial_logits`.

    Args:
        num_classes: number of classes C.
        reduction: factor K, 8 in the released training script.
        last_relu: the ReLU behind the outputs.

    Raises:
        UserError: fewer than 2 classes, or a reduction below 1.
    """

    def __init__(self, num_classes: int, reduction: int = 8, *, last_relu: bool = False) -> None:
        super().__init__()
        if num_classes < 2 or reduction < 1:
            raise UserError(
                f"A discriminator of logits reads at least 2 classes and reduces by at least 1, not {num_classes} and "
                f"{reduction}."
            )
        first = max(2, num_classes // reduction)
        second = max(2, num_classes // reduction // reduction)
        self.layers = nn.Sequential(
            nn.Linear(num_classes, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, 2),
            *([nn.ReLU()] if last_relu else []),
        )

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch 2"]:
        """Scores for student and teacher."""
        out: Tensor = self.layers(logits)
        return out
