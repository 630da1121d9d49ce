"""Choosing samples by what a model says of them, in one pass over a stream: no matrix of scores is ever held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError


def confidence(logits: Float[Tensor, "batch classes"]) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The predicted class of each sample, and the logarithm of its probability.

    Computed from the other classes' share, so that probabilities which round to 1 are still told apart.

    >>> predicted, score = confidence(torch.tensor([[40.0, 0.0], [41.0, 0.0], [0.0, 0.0]]))
    >>> predicted.tolist(), bool(score[0] < score[1] < 0), round(score[2].exp().item(), 4)
    ([0, 0, 0], True, 0.5)
    """
    wide = logits.double()
    top, predicted = wide.max(-1)
    others = (wide - top[:, None]).scatter(-1, predicted[:, None], -torch.inf)
    return predicted, -torch.log1p(others.exp().sum(-1))


@dataclass(frozen=True)
class Picked:
    """The samples that were chosen, by ascending index.

    Attributes:
        index: positions in the pool.
        predicted: class of each.
        score: its score.
    """

    index: Int[Tensor, " picked"]
    predicted: Int[Tensor, " picked"]
    score: Float[Tensor, " picked"]


class TopPerClass:
    """For each class the k samples of highest score among those predicted as it; of equal scores the lower index.

    Memory holds k samples a class and one buffer, however long the stream is. The choice does not depend on the order
    or the batching of the stream, and that of two parts is the choice of the whole (:meth:`merge`).

    Args:
        classes: number of classes.
        k: most samples of one class.
        buffer: samples that are collected before the worst are dropped.

    Attributes:
        predicted: how many samples were seen of each class.

    Raises:
        UserError: ``k`` is below 1.

    >>> top = TopPerClass(classes=2, k=1)
    >>> top.add(torch.tensor([7, 8, 9]), torch.tensor([0, 0, 1]), torch.tensor([0.2, 0.9, 0.1]))
    >>> top.picked().index.tolist(), top.predicted.tolist()
    ([8, 9], [2, 1])
    """

    def __init__(self, classes: int, k: int, *, buffer: int = 65536) -> None:
        if k < 1:
            raise UserError(f"k is the number of samples to keep of each class, at least 1, not {k}.")
        self.classes, self.k, self.buffer = classes, k, buffer
        self.predicted = torch.zeros(classes, dtype=torch.long)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._held = 0
        # What a newcomer of each class must reach: the worst of k that are already held.
        self._least = np.full(classes, -np.inf)

    def add(
        self, index: Int[Tensor, " batch"], predicted: Int[Tensor, " batch"], score: Float[Tensor, " batch"]
    ) -> None:
        """See some samples: their positions in the pool, predicted classes and scores."""
        self.predicted += torch.bincount(predicted.cpu(), minlength=self.classes)
        self._take(index.cpu().numpy(), predicted.cpu().numpy(), score.double().cpu().numpy())

    def merge(self, other: Self) -> None:
        """See all that another one saw, such as another process with its share of the pool."""
        self.predicted += other.predicted
        for part in other._parts:
            self._take(*part)

    def picked(self) -> Picked:
        """The choice among all that was seen."""
        self._prune()
        if not self._parts:
            empty = torch.empty(0, dtype=torch.long)
            return Picked(empty, empty, torch.empty(0, dtype=torch.float64))
        index, predicted, score = self._parts[0]
        order = np.argsort(index, kind="stable")
        return Picked(*(torch.from_numpy(array[order]) for array in (index, predicted, score)))

    def _take(self, index: np.ndarray, predicted: np.ndarray, score: np.ndarray) -> None:
        hopeful = score >= self._least[predicted]
        if hopeful.any():
            self._parts.append((index[hopeful], predicted[hopeful], score[hopeful]))
            self._held += int(hopeful.sum())
        if self._held > self.classes * self.k + self.buffer:
            self._prune()

    def _prune(self) -> None:
        if not self._parts:
            return
        index, predicted, score = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        order = np.lexsort((index, -score, predicted))
        classes = predicted[order]
        sizes = np.bincount(classes, minlength=self.classes)
        rank = np.arange(len(order)) - (np.cumsum(sizes) - sizes)[classes]
        order = order[rank < self.k]
        full = np.flatnonzero(sizes >= self.k)
        last = np.cumsum(np.minimum(sizes, self.k)) - 1
        self._least[full] = score[order][last[full]]
        self._parts = [(index[order], predicted[order], score[order])]
        self._held = len(order)
