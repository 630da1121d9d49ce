"""A network whose parameters are one vector: what trajectories are recorded as, and what an inner training moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.errors import UserError
from stillhouse.models.calling import logits


class FlatNetwork(nn.Module):
    """A network that is called with all its parameters given as one flat vector, in the order of ``parameters()``.

    Its own weights are never used nor moved by a call, so one network serves any number of them.

    Args:
        network: the network, which stays the user's; no norm in it keeps running statistics, which are no function of the
            weights.

    Attributes:
        network: the network.
        shapes: shape of each parameter by name.
        size: number of weights.

    Raises:
        UserError: a norm keeps running statistics, or there are no parameters.

    >>> net = FlatNetwork(nn.Linear(2, 1))
    >>> net.size, net.logits(torch.tensor([1.0, 2.0, 0.5]), {"x": torch.tensor([[3.0, 4.0]])}).tolist()
    (3, [[11.5]])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for path, module in network.named_modules():
            if getattr(module, "running_mean", None) is not None:
                raise UserError(
                    f"network: {path!r} ({type(module).__name__}) keeps running statistics, which are no part of a trajectory "
                    "of weights; use norm=instance or norm=group."
                )
        self.network = network
        self.shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        self.size = sum(shape.numel() for shape in self.shapes.values())
        if not self.size:
            raise UserError(f"network: {type(network).__name__} has no parameters, so there is nothing to match.")

    def weights(self) -> Float[Tensor, " weights"]:
        """A copy of the network's own parameters."""
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()])

    @torch.no_grad()
    def load(self, weights: Float[Tensor, " weights"]) -> None:
        """Write weights into the network's own parameters."""
        for parameter, values in zip(self.network.parameters(), self.views(weights).values(), strict=True):
            parameter.copy_(values)

    def views(self, weights: Float[Tensor, " weights"]) -> dict[str, Tensor]:
        """The parameters by name, as views of the vector, through which gradients flow."""
        parts = torch.split(weights, [shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def logits(self, weights: Float[Tensor, " weights"], batch: Mapping[str, Any]) -> Float[Tensor, "batch classes"]:
        """The network's logits on ``batch`` with the given weights."""
        named = {f"network.{name}": view for name, view in self.views(weights).items()}
        found: Tensor = functional_call(self, named, (batch,))
        return found

    def forward(self, batch: Mapping[str, Any]) -> Float[Tensor, "batch classes"]:
        return logits(self.network, batch)
