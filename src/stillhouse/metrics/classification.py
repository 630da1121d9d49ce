"""Quality of classifiers: accuracy, likelihood, calibration, agreement with a teacher; one pass over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError

Logits = Float[Tensor, "samples classes"]
Labels = Int[Tensor, " samples"]


def accuracy(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Share of samples whose largest logit is the label's, in [0, 1].

    >>> accuracy(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1])).item()
    0.5
    """
    _check(logits, labels)
    return _double(logits.argmax(-1) == labels).mean()


def topk_accuracy(logits: Logits, labels: Labels, k: int = 5) -> Float[Tensor, ""]:
    """Share of samples whose label is among the ``k`` largest logits (all classes when there are fewer).

    >>> topk_accuracy(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([1]), k=2).item()
    1.0

    Raises:
        UserError: ``k`` is below 1, or the shapes do not belong together.
    """
    if k < 1:
        raise UserError(f"A top-k accuracy needs a k of at least 1, not {k}.")
    _check(logits, labels)
    return _double(_in_top(logits, labels, k)).mean()


def roc_auc(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Probability that a sample of a class scores higher for it than one of another does, ties counting a half.

    The area under the ROC curve of the difference of two logits; with more classes the mean over these, each against all
    others by its log-probability.

    >>> roc_auc(torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 0.5]]), torch.tensor([0, 1, 0])).item()
    1.0

    Raises:
        UserError: a class has no sample, or all are of it, or the shapes do not belong together.
    """
    _check(logits, labels)
    scores = _double(logits).log_softmax(-1)
    if logits.shape[-1] == 2:
        scores = _double(logits[:, 1:]) - _double(logits[:, :1])
    areas = []
    for place, column in enumerate(scores.unbind(1)):
        label = place if logits.shape[-1] > 2 else 1
        ours, theirs = column[labels == label], column[labels != label]
        if not len(ours) or not len(theirs):
            raise UserError(f"The area under the ROC curve needs samples of class {label} and of others.")
        ordered = theirs.sort().values
        below, up_to = torch.searchsorted(ordered, ours), torch.searchsorted(ordered, ours, right=True)
        areas.append(_double(below + up_to).mean() / (2 * len(theirs)))
    return torch.stack(areas).mean()


def negative_log_likelihood(logits: Logits, labels: Labels) -> Float[Tensor, ""]:
    """Mean of -log p(label), in nats.

    >>> round(negative_log_likelihood(torch.zeros(3, 4), torch.tensor([0, 1, 2])).exp().item(), 6)
    4.0
    """
    _check(logits, labels)
    return F.cross_entropy(_double(logits), labels)


def expected_calibration_error(logits: Logits, labels: Labels, bins: int = 15) -> Float[Tensor, ""]:
    """Gap between confidence and accuracy over equal-width bins of confidence, weighted by their share.

    Eq. 3 of *On Calibration of Modern Neural Networks* (arXiv 1706.04599). The confidence of a sample is its largest
    probability; a bin contains its upper edge.

    >>> expected_calibration_error(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])).item()
    0.25

    Raises:
        UserError: ``bins`` is below 1, or the shapes do not belong together.
    """
    _check(logits, labels)
    return _calibration_gaps(_double(logits).softmax(-1), labels, bins).abs().sum() / len(labels)


def agreement(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, ""]:
    """Share of samples on which both predict the same class, in [0, 1].

    >>> agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[5.0, 1.0], [1.0, 0.0]])).item()
    0.5
    """
    _check_pair(student_logits, teacher_logits)
    return _double(student_logits.argmax(-1) == teacher_logits.argmax(-1)).mean()


def mean_total_variation(student_logits: Logits, teacher_logits: Logits) -> Float[Tensor, ""]:
    """Mean of half the L1 distance between the predicted distributions, in [0, 1].

    >>> round(mean_total_variation(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 100.0]])).item(), 6)
    0.5
    """
    _check_pair(student_logits, teacher_logits)
    difference = _double(student_logits).softmax(-1) - _double(teacher_logits).softmax(-1)
    return 0.5 * difference.abs().sum(-1).mean()


def classification(
    predict: Callable[[Mapping[str, Tensor]], Tensor], batches: Iterable[Mapping[str, Tensor]], *, bins: int = 15
) -> dict[str, float]:
    """Accuracy, top-5 accuracy (with more than 10 classes), likelihood and calibration over batches, without gradients.

    Only sums are kept, on the device of the logits; it is waited for once, at the end.

    Args:
        predict: a batch to its logits; it also decides on train or eval mode.
        batches: batches with ``labels``; soft labels count by their largest entry, negative ones are left out.
        bins: bins of the calibration error.

    Returns:
        ``accuracy``, ``nll`` (nats), ``ece``, and ``top5`` with more than 10 classes.

    Raises:
        UserError: no sample is labelled, or logits and labels do not belong together.
    """
    total: Tensor | None = None
    num_classes = 0
    with torch.no_grad():
        for batch in batches:
            logits, labels = predict(batch), batch["labels"]
            num_classes = logits.shape[-1]
            labels = labels.argmax(-1) if labels.is_floating_point() else labels
            _check(logits, labels, empty=True)
            sums = _sums(logits, labels, bins)
            total = sums if total is None else total + sums
    count, beyond, correct, top5, surprise, *gaps = total.tolist() if total is not None else [0.0] * 6
    if beyond:
        raise UserError(
            f"{beyond:.0f} labels are of classes beyond the {num_classes} of these predictions: the model was made for other "
            "classes."
        )
    if not count:
        raise UserError("There is nothing to measure: no sample in these batches has a label.")
    measured = {
        "accuracy": correct / count,
        "nll": surprise / count,
        "ece": sum(map(abs, gaps)) / count,
    }
    return measured | ({"top5": top5 / count} if num_classes > 10 else {})


def _sums(logits: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Sums over the labelled samples: their count, those of no class here, correct ones, correct in five, -log p(label);
    then the gaps by bin.

    Unlabelled samples are masked and not cut out, whose number the device would have to be asked for.
    """
    labelled = labels >= 0
    classes = labels.clamp(0, logits.shape[-1] - 1)
    surprise = F.cross_entropy(_double(logits), classes, reduction="none")
    sums = [
        _double(labelled).sum(),
        _double(labels >= logits.shape[-1]).sum(),
        _double((logits.argmax(-1) == classes) & labelled).sum(),
        _double(_in_top(logits, classes, 5) & labelled).sum(),
        torch.where(labelled, surprise, 0.0).sum(),
    ]
    return torch.cat([torch.stack(sums), _calibration_gaps(_double(logits).softmax(-1), classes, bins, labelled)])


def _calibration_gaps(
    probabilities: Tensor, labels: Tensor, bins: int, counted: Tensor | None = None
) -> Float[Tensor, " bins"]:
    """Sum of correctness minus confidence over the (counted) samples of each bin of confidence."""
    if bins < 1:
        raise UserError(f"The calibration error needs at least one bin, not {bins}.")
    confidence, predicted = probabilities.max(-1)
    gap = _double(predicted == labels) - confidence
    if counted is not None:
        gap = torch.where(counted, gap, 0.0)
    bin_of = (confidence * bins).ceil().nan_to_num(0).long().clamp(1, bins) - 1
    return gap.new_zeros(bins).index_add_(0, bin_of, gap)


def _in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    top = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return (top == labels.unsqueeze(-1)).any(-1)


def _double(tensor: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _check(logits: Tensor, labels: Tensor, *, empty: bool = False) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise UserError(
            f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong together; "
            f"they are (samples, classes) and (samples,)."
        )
    if not logits.numel() and not empty:
        raise UserError(f"There is nothing to measure: the logits have the shape {tuple(logits.shape)}.")


def _check_pair(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise UserError(
            f"Student and teacher logits have the shapes {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}; they must be equal."
        )
    if not student_logits.numel():
        raise UserError(f"There is nothing to measure: the logits have the shape {tuple(student_logits.shape)}.")
