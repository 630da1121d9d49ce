"""What data tells a model builder: shapes, classes and the task, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Task = Literal["classification", "regression", "language", "unlabelled"]


@dataclass(frozen=True)
class Facts:
    """Facts about a data set that a model is built from.

    Attributes:
        inputs: per-sample shape of each model input, e.g. ``{"pixel_values": (3, 32, 32)}``; without a batch dimension.
        num_classes: number of classes; ``None`` where there are no class labels.
        task: what the labels mean.
        class_names: the classes in label order, where the data names them.
        factors: number of values of each known ground-truth factor, by name (sets made from known sources).
        vocabulary_size: ids of tokens, or of the labels of a graph's nodes, are smaller than this; ``None`` where there are
            none or it is not known.
        edge_vocabulary_size: ids of the labels of a graph's edges are smaller than this; ``None`` likewise.
        vocabulary: what the ids of node labels stand for, in their order; without those that stand for nothing known.
        edge_vocabulary: the same of edge labels.
    """

    inputs: dict[str, tuple[int, ...]]
    num_classes: int | None = None
    task: Task = "classification"
    class_names: tuple[str, ...] = ()
    factors: dict[str, int] = field(default_factory=dict)
    vocabulary_size: int | None = None
    edge_vocabulary_size: int | None = None
    vocabulary: tuple[str, ...] = ()
    edge_vocabulary: tuple[str, ...] = ()

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Per-sample shape of the first input."""
        return next(iter(self.inputs.values()))
