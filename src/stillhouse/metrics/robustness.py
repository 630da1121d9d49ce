"""Accuracy of a classifier of images under a small attack and under noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.metrics.classification import classification

Predict = Callable[[Mapping[str, Tensor]], Tensor]


def fgsm_accuracy(
    predict: Predict,
    batches: Iterable[Mapping[str, Tensor]],
    epsilon: float | Tensor,
    *,
    low: float | Tensor = float("-inf"),
    high: float | Tensor = float("inf"),
    name: str = "pixel_values",
) -> float:
    """Accuracy after one step of size ``epsilon`` along the sign of the loss's gradient (FGSM, arXiv 1412.6572).

    Args:
        predict: a batch to its logits, with a graph to the inputs; it also decides on train or eval mode.
        batches: batches with class ``labels``.
        epsilon: size of the step in each input, in the units of the model's inputs.
        low: inputs are kept at or above it.
        high: inputs are kept at or below it.
        name: the input that is attacked.

    Raises:
        UserError: the batches lack that input.

    >>> line = lambda batch: torch.stack([batch["pixel_values"], -batch["pixel_values"]], 1)
    >>> batches = [{"pixel_values": torch.tensor([1.0, 3.0]), "labels": torch.tensor([0, 0])}]
    >>> fgsm_accuracy(line, batches, epsilon=2.0)
    0.5
    """

    def attacked() -> Iterable[dict[str, Tensor]]:
        for batch in batches:
            _check(batch, name)
            labels = batch["labels"]
            classes = labels.argmax(-1) if labels.is_floating_point() else labels
            with torch.enable_grad():
                inputs = batch[name].detach().clone().requires_grad_()
                loss = F.cross_entropy(
                    predict({**batch, name: inputs}).float(), classes, reduction="sum", ignore_index=-1
                )
                (gradient,) = torch.autograd.grad(loss, [inputs])
            yield {**batch, name: _within(batch[name] + epsilon * gradient.sign(), low, high)}

    return classification(predict, attacked())["accuracy"]


def noise_accuracy(
    predict: Predict,
    batches: Iterable[Mapping[str, Tensor]],
    deviation: float | Tensor,
    *,
    low: float | Tensor = float("-inf"),
    high: float | Tensor = float("inf"),
    name: str = "pixel_values",
    seed: int = 0,
) -> float:
    """Accuracy under Gaussian noise, the same noise for every model.

    Args:
        predict: a batch to its logits; it also decides on train or eval mode.
        batches: batches with class ``labels``.
        deviation: standard deviation of the noise, in the units of the model's inputs.
        low: inputs are kept at or above it.
        high: inputs are kept at or below it.
        name: the input that is disturbed.
        seed: of the noise.

    Raises:
        UserError: the batches lack that input.
    """
    generator = torch.Generator().manual_seed(seed)

    def disturbed() -> Iterable[dict[str, Tensor]]:
        for batch in batches:
            _check(batch, name)
            clean = batch[name]
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            yield {**batch, name: _within(clean + deviation * noise, low, high)}

    return classification(predict, disturbed())["accuracy"]


def _within(inputs: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return torch.minimum(torch.maximum(inputs, torch.as_tensor(low).to(inputs)), torch.as_tensor(high).to(inputs))


def _check(batch: Mapping[str, Tensor], name: str) -> None:
    if name not in batch:
        raise UserError(f"Robustness is measured on {name!r}, which this batch lacks; it holds {', '.join(batch)}.")
