"""Training of a diffusion model as in EDM (arXiv 2206.00364): the teacher of every method that distils one."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator

from stillhouse.data import Batch, DataSpec
from stillhouse.engine import (
    Losses,
    Modules,
    Optimizer,
    Paper,
    Result,
    Run,
    Stage,
    Stages,
    Update,
    Weight,
)
from stillhouse.errors import UserError
from stillhouse.losses.scores import Weighting, denoising, denoising_weight
from stillhouse.methods.generators.process import Diffusion, Process, Sampler
from stillhouse.methods.generators.scoring import Generating, progress
from stillhouse.models import ModelSpec, UNetSpec
from stillhouse.modules.noise import EDMNoise, NoiseSchedule, Prediction, check_prediction
from stillhouse.spec import Spec

SHOWN_STEPS = 8
"""Sampling steps of the pictures during training."""

WEIGHTINGS: dict[Prediction, Weighting] = {
    "edm": "edm",
    "epsilon": "epsilon",
    "score": "epsilon",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow_prediction",
    "sample": "sample",
}
"""The weight of a clean sample's error that makes it the plain error of what the network predicts."""


class DenoiserTraining(Spec):
    """Fields that say how a denoiser is trained."""

    model: ModelSpec = Field(UNetSpec(), description="the network")
    schedule: NoiseSchedule = Field(EDMNoise(), description="the forward process: edm, vp or flow")
    prediction: Prediction = Field("edm", description="what the network predicts")
    optimizer: Optimizer = Field(Optimizer(name="adam", lr=1e-3, warmup=19_531), description="its optimiser")
    num_steps: int = Field(390_625, ge=1, description="steps")
    batch_size: int = Field(512, ge=1, description="samples per process and step")
    ema: float = Field(
        0.9993, gt=0, lt=1, description="decay of the averaged weights, which are the ones that are kept"
    )
    null_rate: float = Field(0.1, ge=0, lt=1, description="share of samples whose class is withheld, for guidance")
    sigma_mean: float = Field(-1.2, description="mean of ln(noise level) in training on the edm process (P_mean)")
    sigma_std: float = Field(1.2, gt=0, description="its standard deviation (P_std)")

    @model_validator(mode="after")
    def _known(self) -> DenoiserTraining:
        try:
            check_prediction(self.schedule, self.prediction)
        except UserError as error:
            raise ValueError(str(error)) from None
        return self


class Denoiser(DenoiserTraining, Generating):
    """Train a network to remove noise, with EDM's preconditioning, noise levels and loss weight.

    Samples are drawn by Heun's method (or DDIM), and measured at several numbers of evaluations.
    """

    name: ClassVar[str] = "denoiser"
    family: ClassVar[str] = "generators"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Elucidating the Design Space of Diffusion-Based Generative Models",
        2022,
        arxiv="2206.00364",
        venue="NeurIPS 2022",
    )
    summary: ClassVar[str] = "a diffusion model trained from scratch; the teacher that generators are distilled from"
    verified: ClassVar[Literal["official", "reference", "formula"]] = "formula"

    data: DataSpec = Field(DataSpec.parse({"kind": "digits", "pixels": "symmetric"}), description="the data set")
    sampler: Sampler = Field("auto", description="sampler: heun, ddim, or auto (heun on edm, else ddim)")
    eval_steps: tuple[int, ...] = Field(
        (18, 8, 4, 2, 1), description="numbers of sampling steps to measure, best first"
    )
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance while sampling; 1: none")
    weight_denoising: Weight = Field(1.0, description="weight of the denoising loss")

    def stages(self, run: Run) -> Stages:
        """Train, then sample."""
        net = self.model.build(run.data.facts)
        process = Process.of(net, self.schedule, self.prediction, run.data.facts)
        yield Stage(
            "model",
            modules={"net": net},
            updates=[Update(partial(self.loss, process), {"net": self.optimizer}, name="loss")],
            batches=run.data.split("train").batches(self.batch_size),
            steps=self.num_steps,
            ema={"net": self.ema},
            keep="ema",
            show=lambda m, run: progress(Diffusion(m.net, process, self.schedule.grid(SHOWN_STEPS), self.sampler), run),
            show_every=max(1, self.num_steps // 5),
        )
        model = Diffusion(
            net,
            process,
            self.schedule.grid(self.eval_steps[0] if self.eval_steps else 18),
            self.sampler,
            self.guidance_scale,
        )
        by_steps = {
            f"{steps}-step": Diffusion(net, process, self.schedule.grid(steps), self.sampler, self.guidance_scale)
            for steps in self.eval_steps
        }
        found = yield from self.measured(run, by_steps)
        best = f"test/{self.eval_steps[0]}-step/" if self.eval_steps else ""
        main = {k.replace(best, "test/"): v for k, v in found.metrics.items() if best and k.startswith(best)}
        return Result(
            artefacts={"model": model},
            metrics={**found.metrics, **main},
            tables=found.tables,
            pictures=found.pictures,
            functions={"sample": model.sample},
            notes=found.notes,
        )

    def loss(self, process: Process, m: Modules, batch: Batch, run: Run) -> Losses:
        """Weighted error of the clean sample seen in a noisy one (Eq. 8 of the paper on the ``edm`` process)."""
        schedule = self.schedule
        x: torch.Tensor = batch["pixel_values"] if "pixel_values" in batch else batch["features"]
        if isinstance(schedule, EDMNoise):
            t = schedule.lognormal(run.randn(len(x)), self.sigma_mean, self.sigma_std)
        else:
            t = schedule.draw(run.rand(len(x)))
        condition = process.condition(batch)
        if process.null is not None and self.null_rate > 0:
            withheld = run.rand(len(x)) < self.null_rate
            condition = batch.labels.masked_fill(withheld, process.null)
        x_t = schedule.add_noise(x, run.randn(*x.shape), t)
        x0 = process.denoise(m.net, x_t, t, condition)
        return {"denoising": denoising(x0, x, weight_of(process, t))}


def weight_of(process: Process, t: torch.Tensor) -> torch.Tensor:
    """The weight of each clean sample's error in a denoising loss: EDM's, or that of the plain error in the prediction."""
    schedule = process.schedule
    return denoising_weight(schedule.alpha(t), schedule.sigma(t), WEIGHTINGS[process.prediction], schedule.sigma_data)
