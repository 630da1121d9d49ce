"""Pixels: from stored levels to [0, 1] to a model's space and back, and images of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from stillhouse.memory import check_room

PixelSpace = Literal["standard", "unit", "symmetric"]


@dataclass(frozen=True)
class PixelScale:
    """The affine maps between stored pixels, pictures in [0, 1] and the pixels a model sees.

    ``unit = (stored - low) / span`` and ``model = (unit - mean) / std``, with one mean and std per channel.

    Attributes:
        low: stored value of black.
        span: stored value of white minus that of black (255 for bytes).
        mean: per-channel mean taken off in unit space.
        std: per-channel divisor in unit space.
        given: the stored pixels are the model's pixels, untouched.
    """

    low: float
    span: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    given: bool = False

    @classmethod
    def of(cls, space: PixelSpace, stored: Shaped[Tensor, "n channels height width"], levels: float) -> PixelScale:
        """The scale for a pixel space; the training images ``stored`` (0 .. levels) give mean and std of "standard"."""
        channels = stored.shape[1]
        if space == "unit":
            return cls(0.0, levels, (0.0,) * channels, (1.0,) * channels)
        if space == "symmetric":
            return cls(0.0, levels, (0.5,) * channels, (0.5,) * channels)
        moments = [_moments(stored[:, channel]) for channel in range(channels)]
        means = tuple(mean / levels for mean, _ in moments)
        return cls(0.0, levels, means, tuple(std / levels or 1.0 for _, std in moments))

    @classmethod
    def as_given(cls, stored: Float[Tensor, "n channels height width"]) -> PixelScale:
        """The scale of floats that a model takes as they are; pictures are made by their range (none if in [0, 1])."""
        low, high = stored.min().item(), stored.max().item()
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        span, channels = high - low or 1.0, stored.shape[1]
        return cls(low, span, (-low / span,) * channels, (1 / span,) * channels, given=True)

    def to_model(self, stored: Shaped[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Stored pixels as a model sees them (float32)."""
        pixels = stored.to(torch.float32)
        if self.given:
            return pixels
        if pixels is stored:
            pixels = pixels.clone()
        if self._plain:
            return pixels.sub_(self.low).div_(self.span) if self.low else pixels.div_(self.span)
        shift, gain = self._composed
        if len(gain) == 1:
            return pixels.sub_(shift[0]).mul_(gain[0])
        return pixels.sub_(_constant(shift, pixels.device)).mul_(_constant(gain, pixels.device))

    @cached_property
    def _plain(self) -> bool:
        return not any(self.mean) and all(std == 1 for std in self.std)

    @cached_property
    def _composed(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What :meth:`to_model` takes off and multiplies by, per channel; one value if all channels agree."""
        shift = tuple(self.low + self.span * mean for mean in self.mean)
        gain = tuple(1 / (self.span * std) for std in self.std)
        return (shift[:1], gain[:1]) if len(set(shift)) == len(set(gain)) == 1 else (shift, gain)

    def stored_to_unit(
        self, stored: Shaped[Tensor, "n channels height width"]
    ) -> Float[Tensor, "n channels height width"]:
        """Stored pixels as pictures in [0, 1]."""
        return (stored.to(torch.float32) - self.low) / self.span

    def from_unit(self, unit: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """Pictures in [0, 1] as a model sees them; differentiable."""
        return (unit - self._per_channel(self.mean, unit)) / self._per_channel(self.std, unit)

    def to_unit(self, pixels: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n channels height width"]:
        """A model's pixels as pictures in [0, 1]; what lies outside is clipped."""
        return (pixels * self._per_channel(self.std, pixels) + self._per_channel(self.mean, pixels)).clamp(0, 1)

    def _per_channel(self, values: Sequence[float], like: Tensor) -> Tensor | float:
        return values[0] if len(set(values)) == 1 else _constant(tuple(values), like.device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _moments(channel: Shaped[Tensor, "n height width"]) -> tuple[float, float]:
    """Mean and standard deviation; exact for bytes, whatever their number."""
    if channel.dtype == torch.uint8:
        counts = torch.bincount(channel.flatten(), minlength=256).double()
        values = torch.arange(256, dtype=torch.float64)
        mean = (counts @ values) / counts.sum()
        return mean.item(), ((counts @ (values - mean).square()) / counts.sum()).sqrt().item()
    return channel.double().mean().item(), channel.double().std(correction=0).item()


def at_size(
    images: Shaped[Tensor, "n channels height width"], size: int, levels: float
) -> Shaped[Tensor, "n channels size size"]:
    """Images as bytes or floats of ``size`` x ``size``.

    A frame of black is added where that grows a side by at most a quarter (28 to 32); all else is a centre crop to a
    square and a bilinear, antialiased resize. Bytes stay bytes.
    """
    height, width = images.shape[-2:]
    if height == width == size:
        return images
    if size >= max(height, width) and 4 * size <= 5 * min(height, width):
        left, top = (size - width) // 2, (size - height) // 2
        return F.pad(images, (left, size - width - left, top, size - height - top))
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = images[..., top : top + side, left : left + side]
    # In floats as long as they are put together.
    check_room(5 * images.shape[0] * images.shape[1] * size**2, f"{len(images):,} images of {size} x {size} pixels")
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        for part in torch.split(square, 4096)
    ]
    resized = torch.cat(parts)
    return resized.clamp(0, levels).round().to(torch.uint8) if images.dtype == torch.uint8 else resized
