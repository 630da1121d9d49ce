"""RandAugment (arXiv 1909.13719) on batches of images: a few operations drawn for each sample, all of one strength."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from stillhouse.data.augment import Augment

Level = Float[Tensor, " batch"]
"""Strength of each sample in [0, 1], and with a random sign where an operation has a direction."""


class RandAugment(Augment):
    """Operations drawn for each sample, as in ``rand-m7-mstd0.5-inc1``; text form ``rand-augment:9`` gives the magnitude.

    Each of ``layers`` times one of fifteen operations is drawn, and left out with probability ``1 - probability``. All grow
    stronger with the magnitude (the "increasing" set). Pictures are quantised to 256 levels where an operation counts them,
    so this augmentation is not differentiable.
    """

    kind: ClassVar[str] = "rand-augment"

    magnitude: float = Field(7.0, ge=0, le=10)
    """Strength from 0 to 10."""
    deviation: float = Field(0.5, ge=0)
    """Standard deviation of each sample's magnitude around it."""
    layers: int = Field(2, ge=1)
    """Operations in a row."""
    probability: float = Field(0.5, ge=0, le=1)
    """Chance of each drawn operation to be applied."""
    fill: float = Field(0.5, ge=0, le=1)
    """Grey level that moves in from outside."""
    first: Augment = Field("none", validate_default=True)
    """An augmentation that comes before it, such as resized-crop."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls() if not text else cls(magnitude=float(text))

    def __call__(
        self, pixels: Float[Tensor, "batch channels height width"], *, rank: int = 0, world: int = 1
    ) -> Float[Tensor, "batch channels height width"]:
        pixels = self.first(pixels, rank=rank, world=world)
        count = len(pixels)

        def mine(whole: Tensor) -> Tensor:
            return whole[rank * count : (rank + 1) * count]

        size = count * world
        names = list(OPERATIONS)
        for _ in range(self.layers):
            device = pixels.device
            chosen = mine(torch.randint(len(names), (size,), device=device))
            applied = mine(torch.rand(size, device=device)) < self.probability
            strength = mine(torch.randn(size, device=device)) * self.deviation + self.magnitude
            sign = 1 - 2 * mine(torch.randint(2, (size,), device=device)).to(pixels.dtype)
            level = sign * strength.clamp(0, 10) / 10
            moved = pixels.clone()
            for number, name in enumerate(names):
                at = ((chosen == number) & applied).nonzero().flatten()
                if len(at):
                    moved[at] = OPERATIONS[name](pixels[at], level[at], self.fill)
            pixels = moved
        return pixels


def _autocontrast(x: Tensor, level: Level, fill: float) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp_min(1e-12), x)


def _equalize(x: Tensor, level: Level, fill: float) -> Tensor:
    """Each channel's histogram as flat as 256 levels allow (the rounding is PIL's)."""
    levels = (x * 255).round().long().flatten(2)
    counts = x.new_zeros(*x.shape[:2], 256, dtype=torch.long).scatter_add_(2, levels, torch.ones_like(levels))
    last = torch.where(counts > 0, torch.arange(256, device=x.device), -1).amax(2, keepdim=True)
    step = (levels.shape[2] - counts.gather(2, last)) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp_min(1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return (table.gather(2, levels).to(x.dtype) / 255).view_as(x)


def _invert(x: Tensor, level: Level, fill: float) -> Tensor:
    return 1 - x


def _posterize(x: Tensor, level: Level, fill: float) -> Tensor:
    dropped = 4 + (4 * level.abs()).long()  # of 8 bits
    step = (2.0 ** dropped.to(x.dtype)).view(-1, 1, 1, 1)
    return ((x * 255).round() / step).floor() * step / 255


def _solarize(x: Tensor, level: Level, fill: float) -> Tensor:
    threshold = (256 - (256 * level.abs()).floor()).view(-1, 1, 1, 1)
    return torch.where((x * 255).round() < threshold, x, 1 - x)


def _solarize_add(x: Tensor, level: Level, fill: float) -> Tensor:
    added = ((110 * level.abs()).floor() / 255).view(-1, 1, 1, 1)
    return torch.where((x * 255).round() < 128, (x + added).clamp(max=1), x)


def _blended(other: Callable[[Tensor], Tensor]) -> Operation:
    """An image towards or away from another: ``other + f (x - other)`` with ``f`` from 0.1 to 1.9."""

    def operation(x: Tensor, level: Level, fill: float) -> Tensor:
        factor = (1 + 0.9 * level).clamp_min(0.1).view(-1, 1, 1, 1)
        base = other(x)
        return (base + factor * (x - base)).clamp(0, 1)

    return operation


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True).expand_as(x)
    weights = torch.tensor([0.299, 0.587, 0.114], device=x.device, dtype=x.dtype)
    return torch.einsum("nchw,c->nhw", x, weights)[:, None].expand_as(x)


def _mean(x: Tensor) -> Tensor:
    return _grey(x).mean((1, 2, 3), keepdim=True).expand_as(x)


def _smooth(x: Tensor) -> Tensor:
    """PIL's SMOOTH filter; the border stays as it is."""
    kernel = torch.ones(3, 3, device=x.device, dtype=x.dtype)
    kernel[1, 1] = 5
    smooth = x.clone()
    if min(x.shape[-2:]) > 2:
        channels = x.shape[1]
        weight = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
        smooth[..., 1:-1, 1:-1] = F.conv2d(x, weight, groups=channels)
    return smooth


def _affine(matrix: Callable[[Level, float], Tensor]) -> Operation:
    """Move an image by the matrix that maps places of the result to places of the source, in pixels around the centre."""

    def operation(x: Tensor, level: Level, fill: float) -> Tensor:
        height, width = x.shape[-2:]
        theta = matrix(level, width / height)
        grid = F.affine_grid(theta.to(x.dtype), list(x.shape), align_corners=False)
        return F.grid_sample(x - fill, grid, align_corners=False) + fill

    return operation


def _rows(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], 1)


def _rotation(level: Level, ratio: float) -> Tensor:
    angle, zero = level * math.pi / 6, torch.zeros_like(level)
    cos, sin = angle.cos(), angle.sin()
    return _rows((cos, -sin / ratio, zero), (sin * ratio, cos, zero))


def _shear(along: int) -> Callable[[Level, float], Tensor]:
    def matrix(level: Level, ratio: float) -> Tensor:
        one, zero, slope = torch.ones_like(level), torch.zeros_like(level), 0.3 * level
        if along == 0:
            return _rows((one, slope / ratio, zero), (zero, one, zero))
        return _rows((one, zero, zero), (slope * ratio, one, zero))

    return matrix


def _translation(along: int) -> Callable[[Level, float], Tensor]:
    def matrix(level: Level, ratio: float) -> Tensor:
        # Places run from -1 to 1, so a share of the side counts twice.
        one, zero, shift = torch.ones_like(level), torch.zeros_like(level), 2 * 0.45 * level
        return _rows((one, zero, shift if along == 0 else zero), (zero, one, zero if along == 0 else shift))

    return matrix


Operation = Callable[[Tensor, Tensor, float], Tensor]

OPERATIONS: dict[str, Operation] = {
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
    "rotate": _affine(_rotation),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize-add": _solarize_add,
    "color": _blended(_grey),
    "contrast": _blended(_mean),
    "brightness": _blended(torch.zeros_like),
    "sharpness": _blended(_smooth),
    "shear-x": _affine(_shear(0)),
    "shear-y": _affine(_shear(1)),
    "translate-x": _affine(_translation(0)),
    "translate-y": _affine(_translation(1)),
}
"""The fifteen operations, of (pictures in [0, 1], level of each, fill)."""
