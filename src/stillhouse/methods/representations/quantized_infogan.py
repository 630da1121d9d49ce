"""InfoGAN with quantised latents: the adversarial form of latent quantisation (arXiv 2305.18378)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stillhouse.data import Batch, DataSpec
from stillhouse.engine import (
    Compute,
    Losses,
    Method,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Table,
    Update,
    Weight,
    adam,
    adamw,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses.latents import (
    commitment,
    gradient_penalty,
    latent_regression,
    quantization,
    wgan_critic,
    wgan_generator,
)
from stillhouse.methods.representations.autoencoding import (
    Decoder,
    Encoder,
    check_range,
    draw,
    inputs,
    measure,
    not_measured,
    rest_in_range,
)
from stillhouse.models import Autoencoder, AutoencoderSpec, ModelSpec, count_parameters
from stillhouse.models.autoencoders import CriticEncoder, DenseEncoder, ImageEncoder
from stillhouse.modules.quantizers import LatentQuantizer

SHOWN = 10  # generated samples in the picture


class QuantizedInfoGAN(Method):
    """A generator of samples from stored values, and an encoder that both criticises them and finds their values again.

    Codes are drawn uniformly from the values of each latent. The encoder's trunk also feeds a Wasserstein critic:

    - critic step: ``L = D(fake) - D(real) + 10 (||grad D|| - 1)^2 + 200 ||zq(fake) - z||^2 + 0.01 commitment``
    - generator step, every fifth: ``L = -D(fake) + 200 ||zq(fake) - z||^2 + 0.01 quantisation + 0.01 commitment``

    with the gradient of the regression passing the rounding. The stored values are trained in the generator step alone.
    """

    name: ClassVar[str] = "quantized-infogan"
    family: ClassVar[str] = "representations"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Disentanglement via Latent Quantization", 2023, arxiv="2305.18378", venue="NeurIPS 2023"
    )
    summary: ClassVar[str] = "a generator driven by a few discrete numbers, and the encoder that reads them back"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    data: DataSpec = Field(
        DataSpec.parse({"kind": "scenes", "pixels": "unit", "held_out": 0}),
        description="images with pixels in [0, 1] (pixels=unit), or vectors; known factors give the measures",
    )
    model: ModelSpec = Field(AutoencoderSpec(), description="encoder, quantiser (per_latent or shared) and generator")
    num_steps: int = Field(200_000, ge=1, description="critic steps")
    generator_every: int = Field(5, ge=1, description="critic steps per generator step")
    batch_size: int = Field(64, ge=1, description="real samples, and as many generated ones, per process and step")
    lr: float = Field(2e-4, gt=0, description="learning rate of both sides, constant")
    betas: tuple[float, float] = Field((0.0, 0.9), description="decay rates of Adam, of both sides")
    weight_decay: float = Field(1e-4, ge=0, description="decoupled decay of everything but biases and stored values")
    clip_value: float | None = Field(1.0, gt=0, description="largest absolute gradient element of what is decayed")
    held_out: int = Field(10_000, ge=2, description="fixed samples on which the code is measured")
    weight_value: Weight = Field(1.0, description="weight of the critic's value, on both sides")
    weight_gradient: Weight = Field(10.0, description="weight of the critic's gradient penalty")
    weight_latent: Weight = Field(200.0, description="weight of the regression of the drawn codes, on both sides")
    weight_quantization: Weight = Field(0.01, description="weight of the term that moves the stored values")
    weight_commitment: Weight = Field(0.01, description="weight of the term that moves the encoder to stored values")

    def critic_loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Tell real from generated samples, smoothly, and read the generated ones' codes."""
        real = inputs(batch)
        with torch.no_grad():
            drawn = prior(m.quantizer, len(real), run)
            fake = m.generator(drawn).float().sigmoid()
        found = m.critic(fake)
        code = m.quantizer(found.outputs)
        return {
            "value": wgan_critic(m.critic.value(real), found.value),
            "gradient": lambda: gradient_penalty(m.critic.value, real, fake, mix=run.rand(len(real))),
            "latent": lambda: latent_regression(code.z, drawn),
            "commitment": lambda: commitment(found.outputs, code.quantized),
        }

    def generator_loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Please the critic with samples whose codes can be read."""
        drawn = prior(m.quantizer, len(inputs(batch)), run)
        found = m.critic(m.generator(drawn).float().sigmoid())
        code = m.quantizer(found.outputs)
        terms: Losses = {
            "value": wgan_generator(found.value),
            "latent": lambda: latent_regression(code.z, drawn),
            "commitment": lambda: commitment(found.outputs, code.quantized),
        }
        if not code.quantized.requires_grad:
            return terms
        return {**terms, "quantization": lambda: quantization(found.outputs, code.quantized)}

    def build(self, run: Run) -> Autoencoder:
        """The networks, when the data and the kind of code are what can be trained."""
        check_range(run.data.split("train"), run.data.name)
        model = self.model.build(run.data.facts)
        if not isinstance(model, Autoencoder) or not isinstance(model.latent, LatentQuantizer):
            raise UserError(
                f"model: {self.name} draws from scalar codebooks; use kind: autoencoder with latent per_latent or shared."
            )
        return model

    def optimizers(self) -> tuple[Optimizer, Optimizer]:
        """Of kernels, with decay and clipping; of biases and stored values, with neither."""
        decayed = adamw(self.lr, betas=self.betas, weight_decay=self.weight_decay, clip_value=self.clip_value)
        return decayed, adam(self.lr, betas=self.betas)

    def stages(self, run: Run) -> Stages:
        """One adversarial stage, then the measures of the encoder's codes."""
        model = self.build(run)
        yield from rest_in_range(run.data.split("train"), run.data.name)
        quantizer, encoder = model.latent, model.encoder
        assert isinstance(quantizer, LatentQuantizer)
        assert isinstance(encoder, ImageEncoder | DenseEncoder)
        decayed, free = self.optimizers()
        stored = ("quantizer",) if list(quantizer.parameters()) else ()
        critic = Update(self.critic_loss, {("critic", "!critic:*.bias"): decayed, "critic:*.bias": free}, name="critic")
        generator = Update(
            self.generator_loss,
            {("generator", "!generator:*.bias"): decayed, ("generator:*.bias", *stored): free},
            every=self.generator_every,
            name="generator",
        )
        yield Stage(
            "adversaries",
            modules={"critic": CriticEncoder(encoder), "generator": model.decoder, "quantizer": quantizer},
            updates=[critic, generator],
            batches=run.data.split("train").batches(self.batch_size),
            steps=self.num_steps,
            show=lambda m, run: gallery(model, SHOWN),
        )
        split = run.data.split("validation" if "validation" in run.data.splits else "train")
        measured = yield Compute("measures", lambda _: measure(model, split, self.held_out, run), form=not_measured)
        pictures = yield Compute(
            "pictures", lambda _: {**draw(model, split, run), **gallery(model, SHOWN)}, form=dict[str, Tensor]
        )
        numbers = measured["numbers"]
        rows: list[list[str | float | int]] = [[name, round(value, 4)] for name, value in numbers.items()]
        title = f"Code of {measured['latents']} latents on {measured['samples']} samples ({split.name})"
        return Result(
            artefacts={"autoencoder": model},
            metrics={**numbers, "parameters": float(count_parameters(model))},
            tables=[Table(title, ["measure", "value"], rows)],
            pictures=pictures,
            functions={"encode": Encoder(model), "decode": Decoder(model), "sample": Sampler(model)},
            notes=measured["notes"],
        )


def prior(quantizer: LatentQuantizer, count: int, run: Run) -> Tensor:
    """Codes of this process's samples, uniform over the stored values, with gradient to them."""
    indices = (run.rand(count, quantizer.num_latents) * quantizer.sizes).long()
    return quantizer.lookup(indices)


class Sampler:
    """``sample(count)``: new samples in [0, 1], from codes drawn uniformly over the stored values."""

    def __init__(self, model: Autoencoder) -> None:
        self.model = model

    def __call__(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Generated samples; ``generator`` makes the draw repeatable."""
        if count < 1:
            raise UserError(f"sample was asked for {count} samples; ask for at least 1.")
        with measuring(self.model):
            quantizer = self.model.latent
            assert isinstance(quantizer, LatentQuantizer)
            drawn, _ = quantizer.sample(count, generator=generator)
            return self.model.decode(drawn).sigmoid()


def gallery(model: Autoencoder, count: int) -> dict[str, Tensor]:
    """Generated images side by side; nothing where samples are no images of one or three channels."""
    images = Sampler(model)(count)
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        return {}
    return {"samples": torch.cat(list(images), 2).cpu()}
