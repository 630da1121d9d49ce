"""Samples of nothing: what stands for a data set that is not here but whose form is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stillhouse.data.sources import Seeds, Source


class Blank(Source):
    """Zeros of a known form, with class labels in turn; nothing is held in memory.

    Args:
        count: number of samples.
        inputs: shape and data type of each tensor of a sample.
        classes: number of classes; None gives no labels.
    """

    def __init__(
        self, count: int, inputs: Mapping[str, tuple[tuple[int, ...], torch.dtype]], classes: int | None = None
    ) -> None:
        self.count, self.inputs, self.classes = count, inputs, classes

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Tensor | None:
        return None if self.classes is None else torch.arange(self.count) % self.classes

    def fetch(self, index: Tensor, seeds: Seeds | None = None) -> dict[str, Tensor]:
        batch = {name: torch.zeros(len(index), *shape, dtype=kind) for name, (shape, kind) in self.inputs.items()}
        if self.classes is not None:
            batch["labels"] = index % self.classes
        return batch
