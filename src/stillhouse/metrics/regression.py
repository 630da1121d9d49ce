"""Quality of regressors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def regression(
    predict: Callable[[Mapping[str, Tensor]], Tensor], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Mean squared and absolute error, and the correlation of predictions with targets.

    Args:
        predict: a batch to its predictions, (samples,) or (samples, 1).
        batches: batches with ``labels``.
    """
    outputs, targets = [], []
    for batch in batches:
        outputs.append(predict(batch).squeeze(-1).double())
        targets.append(batch["labels"].double())
    predicted, wanted = torch.cat(outputs), torch.cat(targets)
    error = predicted - wanted
    pair = torch.stack([predicted.flatten(), wanted.flatten()])
    numbers = torch.stack([error.square().mean(), error.abs().mean(), torch.corrcoef(pair)[0, 1]])
    return dict(zip(("mse", "mae", "correlation"), numbers.tolist(), strict=True))
