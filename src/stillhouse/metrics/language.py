"""Quality of models that predict a token at each position; one pass over a data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.metrics.classification import agreement, mean_total_variation

_ELEMENTS = 2**24
"""Positions times vocabulary that are held in double precision at once."""


def token_prediction(
    predict: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor]], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Accuracy and likelihood of the labelled positions over batches, without gradients.

    Every position weighs the same, whichever sample it is in. Only sums are kept, on the device of the logits; it is
    waited for once, at the end.

    Args:
        predict: a batch to its logits, (batch, positions, vocabulary), and the label of each of these positions, negative
            where none counts; it also decides on train or eval mode.
        batches: batches.

    Returns:
        ``accuracy``, ``nll`` (nats per position) and ``perplexity``.

    Raises:
        UserError: no position is labelled, or logits and labels do not belong together.

    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 2, -100]])
    >>> {name: round(value, 4) for name, value in token_prediction(lambda batch: (logits, labels), [{}]).items()}
    {'accuracy': 0.5, 'nll': 1.3863, 'perplexity': 4.0}
    """
    total: Tensor | None = None
    with torch.no_grad():
        for batch in batches:
            for rows, labels in _in_rows(*predict(batch)):
                counted = labels >= 0
                wanted = labels.clamp(min=0)
                surprise = F.cross_entropy(_double(rows), wanted, reduction="none")
                right = (rows.argmax(-1) == wanted) & counted
                sums = torch.stack(
                    [_double(counted).sum(), _double(right).sum(), torch.where(counted, surprise, 0).sum()]
                )
                total = sums if total is None else total + sums
    count, correct, nats = total.tolist() if total is not None else [0.0] * 3
    if not count:
        raise UserError("There is nothing to measure: no position in these batches has a label.")
    nll = nats / count
    return {"accuracy": correct / count, "nll": nll, "perplexity": math.exp(nll) if nll < 700 else math.inf}


def token_agreement(
    predict: Callable[[Mapping[str, Tensor]], tuple[Tensor, Tensor, Tensor]], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """How alike two models predict at the labelled positions, without gradients.

    Args:
        predict: a batch to the logits of both models, (batch, positions, vocabulary), and the labels of the positions,
            negative where none counts.
        batches: batches.

    Returns:
        ``agreement``, the share of positions with the same prediction, and ``mean_total_variation``, both in [0, 1].

    Raises:
        UserError: no position is labelled, or the shapes do not belong together.
    """
    count, same, apart = 0, 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            ours, theirs, labels = predict(batch)
            if ours.shape != theirs.shape:
                agreement(ours, theirs)
            parts = zip(_in_rows(ours, labels), _in_rows(theirs, labels), strict=True)
            for (our_rows, wanted), (their_rows, _) in parts:
                counted = wanted >= 0
                number = int(counted.sum())
                if number:
                    pair = our_rows[counted], their_rows[counted]
                    count += number
                    same += number * float(agreement(*pair))
                    apart += number * float(mean_total_variation(*pair))
    if not count:
        raise UserError("There is nothing to measure: no position in these batches has a label.")
    return {"agreement": same / count, "mean_total_variation": apart / count}


def _in_rows(logits: Tensor, labels: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Positions as rows, some at a time: a vocabulary is large, and doubles are."""
    if logits.shape[:-1] != labels.shape:
        raise UserError(
            f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do not belong together; "
            "they are (batch, positions, vocabulary) and (batch, positions)."
        )
    rows = max(1, _ELEMENTS // logits.shape[-1])
    return zip(torch.split(logits.flatten(0, -2), rows), torch.split(labels.flatten(), rows), strict=True)


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
