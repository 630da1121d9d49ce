"""Probes of a training: how two losses pull at the same weights, how long features are and where they point."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillhouse.errors import UserError


def gradient_cosine(
    first: Float[Tensor, ""], second: Float[Tensor, ""], parameters: Iterable[Tensor]
) -> Float[Tensor, ""]:
    """Cosine between the gradients of two losses, over all parameters as one vector; negative where they conflict.

    Asked separately of a classifier's head and of its backbone it is the diagnosis of Dual-Head Knowledge Distillation
    (arXiv 2411.08937). A parameter that a loss does not reach counts as gradient 0. Nothing is accumulated, and the graphs
    stay for a backward.

    Args:
        first: a loss.
        second: another.
        parameters: what both gradients are taken of; those that require none are left out.

    Returns:
        The cosine; 0 where either loss reaches nothing.

    Raises:
        UserError: none of the parameters requires a gradient.

    >>> w = torch.tensor([1.0, 1.0], requires_grad=True)
    >>> round(gradient_cosine(w.sum(), w[0] ** 2, [w]).item(), 4)
    0.7071
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise UserError("gradient_cosine: none of these parameters requires a gradient.")
    return _cosine(_gradient(first, trained), _gradient(second, trained))


def gradient_cosines(
    losses: Mapping[str, Float[Tensor, ""]], groups: Mapping[str, Iterable[Tensor]]
) -> dict[str, Float[Tensor, ""]]:
    """Cosines between the gradients of all pairs of losses, within each group of parameters.

    Each loss is differentiated once, over all groups.

    Args:
        losses: losses by name.
        groups: parameters by name, such as ``head`` and ``backbone`` of :func:`head_and_backbone`.

    Returns:
        The cosines by ``"<group>/<loss>-<other loss>"``.

    Raises:
        UserError: a group has no parameter that requires a gradient.

    >>> w, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    >>> found = gradient_cosines({"ce": w.sum() + b, "kl": w.sum() - b}, {"weights": [w], "biases": [b]})
    >>> {name: round(value.item(), 4) for name, value in found.items()}
    {'weights/ce-kl': 1.0, 'biases/ce-kl': -1.0}
    """
    trained = {name: [p for p in parameters if p.requires_grad] for name, parameters in groups.items()}
    empty = next((name for name, parameters in trained.items() if not parameters), None)
    if empty is not None:
        raise UserError(f"gradient_cosines: no parameter of the group {empty!r} requires a gradient.")
    everything = [parameter for parameters in trained.values() for parameter in parameters]
    sizes = [sum(parameter.numel() for parameter in parameters) for parameters in trained.values()]
    gradients = {name: torch.split(_gradient(loss, everything), sizes) for name, loss in losses.items()}
    names = list(gradients)
    return {
        f"{group}/{one}-{other}": _cosine(gradients[one][at], gradients[other][at])
        for at, group in enumerate(trained)
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    }


def head_and_backbone(model: nn.Module, classifier: str) -> dict[str, list[nn.Parameter]]:
    """The parameters of a model's classifier and all others.

    Args:
        model: the model.
        classifier: path of the module that reads the embedding.

    Raises:
        UserError: the model has no such module.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> {name: len(parameters) for name, parameters in head_and_backbone(model, "2").items()}
    {'head': 2, 'backbone': 2}
    """
    modules = dict(model.named_modules())
    if classifier not in modules:
        raise UserError(f"{type(model).__name__} has no module {classifier!r} that would read its embedding.")
    head = list(modules[classifier].parameters())
    of_head = {id(parameter) for parameter in head}
    return {"head": head, "backbone": [p for p in model.parameters() if id(p) not in of_head]}


def pull_and_push(
    logit_gradient: Float[Tensor, "samples classes"],
    embeddings: Float[Tensor, "samples width"],
    labels: Int[Tensor, " samples"],
) -> tuple[Float[Tensor, "classes width"], Float[Tensor, "classes width"]]:
    """What a loss does to each row of a linear classifier, in two parts: through samples of the class, and of all others.

    Minus the gradient by row k is ``-sum_i g_ik f_i``. The pull is its part over samples of class k, the push that over the
    others (Dual-Head Knowledge Distillation, arXiv 2411.08937, and the analysis of neural collapse that it rests on). With
    cross-entropy the pull goes along the class's own embeddings, ``sum (1 - p_ik) f_i / n``, and the push away from those of
    other classes, ``-sum p_ik f_i / n``.

    Args:
        logit_gradient: gradient g of the loss by the logits.
        embeddings: what the classifier reads, f.
        labels: class of each sample.

    Returns:
        Pull and push of each class, whose sum is minus the gradient by the weights.

    Raises:
        UserError: samples that differ in number, or labels that are no class numbers.

    >>> gradient = torch.tensor([[-0.5, 0.5], [0.25, -0.25]])
    >>> pull, push = pull_and_push(gradient, torch.eye(2), torch.tensor([0, 1]))
    >>> pull.tolist(), push.tolist()
    ([[0.5, 0.0], [0.0, 0.25]], [[0.0, -0.25], [-0.5, 0.0]])
    """
    if (
        logit_gradient.dim() != 2
        or labels.is_floating_point()
        or len({len(logit_gradient), len(embeddings), len(labels)}) > 1
    ):
        raise UserError(
            f"pull_and_push: it takes one gradient row, one embedding and one class number per sample, not shapes "
            f"{tuple(logit_gradient.shape)}, {tuple(embeddings.shape)} and {tuple(labels.shape)}."
        )
    own = torch.nn.functional.one_hot(labels.long(), logit_gradient.shape[1]).bool()
    return tuple(-logit_gradient.masked_fill(away, 0.0).T @ embeddings for away in (~own, own))  # type: ignore[return-value]


def simplex_vertices(
    embeddings: Float[Tensor, "samples width"], labels: Int[Tensor, " samples"], num_classes: int
) -> Float[Tensor, "classes width"]:
    """Direction of each class's mean embedding from the mean of all classes: the corners of a simplex where classes collapse.

    Args:
        embeddings: embeddings.
        labels: class of each sample.
        num_classes: number of classes; one without a sample has the direction 0.

    >>> simplex_vertices(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]), 2).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """
    member = torch.nn.functional.one_hot(labels.long(), num_classes).to(embeddings.dtype)
    counts = member.sum(0)
    means = (member.T @ embeddings) / counts.clamp_min(1)[:, None]
    present = counts > 0
    centred = (means - means[present].mean(0)) * present[:, None]
    return torch.nn.functional.normalize(centred, eps=1e-30)


def feature_norm(features: Float[Tensor, "samples *shape"]) -> Float[Tensor, ""]:
    """Mean length of the flattened features.

    Args:
        features: embeddings, maps or tokens.

    >>> feature_norm(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item()
    3.0
    """
    length: Tensor = torch.linalg.vector_norm(_double(features).flatten(1), dim=1)
    return length.mean()


def feature_cosine(
    first: Float[Tensor, "samples *shape"], second: Float[Tensor, "samples *shape"]
) -> Float[Tensor, ""]:
    """Mean cosine between the flattened features of the same samples, such as embeddings and their class means.

    Args:
        first: features.
        second: features of the same shape.

    Raises:
        UserError: shapes that differ.

    >>> feature_cosine(torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 0.0]])).item()
    1.0
    """
    if first.shape != second.shape:
        raise UserError(
            f"feature_cosine: features of shape {tuple(first.shape)} and {tuple(second.shape)} have no cosine; project "
            "one side."
        )
    a, b = (_double(side).flatten(1) for side in (first, second))
    return torch.cosine_similarity(a, b, dim=1, eps=1e-12).mean()


def _gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).flatten()
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
    )


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return torch.cosine_similarity(_double(first), _double(second), dim=0, eps=1e-30)


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
