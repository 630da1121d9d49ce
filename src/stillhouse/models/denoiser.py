"""Denoisers: a small U-Net, a small network for points, models of diffusers, and features from a denoiser's middle."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int, Num
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from stillhouse.errors import UnreachableError, UserError
from stillhouse.facts import Facts
from stillhouse.models.spec import ModelSpec, on_meta
from stillhouse.models.taps import resolve_paths
from stillhouse.modules.noise import Condition, NoiseSchedule, predict


class UNetSpec(ModelSpec):
    """A small class-conditional U-Net for images of 8 to 32 pixels: a ``diffusers.UNet2DModel``, and saved as one.

    Every level but the last halves the image, so the bottleneck of a 16-pixel image is 4x4. Where the data has classes,
    the network has one more for "no class", numbered last, so that guidance can be trained.
    """

    kind = "unet"

    width: int = Field(default=16, ge=8, multiple_of=8)
    """Channels of the first level."""
    multipliers: tuple[int, ...] = Field(default=(1, 2, 4), min_length=1)
    """Channels of each level in units of ``width``."""
    blocks: int = Field(default=1, ge=1, le=1000)
    """Residual blocks of each level."""
    attention: bool = True
    """Self-attention in the bottleneck."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout in the residual blocks."""
    conditional: bool | None = None
    """Whether it takes class labels. None: when the data has classes."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        if not text:
            return cls()
        if not text.isdecimal():
            raise ValueError(f"{text!r} is not a width; write it as in 'unet:32'")
        return cls(width=int(text))

    def build(self, facts: Facts) -> nn.Module:
        shape = facts.inputs.get("pixel_values", facts.input_shape)
        if len(shape) != 3:
            raise UserError(
                f"The model 'unet' takes images, not inputs of shape {tuple(shape)}; use 'point_denoiser' for vectors."
            )
        channels, height, width = shape
        levels = len(self.multipliers)
        if height % 2 ** (levels - 1) or width % 2 ** (levels - 1):
            raise UserError(
                f"The model 'unet' halves images of {height}x{width} {levels - 1} times, which does not come out even; "
                "use fewer 'multipliers' or pad the images."
            )
        return _diffusers().UNet2DModel(  # type: ignore[no-any-return]
            sample_size=(height, width) if height != width else height,
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            block_out_channels=tuple(self.width * multiplier for multiplier in self.multipliers),
            layers_per_block=self.blocks,
            dropout=self.dropout,
            attention_head_dim=8,
            norm_num_groups=8,
            add_attention=self.attention,
            num_class_embeds=_classes(self, facts),
        )


class PointDenoiser(nn.Module):
    """A multi-layer perceptron that denoises points, called like a U-Net of diffusers.

    The point, the time and the class enter together; the middle layer is ``mid_block``. Returns the prediction itself.

    Args:
        dimensions: number of coordinates.
        width: width of the hidden layers.
        depth: number of hidden layers.
        num_class_embeds: number of classes, the null class included; None for an unconditional network.
    """

    def __init__(self, dimensions: int, width: int = 128, depth: int = 3, num_class_embeds: int | None = None) -> None:
        super().__init__()
        self.time_channels = 32
        self.class_embedding = nn.Embedding(num_class_embeds, self.time_channels) if num_class_embeds else None
        inputs = dimensions + self.time_channels * (2 if num_class_embeds else 1)
        sizes = [inputs] + [width] * depth
        layers = [nn.Sequential(nn.Linear(*pair), nn.SiLU()) for pair in pairwise(sizes)]
        middle = depth // 2
        self.down_blocks = nn.Sequential(*layers[:middle])
        self.mid_block = layers[middle]
        self.up_blocks = nn.Sequential(*layers[middle + 1 :])
        self.out = nn.Linear(width, dimensions)

    def forward(
        self,
        sample: Float[Tensor, "batch dimensions"],
        timestep: Num[Tensor, "batch"],
        class_labels: Int[Tensor, "batch"] | None = None,
    ) -> Float[Tensor, "batch dimensions"]:
        """Predict from noisy points, their times and (for a conditional network) their classes."""
        parts = [sample, _sinusoids(timestep, self.time_channels).to(sample.dtype)]
        if self.class_embedding is not None:
            if class_labels is None:
                raise UserError("This denoiser is conditional: give it 'class_labels'.")
            parts.append(self.class_embedding(class_labels))
        output: Tensor = self.out(self.up_blocks(self.mid_block(self.down_blocks(torch.cat(parts, dim=1)))))
        return output


class PointDenoiserSpec(ModelSpec):
    """A small perceptron that denoises points or vectors, for studies in the plane."""

    kind = "point_denoiser"

    width: int = Field(default=128, ge=1)
    """Width of the hidden layers."""
    depth: int = Field(default=3, ge=1, le=1000)
    """Number of hidden layers."""
    conditional: bool | None = None
    """Whether it takes class labels. None: when the data has classes."""

    def build(self, facts: Facts) -> PointDenoiser:
        if len(facts.input_shape) != 1:
            raise UserError(
                f"The model 'point_denoiser' takes vectors, not inputs of shape {facts.input_shape}; "
                "use 'unet' for images."
            )
        return PointDenoiser(facts.input_shape[0], self.width, self.depth, _classes(self, facts))


class DiffusersSpec(ModelSpec):
    """A denoiser of diffusers by hub id or directory: ``diffusers:owner/name``, with its folder as ``...:unet``.

    Give either ``name`` (pretrained weights) or ``config`` (random weights).
    """

    kind = "diffusers"

    name: str | None = None
    """Hub id or directory."""
    subfolder: str = ""
    """Folder of the denoiser in a pipeline, such as ``unet`` or ``transformer``."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    config: dict[str, Any] | None = None
    """For random weights: the fields of a model's ``config.json``, with its ``_class_name``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; half precision for teachers only."""

    @classmethod
    def from_text(cls, text: str) -> Self:
        name, _, subfolder = text.partition(":")
        return cls(name=name or None, subfolder=subfolder)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either 'name', as in 'diffusers:owner/name', or 'config'")
        if self.config is not None and "_class_name" not in self.config:
            raise ValueError("'config' needs '_class_name', such as 'UNet2DModel'")
        return self

    def build(self, facts: Facts) -> nn.Module:
        library = _diffusers()
        where = {"subfolder": self.subfolder or None, "revision": self.revision}
        dtype = getattr(torch, self.dtype)
        shown = repr(self.name) if self.name is not None else "of the given config"
        try:
            config = self.config or library.UNet2DModel.load_config(self.name, **where)
            cls = getattr(library, str(config.get("_class_name")), None)
            if not (isinstance(cls, type) and issubclass(cls, library.ModelMixin)):
                raise ValueError(f"diffusers has no model class {config.get('_class_name')!r}")
            if self.config is not None or on_meta():
                module = cls.from_config(config).to(dtype)  # type: ignore[attr-defined]
            else:
                module = cls.from_pretrained(self.name, torch_dtype=dtype, **where)  # type: ignore[attr-defined]
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            kind = UnreachableError if isinstance(error, OSError) else UserError
            raise kind(f"The denoiser {shown} could not be made: {reason}.") from error
        shape, channels = facts.inputs.get("pixel_values", facts.input_shape), module.config.get("in_channels")
        if channels is not None and len(shape) == 3 and channels != shape[0]:
            raise UserError(f"The denoiser {shown} takes {channels} channels and the data has {shape[0]}.")
        return module.train()  # type: ignore[no-any-return]


def bottleneck(
    net: nn.Module,
    x_t: Float[Tensor, "batch ..."],
    t: Num[Tensor, "*batch"],
    schedule: NoiseSchedule,
    condition: Condition = None,
    *,
    layer: str = "mid_block",
) -> Float[Tensor, "batch channels *size"]:
    """What one layer of a denoiser puts out; nothing behind that layer is run.

    The forward pass is left as soon as the layer has returned, so a U-Net's features cost its encoder and middle block
    and never touch its decoder. The graph is kept: gradients reach ``x_t`` and the parameters up to the layer.

    Args:
        net: a denoiser, see :func:`stillhouse.modules.noise.predict`.
        x_t: noisy samples.
        t: their times, in the schedule's unit.
        schedule: the process.
        condition: see :data:`stillhouse.modules.noise.Condition`.
        layer: path of the layer; for a transformer a block in the middle, such as ``transformer_blocks.13``.

    Returns:
        The layer's output (its first part, where it puts out several); a square number of tokens comes back as a map.

    Raises:
        UserError: the network has no such layer, or its forward pass does not call it.
    """
    (path,) = resolve_paths(net, [layer])
    features: Tensor

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output if isinstance(output, Tensor) else output[0])

    handle = net.get_submodule(path).register_forward_hook(leave)
    try:
        # A compiled network has its hooks compiled in; its forward method runs as it is written and sees this one.
        predict(net if net._compiled_call_impl is None else net.forward, x_t, t, schedule, condition)
    except _Reached as reached:
        features = reached.features
    else:
        raise UserError(f"The forward pass of {type(net).__name__} does not call its layer {layer!r}.")
    finally:
        handle.remove()
    side = math.isqrt(features.shape[1]) if features.ndim == 3 else 0
    if side and side**2 == features.shape[1]:
        return torch.unflatten(features.transpose(1, 2), 2, (side, side))
    return features


class _Reached(Exception):
    def __init__(self, features: Tensor) -> None:
        super().__init__("the layer has returned")
        self.features = features


def _sinusoids(t: Tensor, channels: int) -> Tensor:
    """Sines and cosines of the time at geometric frequencies from 1 to 1e-4, as in DDPM."""
    rates = torch.exp(-math.log(10000) * torch.arange(channels // 2, device=t.device) / (channels // 2))
    angles = t.to(torch.float32)[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _classes(spec: UNetSpec | PointDenoiserSpec, facts: Facts) -> int | None:
    conditional = facts.num_classes is not None if spec.conditional is None else spec.conditional
    if not conditional:
        return None
    if facts.num_classes is None:
        raise UserError(
            f"The model {spec.kind!r} shall be conditional, but the data has no classes; set 'conditional: false'."
        )
    return facts.num_classes + 1


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise UserError("Denoisers need the library diffusers: pip install 'stillhouse[generators]'.") from error
    return diffusers
