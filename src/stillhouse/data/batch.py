"""A batch: a dict of tensors with equal first dimension, in the vocabulary of Hugging Face."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from stillhouse.errors import UserError

NOT_INPUTS = frozenset({"labels", "index", "weight", "sources", "view"})
"""Names that are never a model's input."""


class Batch(dict[str, Tensor]):
    """Tensors of one batch by name; a plain dict with names for its parts.

    Attributes:
        aside: further names that are not inputs of a model (a data set may carry them along).

    >>> batch = Batch(features=torch.zeros(4, 3), labels=torch.tensor([0, 1, 0, 1]))
    >>> batch.size, list(batch.inputs), batch.labels.tolist()
    (4, ['features'], [0, 1, 0, 1])
    """

    aside: frozenset[str] = frozenset()

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model takes: everything but labels, index, weight, sources, view and the names in ``aside``."""
        return {name: value for name, value in self.items() if name not in NOT_INPUTS and name not in self.aside}

    @property
    def labels(self) -> Tensor:
        """Class numbers (long), or targets and soft labels (float).

        Raises:
            UserError: if the batch is unlabelled.
        """
        return self._named("labels")

    @property
    def index(self) -> Tensor:
        """Position of each sample in its split (long)."""
        return self._named("index")

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(next(iter(self.values())))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with every tensor on ``device``."""
        return self.replace(**{name: value.to(device, non_blocking=non_blocking) for name, value in self.items()})

    def replace(self, **tensors: Tensor) -> Self:
        """A new batch with some tensors exchanged or added; the others are shared."""
        batch = type(self)(self)
        batch.update(tensors)
        if self.aside:
            batch.aside = self.aside
        return batch

    def _named(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise UserError(f"This batch has no {name}; it holds {', '.join(self)}.") from None
