"""Views of a small set of images that are drawn once, labelled by a teacher, kept and trained on (FKD, arXiv 2112.01528).

A view is a random crop of an image, perhaps mirrored and with its strips shuffled, mixed with another one. What was drawn
is a :class:`Views`, a handful of integers for each; :func:`seen` makes the pixels from it, always the same ones, so that a
teacher's answer can be stored and belongs to just these pixels. This is how SRe2L (arXiv 2306.13092) and RDED (arXiv
2312.03526) relabel their images.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from stillhouse.modules.crops import crop_resized, random_crops, random_strips, shuffle_strips
from stillhouse.modules.mixing import CutMix, Mixing
from stillhouse.spec import Spec


@dataclass(frozen=True, eq=False)
class Views:
    """Views of a set's images, each of two parts (where nothing is mixed, both are of one image).

    Attributes:
        sources: which image each part is of.
        crops: the box of each part (top, left, height, width).
        mirrored: which parts are mirrored.
        strips: the order of rows and columns of strips of each part.
        share: the share of the first part, where parts are blended.
        pasted: the box (top, left, height, width) that is taken from the second part; empty where parts are blended.
    """

    sources: Int[Tensor, "views parts"]
    crops: Int[Tensor, "views parts box"]
    mirrored: Bool[Tensor, "views parts"]
    strips: Int[Tensor, "views parts both strips"]
    share: Float[Tensor, " views"]
    pasted: Int[Tensor, "views box"]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, rows: slice | Int[Tensor, " rows"]) -> Self:
        return type(self)(**{name: tensor[rows] for name, tensor in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it is stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def joined(cls, parts: list[Views]) -> Views:
        """One after the other."""
        return Views(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def small(self) -> dict[str, Tensor]:
        """:attr:`tensors` in the smallest types that hold them; ``Views(**small)`` is as good."""
        return {name: tensor.to(_SMALL.get(name, tensor.dtype)) for name, tensor in self.tensors.items()}

    def ready(self, device: torch.device) -> Self:
        """On a device, in types that can index."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return type(self)(**{name: tensor.long() if name in _SMALL else tensor for name, tensor in moved.items()})


_SMALL = {"sources": torch.int32, "crops": torch.int16, "strips": torch.int8, "pasted": torch.int16}


class ViewPlan(Spec):
    """How views are drawn; the defaults are those of SRe2L on ImageNet."""

    smallest: float = Field(0.08, gt=0, le=1)
    """Least share of an image's area in a crop."""
    ratio: float = Field(4 / 3, ge=1)
    """Largest ratio of a crop's sides, either way."""
    flip: bool = True
    """Mirror half of the parts. Off where a mirror image means something else (digits)."""
    strips: int = Field(1, ge=1, le=127)
    """Cut images into so many rows and columns and shuffle these before the crop (RDED: its parts along a side)."""
    mix: Mixing = Field(CutMix(shared=True), validate_default=True)
    """How the views of a batch are mixed: none, mixup, cutmix; the papers draw one share and one box for a batch."""

    def draw(self, count: int, size: tuple[int, int]) -> Views:
        """Views of a batch of ``count`` images, from torch's global generator; ``sources`` count in the batch.

        Args:
            count: number of images, each the first part of one view.
            size: their height and width.
        """
        crops = random_crops(count, size, smallest=self.smallest, ratio=self.ratio)
        mirrored = torch.rand(count) < (0.5 if self.flip else 0.0)
        strips = random_strips(count, self.strips)
        first = second = torch.arange(count)
        share, pasted = torch.ones(count), torch.zeros(count, 4, dtype=torch.long)
        if count > 1 and self.mix.kind != "none":
            mixture = self.mix.draw(torch.empty(count, 1, *size))
            first, second = mixture.first, mixture.second
            if mixture.pasted is None:
                share = mixture.share
            else:
                pasted = _boxes(mixture.pasted)
        sources = torch.stack([first, second], 1)
        return Views(sources, crops[sources], mirrored[sources], strips[sources], share, pasted)


def _boxes(mask: Bool[Tensor, "views height width"]) -> Int[Tensor, "views box"]:
    """The boxes of masks that are boxes."""
    ends = []
    for inside in (mask.any(2), mask.any(1)):
        length = inside.sum(1)
        ends.append((torch.where(length > 0, inside.int().argmax(1), 0), length))
    (top, height), (left, width) = ends
    return torch.stack([top, left, height, width], 1)


def seen(
    images: Float[Tensor, "images channels height width"], views: Views
) -> Float[Tensor, "views channels height width"]:
    """The pixels of views: shuffled, cropped, mirrored, mixed; the same each time.

    Args:
        images: the set, or the batch, that ``views.sources`` count in.
        views: what was drawn.

    >>> plan = ViewPlan(smallest=1.0, ratio=1.0, flip=False, mix="none")
    >>> images = torch.rand(2, 1, 4, 4)
    >>> torch.equal(seen(images, plan.draw(2, (4, 4))), images)
    True
    """
    views = views.ready(images.device)
    one, other = (
        crop_resized(
            shuffle_strips(images[views.sources[:, part]], views.strips[:, part]),
            views.crops[:, part],
            mirrored=views.mirrored[:, part],
        )
        for part in (0, 1)
    )
    share = views.share.to(one.dtype)[:, None, None, None]
    blended = torch.where(share < 1, share * one + (1 - share) * other, one)
    top, left, height, width = (value[:, None] for value in views.pasted.unbind(1))
    rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
    inside = ((rows >= top) & (rows < top + height))[:, :, None] & ((columns >= left) & (columns < left + width))[
        :, None
    ]
    return torch.where(inside[:, None], other, blended)
