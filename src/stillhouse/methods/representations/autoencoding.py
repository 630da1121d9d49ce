"""What autoencoders of images share here: training, the measures of their codes, pictures, encoding of new data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from stillhouse.data import Batch, DataSpec, Split
from stillhouse.data.sources import Memory, in_chunks
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
        yield from rest_in_range(run.data.split("train"), run.data.name)
        batches = run.data.split("train").batches(self.batch_size)
        update = Update(self.loss, trains=self.trains(model), couples=self.couples(), sparse=True)
        split = measured_split(run)
        yield Stage(
            "autoencoder",
            {"model": model},
            [update],
            steps=self.num_steps,
            batches=batches,
            show=lambda m, run: draw(m.model, split, run),
        )
        return (yield from self.concluded(run, model))

    def concluded(self, run: Run, model: Autoencoder) -> Stages:
        """The measured result."""
        split = measured_split(run)
        measured = yield Compute("measures", lambda _: measure(model, split, self.held_out, run), form=not_measured)
        pictures = yield Compute("pictures", lambda _: draw(model, split, run), form=dict[str, Tensor])
        numbers = measured["numbers"]
        rows: list[list[str | float | int]] = [[name, round(value, 4)] for name, value in numbers.items()]
        functions: dict[str, Callable[..., Any]] = {"encode": Encoder(model), "decode": Decoder(model)}
        if model.latent is not None:
            functions["sample"] = Sampler(model, measured["seen"])
        title = f"Code of {measured['latents']} latents on {measured['samples']} samples ({split.name})"
        return Result(
            artefacts={"autoencoder": model},
            metrics={**numbers, "parameters": float(count_parameters(model))},
            tables=[Table(title, ["measure", "value"], rows)],
            pictures=pictures,
            functions=functions,
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


class Sampler:
    """``sample(count)``: new samples in [0, 1] from codes that vary each latent by itself.

    Args:
        model: an autoencoder with a latent.
        seen: which values each latent takes on data, the ones it is drawn from uniformly; (latents, values). Not used
            for a Gaussian code, which is drawn from its prior.
    """

    def __init__(self, model: Autoencoder, seen: Tensor) -> None:
        self.model, self.seen = model, seen

    def __call__(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Samples; ``generator`` (on the CPU) makes the draw repeatable."""
        if count < 1:
            raise UserError(f"sample was asked for {count} samples; ask for at least 1.")
        device, latent = next(self.model.parameters()).device, self.model.latent
        with measuring(self.model):
            if isinstance(latent, LatentQuantizer | VectorQuantizer):
                drawn = torch.multinomial(self.seen.cpu().float(), count, replacement=True, generator=generator)
                z = latent.lookup(drawn.T.to(device))
            else:
                assert latent is not None
                z = torch.randn(count, latent.num_latents, generator=generator).to(device)
            return self.model.decode(z).sigmoid()


def inputs(batch: Batch) -> Tensor:
    """What is encoded and reconstructed: the first input."""
    return next(iter(batch.inputs.values()))


def latent_parameters(model: Autoencoder) -> list[Tensor]:
    """Parameters of what stands between encoder and decoder."""
    return list(model.latent.parameters()) if model.latent is not None else []


def check_range(split: Split, name: str) -> None:
    """Refuse a training split with a value outside [0, 1], where the loss is not a likelihood.

    Of a split that is not in memory only the first samples are looked at; :func:`rest_in_range` reads the others.
    """
    held = split.source
    stored = held.tensors if isinstance(held, Memory) else held.fetch(torch.arange(min(256, len(split))))
    field = next(iter(split.batch([0]).inputs))
    _refuse_outside(_extent(split, field, stored[field]), name)


def rest_in_range(split: Split, name: str) -> Generator[Compute, Any, None]:
    """Refuse like :func:`check_range` a split that is not in memory, after reading it once.

    Bytes whose every level lies in [0, 1] need no reading. Of samples that are drawn anew each time, one draw is read.
    """
    source = split.source
    if isinstance(source, Memory):
        return
    field = next(iter(split.batch([0]).inputs))
    stored = source.fetch(torch.arange(1))[field]
    if stored.dtype == torch.uint8:
        low, high = _extent(split, field, torch.cat([torch.zeros_like(stored), torch.full_like(stored, 255)]))
        if low >= 0 and high <= 1:
            return

    def read(_: Path, share: float = 1.0) -> Tensor:
        part = split.spaced(max(1, round(share * len(split)))).source
        extents = torch.tensor([_extent(split, field, chunk[field]) for chunk in in_chunks(part)])
        return torch.stack([extents[:, 0].amin(), extents[:, 1].amax()])

    low, high = (yield Compute("range", read, part=read, form=lambda: torch.tensor([0.0, 1.0]))).tolist()
    _refuse_outside((low, high), name)


def _extent(split: Split, field: str, stored: Tensor) -> tuple[float, float]:
    """Smallest and largest value that a model sees of stored samples; NaN where one is NaN."""
    # What brings them to a model is monotone in each channel, so the ends of the channels are enough.
    dims = [dim for dim in range(stored.dim()) if dim != 1 or stored.dim() != 4]
    ends = torch.stack([stored.amin(dims), stored.amax(dims)])
    seen = split.prepare({field: ends[..., None, None] if stored.dim() == 4 else ends}, device=torch.device("cpu"))
    return float(seen[field].min()), float(seen[field].max())


def _refuse_outside(extent: tuple[float, float], name: str) -> None:
    low, high = extent
    if not (low >= 0 and high <= 1):  # So that NaN is refused too.
        raise UserError(
            f"data: {name!r} has values from {low:.3g} to {high:.3g}, but this method needs [0, 1]; set data.pixels=unit."
        )


def measured_split(run: Run) -> Split:
    """Where a code is measured: the validation split, or the training split where there is none."""
    return run.data.split("validation" if "validation" in run.data.splits else "train")


def not_measured() -> dict[str, Any]:
    """The form of what :func:`measure` gives."""
    return {"numbers": {}, "latents": 0, "samples": 0, "seen": torch.empty(0), "notes": []}


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
    usage = None
    discrete = bool(indices)
    latents = torch.cat(indices if discrete else codes).cpu()
    if isinstance(model.latent, LatentQuantizer | VectorQuantizer):
        usage = model.latent.usage(latents)
        numbers["codebook_usage"] = float(usage.fraction.float().mean())
    notes: list[str] = []
    if sources:
        known = torch.cat(sources).cpu()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            scores = info_mec(known, latents, discrete=discrete)
            # Trees, as neither hues and shapes nor a codebook's indices have an order that a line could follow.
            importance = dci(known, latents, predictor="random_forest", n_jobs=1)
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
        "seen": torch.empty(0) if usage is None else usage.counts > 0,
        "notes": notes,
    }


def draw(model: Autoencoder, split: Split, run: Run) -> dict[str, Tensor]:
    """Pictures: reconstructions below their originals, and each latent moved over its values, a row per latent."""
    shown = min(256, len(split))
    seen = inputs(split.take(shown).batch(range(shown)))
    x = seen[:10]
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return {}
    x = x.to(run.world.device)
    with measuring(model):
        rebuilt = model(x).sigmoid()
        count = model.encode(x[:1])
        latents = count.indices.shape[1] if count.indices is not None else count.z.shape[1]
        spans = [(-2.0, 2.0)] * latents
        if model.latent is None:  # Its scale is its own: as far as the samples go.
            z = model.encode(seen.to(run.world.device)).z
            spans = list(zip(z.amin(0).tolist(), z.amax(0).tolist(), strict=True))
        rows = [model.traverse(x[:1], latent, span=spans[latent]) for latent in range(latents)]
    widest = max(len(row) for row in rows)
    lines = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, widest - len(row)), value=1.0) for row in rows]
    return {
        "reconstructions": torch.cat([_line(x), _line(rebuilt)], 1).cpu(),
        "traversals": torch.cat([_line(line) for line in lines], 1).cpu(),
    }


def _line(images: Tensor) -> Tensor:
    return torch.cat(list(F.pad(images, (1, 1, 1, 1), value=1.0)), 2)
