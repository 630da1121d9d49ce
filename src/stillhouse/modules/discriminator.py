"""A discriminator that reads the bottleneck of a denoiser."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import UserError


class BottleneckDiscriminator(nn.Module):
    """The GAN head of DMD2 (arXiv 2405.14867, Section 4.3) on features from the middle of a denoiser.

    4x4 convolutions of stride 2 halve the map until its shorter side is at most 4, a last convolution covers what is
    left, each followed by a group norm and SiLU; a 1x1 convolution gives the logit. For 8x8 maps these are the paper's
    layers (4x4 stride 2, 4x4 stride 4, 1x1), for SDXL's 32x32 there are two more halvings, and for the 4x4 or 2x2 maps
    of small networks none. Vectors count as 1x1 maps.

    The group norm has 32 groups, or fewer where the channels are few: normalizing a 1x1 map in groups of one channel
    would erase it, so a group has at least 8 channels (or all of them).

    Args:
        channels: channels of the features.
        size: height and width of the feature map; () for vectors.

    Raises:
        UserError: the map has no extent.
    """

    def __init__(self, channels: int, size: Sequence[int] = ()) -> None:
        super().__init__()
        height, width = size if size else (1, 1)
        if min(height, width, channels) < 1:
            raise UserError(f"A discriminator cannot read {channels} channels of size {tuple(size)}.")
        self.expected = (channels, *size)
        layers: list[nn.Module] = []
        while min(height, width) > 4:
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), _norm(channels), nn.SiLU()]
            height, width = height // 2, width // 2
        layers += [nn.Conv2d(channels, channels, (height, width)), _norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Float[Tensor, "batch channels *size"]) -> Float[Tensor, "batch"]:
        """The logit of each sample; large means real.

        Raises:
            UserError: the features are not of the shape that the head was made for.
        """
        if features.shape[1:] != self.expected:
            raise UserError(
                f"The discriminator reads features of shape {self.expected}, not {tuple(features.shape[1:])}."
            )
        if features.ndim == 2:
            features = features[:, :, None, None]
        logits: Tensor = self.layers(features)
        return logits.flatten()


def _norm(channels: int) -> nn.GroupNorm:
    most = max(1, min(32, channels // 8))
    return nn.GroupNorm(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)
