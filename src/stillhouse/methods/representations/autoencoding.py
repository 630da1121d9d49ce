"""What autoencoders of images share here: training, the measures of their codes, pictures, encoding of new data."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.data import Batch, DataSpec, Split
from stillhouse.engine import (
    Compute,
    Losses,
    Method,
    Modules,
    Optimizer,
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
from stillhouse.losses.latents import binary_cross_entropy
from stillhouse.metrics.disentanglement import dci, info_mec, mig
from stillhouse.models import Autoencoder, AutoencoderSpec, Code, ModelSpec, count_parameters
from stillhouse.modules.quantizers import LatentQuantizer, VectorQuantizer


class Autoencoding(Method):
    """Base of methods that train an autoencoder on pictures in [0, 1] and measure its code."""

    data: DataSpec = Field(
        DataSpec.parse({"kind": "scenes", "pixels": "unit", "held_out": 0}),
        description="images with pixels in [0, 1] (pixels=unit), or vectors; known factors give the measures",
    )
    model: ModelSpec = Field(AutoencoderSpec(), description="the autoencoder")
    num_steps: int = Field(200_000, ge=1, description="training steps")
    batch_size: int = Field(128, ge=1, description="samples per process and step")
    lr: float = Field(1e-3, gt=0, description="learning rate, constant")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay of everything but biases and codebooks")
    clip_value: float | None = Field(None, gt=0, description="largest absolute gradient element of what is decayed")
    held_out: int = Field(10_000, ge=2, description="fixed samples on which the code is measured")
    weight_reconstruction: Weight = Field(1.0, description="weight of the binary cross-entropy, a mean over pixels")

    def code(self, m: Modules, batch: Batch) -> Code:
        """The training code of a batch."""
        found: Code = m.model.encode(inputs(batch))
        return found

    def loss(self, m: Modules, batch: Batch, run: Run) -> Losses:
        """Reconstruction."""
        return self.reconstruction(m, batch, self.code(m, batch))

    def reconstruction(self, m: Modules, batch: Batch, code: Code) -> Losses:
        """Binary cross-entropy of the pixels, their mean."""
        return {"reconstruction": lambda: binary_cross_entropy(m.model.decode(code.z), inputs(batch))}

    def trains(self, model: Autoencoder) -> dict[str | tuple[str, ...], Optimizer]:
        """Biases and codebooks without decay and clipping; everything else with both."""
        decayed = adamw(self.lr, weight_decay=self.weight_decay, clip_value=self.clip_value)
        codebook = ("model.latent",) if any(True for _ in latent_parameters(model)) else ()
        biases = ("model:*.bias", *codebook)
        return {("model", *("!" + pattern for pattern in biases)): decayed, biases: adam(self.lr)}

    def couples(self) -> bool:
        """Whether the loss couples the samples of a batch."""
        return False

    def build(self, run: Run) -> Autoencoder:
        """The autoencoder, when the data are what it can be trained on."""
        check_range(run.data.split("train"), run.data.name)
        model = self.model.build(run.data.facts)
        if not isinstance(model, Autoencoder):
            raise UserError(
                f"model: {self.name} trains an autoencoder (kind: autoencoder), not {type(model).__name__}."
            )
        return model

    def stages(self, run: Run) -> Stages:
        """One stage, then the measures."""
        model = self.build(run)
        batches = run.data.split("train").batches(self.batch_size)
        update = Update(self.loss, trains=self.trains(model), couples=self.couples(), sparse=True)
        yield Stage("autoencoder", {"model": model}, [update], steps=self.num_steps, batches=batches)
        return (yield from self.concluded(run, model))

    def concluded(self, run: Run, model: Autoencoder) -> Stages:
        """The measured result."""
        split = run.data.split("validation" if "validation" in run.data.splits else "train")
        measured = yield Compute("measures", lambda _: measure(model, split, self.held_out, run))
        pictures = yield Compute("pictures", lambda _: draw(model, split, run))
        numbers = measured["numbers"]
        rows: list[list[str | float | int]] = [[name, round(value, 4)] for name, value in numbers.items()]
        title = f"Code of {measured['latents']} latents on {measured['samples']} samples ({split.name})"
        return Result(
            artefacts={"autoencoder": model},
            metrics={**numbers, "parameters": float(count_parameters(model))},
            tables=[Table(title, ["measure", "value"], rows)],
            pictures=pictures,
            functions={"encode": Encoder(model), "decode": Decoder(model)},
            notes=measured["notes"],
        )


class Encoder:
    """``encode(images)``: codes of new data in [0, 1], (batch, inputs of the decoder)."""

    def __init__(self, model: Autoencoder) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Code:
        """Codes, and the indices of their stored values where they are quantised."""
        if not bool(((x >= 0) & (x <= 1)).all()):
            raise UserError("encode takes values in [0, 1]; bring the data there first.")
        with measuring(self.model):
            code: Code = self.model.encode(x.to(next(self.model.parameters()).device))
            return code


class Decoder:
    """``decode(z)``: pictures in [0, 1] of codes."""

    def __init__(self, model: Autoencoder) -> None:
        self.model = model

    def __call__(self, z: Tensor) -> Tensor:
        """Pictures of codes."""
        with measuring(self.model):
            return self.model.decode(z.to(next(self.model.parameters()).device)).sigmoid()


def inputs(batch: Batch) -> Tensor:
    """What is encoded and reconstructed: the first input."""
    return next(iter(batch.inputs.values()))


def latent_parameters(model: Autoencoder) -> list[Tensor]:
    """Parameters of what stands between encoder and decoder."""
    return list(model.latent.parameters()) if model.latent is not None else []


def check_range(split: Split, name: str) -> None:
    """Refuse data outside [0, 1], for which the loss is not a likelihood."""
    x = inputs(split.batch(torch.arange(min(256, len(split)))))
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        raise UserError(
            f"data: {name!r} has values from {low:.3g} to {high:.3g}, but this method needs [0, 1]; set data.pixels=unit."
        )


def measure(model: Autoencoder, split: Split, most: int, run: Run) -> dict[str, Any]:
    """Reconstruction and, with known factors, disentanglement of the code on the first samples of a split."""
    subset = split.take(most) if most < len(split) else split
    codes, errors, sources, indices = [], [], [], []
    with measuring(model):
        for batch in subset.in_order(256, device=run.world.device):
            x = inputs(batch)
            code: Code = model.encode(x)
            error = F.mse_loss(model.decode(code.z).sigmoid(), x, reduction="none").flatten(1).mean(1)
            errors.append(error)
            codes.append(code.continuous if code.indices is None else code.z)
            if code.indices is not None:
                indices.append(code.indices)
            if "sources" in batch:
                sources.append(batch["sources"])
    psnr = -10 * torch.log10(torch.cat(errors).clamp_min(1e-12)).mean()
    numbers = {"psnr": float(psnr)}
    discrete = bool(indices)
    latents = torch.cat(indices if discrete else codes).cpu()
    if isinstance(model.latent, LatentQuantizer | VectorQuantizer):
        numbers["codebook_usage"] = float(model.latent.usage(latents).fraction.float().mean())
    notes: list[str] = []
    if sources:
        known = torch.cat(sources).cpu()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scores = info_mec(known, latents, discrete=discrete)
            importance = dci(known, latents, predictor="lasso")
            numbers |= {
                "infom": scores.modularity,
                "infoe": scores.explicitness,
                "infoc": scores.compactness,
                "mig": mig(known, latents, discrete=discrete),
                "dci/disentanglement": importance.disentanglement,
                "dci/completeness": importance.completeness,
                "dci/informativeness": importance.informativeness,
                "active_latents": float(scores.active.sum()),
            }
        notes = sorted({str(warning.message) for warning in said if issubclass(warning.category, UserWarning)})
    return {
        "numbers": {name: float(value) for name, value in numbers.items()},
        "latents": latents.shape[1],
        "samples": len(subset),
        "notes": notes,
    }


def draw(model: Autoencoder, split: Split, run: Run) -> dict[str, Tensor]:
    """Pictures: reconstructions below their originals, and each latent moved over its values, a row per latent."""
    x = inputs(split.take(min(10, len(split))).batch(range(min(10, len(split)))))
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return {}
    x = x.to(run.world.device)
    with measuring(model):
        rebuilt = model(x).sigmoid()
        count = model.encode(x[:1])
        latents = count.indices.shape[1] if count.indices is not None else count.z.shape[1]
        rows = [model.traverse(x[:1], latent) for latent in range(latents)]
    widest = max(len(row) for row in rows)
    lines = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, widest - len(row)), value=1.0) for row in rows]
    return {
        "reconstructions": torch.cat([_line(x), _line(rebuilt)], 1).cpu(),
        "traversals": torch.cat([_line(line) for line in lines], 1).cpu(),
    }


def _line(images: Tensor) -> Tensor:
    return torch.cat(list(F.pad(images, (1, 1, 1, 1), value=1.0)), 2)
