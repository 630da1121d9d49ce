"""Autoencoders as models: an encoder, what stands between, a decoder; described by one spec."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models.autoencoders import (
    DenseDecoder,
    DenseEncoder,
    GaussianLatent,
    ImageDecoder,
    ImageEncoder,
    StyleImageDecoder,
)
from stillhouse.models.spec import ModelSpec
from stillhouse.modules.quantizers import LatentQuantizer, VectorQuantizer

Positive = Annotated[int, Field(ge=1)]


class Code(NamedTuple):
    """What an encoder says of a batch.

    Attributes:
        z: what the decoder reads, (batch, inputs).
        continuous: the encoder's output before quantisation; the posterior means of a Gaussian code.
        quantized: the stored values, with gradient to them; None where nothing is quantised.
        indices: which stored value each latent takes, (batch, latents); None where nothing is quantised.
        std: posterior standard deviations of a Gaussian code, or None.
    """

    z: Tensor
    continuous: Tensor
    quantized: Tensor | None = None
    indices: Int[Tensor, "batch latents"] | None = None
    std: Tensor | None = None


class Autoencoder(nn.Module):
    """An encoder, a latent (a quantiser, a Gaussian posterior, or nothing) and a decoder that gives logits.

    Args:
        encoder: inputs to ``latent.num_inputs`` numbers.
        latent: what stands between, or None for the encoder's numbers themselves.
        decoder: codes to logits of pixels in [0, 1].
    """

    def __init__(
        self, encoder: nn.Module, latent: LatentQuantizer | VectorQuantizer | GaussianLatent | None, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.latent, self.decoder = encoder, latent, decoder

    def encode(self, x: Float[Tensor, "batch *shape"], *, sample: bool = False) -> Code:
        """The code of a batch; with ``sample`` a Gaussian code is drawn from its posterior, else it is the mean."""
        outputs = self.encoder(x)
        if self.latent is None:
            return Code(outputs, outputs)
        if isinstance(self.latent, GaussianLatent):
            mean, std = self.latent(outputs)
            return Code(GaussianLatent.sample(mean, std) if sample else mean, mean, std=std)
        z, quantized, indices = self.latent(outputs)
        return Code(z, outputs, quantized, indices)

    def decode(self, z: Float[Tensor, "batch inputs"]) -> Float[Tensor, "batch *shape"]:
        """Logits of the pixels."""
        logits: Tensor = self.decoder(z)
        return logits

    def forward(self, pixel_values: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch *shape"]:
        """Logits of the reconstruction."""
        return self.decode(self.encode(pixel_values).z)

    @torch.no_grad()
    def traverse(
        self, x: Float[Tensor, "one *shape"], latent: int, steps: int = 8, span: tuple[float, float] = (-2.0, 2.0)
    ) -> Float[Tensor, "values *shape"]:
        """Pictures of one sample as one latent takes its values (or ``steps`` values over ``span`` when continuous)."""
        code = self.encode(x)
        if isinstance(self.latent, LatentQuantizer) and code.indices is not None:
            codes = self.latent.traverse(code.indices, latent)[:, 0]
        elif isinstance(self.latent, VectorQuantizer) and code.indices is not None:
            moved = code.indices.repeat(min(steps, self.latent.num_vectors), 1)
            moved[:, latent] = torch.arange(len(moved), device=moved.device)
            codes = self.latent.lookup(moved)
        else:
            codes = code.z.repeat(steps, 1)
            codes[:, latent] = torch.linspace(*span, steps, device=codes.device)
        return self.decode(codes).sigmoid()


class AutoencoderSpec(ModelSpec):
    """An autoencoder of images, or of vectors with dense networks."""

    kind = "autoencoder"

    num_latents: int | None = Field(default=None, ge=1, le=2**20)
    """Numbers of the code; twice the known factors of the data when not given (10 without factors)."""
    latent: Literal["per_latent", "shared", "vector", "gaussian", "none"] = "per_latent"
    """A scalar codebook per latent, one for all, a codebook of vectors, a Gaussian posterior, or the plain numbers."""
    num_values: int = Field(default=10, ge=2, le=2**20)
    """Values of each codebook."""
    learned_values: bool = True
    """Whether the values are trained."""
    vector_size: int = Field(default=64, ge=1)
    """Numbers per vector of a codebook of vectors."""
    decoder: Literal["style", "plain"] = "style"
    """A decoder that the code only modulates, or one that spreads the code over a map."""
    widths: tuple[Positive, ...] = (32, 64, 128, 256)
    """Channels of each stage; every stage halves the image."""
    dense_widths: tuple[Positive, ...] = (256, 256)
    """Widths of the dense layers beside the code; of the whole networks for vectors."""
    convolutions_per_stage: int = Field(default=3, ge=1, le=1000)
    """Convolutions of a stage, the halving one included."""

    def latents(self, facts: Facts) -> int:
        """Numbers of the code for this data."""
        return self.num_latents or (2 * len(facts.factors) if facts.factors else 10)

    def build(self, facts: Facts) -> Autoencoder:
        count = self.latents(facts)
        latent: LatentQuantizer | VectorQuantizer | GaussianLatent | None = None
        match self.latent:
            case "per_latent" | "shared":
                shared = self.latent == "shared"
                latent = LatentQuantizer(count, self.num_values, learned=self.learned_values, shared=shared)
            case "vector":
                latent = VectorQuantizer(count, self.num_values, self.vector_size)
            case "gaussian":
                latent = GaussianLatent(count)
        inputs = latent.num_inputs if latent is not None else count
        outputs = count if isinstance(latent, GaussianLatent) else inputs
        shape = facts.input_shape
        if len(shape) != 3:
            dense = self.dense_widths
            return Autoencoder(
                DenseEncoder(shape, inputs, widths=dense), latent, DenseDecoder(outputs, shape, widths=dense)
            )
        channels, height, width = shape
        if height % 2 ** len(self.widths) or width % 2 ** len(self.widths):
            raise UserError(
                f"widths: {len(self.widths)} stages halve the image {len(self.widths)} times, but {height}x{width} is not "
                f"divisible by {2 ** len(self.widths)}; use fewer stages or another image_size."
            )
        fields = {
            "widths": self.widths,
            "dense_widths": self.dense_widths,
            "convolutions_per_stage": self.convolutions_per_stage,
        }
        image = (channels, height, width)
        encoder = ImageEncoder(image, inputs, **fields)  # type: ignore[arg-type]
        kind = StyleImageDecoder if self.decoder == "style" else ImageDecoder
        return Autoencoder(encoder, latent, kind(outputs, image, **fields))  # type: ignore[arg-type]
