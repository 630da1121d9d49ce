"""Points in the plane from known mixtures, for studies of generators that take seconds."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field

from stillhouse.data.dataset import Data, DataSpec
from stillhouse.data.splits import carve, number_of


class Ring(DataSpec):
    """Gaussians of equal weight around a circle; the label of a point is the Gaussian that it was drawn from.

    Batches carry the points as ``features`` of shape (2,). A tenth is set aside for validation, and another for testing.
    """

    kind: ClassVar[str] = "ring"

    modes: int = Field(8, ge=1, le=10**6)
    """Number of Gaussians."""
    radius: float = Field(1.0, gt=0)
    """Radius of the circle that their centres lie on."""
    std: float = Field(0.05, gt=0)
    """Standard deviation of each Gaussian along each axis."""
    samples: int = Field(50_000, ge=20, le=10**8)
    """Number of points in all splits together."""

    def load(self) -> Data:
        generator = torch.Generator().manual_seed(number_of(self.kind))
        labels = torch.arange(self.samples) % self.modes
        angles = 2 * math.pi / self.modes * labels
        centres = self.radius * torch.stack([angles.cos(), angles.sin()], dim=1)
        points = centres + self.std * torch.randn(self.samples, 2, generator=generator)
        parts = carve(labels, self.samples, {"train": 0.8, "validation": 0.1, "test": 0.1}, self.kind)
        sources = {name: {"features": points[index], "labels": labels[index]} for name, index in parts.items()}
        return self.assemble(sources, [], class_names=[f"mode {mode}" for mode in range(self.modes)])
