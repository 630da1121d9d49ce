"""Encoders and decoders of representation learning: convolutional with instance norm, style-modulated, dense.

The networks of *Disentanglement via Latent Quantization* (arXiv 2305.18378) and of its baselines. Decoders give
logits. An encoder and a decoder of equal ``image_shape``, ``widths`` and ``convolutions_per_stage`` mirror each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse.errors import UserError

NORM_EPS = 1e-6
NEGATIVE_SLOPE = 0.2


class CriticOutput(NamedTuple):
    """What a :class:`CriticEncoder` says about samples.

    Attributes:
        outputs: the encoder's latents.
        value: the critic's value, one number per sample.
    """

    outputs: Float[Tensor, "batch outputs"]
    value: Float[Tensor, " batch"]


class ImageEncoder(nn.Module):
    """Convolution stages, each halving the image, then a dense trunk and a linear head.

    A stage is ``convolutions_per_stage - 1`` convolutions of size 3 and one of size 4 and stride 2; every convolution
    (no bias) is followed by an instance norm with affine parameters and a leaky ReLU of slope 0.2.

    Args:
        image_shape: channels, height and width; height and width divisible by 2 for every stage.
        num_outputs: numbers the head gives (a quantiser's ``num_inputs``; twice the latents for a Gaussian posterior).
        widths: channels of each stage.
        dense_widths: widths of the dense trunk (ReLU after each).
        convolutions_per_stage: convolutions in a stage, the halving one included.

    Raises:
        UserError: for an image that the stages cannot halve down to a map of at least 2 x 2.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_outputs: int,
        *,
        widths: Sequence[int] = (32, 64, 128, 256),
        dense_widths: Sequence[int] = (256, 256),
        convolutions_per_stage: int = 3,
    ) -> None:
        super().__init__()
        self.map_shape = _map_shape(image_shape, widths)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for width in widths:
            for position in range(convolutions_per_stage):
                size, stride = _kernel(position, convolutions_per_stage)
                layers += [
                    nn.Conv2d(channels, width, size, stride, padding=1, bias=False),
                    nn.GroupNorm(width, width, eps=NORM_EPS),
                    nn.LeakyReLU(NEGATIVE_SLOPE),
                ]
                channels = width
        self.convolutions = nn.Sequential(*layers)
        self.dense = _dense(math.prod(self.map_shape), dense_widths)
        self.num_features = dense_widths[-1] if dense_widths else math.prod(self.map_shape)
        self.head = nn.Linear(self.num_features, num_outputs)

    def features(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The dense trunk's output, what the head reads (a critic shares it)."""
        features: Tensor = self.dense(self.convolutions(pixel_values).flatten(1))
        return features

    def forward(self, pixel_values: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        """Encode images."""
        outputs: Tensor = self.head(self.features(pixel_values))
        return outputs


class DenseEncoder(nn.Module):
    """A dense trunk with layer norm and ReLU, then a linear head; images and other arrays are flattened.

    Args:
        input_shape: shape of one sample.
        num_outputs: numbers the head gives.
        widths: widths of the trunk.
    """

    def __init__(
        self, input_shape: Sequence[int], num_outputs: int, *, widths: Sequence[int] = (2048, 2048, 2048, 2048)
    ) -> None:
        super().__init__()
        self.dense = _dense(math.prod(input_shape), widths, layer_norm=True)
        self.num_features = widths[-1] if widths else math.prod(input_shape)
        self.head = nn.Linear(self.num_features, num_outputs)

    def features(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch features"]:
        """The trunk's output, what the head reads (a critic shares it)."""
        features: Tensor = self.dense(x.flatten(1))
        return features

    def forward(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch outputs"]:
        """Encode samples."""
        outputs: Tensor = self.head(self.features(x))
        return outputs


class CriticEncoder(nn.Module):
    """An encoder whose trunk also feeds a Wasserstein critic, as in InfoGAN.

    Args:
        encoder: an encoder of this module; the critic's linear layer reads its features.
    """

    def __init__(self, encoder: ImageEncoder | DenseEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.critic = nn.Linear(encoder.num_features, 1)

    def forward(self, x: Float[Tensor, "batch *shape"]) -> CriticOutput:
        """Latents and critic values in one pass."""
        features = self.encoder.features(x)
        return CriticOutput(self.encoder.head(features), self.critic(features).squeeze(-1))

    def value(self, x: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
        """The critic's value alone (what a gradient penalty differentiates)."""
        value: Tensor = self.critic(self.encoder.features(x)).squeeze(-1)
        return value


class StyleConvTranspose2d(nn.Module):
    """Transposed convolution, leaky ReLU, instance norm, then scale and bias of each channel from a style vector.

    Scale and bias come through a ReLU, so neither is negative (as in the released code). The norm has no parameters of
    its own: a channel's level and contrast come from the style alone.

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        kernel_size: 3 keeps the map's size at stride 1, 4 doubles it at stride 2.
        stride: stride of the transposed convolution.
        num_styles: length of the style vector.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, num_styles: int) -> None:
        super().__init__()
        self.convolution = _transposed(in_channels, out_channels, kernel_size, stride)
        self.modulation = nn.Linear(num_styles, 2 * out_channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"], style: Float[Tensor, "batch styles"]
    ) -> Float[Tensor, "batch outputs out_height out_width"]:
        """Apply the block to a map."""
        x = F.leaky_relu(self.convolution(x), NEGATIVE_SLOPE)
        x = F.group_norm(x, x.shape[1], eps=NORM_EPS)
        scale, bias = F.relu(self.modulation(style))[..., None, None].chunk(2, dim=1)
        return x * scale + bias


class StyleImageDecoder(nn.Module):
    """A decoder whose code only modulates: it scales and shifts the channels of a map that is the same for all codes.

    The map starts as a learned constant, 0.1 everywhere at first. The code becomes a style vector by a dense trunk,
    mirrored stages of :class:`StyleConvTranspose2d` double the map, and a last convolution of size 3 without bias gives
    logits.

    Args:
        num_inputs: length of the code.
        image_shape: channels, height and width, as the encoder's.
        widths: channels of each stage in the ENCODER's order; used from last to first.
        dense_widths: widths of the dense trunk (ReLU after each); the last is the style vector's length.
        convolutions_per_stage: transposed convolutions in a stage, the doubling one included.

    Raises:
        UserError: for an image that the stages cannot halve down to a map of at least 2 x 2.
    """

    def __init__(
        self,
        num_inputs: int,
        image_shape: tuple[int, int, int],
        *,
        widths: Sequence[int] = (32, 64, 128, 256),
        dense_widths: Sequence[int] = (256, 256),
        convolutions_per_stage: int = 3,
    ) -> None:
        super().__init__()
        map_shape = _map_shape(image_shape, widths)
        self.start = nn.Parameter(torch.full(map_shape, 0.1))
        self.dense = _dense(num_inputs, dense_widths)
        num_styles = dense_widths[-1] if dense_widths else num_inputs
        self.stages = nn.ModuleList(
            StyleConvTranspose2d(*sizes, num_styles) for sizes in _mirrored(widths, convolutions_per_stage)
        )
        self.head = nn.Conv2d(widths[0], image_shape[0], 3, padding=1, bias=False)

    def forward(self, z: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch channels height width"]:
        """Decode codes to logits of pixel intensities."""
        style = self.dense(z)
        x = self.start.expand(z.shape[0], -1, -1, -1)
        for stage in self.stages:
            x = stage(x, style)
        logits: Tensor = self.head(x)
        return logits


class ImageDecoder(nn.Module):
    """A decoder that spreads the code over a small map and doubles it with transposed convolutions.

    The mirror of :class:`ImageEncoder` (instance norm with affine parameters, leaky ReLU); a last convolution of size 1
    without bias gives logits.

    Args:
        num_inputs: length of the code.
        image_shape: channels, height and width, as the encoder's.
        widths: channels of each stage in the ENCODER's order; used from last to first.
        dense_widths: widths of the dense trunk (ReLU after each).
        convolutions_per_stage: transposed convolutions in a stage, the doubling one included.

    Raises:
        UserError: for an image that the stages cannot halve down to a map of at least 2 x 2.
    """

    def __init__(
        self,
        num_inputs: int,
        image_shape: tuple[int, int, int],
        *,
        widths: Sequence[int] = (32, 64, 128, 256),
        dense_widths: Sequence[int] = (256, 256),
        convolutions_per_stage: int = 3,
    ) -> None:
        super().__init__()
        self.map_shape = _map_shape(image_shape, widths)
        self.dense = _dense(num_inputs, [*dense_widths, math.prod(self.map_shape)])
        layers: list[nn.Module] = []
        for in_channels, out_channels, size, stride in _mirrored(widths, convolutions_per_stage):
            layers += [
                _transposed(in_channels, out_channels, size, stride),
                nn.GroupNorm(out_channels, out_channels, eps=NORM_EPS),
                nn.LeakyReLU(NEGATIVE_SLOPE),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.head = nn.Conv2d(widths[0], image_shape[0], 1, bias=False)

    def forward(self, z: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch channels height width"]:
        """Decode codes to logits of pixel intensities."""
        logits: Tensor = self.head(self.convolutions(self.dense(z).view(-1, *self.map_shape)))
        return logits


class DenseDecoder(nn.Module):
    """A dense trunk with layer norm and ReLU, then a linear head shaped like a sample.

    Args:
        num_inputs: length of the code.
        output_shape: shape of one sample.
        widths: widths of the trunk.
    """

    def __init__(
        self, num_inputs: int, output_shape: Sequence[int], *, widths: Sequence[int] = (2048, 2048, 2048, 2048)
    ) -> None:
        super().__init__()
        self.output_shape = tuple(output_shape)
        self.dense = _dense(num_inputs, widths, layer_norm=True)
        self.head = nn.Linear(widths[-1] if widths else num_inputs, math.prod(self.output_shape))

    def forward(self, z: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch *shape"]:
        """Decode codes to logits (or, for unbounded data, to values)."""
        logits: Tensor = self.head(self.dense(z)).view(-1, *self.output_shape)
        return logits


class GaussianLatent(nn.Module):
    """A diagonal Gaussian posterior over latents, the code of a VAE.

    Args:
        num_latents: number of latents; the encoder gives twice as many numbers.
    """

    def __init__(self, num_latents: int) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.num_inputs = 2 * num_latents

    def forward(
        self, outputs: Float[Tensor, "batch inputs"]
    ) -> tuple[Float[Tensor, "batch latents"], Float[Tensor, "batch latents"]]:
        """Mean and standard deviation (a softplus) from encoder outputs, in float32."""
        mean, raw = outputs.float().chunk(2, dim=-1)
        return mean, F.softplus(raw)

    @staticmethod
    def sample(
        mean: Float[Tensor, "batch latents"],
        std: Float[Tensor, "batch latents"],
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch latents"]:
        """A reparameterised draw: gradients reach mean and standard deviation."""
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + std * noise


def _kernel(position: int, per_stage: int) -> tuple[int, int]:
    """Kernel size and stride of a stage's convolution; the last one changes the resolution."""
    return (4, 2) if position == per_stage - 1 else (3, 1)


def _mirrored(widths: Sequence[int], per_stage: int) -> list[tuple[int, int, int, int]]:
    """(in channels, out channels, kernel size, stride) of every transposed convolution of a decoder."""
    layers = []
    channels = widths[-1]
    for width in reversed(widths):
        for position in range(per_stage):
            layers.append((channels, width, *_kernel(position, per_stage)))
            channels = width
    return layers


def _transposed(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.ConvTranspose2d:
    """Without bias, and initialised by its true fan-in: torch counts output channels for a transposed convolution."""
    layer = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, stride, padding=1, bias=False)
    limit = 1 / math.sqrt(in_channels * kernel_size**2)
    nn.init.uniform_(layer.weight, -limit, limit)
    return layer


def _dense(num_inputs: int, widths: Sequence[int], *, layer_norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Linear(num_inputs, width))
        if layer_norm:
            layers.append(nn.LayerNorm(width))
        layers.append(nn.ReLU())
        num_inputs = width
    return nn.Sequential(*layers)


def _map_shape(image_shape: tuple[int, int, int], widths: Sequence[int]) -> tuple[int, int, int]:
    """Shape of the smallest map. An instance norm over a single pixel would erase it, so 2 x 2 is the least."""
    factor = 2 ** len(widths)
    _, height, width = image_shape
    if not widths or height % factor or width % factor or min(height, width) < 2 * factor:
        raise UserError(
            f"An image of {height} x {width} cannot be halved {len(widths)} times down to a map of at least 2 x 2; "
            f"give sides that are multiples of {factor} and at least {2 * factor}, or other widths."
        )
    return widths[-1], height // factor, width // factor
