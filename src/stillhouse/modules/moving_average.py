"""The moving average of a network's weights, as a part of a training that its losses may ask."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError


class MovingAverage(nn.Module):
    """A copy of a network whose weights follow the network's after each step (arXiv 1703.01780).

    It is always in eval mode and has no gradients; running statistics are copied. The decay is ``1 - 1 / (n + 1)`` after
    step n as long as that is below ``decay``, so that the first weights are soon forgotten. Give it to a stage as a module:
    its state is then kept and resumed with the stage's.

    Args:
        model: the network, which stays the user's.
        decay: share of the average that stays at each step.

    Attributes:
        network: the averaged network.

    Raises:
        UserError: the decay is not between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"A moving average's decay lies between 0 and 1, not {decay}.")
        self.decay = decay
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        # Within a tuple the network is no part of this one, so that it is neither stored nor moved twice.
        self._followed = (model,)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    @torch.no_grad()
    def after_step(self, run: Any) -> None:
        """Move towards the network's weights; ``run.step`` counts from 0."""
        (followed,) = self._followed
        decay = min(self.decay, 1 - 1 / (run.step + 2))
        mine: list[Tensor] = list(self.network.parameters())
        theirs: list[Tensor] = list(followed.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        for copied, buffer in zip(self.network.buffers(), followed.buffers(), strict=True):
            copied.copy_(buffer)
