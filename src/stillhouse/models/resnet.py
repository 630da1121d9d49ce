"""Residual networks: He et al. for CIFAR and ImageNet, and wide residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.facts import Facts
from stillhouse.models.spec import NetworkSpec, classifier, number, numbers

Shortcut = Literal["projection", "pad"]
Stem = Literal["cifar", "imagenet"]


class _Conv(nn.Conv2d):
    """A convolution without bias, drawn from N(0, 2 / fan_out) (He et al., "Delving Deep into Rectifiers")."""

    def __init__(self, before: int, after: int, size: int, stride: int = 1) -> None:
        super().__init__(before, after, size, stride=stride, padding=size // 2, bias=False)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")


class _Pad(nn.Module):
    """Option A of the CIFAR networks: take every ``stride``-th position and fill the new channels with zeros."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        front = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.extra - front))


def _shortcut(before: int, after: int, stride: int, kind: Shortcut) -> nn.Module:
    if before == after and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return _Pad(after - before, stride)
    return nn.Sequential(_Conv(before, after, 1, stride), nn.BatchNorm2d(after))


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, before: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _Conv(before, width, 3, stride)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = nn.ReLU()
        self.conv2 = _Conv(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = _shortcut(before, width, stride, shortcut)
        self.activation2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.activation1(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        output: Tensor = self.activation2(branch + self.shortcut(x))
        return output


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, before: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        after = width * self.expansion
        self.conv1 = _Conv(before, width, 1)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation1 = nn.ReLU()
        # The stride sits in the 3x3 convolution (ResNet v1.5), where all current pretrained weights have it.
        self.conv2 = _Conv(width, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation2 = nn.ReLU()
        self.conv3 = _Conv(width, after, 1)
        self.norm3 = nn.BatchNorm2d(after)
        self.shortcut = _shortcut(before, after, stride, shortcut)
        self.activation3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        branch = self.activation1(self.norm1(self.conv1(x)))
        branch = self.activation2(self.norm2(self.conv2(branch)))
        branch = self.norm3(self.conv3(branch))
        output: Tensor = self.activation3(branch + self.shortcut(x))
        return output


class ResNet(nn.Module):
    """Residual network (arXiv 1512.03385): stem, stages of residual blocks, global average, linear classifier.

    Args:
        channels: channels of the images.
        outputs: size of the output; 0 returns the pooled features.
        blocks: number of blocks of each stage; every stage but the first halves the resolution.
        widths: width of each stage.
        stem_width: channels after the stem.
        bottleneck: blocks of 1x1, 3x3, 1x1 with four times the width at their output, instead of two 3x3.
        stem: ``cifar`` is one 3x3 convolution, ``imagenet`` a strided 7x7 and a max pooling.
        shortcut: where the shape changes, ``projection`` (1x1 convolution, option B) or ``pad`` (zeros, option A).
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        blocks: Sequence[int],
        widths: Sequence[int] = (16, 32, 64),
        stem_width: int = 16,
        bottleneck: bool = False,
        stem: Stem = "cifar",
        shortcut: Shortcut = "projection",
    ) -> None:
        super().__init__()
        block = _Bottleneck if bottleneck else _BasicBlock
        self.stem = nn.Sequential()
        large = stem == "imagenet"
        self.stem.add_module("conv", _Conv(channels, stem_width, 7, 2) if large else _Conv(channels, stem_width, 3))
        self.stem.add_module("norm", nn.BatchNorm2d(stem_width))
        self.stem.add_module("activation", nn.ReLU())
        if large:
            self.stem.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        stages, before = [], stem_width
        for index, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for position in range(count):
                stage.append(block(before, width, 2 if index > 0 and position == 0 else 1, shortcut))
                before = width * block.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier(before, outputs)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The output of the last stage, averaged over positions."""
        features: Tensor = self.pool(self.stages(self.stem(x))).flatten(1)
        return features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class ResNetSpec(NetworkSpec):
    """The ResNet of the CIFAR experiments, depth 6n + 2 in three stages; text form ``resnet:20``.

    Distillation benchmarks write ``resnet8x4`` for four times the width: ``widths: [64, 128, 256], stem_width: 32``.
    """

    kind = "resnet"

    depth: int = Field(default=20, ge=8, le=10_000)
    """Layers with weights: 8, 14, 20, 32, 44, 56, 110, ... (6n + 2)."""
    widths: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (16, 32, 64)
    """Channels of the three stages."""
    stem_width: int | None = Field(default=None, ge=1)
    """Channels after the first convolution. None: those of the first stage."""
    shortcut: Shortcut = "projection"
    """Where the shape changes: a 1x1 convolution (as in distillation benchmarks), or 'pad' (as first published)."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(depth=number(text, "resnet:20")) if text else cls()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.depth - 2) % 6:
            below = self.depth - (self.depth - 2) % 6
            raise ValueError(
                f"'depth' is 6n + 2, so {below} or {below + 6}, not {self.depth}; "
                f"18, 34, 50, 101 and 152 are depths of the kind 'imagenet-resnet'"
            )
        widths = [self.stem_width or self.widths[0], *self.widths]
        if self.shortcut == "pad" and widths != sorted(widths):
            raise ValueError("shortcut 'pad' adds channels: 'stem_width' and 'widths' may not decrease")
        return self

    def build(self, facts: Facts) -> ResNet:
        channels, _, _ = self.image(facts)
        blocks = [(self.depth - 2) // 6] * 3
        stem = self.stem_width or self.widths[0]
        return ResNet(channels, self.outputs(facts), blocks, self.widths, stem, shortcut=self.shortcut)


_LAYOUTS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class ImageNetResNetSpec(NetworkSpec):
    """The four-stage ResNet of 18 to 152 layers; ``imagenet-resnet:18``, with ``stem: cifar`` for small images."""

    kind = "imagenet-resnet"

    depth: Literal[18, 34, 50, 101, 152] = 18
    """Layers with weights."""
    stem: Stem | None = None
    """First layers: 'cifar' is one 3x3 convolution, 'imagenet' a strided 7x7 and pooling. None: 'cifar' below 96 pixels."""
    width: int = Field(default=64, ge=1)
    """Channels of the first stage; each later stage doubles them."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            return cls()
        depth = number(text, "imagenet-resnet:18")
        if depth not in _LAYOUTS:
            raise ValueError(f"the depth of 'imagenet-resnet' is one of {', '.join(map(str, _LAYOUTS))}, not {depth}")
        return cls(depth=depth)  # type: ignore[arg-type]

    def build(self, facts: Facts) -> ResNet:
        channels, height, width = self.image(facts)
        blocks, bottleneck = _LAYOUTS[self.depth]
        widths = [self.width * 2**stage for stage in range(4)]
        stem = self.stem or ("cifar" if min(height, width) < 96 else "imagenet")
        return ResNet(channels, self.outputs(facts), blocks, widths, self.width, bottleneck, stem)


class _WideBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(before)
        self.activation1 = nn.ReLU()
        self.conv1 = _Conv(before, width, 3, stride)
        self.norm2 = nn.BatchNorm2d(width)
        self.activation2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _Conv(width, width, 3)
        self.shortcut = _Conv(before, width, 1, stride) if before != width else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation1(self.norm1(x))
        branch = self.activation2(self.norm2(self.conv1(active)))
        branch = self.conv2(self.dropout(branch))
        # The projection reads the pre-activated input, the identity the input itself.
        output: Tensor = branch + (x if self.shortcut is None else self.shortcut(active))
        return output


class WideResNet(nn.Module):
    """Wide residual network (arXiv 1605.07146) with pre-activated blocks, three stages.

    Args:
        channels: channels of the images.
        outputs: size of the output; 0 returns the pooled features.
        depth: 6n + 4 layers.
        widen_factor: width over that of the CIFAR ResNet (16, 32, 64).
        dropout: probability of dropping a value between the two convolutions of a block.
    """

    def __init__(self, channels: int, outputs: int, depth: int, widen_factor: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", _Conv(channels, 16, 3))
        stages, before = [], 16
        for index in range(3):
            width, stage = 16 * 2**index * widen_factor, []
            for position in range((depth - 4) // 6):
                stage.append(_WideBlock(before, width, 2 if index > 0 and position == 0 else 1, dropout))
                before = width
            stages.append(nn.Sequential(*stage))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(before)
        self.activation = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier(before, outputs)

    def features(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch features"]:
        """The normalized and activated output of the last stage, averaged over positions."""
        features: Tensor = self.pool(self.activation(self.norm(self.stages(self.stem(x))))).flatten(1)
        return features

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        outputs: Tensor = self.classifier(self.features(x))
        return outputs


class WideResNetSpec(NetworkSpec):
    """A wide residual network; text form ``wrn:16-2`` gives depth and widen factor."""

    kind = "wrn"

    depth: int = Field(default=16, ge=10, le=10_000)
    """Layers with weights: 10, 16, 22, 28, 40, ... (6n + 4)."""
    widen_factor: int = Field(default=2, ge=1)
    """Width over that of the CIFAR ResNet."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a value between the two convolutions of a block."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            return cls()
        values = numbers(text, "wrn:16-2")
        if len(values) != 2:
            raise ValueError(f"{text!r} is not a depth and a widen factor; write it as in 'wrn:16-2'")
        return cls(depth=values[0], widen_factor=values[1])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.depth - 4) % 6:
            below = self.depth - (self.depth - 4) % 6
            raise ValueError(f"'depth' is 6n + 4, so {below} or {below + 6}, not {self.depth}")
        return self

    def build(self, facts: Facts) -> WideResNet:
        channels, _, _ = self.image(facts)
        return WideResNet(channels, self.outputs(facts), self.depth, self.widen_factor, self.dropout)
