"""Quality of classifiers: accuracy, likelihood, calibration, agreement with a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "samples classes"]
Labels = Int[Tensor, " samples"]


def accuracy(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Share of samples whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).double().mean()


def topk_accuracy(logits: Logits, labels: Labels, k: int = 5) -> Float[Tensor, ""]:
    """Share of samples whose label is among the ``k`` largest logits (all classes when there are fewer)."""
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return (top == labels.unsqueeze(-1)).any(-1).double().mean()


def negative_log_likelihood(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Mean of -log p(label), in nats."""
    return F.cross_entropy(logits.double(), labels)


def expected_calibration_error(logits: Logits, labels: Labels, bins: int = 15) -> Float[Tensor, ""]:
    """Gap between confidence and accuracy over equal-width bins of confidence, weighted by their share (Guo et al. 2017)."""
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).double()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double, device=logits.device).index_add_(0, bin_of, correct - confidence)
    return gaps.abs().sum() / len(labels)


def agreement(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, ""]:
    """Share of samples on which both predict the same class."""
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).double().mean()


def mean_total_variation(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, ""]:
    """Mean of half the L1 distance between the predicted distributions, in [0, 1]."""
    difference = student_logits.double().softmax(-1) - teacher_logits.double().softmax(-1)
    return 0.5 * difference.abs().sum(-1).mean()


def classification(
    predict: Callable[[Mapping[str, Tensor]], Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Accuracy, top-5 accuracy (with more than 10 classes), likelihood and calibration over batches.

    Args:
        predict: a batch to its logits.
        batches: batches with ``labels``; soft labels count by their largest entry, negative ones are left out.
    """
    outputs, targets = [], []
    for batch in batches:
        logits, labels = predict(batch), batch["labels"]
        labels = labels.argmax(-1) if labels.is_floating_point() else labels
        known = labels >= 0
        outputs.append(logits[known].float())
        targets.append(labels[known])
    logits, labels = torch.cat(outputs), torch.cat(targets)
    numbers = {
        "accuracy": accuracy(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
        "ece": expected_calibration_error(logits, labels),
    }
    if logits.shape[-1] > 10:
        numbers["top5"] = topk_accuracy(logits, labels)
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
