"""How smooth a classifier's predictions are, and how far its features lie apart: what mixup and temperature change."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError


def smoothness(
    logits: Float[Tensor, "samples classes"], labels: Int[Tensor, " samples"] | None = None, temperature: float = 1.0
) -> dict[str, float]:
    """Means over samples of what tells a sure prediction from a smooth one.

    The probes of the study of mixup in distillation (arXiv 2211.03946): mixup, temperature and scaling by the deviation all
    make predictions smoother.

    Args:
        logits: class logits.
        labels: the classes, for ``other_mass``.
        temperature: softmax temperature.

    Returns:
        ``entropy`` in nats; ``confidence``, the largest probability; ``logit_std``, the deviation of the logits over classes
        (with Bessel's correction); and ``other_mass``, the probability of all classes but the label's.

    Raises:
        UserError: there are no logits.

    >>> found = smoothness(torch.zeros(2, 4), torch.tensor([0, 1]))
    >>> [round(found[name], 4) for name in ("entropy", "confidence", "logit_std", "other_mass")]
    [1.3863, 0.25, 0.0, 0.75]
    """
    if not logits.numel():
        raise UserError(f"There is nothing to measure: the logits have the shape {tuple(logits.shape)}.")
    logs = (logits.double() / temperature).log_softmax(-1)
    probabilities = logs.exp()
    found = {
        "entropy": float(-(probabilities * logs).nansum(-1).mean()),
        "confidence": float(probabilities.max(-1).values.mean()),
        "logit_std": float(logits.double().std(-1).mean()),
    }
    if labels is not None:
        found["other_mass"] = float(1 - probabilities.gather(-1, labels[:, None]).mean())
    return found


def spread(features: Float[Tensor, "samples width"], labels: Int[Tensor, " samples"]) -> dict[str, float]:
    """How features of one class lie together and those of different classes apart.

    Args:
        features: embeddings.
        labels: the class of each.

    Returns:
        ``within``, the mean squared distance of a sample from the mean of its class; ``between``, that of the class means
        from the mean of all, by class size; and ``separation``, the second over the first.

    Raises:
        UserError: fewer than two classes.

    >>> spread(torch.tensor([[0.0], [2.0], [10.0], [12.0]]), torch.tensor([0, 0, 1, 1]))
    {'within': 1.0, 'between': 25.0, 'separation': 25.0}
    """
    classes, place = torch.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise UserError("The spread of classes needs samples of at least two.")
    wide = features.double()
    sizes = torch.bincount(place).double()
    means = wide.new_zeros(len(classes), wide.shape[1]).index_add_(0, place, wide) / sizes[:, None]
    within = float((wide - means[place]).square().sum(1).mean())
    between = float((sizes * (means - wide.mean(0)).square().sum(1)).sum() / sizes.sum())
    return {"within": within, "between": between, "separation": between / within if within else float("inf")}
