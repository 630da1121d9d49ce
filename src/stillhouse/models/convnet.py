"""Plain convolutional networks: the ConvNet of dataset distillation, and a small strided CNN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import Activation, NetworkSpec, Norm, activation, classifier, normalization, number, numbers

Pooling = Literal["average", "max", "none"]

_POOLING: dict[str, type[nn.Module]] = {"average": nn.AvgPool2d, "max": nn.MaxPool2d}


class ConvNet(nn.Module):
    """The ConvNet of dataset condensation (arXiv 2006.05929): ``depth`` blocks, then a linear classifier.

    A block is a 3x3 convolution, a normalization, an activation and a 2x2 pooling. Images of 28x28 are padded to 32x32
    by the first convolution, as in the published experiments.

    Args:
        image: shape (channels, height, width) of one image.
        outputs: size of the output; 0 returns the features.
        width: channels of every block.
        depth: number of blocks.
        norm: normalization after each convolution; ``instance`` is a group norm with a group per channel.
        activation_name: activation of each block.
        pooling: pooling of each block, kernel and stride 2.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        outputs: int,
        width: int | Sequence[int] = 128,
        depth: int = 3,
        norm: Norm = "instance",
        activation_name: Activation = "relu",
        pooling: Pooling = "average",
    ) -> None:
        super().__init__()
        channels, *sides = image
        widths = [width] * depth if isinstance(width, int) else list(width)
        blocks = []
        for index, after in enumerate(widths):
            padding = 3 if index == 0 and sides == [28, 28] else 1
            sides = [side + 2 * padding - 2 for side in sides]
            parts = OrderedDict(
                conv=nn.Conv2d(channels, after, 3, padding=padding),
                norm=normalization(norm, after, *sides),
                activation=activation(activation_name),
            )
            if pooling != "none":
                parts["pool"] = _POOLING[pooling](2)
                sides = [side // 2 for side in sides]
            blocks.append(nn.Sequential(parts))
            channels = after
        self.blocks = nn.Sequential(*blocks)
        self.classifier = classifier(channels * sides[0] * sides[1], outputs)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The flattened output of the last block, which the classifier reads."""
        features: Tensor = self.blocks(x).flatten(1)
        return features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class ConvNetSpec(NetworkSpec):
    """The ConvNet of dataset distillation; ``convnet:4`` has depth 4 (64x64 images), the default D3 fits 32x32."""

    kind = "convnet"

    width: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], ...] = 128
    """Channels of every block, or of each block in order."""
    depth: int = Field(default=3, ge=1, le=1000)
    """Number of blocks."""
    norm: Norm = "instance"
    """Normalization after each convolution."""
    activation: Activation = "relu"
    """Activation of each block."""
    pooling: Pooling = "average"
    """Pooling of each block, kernel and stride 2."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(depth=number(text, "convnet:4")) if text else cls()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        widths = (self.width,) if isinstance(self.width, int) else self.width
        if not isinstance(self.width, int) and len(self.width) != self.depth:
            raise ValueError(f"'width' lists {len(self.width)} blocks and 'depth' is {self.depth}; make them agree")
        if self.norm == "group" and any(width % 4 for width in widths):
            raise ValueError("norm 'group' has four groups: every width must be a multiple of 4")
        return self

    def build(self, facts: Facts) -> ConvNet:
        channels, height, width = self.image(facts)
        side = 32 if (height, width) == (28, 28) else min(height, width)
        if self.pooling != "none" and side < 2**self.depth:
            raise UserError(
                f"The model 'convnet' of depth {self.depth} halves images of {height}x{width} to nothing; "
                f"a depth of at most {side.bit_length() - 1} fits, or pooling 'none'."
            )
        image, outputs = (channels, height, width), self.outputs(facts)
        return ConvNet(image, outputs, self.width, self.depth, self.norm, self.activation, self.pooling)


class CNN(nn.Module):
    """3x3 convolutions with normalization and activation, some strided, a global average, a linear classifier.

    Args:
        image: shape (channels, height, width) of one image.
        outputs: size of the output; 0 returns the pooled features.
        channels: channels of each block.
        strides: stride of each block.
        norm: normalization after each convolution.
        activation_name: activation of each block.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        outputs: int,
        channels: Sequence[int] = (32, 64, 128),
        strides: Sequence[int] = (2, 2, 1),
        norm: Norm = "batch",
        activation_name: Activation = "relu",
    ) -> None:
        super().__init__()
        before, *sides = image
        blocks = []
        for after, stride in zip(channels, strides, strict=True):
            sides = [(side - 1) // stride + 1 for side in sides]
            blocks.append(
                nn.Sequential(
                    OrderedDict(
                        conv=nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=norm == "none"),
                        norm=normalization(norm, after, *sides),
                        activation=activation(activation_name),
                    )
                )
            )
            before = after
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier(before, outputs)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The output of the last block, averaged over positions."""
        features: Tensor = self.pool(self.blocks(x)).flatten(1)
        return features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class CNNSpec(NetworkSpec):
    """A small strided CNN with global pooling, for any image size; ``cnn:6-12-24`` gives the channels."""

    kind = "cnn"

    channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(32, 64, 128), min_length=1)
    """Channels of each block."""
    strides: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Stride of each block. None: 2 for all but the last."""
    norm: Norm = "batch"
    """Normalization after each convolution."""
    activation: Activation = "relu"
    """Activation of each block."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls() if not text else cls(channels=tuple(numbers(text, "cnn:32-64-128")))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.strides is not None and len(self.strides) != len(self.channels):
            raise ValueError(f"'strides' lists {len(self.strides)} blocks and 'channels' {len(self.channels)}")
        if self.norm == "group" and any(width % 4 for width in self.channels):
            raise ValueError("norm 'group' has four groups: every channel count must be a multiple of 4")
        return self

    def build(self, facts: Facts) -> CNN:
        strides = self.strides or (2,) * (len(self.channels) - 1) + (1,)
        return CNN(self.image(facts), self.outputs(facts), self.channels, strides, self.norm, self.activation)
