"""Augmentations of image batches: vectorised, on the batch's device, drawing only from torch's global generator."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor

from stillhouse.data.splits import number_of
from stillhouse.errors import UserError, nearest
from stillhouse.spec import Tagged

Integers = Callable[[int, int], Tensor]
"""Draws integers in 0 .. below-1 for a batch: (below, columns) to (batch, columns)."""


class Augment(Tagged):
    """Base of augmentations. They act on pictures in [0, 1] and are differentiable in the pixels.

    Each random number is drawn for the global batch and then sliced, so that ``world`` processes together see what one
    process with the whole batch would.
    """

    noun: ClassVar[str] = "augmentation"

    def __call__(
        self, pixels: Float[Tensor, "batch channels height width"], *, rank: int = 0, world: int = 1
    ) -> Float[Tensor, "batch channels height width"]:
        """Augment a batch (this process's slice ``rank`` of ``world`` equal ones)."""
        raise NotImplementedError

    def fixed(
        self, pixels: Float[Tensor, "batch channels height width"], index: Int[Tensor, " batch"], view: int
    ) -> Float[Tensor, "batch channels height width"]:
        """View number ``view`` of the samples at ``index``: the same each time, whatever they are batched with.

        Raises:
            UserError: this augmentation draws for a batch as a whole.
        """
        raise UserError(
            f"augment: {self.kind!r} draws for a batch as a whole, so a sample has no fixed views; 'none', 'crop-flip', "
            "'resized-crop' and 'shift' have."
        )


class NoAugment(Augment):
    """The images as they are."""

    kind: ClassVar[str] = "none"

    def __call__(
        self, pixels: Float[Tensor, "batch channels height width"], *, rank: int = 0, world: int = 1
    ) -> Float[Tensor, "batch channels height width"]:
        return pixels

    def fixed(
        self, pixels: Float[Tensor, "batch channels height width"], index: Int[Tensor, " batch"], view: int
    ) -> Float[Tensor, "batch channels height width"]:
        return pixels


class Moving(Augment):
    """Base of augmentations that move or cut an image, each sample by random integers of its own."""

    def __call__(
        self, pixels: Float[Tensor, "batch channels height width"], *, rank: int = 0, world: int = 1
    ) -> Float[Tensor, "batch channels height width"]:
        count = len(pixels)

        def drawn(below: int, columns: int) -> Tensor:
            whole = torch.randint(below, (count * world, columns), device=pixels.device)
            return whole[rank * count : (rank + 1) * count]

        return self.move(pixels, drawn)

    def fixed(
        self, pixels: Float[Tensor, "batch channels height width"], index: Int[Tensor, " batch"], view: int
    ) -> Float[Tensor, "batch channels height width"]:
        return self.move(pixels, counted(index, view))

    def move(
        self, pixels: Float[Tensor, "batch channels height width"], integers: Integers
    ) -> Float[Tensor, "batch channels height width"]:
        """The images, moved by what ``integers`` draws."""
        raise NotImplementedError


class CropFlip(Moving):
    """A random crop from the image with a black frame, then a mirror image half of the time (the CIFAR custom)."""

    kind: ClassVar[str] = "crop-flip"

    padding: int = Field(4, ge=0)
    """Pixels of black frame on each side."""
    flip: bool = True
    """Mirror left and right with probability one half."""

    def move(
        self, pixels: Float[Tensor, "batch channels height width"], integers: Integers
    ) -> Float[Tensor, "batch channels height width"]:
        offsets = integers(2 * self.padding + 1, 2)
        return moved(pixels, offsets, self.padding, integers(2, 1)[:, 0].bool() if self.flip else None)


class Shift(Moving):
    """A random shift by whole pixels, black moving in: for characters, where a mirror image is another character."""

    kind: ClassVar[str] = "shift"

    by: int = Field(1, ge=0)
    """Largest shift in each direction, in pixels."""

    def move(
        self, pixels: Float[Tensor, "batch channels height width"], integers: Integers
    ) -> Float[Tensor, "batch channels height width"]:
        return moved(pixels, integers(2 * self.by + 1, 2), self.by, None)


class ResizedCrop(Moving):
    """A random part of the image, enlarged to the whole, then a mirror image half of the time (the ImageNet custom)."""

    kind: ClassVar[str] = "resized-crop"

    smallest: float = Field(0.08, gt=0, le=1)
    """Least share of the image's area; the largest is all of it."""
    ratio: float = Field(4 / 3, ge=1)
    """Largest ratio of the part's sides, either way."""
    flip: bool = True
    """Mirror left and right with probability one half."""

    def move(
        self, pixels: Float[Tensor, "batch channels height width"], integers: Integers
    ) -> Float[Tensor, "batch channels height width"]:
        area, ratio, row, column = ((integers(2**24, 4) + 0.5) / 2**24).to(pixels.dtype).unbind(1)
        area = self.smallest + (1 - self.smallest) * area
        ratio = torch.exp((2 * ratio - 1) * math.log(self.ratio))
        # In units of the image's sides, no longer than they are.
        high, wide = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)
        down, right = (2 * row - 1) * (1 - high), (2 * column - 1) * (1 - wide)
        if self.flip:
            wide = torch.where(integers(2, 1)[:, 0].bool(), -wide, wide)
        zero = torch.zeros_like(high)
        corners = torch.stack([wide, zero, right, zero, high, down], 1).view(-1, 2, 3)
        grid = F.affine_grid(corners, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


class Kornia(Augment):
    """A pipeline of kornia augmentations, each with its arguments, in order.

    >>> Kornia(operations=["RandomHorizontalFlip", {"RandomAffine": {"degrees": 15.0}}]).operations[0]
    {'RandomHorizontalFlip': {}}
    """

    kind: ClassVar[str] = "kornia"

    operations: tuple[dict[str, dict[str, Any]], ...] = Field(min_length=1)
    """Names in ``kornia.augmentation``, alone or as ``{name: {argument: value}}``."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(operations=tuple(text.split(",")))

    @field_validator("operations", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple({item: {}} if isinstance(item, str) else item for item in items)

    def __call__(
        self, pixels: Float[Tensor, "batch channels height width"], *, rank: int = 0, world: int = 1
    ) -> Float[Tensor, "batch channels height width"]:
        count = len(pixels)
        for operation in self._pipeline():
            whole = torch.Size((count * world, *pixels.shape[1:]))
            params = operation.forward_parameters(whole)
            if world > 1:
                for name, value in params.items():
                    # The order of colour changes and the batch's shape are about the batch, all else is per sample.
                    if name not in ("order", "forward_input_shape") and len(value) == count * world:
                        params[name] = value[rank * count : (rank + 1) * count]
            pixels = operation(pixels, params=params)
        return pixels

    def _pipeline(self) -> list[Any]:
        """The operations, made once per set of fields and process.

        Raises:
            UserError: if kornia is missing, or has no such augmentation or argument.
        """
        return _pipeline_of(json.dumps(self.operations))


@lru_cache(maxsize=32)
def _pipeline_of(operations: str) -> list[Any]:
    try:
        import kornia.augmentation as kornia
    except ImportError:
        raise UserError("Kornia augmentations need kornia: pip install 'stillhouse[knowledge]'.") from None
    pipeline = []
    for entry in json.loads(operations):
        for name, arguments in entry.items():
            operation = getattr(kornia, name, None)
            if not (isinstance(operation, type) and issubclass(operation, kornia.AugmentationBase2D)):
                named = [
                    other
                    for other, value in vars(kornia).items()
                    if isinstance(value, type) and issubclass(value, kornia.AugmentationBase2D)
                ]
                raise UserError(f"augment: kornia has no image augmentation {name!r}; {nearest(name, named)}")
            # JSON has no tuples, and kornia tells a range (tuple) from other sequences.
            values = {key: tuple(v) if isinstance(v, list) else v for key, v in arguments.items()}
            try:
                pipeline.append(operation(**values))
            except (TypeError, ValueError) as error:
                raise UserError(f"augment: kornia's {name} does not take {arguments}: {error}.") from None
    return pipeline


def counted(index: Int[Tensor, " batch"], view: int) -> Integers:
    """Integers from a counter hash (splitmix64) of each sample's index, the view and the place of the draw."""
    draws = 0

    def drawn(below: int, columns: int) -> Tensor:
        nonlocal draws
        salts = [number_of("view", view, draws + column) for column in range(columns)]
        draws += columns
        z = index[:, None] * _signed(0x9E3779B97F4A7C15) + torch.tensor(salts, device=index.device)
        z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
        return (_shifted(z ^ _shifted(z, 31), 33) * below) >> 31

    return drawn


def _signed(number: int) -> int:
    """A 64-bit number as the signed integer of the same bits: products of int64 tensors wrap around as unsigned ones do."""
    return number - 2**64 if number >= 2**63 else number


def _shifted(z: Tensor, by: int) -> Tensor:
    """Shift right with zeros moving in."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def moved(
    pixels: Float[Tensor, "batch channels height width"],
    offsets: Int[Tensor, "batch 2"],
    padding: int,
    mirrored: Bool[Tensor, " batch"] | None,
) -> Float[Tensor, "batch channels height width"]:
    """Windows of the padded images at the given (row, column) offsets, mirrored where asked; one gather for all."""
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (padding,) * 4)
    rows = offsets[:, :1] + torch.arange(height, device=pixels.device)
    columns = torch.arange(width, device=pixels.device).expand(len(pixels), -1)
    if mirrored is not None:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = offsets[:, 1:] + columns
    places = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).flatten(1)
    windows = padded.flatten(2).gather(2, places[:, None].expand(-1, pixels.shape[1], -1))
    return windows.view_as(pixels)
