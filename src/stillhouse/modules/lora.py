"""Low-rank adapters (LoRA) on the weights of a module, as parametrizations: no layer is replaced or wrapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError


class LowRank(nn.Module):
    """``W + (alpha / rank) B A`` (arXiv 2106.09685, Eq. 3); kernels of convolutions are matrices of (out, rest).

    ``A`` is drawn as a linear layer's weight is, ``B`` is zero, so that nothing changes at first. Both are in single
    precision; the sum is in the type of the weight.

    Args:
        weight: the weight to adapt; the first dimension counts the outputs.
        rank: rank of the change.
        alpha: its scale is ``alpha / rank``.
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The adapted weight."""
        return weight + (self.scale * (self.B @ self.A)).view_as(weight).to(weight.dtype)


def add_lora(module: nn.Module, layers: Sequence[str], rank: int, alpha: float) -> list[str]:
    """Put an adapter on the weight of every linear and convolution layer with one of these paths; all others freeze.

    Weights in ``module`` move to ``<path>.parametrizations.weight.original`` until :func:`merge_lora`.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> add_lora(net, ["2"], rank=1, alpha=1.0)
    ['2']
    >>> [name for name, p in net.named_parameters() if p.requires_grad]
    ['2.parametrizations.weight.0.A', '2.parametrizations.weight.0.B']

    Args:
        module: changed in place.
        layers: ends of module paths (``to_q`` is every ``...to_q``), or patterns of whole paths with ``*``.
        rank: rank of the adapters.
        alpha: their scale is ``alpha / rank``.

    Returns:
        The paths of the adapted layers.

    Raises:
        UserError: no layer has such a path.
    """
    paths = [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and any(f".{path}".endswith(f".{end}") or fnmatchcase(path, end) for end in layers)
    ]
    if not paths:
        raise UserError(f"LoRA: {type(module).__name__} has no linear or convolution layer named {list(layers)}.")
    module.requires_grad_(False)
    for path in paths:
        layer = module.get_submodule(path)
        # unsafe: the type of the sum is the weight's whatever the adapters' types are, so nothing needs checking.
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, alpha), unsafe=True)  # type: ignore[arg-type]
    return paths


def merge_lora(module: nn.Module) -> nn.Module:
    """Add the adapters into their weights and take them off, in place; returned for chaining."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, "weight") and isinstance(layer.parametrizations.weight[0], LowRank):  # type: ignore[union-attr, index]
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module
