"""Differentiable siamese augmentation ("Dataset Condensation with Differentiable Siamese Augmentation", 2102.08259).

One draw of parameters is a value, :class:`Params`: the same row is applied to the real and to the synthetic images of a
class, replayed in the second pass of an adjoint, or cut to a group of classes. Every operation is differentiable with
respect to the pixels, and all groups that drew the same operation go through it together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import Field, model_validator
from torch import Tensor

from stillhouse.errors import UserError, nearest
from stillhouse.spec import Spec

OPERATIONS = ("color", "crop", "cutout", "flip", "scale", "rotate")


@dataclass(frozen=True, eq=False)
class Params:
    """One draw: row ``g`` of every tensor (on the CPU, so that nothing here waits for a device) belongs to group ``g``.

    ``params[2:5]`` or ``params[index]`` cuts out groups.

    Attributes:
        size: height and width of the images it was drawn for.
        operations: the strategy's operations in their order.
        cutout_size: height and width of the box that ``cutout`` blanks.
        choice: which operation each group gets; ``None`` applies all of them in order.
        brightness: number added to every value.
        saturation: factor on the distance of each pixel from its mean over the channels.
        contrast: factor on the distance of each value from the mean of its image.
        shift: rows and columns by which ``crop`` reads away from a pixel's own place; outside is zero.
        cutout: row and column of the box's centre; the box is cut off at the border.
        flip: whether to mirror left to right.
        scale: factors (x, y) on the sampling coordinates; above one the content shrinks.
        angle: rotation in radians, counter-clockwise for positive values as the image is seen.
    """

    size: tuple[int, int]
    operations: tuple[str, ...]
    cutout_size: tuple[int, int]
    choice: Int[Tensor, " groups"] | None
    brightness: Float[Tensor, " groups"]
    saturation: Float[Tensor, " groups"]
    contrast: Float[Tensor, " groups"]
    shift: Int[Tensor, "groups 2"]
    cutout: Int[Tensor, "groups 2"]
    flip: Bool[Tensor, " groups"]
    scale: Float[Tensor, "groups 2"]
    angle: Float[Tensor, " groups"]

    def __len__(self) -> int:
        return len(self.flip)

    def __getitem__(self, groups: slice | Int[Tensor, " part"]) -> Self:
        rows: dict[str, Any] = {
            f.name: value[groups] for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **rows)


class DSA(Spec):
    """What may be drawn: the operations, and how strong each is. The defaults are those of the published code.

    Images are expected standardised (zero mean): what ``crop``, ``cutout``, ``scale`` and ``rotate`` leave empty is
    zero. Leave ``flip`` out where mirror images mean something else (digits). As a field it also reads from text:
    ``color_crop_cutout``, ``none``.

    >>> dsa = DSA.model_validate("crop_flip")
    >>> params = dsa.draw(groups=2, size=(8, 8), generator=torch.Generator().manual_seed(0))
    >>> real, synthetic = torch.randn(2, 16, 3, 8, 8), torch.randn(2, 1, 3, 8, 8, requires_grad=True)
    >>> apply(real, params).shape, apply(synthetic, params).shape
    (torch.Size([2, 16, 3, 8, 8]), torch.Size([2, 1, 3, 8, 8]))
    """

    strategy: str = "color_crop_cutout_flip_scale_rotate"
    """Operations joined by '_', in the order in which 'all' applies them; 'none' leaves images as they are."""
    mode: Literal["one", "all"] = "one"
    """'one' draws a single operation for each group, 'all' applies every operation of the strategy in order."""
    brightness: float = Field(1.0, ge=0)
    """Width of the range of the number added: uniform in [-brightness/2, brightness/2)."""
    saturation: float = Field(2.0, ge=0)
    """Upper end of the factor on saturation: uniform in [0, saturation)."""
    contrast: float = Field(0.5, ge=0)
    """Lower end of the factor on contrast: uniform in [contrast, contrast + 1)."""
    crop: float = Field(0.125, ge=0, le=1)
    """Largest shift of crop, as a part of each side."""
    cutout: float = Field(0.5, ge=0, le=1)
    """Sides of the blanked box, as parts of the image's sides."""
    flip: float = Field(0.5, ge=0, le=1)
    """Probability of mirroring."""
    scale: float = Field(1.2, ge=1)
    """Largest factor of scale; x and y are each uniform in [1/scale, scale)."""
    rotate: float = Field(15.0, ge=0, le=180)
    """Largest rotation in degrees, either way."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"strategy": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(f"there is no operation {name!r} in the strategy; {nearest(name, OPERATIONS)}")
        if len(set(self.operations)) < len(self.operations):
            raise ValueError(f"the strategy {self.strategy!r} names an operation twice")
        return self

    @property
    def operations(self) -> tuple[str, ...]:
        """The strategy's operations in their order; empty for 'none'."""
        return () if self.strategy in ("", "none") else tuple(self.strategy.split("_"))

    def draw(
        self,
        groups: int,
        size: tuple[int, int],
        *,
        shared_choice: bool = False,
        generator: torch.Generator | None = None,
    ) -> Params:
        """Draw parameters for ``groups`` groups of images.

        The parameters of a group depend neither on how many groups follow nor on which operations the strategy names.

        Args:
            groups: number of groups; a group is a class (siamese) or a single image (training a network).
            size: height and width of the images.
            shared_choice: draw one operation for all groups together, each with its own parameters, which is how the
                published code augments the batches of a network's training. Only matters in mode 'one'.
            generator: source of randomness; torch's global CPU generator by default.
        """
        device = generator.device if generator is not None else "cpu"
        u = torch.rand(groups, 12, generator=generator, dtype=torch.float64, device=device).cpu().T
        sides = torch.tensor(size)
        reach, box = _part(size, self.crop), _part(size, self.cutout)
        spans = sides + 1 - torch.tensor(box) % 2
        choice = (u[0, :1].expand(groups) if shared_choice else u[0]) * len(self.operations)
        return Params(
            size=(int(size[0]), int(size[1])),
            operations=self.operations,
            cutout_size=box,
            choice=choice.long() if self.mode == "one" else None,
            brightness=(u[1] - 0.5) * self.brightness,
            saturation=u[2] * self.saturation,
            contrast=u[3] + self.contrast,
            shift=(u[4:6].T * (2 * torch.tensor(reach) + 1)).long() - torch.tensor(reach),
            cutout=(u[6:8].T * spans).long(),
            flip=u[8] < self.flip,
            scale=u[9:11].T * (self.scale - 1 / self.scale) + 1 / self.scale,
            angle=(2 * u[11] - 1) * self.rotate * (torch.pi / 180),
        )

    def augment(
        self, images: Float[Tensor, "batch channels height width"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Augment a training batch: one operation for the batch (mode 'one'), parameters of its own for each image."""
        if not self.operations:
            return images
        height, width = images.shape[-2:]
        return apply(images, self.draw(len(images), (height, width), shared_choice=True, generator=generator))


def apply(
    images: Float[Tensor, "*batch channels height width"], params: Params, groups: Int[Tensor, " images"] | None = None
) -> Float[Tensor, "*batch channels height width"]:
    """Augment images with the parameters of their groups.

    Args:
        images: any number of images; leading dimensions such as [classes, per class] are kept.
        params: a draw for images of this size.
        groups: row of ``params`` for each image, on the CPU. Without it the images are as many equal consecutive runs
            as there are groups.

    Raises:
        UserError: the draw is for another size, or the images cannot be divided among the groups.
    """
    height, width = images.shape[-2:]
    if (height, width) != params.size:
        raise UserError(
            f"These parameters were drawn for images of {params.size[0]}x{params.size[1]}, not {height}x{width}."
        )
    flat = images.reshape(-1, *images.shape[-3:])
    if groups is not None:
        x, params = flat[:, None], params[groups]
    elif len(params) == 0 or len(flat) % len(params):
        raise UserError(
            f"{len(flat)} images are not {len(params)} groups of equal size; pass groups, the group of each image."
        )
    else:
        x = flat.view(len(params), -1, *flat.shape[1:])
    if not params.operations:
        return images
    if params.choice is None:
        for name in params.operations:
            x = _OPERATIONS[name](x, params)
    else:
        x = _apply_chosen(x, params, params.choice)
    return x.reshape(images.shape)


# From here on images are [groups, per group, channels, height, width]. The parameters of a group hold for all its
# images, so that masks and sampling grids are made once for each group.
Images = Float[Tensor, "groups per_group channels height width"]


def _apply_chosen(x: Images, p: Params, choice: Int[Tensor, " groups"]) -> Images:
    """Each group through its own one operation; scaled and rotated groups share one resampling."""
    kinds: dict[Callable[[Tensor, Params], Tensor], list[int]] = {}
    for place, name in enumerate(p.operations):
        kinds.setdefault(_warp if name in ("scale", "rotate") else _OPERATIONS[name], []).append(place)
    done = list(x)
    for operation, places in kinds.items():
        mine = torch.isin(choice, torch.tensor(places)).nonzero().flatten()
        if len(mine) == len(x):
            return operation(x, p)
        if len(mine):
            changed = operation(x.index_select(0, mine.to(x.device)), p[mine])
            for group, images in zip(mine.tolist(), changed, strict=True):
                done[group] = images
    return torch.stack(done)


def _part(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    return int(size[0] * ratio + 0.5), int(size[1] * ratio + 0.5)


def _per_group(values: Shaped[Tensor, " groups"], like: Images) -> Shaped[Tensor, "groups 1 1 1 1"]:
    return values.to(like.device)[:, None, None, None, None]


def _color(x: Images, p: Params) -> Images:
    # Brightness b, then saturation s about the mean g over channels, then contrast c about the mean m of the image.
    # Saturation keeps g, so m is known from the start, and the three are c s x + c (1 - s) g + (1 - c) m + b.
    b, s, c = (_per_group(value, x).to(x.dtype) for value in (p.brightness, p.saturation, p.contrast))
    gray = x.mean(2, keepdim=True)
    return x * (c * s) + (gray * (c * (1 - s)) + (gray.mean((3, 4), keepdim=True) * (1 - c) + b))


def _crop(x: Images, p: Params) -> Images:
    sides = torch.tensor(p.size)
    # A shift by whole pixels; the nearest pixel is the pixel itself, so values come through unchanged.
    translation = (2 * p.shift.double() / sides).flip(1)
    theta = torch.cat((torch.eye(2, dtype=torch.float64).expand(len(translation), 2, 2), translation[:, :, None]), 2)
    return _resample(x, theta, "nearest")


def _cutout(x: Images, p: Params) -> Images:
    (height, width), (tall, wide) = p.size, p.cutout_size
    top_left = p.cutout - torch.tensor((tall // 2, wide // 2))
    rows = torch.arange(height) - top_left[:, :1]
    columns = torch.arange(width) - top_left[:, 1:]
    box = ((rows >= 0) & (rows < tall))[:, :, None] & ((columns >= 0) & (columns < wide))[:, None, :]
    return x.masked_fill(box[:, None, None].to(x.device), 0)


def _flip(x: Images, p: Params) -> Images:
    return torch.where(_per_group(p.flip, x), x.flip(4), x)


def _scaling(p: Params) -> Float[Tensor, "groups 2 3"]:
    return F.pad(torch.diag_embed(p.scale), (0, 1))


def _rotation(p: Params) -> Float[Tensor, "groups 2 3"]:
    # The corners are at +-1 on both axes, so a rotation in pixels carries the image's proportions.
    height, width = p.size
    cos, sin = p.angle.cos(), p.angle.sin()
    return F.pad(torch.stack((cos, -sin * height / width, sin * width / height, cos), -1).view(-1, 2, 2), (0, 1))


def _scale(x: Images, p: Params) -> Images:
    return _resample(x, _scaling(p), "bilinear")


def _rotate(x: Images, p: Params) -> Images:
    return _resample(x, _rotation(p), "bilinear")


def _warp(x: Images, p: Params) -> Images:
    assert p.choice is not None
    rotated = torch.tensor([name == "rotate" for name in p.operations])[p.choice]
    return _resample(x, torch.where(rotated[:, None, None], _rotation(p), _scaling(p)), "bilinear")


def _resample(x: Images, theta: Float[Tensor, "groups 2 3"], mode: Literal["nearest", "bilinear"]) -> Images:
    # All images of a group are channels of one picture: interpolation weights are computed once for the group.
    # Sampling coordinates in half precision would be off by whole pixels, so those images pass through float32.
    wide = (x if x.dtype in (torch.float32, torch.float64) else x.float()).flatten(1, 2)
    grid = F.affine_grid(theta.to(wide), list(wide.shape), align_corners=False)
    return F.grid_sample(wide, grid, mode=mode, padding_mode="zeros", align_corners=False).to(x.dtype).view(x.shape)


_OPERATIONS: dict[str, Callable[[Tensor, Params], Tensor]] = {
    "color": _color,
    "crop": _crop,
    "cutout": _cutout,
    "flip": _flip,
    "scale": _scale,
    "rotate": _rotate,
}
