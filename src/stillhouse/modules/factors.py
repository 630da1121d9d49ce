"""Factor transfer (Paraphrasing Complex Network, arXiv 1802.04977): the teacher's paraphraser, the student's translator."""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.losses.feature_matching import feature_maps


class Paraphraser(nn.Module):
    """A convolutional autoencoder of the teacher's features; its code is the factor that the student learns.

    Three 3x3 convolutions with LeakyReLU 0.1 down to ``rate`` times the channels, and three transposed ones back. Trained
    first, on reconstruction (:meth:`reconstruct`), then frozen.

    Args:
        channels: channels of the teacher's features.
        rate: channels of the factor per channel of the features, k = 0.5 in the official code.
        batch_norm: a batch norm after each convolution; none in RepDistiller.

    Raises:
        UserError: the rate leaves no channel.
    """

    def __init__(self, channels: int, rate: float = 0.5, *, batch_norm: bool = False) -> None:
        super().__init__()
        factor = _factor_channels(channels, rate)
        widths = [channels, channels, factor, factor]
        self.encoder = _stack(nn.Conv2d, widths, batch_norm)
        self.decoder = _stack(nn.ConvTranspose2d, [factor, factor, channels, channels], batch_norm)

    def forward(self, features: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch factor height width"]:
        """The teacher's factor."""
        out: Tensor = self.encoder(feature_maps(features))
        return out

    def reconstruct(self, features: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch channels height width"]:
        """The features again, from their factor: to be brought close to them by the mean squared error."""
        out: Tensor = self.decoder(self(features))
        return out


class Translator(nn.Module):
    """The student's factor: three 3x3 convolutions with LeakyReLU 0.1, trained with the student.

    Args:
        student_channels: channels of the student's features.
        teacher_channels: channels of the teacher's.
        rate: the paraphraser's.
        batch_norm: a batch norm after each convolution, as in RepDistiller.

    Raises:
        UserError: the rate leaves no channel.
    """

    def __init__(
        self, student_channels: int, teacher_channels: int, rate: float = 0.5, *, batch_norm: bool = True
    ) -> None:
        super().__init__()
        factor = _factor_channels(teacher_channels, rate)
        self.encoder = _stack(nn.Conv2d, [student_channels, student_channels, factor, factor], batch_norm)

    def forward(self, features: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch factor height width"]:
        """The student's factor."""
        out: Tensor = self.encoder(feature_maps(features))
        return out


def _factor_channels(channels: int, rate: float) -> int:
    factor = int(channels * rate)
    if factor < 1:
        raise UserError(f"A factor of {rate} times {channels} channels has none; raise the rate.")
    return factor


def _stack(kind: type[nn.Conv2d] | type[nn.ConvTranspose2d], widths: list[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [kind(before, after, 3, 1, 1), *([nn.BatchNorm2d(after)] if batch_norm else []), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
