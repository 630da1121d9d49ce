"""Features as tokens on a grid: maps cut into patches, transformer tokens without those that stand for no patch."""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError


def feature_grid(
    features: Float[Tensor, "batch *shape"], image: tuple[int, int] = (1, 1), prefix: int | None = None
) -> Float[Tensor, "batch width rows columns"]:
    """Features as a map: maps as they are, tokens laid out as the patches of the image.

    Args:
        features: (batch, channels, height, width), or (batch, tokens, width) of a transformer, row by row.
        image: height and width of the images, whose ratio the grid has.
        prefix: number of tokens before the patches' (class, distillation, registers). None finds out: 0, 1 or 2, with which
            the others fill a grid.

    Raises:
        UserError: features of another kind, tokens that fill no grid, or a prefix of maps.

    >>> import torch
    >>> feature_grid(torch.rand(2, 17, 8), image=(32, 32)).shape  # a class token and 4 x 4 patches
    torch.Size([2, 8, 4, 4])
    """
    if features.dim() == 4:
        if prefix:
            raise UserError(
                f"Features of shape {tuple(features.shape)} are maps: no token stands before their patches."
            )
        return features
    if features.dim() != 3:
        raise UserError(
            f"Tokens are taken from maps (batch, channels, height, width) or token sequences (batch, tokens, width), not from "
            f"features of shape {tuple(features.shape)}; name another layer."
        )
    count = features.shape[1]
    for before in range(3) if prefix is None else (prefix,):
        shape = _grid(count - before, image)
        if shape is not None:
            return features[:, before:].transpose(1, 2).reshape(len(features), -1, *shape)
    tried = "0, 1 or 2" if prefix is None else str(prefix)
    raise UserError(
        f"{count} tokens, less {tried} that stand for no patch, fill no grid of the image's ratio {image[0]}:{image[1]}; say "
        "how many come before the patches."
    )


def common_grid(*maps: Float[Tensor, "batch width rows columns"], side: int | None = None) -> tuple[int, int]:
    """The coarsest of the grids, or one of ``side`` x ``side``.

    Raises:
        UserError: a grid is finer in one direction and coarser in the other, or ``side`` is finer than one of them.

    >>> import torch
    >>> common_grid(torch.rand(1, 3, 7, 7), torch.rand(1, 5, 4, 4))
    (4, 4)
    """
    shapes = [(one.shape[2], one.shape[3]) for one in maps]
    rows, columns = min(rows for rows, _ in shapes), min(columns for _, columns in shapes)
    if (rows, columns) not in shapes:
        raise UserError(
            f"The grids {' and '.join(f'{r}x{c}' for r, c in shapes)} have no common one; name other layers."
        )
    if side is None:
        return rows, columns
    if side > min(rows, columns):
        raise UserError(f"A grid of {side}x{side} is finer than the features, {rows}x{columns}; choose a smaller one.")
    return side, side


def grid_tokens(
    maps: Float[Tensor, "batch width rows columns"], grid: tuple[int, int], patch: Literal["mean", "flatten"] = "mean"
) -> Float[Tensor, "batch tokens token_width"]:
    """One token per cell of the grid: the mean of what lies in it, or all of it.

    Args:
        maps: features.
        grid: rows and columns of cells.
        patch: ``"mean"``, for any size; ``"flatten"``, where the grid divides the map.

    Raises:
        UserError: the grid does not divide a map that is to be flattened.

    >>> import torch
    >>> grid_tokens(torch.arange(16.0).view(1, 1, 4, 4), (2, 2))[0, :, 0].tolist()
    [2.5, 4.5, 10.5, 12.5]
    """
    if patch == "mean":
        return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
    size = (maps.shape[2] // grid[0], maps.shape[3] // grid[1])
    if any(whole % cells for whole, cells in zip(maps.shape[2:], grid, strict=True)):
        raise UserError(
            f"A map of {maps.shape[2]}x{maps.shape[3]} is not cut into {grid[0]}x{grid[1]} equal patches; use patch=mean."
        )
    return F.unfold(maps, size, stride=size).transpose(1, 2)


def _grid(count: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many patches of an image of that ratio; None where they fill no grid."""
    if count < 1:
        return None
    divisor = math.gcd(*image)
    high, wide = image[0] // divisor, image[1] // divisor
    scale = math.isqrt(count // (high * wide))
    return (scale * high, scale * wide) if scale * scale * high * wide == count else None
