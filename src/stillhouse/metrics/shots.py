"""Accuracy by how many training samples a class had: what a long tail does, which the mean over all hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.errors import UserError


def shot_accuracy(
    predict: Callable[[Mapping[str, Tensor]], Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    training_counts: Int[Tensor, " classes"],
    *,
    many: int = 100,
    few: int = 20,
) -> dict[str, float]:
    """Accuracy on the classes with many, a medium number of and few training samples, and the mean over classes.

    The customary groups of long-tailed recognition (Large-Scale Long-Tailed Recognition in an Open World, arXiv 1904.05160):
    more than 100 samples, 20 to 100, and fewer than 20.

    Args:
        predict: a batch to its logits; it also decides on train or eval mode.
        batches: batches with class ``labels``; soft labels count by their largest entry, negative ones are left out.
        training_counts: training samples of each class.
        many: classes with more are in "many".
        few: classes with fewer are in "few".

    Returns:
        ``many``, ``medium`` and ``few``, as far as there are such classes in the batches: each the share of right samples
        among those of its classes; and ``balanced``, the mean of the accuracy of each class.

    Raises:
        UserError: ``few`` is above ``many``, or no sample is labelled.

    >>> logits = torch.eye(3)[[0, 0, 1, 1, 2, 0]]
    >>> batches = [{"logits": logits, "labels": torch.tensor([0, 0, 1, 1, 2, 2])}]
    >>> shot_accuracy(lambda batch: batch["logits"], batches, torch.tensor([500, 50, 5]))
    {'many': 1.0, 'medium': 1.0, 'few': 0.5, 'balanced': 0.8333333333333334}
    """
    if few > many:
        raise UserError(f"Classes with fewer than {few} samples cannot be few where more than {many} are many.")
    classes = len(training_counts)
    right = wrong = torch.zeros(classes, dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            labels = batch["labels"]
            labels = labels.argmax(-1) if labels.is_floating_point() else labels
            hits = predict(batch).argmax(-1) == labels
            known = labels >= 0
            right = right + torch.bincount(labels[known & hits].cpu(), minlength=classes)
            wrong = wrong + torch.bincount(labels[known & ~hits].cpu(), minlength=classes)
    total = right + wrong
    if not total.sum():
        raise UserError("There is nothing to measure: no sample in these batches has a label.")
    counts = training_counts.cpu()
    groups = {"many": counts > many, "medium": (counts >= few) & (counts <= many), "few": counts < few}
    found = {
        name: float(right[group].sum() / total[group].sum()) for name, group in groups.items() if total[group].sum()
    }
    seen = total > 0
    return found | {"balanced": float((right[seen] / total[seen]).mean())}
