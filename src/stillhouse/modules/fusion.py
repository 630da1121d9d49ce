"""Review of earlier layers by later ones (Distilling Knowledge via Knowledge Review, ReviewKD, arXiv 2104.09044)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import feature_maps


class AttentionFusion(nn.Module):
    """Fuses a layer with what was fused above it, position by position (the paper's attention based fusion, ABF).

    A 1x1 convolution with batch norm brings the layer to the shared channels; the map from above is enlarged to its size;
    one sigmoid gate per position for each of the two, from both, weighs their sum. A 3x3 convolution with batch norm makes
    the teacher's channels of it.

    Args:
        channels: channels of the student's layer.
        shared: channels in which layers are fused.
        teacher_channels: channels of the teacher's layer.
        size: height and width of the teacher's layer.
        fuses: whether there is a layer above.
    """

    def __init__(
        self, channels: int, shared: int, teacher_channels: int, size: tuple[int, int], *, fuses: bool
    ) -> None:
        super().__init__()
        self.size = size
        reduce, expand = (
            nn.Conv2d(channels, shared, 1, bias=False),
            nn.Conv2d(shared, teacher_channels, 3, 1, 1, bias=False),
        )
        for convolution in (reduce, expand):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(reduce, nn.BatchNorm2d(shared))
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher_channels))
        self.gates = nn.Sequential(nn.Conv2d(2 * shared, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(
        self,
        features: Float[Tensor, "batch channels height width"],
        above: Float[Tensor, "batch shared _ _"] | None = None,
    ) -> tuple[Float[Tensor, "batch teacher _ _"], Float[Tensor, "batch shared _ _"]]:
        """What is compared with the teacher's layer, and what the layer below fuses with."""
        x = self.reduce(features)
        if self.gates is not None:
            assert above is not None
            above = F.interpolate(above, x.shape[2:], mode="nearest")
            gates = self.gates(torch.cat([x, above], 1))
            x = x * gates[:, :1] + above * gates[:, 1:]
        if x.shape[2:] != self.size:
            x = F.interpolate(x, self.size, mode="nearest")
        return self.expand(x), x


class ReviewFusion(nn.Module):
    """The student's layers, each fused with all above it, in the shapes of the teacher's.

    Compare what it gives with the teacher's layers by :func:`~stillhouse.losses.feature_matching.hierarchical_context`,
    summed over layers. In the official code the last layer is the pooled embedding, as a map of one position, and the
    teacher's others are read before their activation.

    Args:
        student: shape of one sample's features for each of the student's layers, first to last: (channels, height, width),
            (tokens, width) or (width,).
        teacher: those of the teacher.
        shared: channels in which layers are fused; those of the student's last layer, at most 512, by default.

    Raises:
        UserError: no layers, or as many of both not given.
    """

    def __init__(
        self, student: Sequence[Sequence[int]], teacher: Sequence[Sequence[int]], shared: int | None = None
    ) -> None:
        super().__init__()
        if len(student) != len(teacher) or not student:
            raise UserError(
                f"Knowledge review pairs layers, but there are {len(student)} of the student and {len(teacher)} of the "
                "teacher."
            )
        mine, theirs = (
            [tuple(feature_maps(torch.empty(1, *shape, device="meta")).shape[1:]) for shape in side]
            for side in (student, teacher)
        )
        shared = min(512, mine[-1][0]) if shared is None else shared
        self.fusions = nn.ModuleList(
            AttentionFusion(a[0], shared, b[0], (b[1], b[2]), fuses=at < len(mine) - 1)
            for at, (a, b) in enumerate(zip(mine, theirs, strict=True))
        )

    def forward(self, features: Sequence[Float[Tensor, "batch *shape"]]) -> list[Float[Tensor, "batch teacher _ _"]]:
        """The fused layers, first to last, as maps.

        Raises:
            UserError: another number of layers than it was made for.
        """
        if len(features) != len(self.fusions):
            raise UserError(f"This review was made for {len(self.fusions)} layers, not {len(features)}.")
        fused: list[Tensor] = []
        above = None
        for fusion, layer in zip(reversed(self.fusions), reversed(features), strict=True):
            out, above = fusion(feature_maps(layer), above)
            fused.append(out)
        return fused[::-1]
