"""A diffusion model as methods use it: the process that its network works on, and the network with a way to sample."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from pydantic import Field
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Run, measuring
from stillhouse.errors import UserError
from stillhouse.facts import Facts
from stillhouse.models import save
from stillhouse.modules.noise import Condition, EDMNoise, NoiseSchedule, Prediction, denoise, to_diffusers
from stillhouse.modules.samplers import Sampled, ddim, heun, multistep

Sampler = Literal["auto", "heun", "ddim"]
"""Deterministic samplers of a teacher; ``auto`` is ``heun`` on the ``edm`` process and ``ddim`` on others."""


class ScaledEDMNoise(EDMNoise):
    """The ``edm`` process for networks that are told ``time_scale · ln(σ) / 4``; OpenAI's count it in thousandths."""

    kind: ClassVar[str] = "scaled-edm"

    time_scale: float = Field(default=1000.0, gt=0)
    """Factor on the time that the network is told."""

    def network_inputs(
        self, x_t: Float[Tensor, "batch ..."], t: Num[Tensor, "*batch"]
    ) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"]]:
        x, time = super().network_inputs(x_t, t)
        return x, self.time_scale * time


@dataclass(frozen=True, eq=False)
class Process:
    """What the network of a diffusion model works on, apart from its weights.

    Attributes:
        schedule: the forward process.
        prediction: what the network predicts.
        shape: per-sample shape.
        classes: number of classes that the network is told; None when it is told none.
        null: the class that stands for none; None where the network has no such class.
        fields: tensors of the batch that the network takes by keyword, such as ``encoder_hidden_states``, and their
            per-sample shapes.
        null_fields: their values (without a batch dimension) that stand for no condition; zeros where not given.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    shape: tuple[int, ...]
    classes: int | None = None
    null: int | None = None
    fields: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    null_fields: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        net: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction,
        facts: Facts | None,
        fields: tuple[str, ...] = (),
        null_fields: Mapping[str, Tensor] | None = None,
        null: int | None = None,
    ) -> Process:
        """The process of a network on data with these facts; the network's own shape where there is no data.

        Which class stands for none follows from ``null``, from the config of a DiT, or from the data, which then have one
        class less than the network. Without any of them all that the network is told are classes.

        Raises:
            UserError: samples or conditions of the network and of the data do not fit.
        """
        config: Mapping[str, Any] = getattr(net, "config", {})
        embedding = getattr(net, "class_embedding", None)
        told = config.get("num_class_embeds") or (
            len(embedding.weight) if isinstance(embedding, nn.Embedding) else None
        )
        if told is None and config.get("num_embeds_ada_norm"):
            # DiT counts its classes without the one that stands for none.
            null = config["num_embeds_ada_norm"] if null is None else null
            told = config["num_embeds_ada_norm"] + 1
        if null is not None and not 0 < null < (told or 0):
            raise UserError(
                f"null_class: it is {null}, but the teacher is told "
                + (f"one of {told} classes from 0, and it must follow the others." if told else "no class.")
            )
        channels, side = config.get("in_channels"), config.get("sample_size")
        own = (channels, *(side if isinstance(side, list | tuple) else (side, side))) if channels and side else None
        if facts is None:
            if own is None:
                raise UserError("data: without data the shape of samples must be known from the teacher's config.")
            if fields:
                raise UserError(
                    "data: the teacher's conditions are tensors of the data, and there is no data; give 'data'."
                )
            return cls(schedule, prediction, own, told if null is None else null, null)
        shape = facts.inputs.get("pixel_values", facts.inputs.get("features", facts.input_shape))
        if own is not None and shape != own:
            raise UserError(
                f"data: the samples have the shape {shape} and the teacher's {own}; bring them to that shape."
            )
        for name in fields:
            if name not in facts.inputs:
                raise UserError(f"conditions: the data has no {name!r}; it has {sorted(facts.inputs)}.")
        if fields or told is None:
            shapes = {name: facts.inputs[name] for name in fields}
            return cls(schedule, prediction, shape, None, None, shapes, null_fields or {})
        if facts.num_classes is None:
            raise UserError(f"data: the teacher is told one of {told} classes, and the data has no class labels.")
        if null is None and told == facts.num_classes + 1:
            null = facts.num_classes
        if facts.num_classes != (told if null is None else null):
            raise UserError(
                f"data: the teacher is told one of {told} classes"
                + (f", of which {null} stands for none" if null is not None else "")
                + f", and the data has {facts.num_classes}."
            )
        return cls(schedule, prediction, shape, facts.num_classes, null)

    def key(self) -> dict[str, Any]:
        """All that samples depend on besides the network's weights and the noise, in JSON's types, for cache keys."""
        nulls = save_tensors({name: value.contiguous() for name, value in self.null_fields.items()})
        return {
            "schedule": self.schedule.digest(),
            "prediction": self.prediction,
            "shape": list(self.shape),
            "classes": self.classes,
            "null": self.null,
            "fields": {name: list(shape) for name, shape in self.fields.items()},
            "null_fields": hashlib.sha256(nulls).hexdigest(),
        }

    def condition(self, entries: Mapping[str, Tensor]) -> Condition:
        """What the network is conditioned on, from a batch or a part of one."""
        if self.fields:
            return {name: entries[name] for name in self.fields}
        return entries["labels"] if self.classes is not None else None

    def drawn(self, run: Run, batch: Batch, count: int) -> dict[str, Tensor]:
        """Conditions of ``count`` samples to generate: classes uniformly at random, other conditions from the batch."""
        if self.fields:
            return {name: batch[name] for name in self.fields}
        return {"labels": run.randint(self.classes, count)} if self.classes is not None else {}

    def example(self, device: torch.device) -> tuple[Tensor, Condition]:
        """One sample and its condition, of zeros."""
        given = {name: torch.zeros(1, *shape, device=device) for name, shape in self.fields.items()}
        labels = torch.zeros(1, dtype=torch.long, device=device)
        return torch.zeros(1, *self.shape, device=device), self.condition({"labels": labels, **given})

    def null_condition(self, condition: Condition) -> Condition:
        """The condition that stands for none, shaped like ``condition``; None where there is none."""
        if isinstance(condition, Mapping):
            return {
                name: self.null_fields[name].to(value).expand_as(value)
                if name in self.null_fields
                else torch.zeros_like(value)
                for name, value in condition.items()
            }
        return torch.full_like(condition, self.null) if condition is not None and self.null is not None else None

    def denoise(
        self,
        net: nn.Module,
        x_t: Float[Tensor, "batch ..."],
        t: Num[Tensor, "*batch"],
        condition: Condition = None,
        guidance_scale: float = 1.0,
    ) -> Float[Tensor, "batch ..."]:
        """The clean samples that a network of this process sees in ``x_t``, guided on request."""
        null = self.null_condition(condition) if guidance_scale != 1 else None
        return denoise(
            net,
            x_t,
            t,
            self.schedule,
            self.prediction,
            condition,
            null_condition=null,
            guidance_scale=guidance_scale,
        )


class Diffusion(nn.Module):
    """A denoiser with its process and its way to sample; called with noise and a condition, it returns samples.

    Args:
        net: the denoiser.
        process: what it works on.
        times: descending times that it is evaluated at.
        sampler: ``multistep`` for a distilled student (fresh noise between steps), ``heun`` or ``ddim`` for others.
        guidance_scale: guidance while sampling.
    """

    def __init__(
        self,
        net: nn.Module,
        process: Process,
        times: Num[Tensor, "steps"],
        sampler: Literal["auto", "heun", "ddim", "multistep"] = "auto",
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.net, self.process, self.times, self.guidance_scale = net, process, times, guidance_scale
        self.sampler = sampler if sampler != "auto" else "heun" if isinstance(process.schedule, EDMNoise) else "ddim"
        if len(times) == 1 and self.sampler == "heun":
            self.sampler = "ddim"  # The same single evaluation, without asking for some signal at the first time.

    @property
    def nfe(self) -> int:
        """Evaluations of the network for a sample (a guided one counts once)."""
        return 2 * len(self.times) - 1 if self.sampler == "heun" else len(self.times)

    def forward(self, noise: Float[Tensor, "batch ..."], condition: Condition = None) -> Float[Tensor, "batch ..."]:
        """Samples from standard normal noise, without a graph."""
        sample = {"heun": heun, "ddim": ddim, "multistep": multistep}[self.sampler]
        with measuring(self.net):
            done: Sampled = sample(
                lambda x_t, t: self.process.denoise(self.net, x_t, t, condition, self.guidance_scale),
                noise,
                self.process.schedule,
                self.times,
            )
        return done.samples

    def sample(
        self,
        count: int = 16,
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        batch_size: int = 256,
        **conditions: Tensor,
    ) -> Float[Tensor, "count ..."]:
        """New samples, on the CPU.

        Args:
            count: how many.
            labels: their classes; one class after the other by default.
            seed: seed of the noise.
            batch_size: samples at once.
            **conditions: other conditions that the network takes by keyword.
        """
        device = next(self.net.parameters()).device
        if self.process.classes is not None:
            labels = torch.arange(count) % self.process.classes if labels is None else labels
            conditions = {"labels": labels, **conditions}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            noise = torch.randn(count, *self.process.shape)
            found = []
            for start in range(0, count, batch_size):
                part = {name: value[start : start + batch_size].to(device) for name, value in conditions.items()}
                condition = self.process.condition(part)
                found.append(self(noise[start : start + batch_size].to(device), condition).cpu())
        return torch.cat(found)

    def save(self, directory: Path) -> None:
        """Write the network (``unet/``, by diffusers where it is diffusers' own), its scheduler and ``process.json``.

        ``process.json`` holds what a scheduler's config cannot say (the student's times, parameterisations that
        diffusers lacks, the class that stands for none).
        """
        save(self.net, directory / "unet")
        description = {
            "schedule": self.process.schedule.dump(),
            "prediction": self.process.prediction,
            "null_class": self.process.null,
            "sampler": self.sampler,
            "times": self.times.tolist(),
        }
        (directory / "process.json").write_text(json.dumps(description, indent=2) + "\n")
        config = scheduler_config(self.process)
        if config is not None:
            (directory / "scheduler").mkdir(exist_ok=True)
            (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")


def scheduler_config(process: Process) -> dict[str, Any] | None:
    """The config of the diffusers scheduler for this process; None where diffusers has none."""
    if isinstance(process.schedule, ScaledEDMNoise):
        return None
    try:
        return to_diffusers(process.schedule, process.prediction)
    except UserError:
        return None


def trainable_copy(net: nn.Module) -> nn.Module:
    """A copy of a denoiser to train, in single precision and without dropout."""
    copied = copy.deepcopy(net).float().train().requires_grad_(True)
    for layer in copied.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        elif hasattr(layer, "dropout_prob"):
            layer.dropout_prob = 0.0  # type: ignore[assignment]  # DiT's label embedding withholds labels in training.
    return copied
