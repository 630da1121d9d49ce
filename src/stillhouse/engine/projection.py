"""Terms that may not work against others: what of their gradient opposes the others' is taken away."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Gradients = list[Tensor | None]


@dataclass(frozen=True)
class Projection:
    """One-sided gradient surgery between the terms of an update.

    With g the gradient of ``onto`` and h that of ``terms``, over the parameters in ``scope`` together: where <g, h> is below
    0, h loses its part along g. The gradient of ``onto``, and of the terms that are named in neither, is never altered.

    Attributes:
        terms: names of the terms that give way.
        onto: names of those that they may not oppose.
        scope: patterns of parameters, as in ``trains``, that are compared and altered; all that the update trains by default.
    """

    terms: tuple[str, ...]
    onto: tuple[str, ...]
    scope: tuple[str, ...] = ()


def without_opposition(towards: Gradients, giving_way: Gradients) -> Gradients:
    """``giving_way`` without its part against ``towards``, over all tensors as one vector; a missing gradient is 0.

    >>> h = without_opposition([torch.tensor([1.0, 0.0])], [torch.tensor([-2.0, 3.0])])
    >>> h[0].tolist()
    [0.0, 3.0]
    """
    both = [(g, h) for g, h in zip(towards, giving_way, strict=True) if g is not None and h is not None]
    present = [g for g in towards if g is not None]
    if not both:
        return giving_way
    dot = torch.stack([(g * h).sum() for g, h in both]).sum()
    square = torch.stack([g.square().sum() for g in present]).sum()
    share = dot.clamp(max=0) / torch.where(square > 0, square, torch.ones_like(square))
    return [
        h if g is None else -share * g if h is None else h - share * g for g, h in zip(towards, giving_way, strict=True)
    ]


def project(
    projection: Projection,
    scope: set[int],
    terms: Mapping[str, Tensor],
    parameters: Sequence[nn.Parameter],
    average: Callable[[Sequence[nn.Parameter]], None],
) -> None:
    """Put the gradients of all terms into ``.grad``, those that give way projected.

    Args:
        projection: which terms.
        scope: ids of the parameters that are compared.
        terms: weighted terms with their graphs.
        parameters: what the update trains, without gradients.
        average: averages the gradients of parameters over processes: the dot product is that of the global batch.
    """
    found: list[Gradients] = []
    for names in (projection.onto, projection.terms):
        values = [terms[name] for name in names if name in terms and terms[name].requires_grad]
        gradients: Gradients = [None] * len(parameters)
        if values:
            whole = torch.stack(values).sum()
            gradients = list(torch.autograd.grad(whole, parameters, retain_graph=True, allow_unused=True))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        average(parameters)
        found.append([parameter.grad for parameter in parameters])
        for parameter in parameters:
            parameter.grad = None
    towards, giving_way = found
    inside = [place for place, parameter in enumerate(parameters) if id(parameter) in scope]
    projected = without_opposition([towards[i] for i in inside], [giving_way[i] for i in inside])
    for place, gradient in zip(inside, projected, strict=True):
        giving_way[place] = gradient
    for parameter, g, h in zip(parameters, towards, giving_way, strict=True):
        parameter.grad = g if h is None else h if g is None else g + h
    rest = [
        value
        for name, value in terms.items()
        if name not in (*projection.onto, *projection.terms) and value.requires_grad
    ]
    if rest:
        torch.autograd.backward(torch.stack(rest).sum(), inputs=list(parameters))
