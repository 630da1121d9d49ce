"""Random crops as boxes that can be kept: drawn once, applied, stored and applied again.

The draw is that of torchvision's ``RandomResizedCrop`` and the resampling that of an antialiased bilinear resize of the
cut-out part, but all boxes of a batch go through two matrix products, and pixels get gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import UserError


def random_crops(
    count: int,
    size: tuple[int, int],
    *,
    smallest: float = 0.08,
    largest: float = 1.0,
    ratio: float = 4 / 3,
    attempts: int = 10,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "count 4"]:
    """Boxes (top, left, height, width) of random area and proportions, each at a uniform place.

    The area is uniform in [smallest, largest] of the image's, the logarithm of the proportions uniform; what does not fit
    is drawn again up to ``attempts`` times in all, and then the largest centred box of allowed proportions is taken.

    Args:
        count: number of boxes.
        size: height and width of the images, in pixels.
        smallest: least share of the area.
        largest: largest share of the area.
        ratio: largest ratio of the sides, either way; 1 gives squares.
        attempts: draws for each box.
        generator: source of randomness; torch's global CPU generator by default.

    >>> random_crops(3, (8, 8), smallest=1.0, ratio=1.0).tolist()
    [[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]]
    """
    height, width = size
    device = generator.device if generator is not None else torch.device("cpu")
    u = torch.rand(count, attempts, 2, generator=generator, dtype=torch.float64, device=device)
    place = torch.rand(count, 2, generator=generator, dtype=torch.float64, device=device)
    area = height * width * (smallest + (largest - smallest) * u[..., 0])
    proportion = torch.exp((2 * u[..., 1] - 1) * math.log(ratio))
    sides = torch.stack([(area / proportion).sqrt().round(), (area * proportion).sqrt().round()], -1).long()
    limits = torch.tensor([height, width], device=device)
    fits = ((sides > 0) & (sides <= limits)).all(-1)
    fallback = torch.tensor(_centred(height, width, ratio), device=device)
    first = fits.int().argmax(1)
    found = fits.any(1)
    chosen = torch.where(found[:, None], sides[torch.arange(count, device=device), first], fallback)
    room = limits - chosen
    corner = torch.where(found[:, None], (place * (room + 1)).long(), room // 2)
    return torch.cat([corner, chosen], 1)


def _centred(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Sides of the largest box with proportions of at most ``ratio``."""
    if width * ratio < height:
        return round(width * ratio), width
    if width > height * ratio:
        return height, round(height * ratio)
    return height, width


def crop_resized(
    images: Float[Tensor, "batch channels height width"],
    boxes: Int[Tensor, "batch 4"],
    size: tuple[int, int] | None = None,
    mirrored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch channels tall wide"]:
    """The part of each image in its box, resized; bilinear, and antialiased where it shrinks. Differentiable.

    Args:
        images: the images, in any affine pixel space.
        boxes: (top, left, height, width) of each, in pixels, inside the image.
        size: height and width of the result; the images' own by default.
        mirrored: which results are turned left to right.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> crop_resized(image, torch.tensor([[1, 1, 2, 2]]), (2, 2)).flatten().tolist()
    [5.0, 6.0, 9.0, 10.0]
    """
    height, width = images.shape[-2:]
    tall, wide = size or (height, width)
    boxes = boxes.to(images.device)
    wider = images if images.dtype in (torch.float32, torch.float64) else images.float()
    down = _weights(boxes[:, 0], boxes[:, 2], height, tall, wider)
    across = _weights(boxes[:, 1], boxes[:, 3], width, wide, wider)
    if mirrored is not None:
        across = torch.where(mirrored.to(images.device)[:, None, None], across.flip(1), across)
    return (down[:, None] @ wider @ across.transpose(1, 2)[:, None]).to(images.dtype)


def _weights(start: Tensor, length: Tensor, source: int, out: int, like: Tensor) -> Float[Tensor, "batch out source"]:
    """The weight of each source pixel in each resized one: a triangle as wide as a step, cut off at the box."""
    scale = (length.double() / out)[:, None, None]
    steps = torch.arange(out, device=like.device, dtype=torch.float64)[None, :, None]
    centre = start[:, None, None] + (steps + 0.5) * scale
    pixel = torch.arange(source, device=like.device)
    weights = (1 - (pixel + 0.5 - centre).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * ((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None]
    return (weights / weights.sum(-1, keepdim=True)).to(like.dtype)


def random_strips(
    count: int, strips: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, "count both strips"]:
    """A random order of the rows of strips and one of the columns, for each of ``count`` images."""
    device = generator.device if generator is not None else None
    return torch.rand(count, 2, strips, generator=generator, device=device).argsort(-1)


def shuffle_strips(
    images: Float[Tensor, "batch channels height width"], orders: Int[Tensor, "batch both strips"]
) -> Float[Tensor, "batch channels height width"]:
    """Cut images into equal strips, lengthwise and across, and lay these in new orders (the last takes what is left over).

    Args:
        images: the images.
        orders: for each image which horizontal strip lies where, from the top, and which vertical one, from the left.

    >>> image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> shuffle_strips(image, torch.tensor([[[0, 1], [1, 0]]])).flatten().tolist()
    [2.0, 1.0, 4.0, 3.0]
    """
    if orders.shape[-1] == 1:
        return images
    rows, columns = (
        _places(order.to(images.device), side) for order, side in zip(orders.unbind(1), images.shape[-2:], strict=True)
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _places(order: Int[Tensor, "batch strips"], length: int) -> Int[Tensor, "batch length"]:
    """Where each row (or column) of the result is read."""
    strips = order.shape[1]
    place = torch.arange(length, device=order.device)
    strip = (place // (length // strips)).clamp_max(strips - 1)
    return (order.argsort(1)[:, strip] * length + place).argsort(1)


def stitch(
    parts: Float[Tensor, "parts channels height width"], size: tuple[int, int], factor: int
) -> Float[Tensor, "images channels tall wide"]:
    """Images of ``factor`` x ``factor`` parts each: image ``i`` of ``n`` has the parts ``i, i + n, i + 2 n, ...``, row by row.

    Where the sides are no multiples of ``factor`` the first rows and columns are a pixel larger; parts are brought to their
    size by the nearest pixel.

    Args:
        parts: the parts, ``factor ** 2`` of them for each image.
        size: height and width of the images.
        factor: parts along each side.

    Raises:
        UserError: the parts are not enough for whole images, or the images too small for that many.

    >>> stitch(torch.arange(4.0).view(4, 1, 1, 1), (2, 2), 2).flatten().tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    count, rest = divmod(len(parts), factor**2)
    if rest or not count:
        raise UserError(f"{len(parts)} parts do not make whole images of {factor} x {factor}.")
    if min(size) < factor:
        raise UserError(f"Images of {size[0]}x{size[1]} have no room for {factor} parts along a side.")
    sides = [[side // factor + (i < side % factor) for i in range(factor)] for side in size]
    cells = parts.view(factor, factor, count, *parts.shape[1:])
    rows = []
    for row, tall in zip(cells, sides[0], strict=True):
        rows.append(torch.cat([F.interpolate(cell, size=(tall, w)) for cell, w in zip(row, sides[1], strict=True)], -1))
    return torch.cat(rows, -2)
