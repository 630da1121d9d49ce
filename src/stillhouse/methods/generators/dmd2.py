"""DMD2: improved distribution matching distillation of a diffusion model into a few-step generator (arXiv 2405.14867)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from pydantic import Field, model_validator
from torch import Tensor, nn

from stillhouse.data import Batch, DataSpec, Facts, Split
from stillhouse.engine import (
    Compute,
    Held,
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
    frozen,
    measuring,
)
from stillhouse.errors import UserError
from stillhouse.losses.scores import denoising, distribution_matching, gan_discriminator, gan_generator
from stillhouse.methods.generators.denoiser import weight_of
from stillhouse.methods.generators.process import Diffusion, Process, Sampler, trainable_copy
from stillhouse.methods.generators.scoring import Generating, progress
from stillhouse.methods.generators.teacher import DiffusionTeacher, Teacher
from stillhouse.models import bottleneck, count_parameters, fingerprint, load
from stillhouse.modules.discriminator import BottleneckDiscriminator
from stillhouse.modules.lora import add_lora, merge_lora
from stillhouse.modules.noise import Condition, NoiseSchedule
from stillhouse.modules.samplers import backward_simulation

GENERATED = "generated"
"""The batch's key of generated samples; their conditions follow as ``generated/<name>``."""

SDXL_LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
"""Layers of diffusers' U-Nets that the LoRA form adapts."""


class DMD2(Generating):
    """Distil a diffusion model into a one-step or few-step generator that matches it in distribution.

    Three copies of the teacher: the generator; the frozen real score; and the fake score, which follows the generator's
    distribution and carries a discriminator on its bottleneck. The fake score is trained in every iteration, the
    generator in every ``generator_every``-th, both on the same generated samples.
    """

    name: ClassVar[str] = "dmd2"
    family: ClassVar[str] = "generators"
    paper: ClassVar[Paper] = Paper(
        "Improved Distribution Matching Distillation for Fast Image Synthesis",
        2024,
        arxiv="2405.14867",
        venue="NeurIPS 2024",
    )
    summary: ClassVar[str] = (
        "a diffusion model into a one-step or few-step generator, by matching distributions and a GAN"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    data: DataSpec | None = Field(  # type: ignore[assignment]
        DataSpec.parse({"kind": "digits", "pixels": "symmetric"}),
        description="real samples for the discriminator and for measuring; none: no GAN, nothing measured",
    )
    teacher: DiffusionTeacher = Field("unet", description="the diffusion model", validate_default=True)
    student_steps: tuple[int, ...] | None = Field(
        None,
        description="times of a few-step student as places in the training table, such as 999, 749, 499, 249; one step when "
        "not given",
    )
    conditioning_step: int | None = Field(
        None,
        ge=0,
        description="place in the table of the time that a one-step student is told; the last when not given",
    )
    num_steps: int = Field(200_000, ge=1, description="iterations; the fake score is trained in each")
    generator_every: int = Field(5, ge=1, description="iterations per update of the generator (two time scales)")
    batch_size: int = Field(40, ge=1, description="generated, and real, samples per process and iteration")
    accumulate: int = Field(1, ge=1, description="micro-batches per iteration")
    optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=2e-6, weight_decay=0.01, warmup=500, clip_norm=10.0),
        description="optimiser of the generator; its warm-up is counted in iterations",
    )
    fake_optimizer: Optimizer | None = Field(
        None, description="optimiser of the fake score and its discriminator together; the generator's when not given"
    )
    guidance_scale: float = Field(1.0, ge=0, description="classifier-free guidance of the real score; 1: none")
    fake_guidance_scale: float = Field(1.0, description="that of the fake score, which must be 1")
    t_range: tuple[float, float] = Field(
        (0.02, 0.98), description="times of distribution matching, as fractions of the training table"
    )
    gan_t_range: tuple[float, float] = Field((0.0, 1.0), description="times of the noise that the discriminator sees")
    feature_layer: str = Field(
        "mid_block",
        description="layer of the fake score that the discriminator reads; down_blocks.<last>: encoder's end",
    )
    start: str | None = Field(
        None,
        description="result directory of an earlier run with keep_fake, whose student and fake score are the start of this "
        "one (a second phase)",
    )
    keep_fake: bool = Field(False, description="also keep the fake score in the result, for a second phase")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the generator's averaged weights; none: the last")
    lora_rank: int = Field(
        0, ge=0, description="rank of adapters that are trained in place of the generator; 0: all of it"
    )
    lora_alpha: float = Field(8.0, gt=0, description="their scale is alpha over the rank")
    lora_layers: tuple[str, ...] = Field(SDXL_LAYERS, description="layers that are adapted: ends of paths, or patterns")
    regression: Literal["none", "baseline", "pretrain"] = Field(
        "none",
        description="train a one-step student on pairs of noise and the teacher's sample: not at all, to compare with, or as "
        "the generator's start as well",
    )
    regression_pairs: int = Field(10_000, ge=1, description="number of those pairs")
    regression_steps: int = Field(10_000, ge=1, description="steps of that training")
    regression_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-5, weight_decay=0.01, warmup=500, clip_norm=10.0), description="its optimiser"
    )
    teacher_sampler: Sampler = Field("auto", description="sampler of the teacher, for pairs and for the table")
    teacher_steps: int = Field(256, ge=1, description="its steps (256 of Heun's are 511 evaluations)")
    weight_dm: Weight = Field(1.0, description="weight of distribution matching")
    weight_gan: Weight = Field(3e-3, description="weight of the generator's GAN loss; 0: there is no discriminator")
    weight_fake: Weight = Field(1.0, description="weight of the fake score's denoising loss")
    weight_discriminator: Weight = Field(1e-2, description="weight of the discriminator's loss")
    weight_regression: Weight = Field(1.0, description="weight of the squared error on pairs")

    @model_validator(mode="after")
    def _consistent(self) -> DMD2:
        if self.fake_guidance_scale != 1:
            raise ValueError(
                f"'fake_guidance_scale' is {self.fake_guidance_scale}, but the fake score is never guided: it must follow "
                "the generator's own distribution; guide the real score with 'guidance_scale'"
            )
        if self.student_steps is not None and self.conditioning_step is not None:
            raise ValueError("'conditioning_step' is for a one-step student; leave it out beside 'student_steps'")
        if self.data is None and self.adversarial:
            raise ValueError(
                f"'weight_gan' is {self.weight_gan}, but a GAN needs real samples: give 'data', or set weight_gan=0"
            )
        if self.data is None and self.regression == "baseline":
            raise ValueError(
                "'regression' is 'baseline', but without data nothing is measured: give 'data', or set none"
            )
        if self.start is not None and self.regression == "pretrain":
            raise ValueError(
                "'start' and regression=pretrain both say which weights the student begins with; leave one of them out"
            )
        if self.adversarial and self.weight_discriminator == 0:
            raise ValueError(
                "'weight_discriminator' is 0, so the student would follow a discriminator that is never trained; give it a "
                "weight, or set weight_gan=0"
            )
        steps = self.student_steps
        if steps is not None and (not steps or steps[-1] < 0 or any(b >= a for a, b in pairwise(steps))):
            raise ValueError(f"'student_steps' is {list(steps)}, but a few-step schedule descends to at least 0")
        for name in ("t_range", "gan_t_range"):
            low, high = getattr(self, name)
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"'{name}' is [{low}, {high}], but its fractions of the table need 0 <= low < high <= 1"
                )
        if self.teacher.foreseen is not None:
            try:
                self._check_times(self.teacher.foreseen)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.weight_gan != 0

    def times(self, process: Process) -> Num[Tensor, "steps"]:
        """The student's descending times."""
        return self._times(process.schedule)

    def _times(self, schedule: NoiseSchedule) -> Num[Tensor, "steps"]:
        if self.student_steps is not None:
            return schedule.at(self.student_steps)
        step = schedule.num_train_timesteps - 1 if self.conditioning_step is None else self.conditioning_step
        if step >= schedule.num_train_timesteps:
            raise UserError(
                f"{step} is no place in the teacher's table, which has {schedule.num_train_timesteps} steps from 0."
            )
        return schedule.times[[step]]

    # Stages ---------------------------------------------------------------------------------------------------------

    def stages(self, run: Run) -> Stages:
        """The teacher, perhaps pairs of it, the student, the comparison."""
        facts: Facts | None = run.data.facts if self.data is not None else None
        teacher = yield from self.teacher.ready(run, facts)
        process = teacher.process
        self._check(process)
        times = self.times(process)
        print_ = fingerprint(teacher.net)
        full = self.sampled(teacher)
        compared = {"teacher": full, f"teacher-{len(times)}-step": self.sampled(teacher, len(times))}

        generator, fake = self.started(teacher.net, "student"), self.started(teacher.net, "fake")
        if self.regression != "none":
            regressed = yield from self.regress(run, teacher, full)
            compared["regression"] = Diffusion(regressed, process, times[:1], "multistep")
            if self.regression == "pretrain":
                generator.load_state_dict(regressed.state_dict())
        if self.lora_rank:
            adapted = add_lora(generator, self.lora_layers, self.lora_rank, self.lora_alpha)
        yield self.distillation(run, teacher.process, generator, teacher.net, fake, times)
        if self.lora_rank:
            merge_lora(generator)

        student = Diffusion(generator.requires_grad_(True), process, times, "multistep")
        found = yield from self.measured(run, {**compared, "student": student})
        notes = [
            f"the teacher has fingerprint {print_} and {count_parameters(teacher.net)} parameters; it takes {full.nfe} "
            f"evaluations a sample, the student {student.nfe}.",
            "the student has its " + ("averaged" if self.ema else "last") + " weights.",
        ]
        if self.lora_rank:
            notes.append(f"adapters of rank {self.lora_rank} on {len(adapted)} layers were trained and are merged.")
        mine = {
            key.replace("test/student/", "test/"): value
            for key, value in found.metrics.items()
            if key.startswith("test/student/")
        }
        costs = {"nfe/teacher": float(full.nfe), "nfe/student": float(student.nfe)}
        kept = {"fake": Diffusion(fake, process, process.schedule.grid(self.teacher_steps))} if self.keep_fake else {}
        return Result(
            artefacts={"student": student, **kept},
            metrics={**found.metrics, **mine, **costs},
            tables=found.tables,
            pictures=found.pictures,
            functions={"sample": student.sample},
            notes=notes + found.notes,
        )

    def sampled(self, teacher: Teacher, steps: int | None = None) -> Diffusion:
        """The teacher with its sampler."""
        times = teacher.process.schedule.grid(self.teacher_steps if steps is None else steps)
        sampler: Sampler = self.teacher_sampler if steps is None else "ddim"
        return Diffusion(teacher.net, teacher.process, times, sampler, self.guidance_scale)

    def started(self, net: nn.Module, artefact: str) -> nn.Module:
        """A copy of the teacher, or of what an earlier run ended with."""
        copied = trainable_copy(net)
        if self.start is not None:
            place = Path(self.start).expanduser() / artefact / "unet"
            if not place.is_dir():
                raise UserError(
                    f"start: {place} does not exist; name the 'result' directory of a run of dmd2 with keep_fake=true."
                )
            copied.load_state_dict(load(place).state_dict())
        return copied

    def distillation(
        self,
        run: Run,
        process: Process,
        generator: nn.Module,
        teacher: nn.Module,
        fake: nn.Module,
        times: Num[Tensor, "steps"],
    ) -> Stage:
        """The stage in which generator and guidance take turns."""
        modules: dict[str, nn.Module | Held] = {"generator": generator, "teacher": frozen(teacher), "fake": fake}
        guidance: tuple[str, ...] = ("fake",)
        if self.adversarial:
            modules["head"] = self.head(process, fake)
            guidance = ("fake", "head")
        warmup = math.ceil(self.optimizer.warmup / self.generator_every)
        trained = "generator:*.parametrizations.weight.0.*" if self.lora_rank else "generator"
        updates = [
            Update(
                partial(self.generator_loss, process),
                {trained: self.optimizer.model_copy(update={"warmup": warmup})},
                every=self.generator_every,
                name="generator",
            ),
            Update(
                partial(self.guidance_loss, process), {guidance: self.fake_optimizer or self.optimizer}, name="guidance"
            ),
        ]
        return Stage(
            "student",
            modules=modules,
            updates=updates,
            steps=self.num_steps,
            batches=run.data.split("train").batches(self.batch_size) if self.data is not None else None,
            prepare=partial(self.prepare, process, times),
            ema={"generator": self.ema} if self.ema else {},
            keep="ema" if self.ema else "last",
            accumulate=self.accumulate,
            show=partial(self.show, process, times) if self.data is not None else None,
        )

    def show(self, process: Process, times: Num[Tensor, "steps"], m: Modules, run: Run) -> dict[str, Tensor]:
        """What the student makes of noise that stays the same."""
        return progress(Diffusion(m.generator, process, times, "multistep"), run)

    def head(self, process: Process, fake: nn.Module) -> BottleneckDiscriminator:
        """A discriminator for the bottleneck of the fake score."""
        x, condition = process.example(next(fake.parameters()).device)
        t = process.schedule.times[-1:].to(x.device)
        with measuring(fake):
            features = bottleneck(fake, x, t, process.schedule, condition, layer=self.feature_layer)
        return BottleneckDiscriminator(features.shape[1], features.shape[2:])

    # One iteration --------------------------------------------------------------------------------------------------

    def prepare(self, process: Process, times: Num[Tensor, "steps"], m: Modules, batch: Batch, run: Run) -> Batch:
        """The generated samples of both turns; they carry a graph only when the generator's turn comes.

        A few-step student starts where inference would put it: at a step that all processes share, on its own samples
        of the steps before (backward simulation, Section 4.5).
        """
        noise = run.randn(self.batch_size, *process.shape)
        given = process.drawn(run, batch, len(noise))
        condition = process.condition(given)
        # The global generator is seeded alike in all processes here, and on the CPU nothing waits for the number.
        step = int(torch.randint(len(times), ())) if len(times) > 1 else 0
        x_t, t = backward_simulation(
            lambda x_s, s: process.denoise(m.generator, x_s, s, condition),
            noise,
            process.schedule,
            times,
            step,
            randn_like=lambda x: run.randn(*x.shape),
        )
        with torch.set_grad_enabled(run.step % self.generator_every == 0):
            x = process.denoise(m.generator, x_t, t, condition)
        return batch.replace(**{GENERATED: x}, **{f"{GENERATED}/{name}": value for name, value in given.items()})

    def generator_loss(self, process: Process, m: Modules, batch: Batch, run: Run) -> Losses:
        """Distribution matching, and the GAN loss of the generator; no parameter of the guidance gets a gradient."""
        x, condition = batch[GENERATED], generated_condition(process, batch)
        terms: dict[str, Any] = {"dm": lambda: self.matching(process, m, x, condition, run)}
        if "head" in m:
            terms["gan"] = lambda: gan_generator(self.realism(process, m, x, condition, run))
        return terms

    def guidance_loss(self, process: Process, m: Modules, batch: Batch, run: Run) -> Generator[Losses]:
        """The fake score learns to denoise the generated samples, the discriminator to tell them from real ones."""
        x, condition = batch[GENERATED].detach(), generated_condition(process, batch)
        schedule = process.schedule
        t = schedule.draw(run.rand(len(x)))
        x_t = schedule.add_noise(x, run.randn(*x.shape), t)
        yield {"fake": denoising(process.denoise(m.fake, x_t, t, condition), x, weight_of(process, t))}
        if "head" in m:
            real = batch["pixel_values"] if "pixel_values" in batch else batch["features"]
            yield {
                "discriminator": lambda: gan_discriminator(
                    self.realism(process, m, real, process.condition(batch), run),
                    self.realism(process, m, x, condition, run),
                )
            }

    def matching(
        self, process: Process, m: Modules, x: Float[Tensor, "batch ..."], condition: Condition, run: Run
    ) -> Float[Tensor, ""]:
        """Distribution matching (Eq. 2) at a random time of each sample; only the real score is guided."""
        schedule = process.schedule
        with torch.no_grad():
            t = schedule.draw(run.rand(len(x)), *self.t_range)
            x_t = schedule.add_noise(x, run.randn(*x.shape), t)
            real = process.denoise(m.teacher, x_t, t, condition, self.guidance_scale)
            fake = process.denoise(m.fake, x_t, t, condition)
        return distribution_matching(x, real, fake)

    def realism(
        self, process: Process, m: Modules, x: Float[Tensor, "batch ..."], condition: Condition, run: Run
    ) -> Float[Tensor, "batch"]:
        """The discriminator's logits of samples that are noised to a random time (Section 4.3)."""
        schedule = process.schedule
        t = schedule.draw(run.rand(len(x)), *self.gan_t_range)
        x_t = schedule.add_noise(x, run.randn(*x.shape), t)
        logits: Tensor = m.head(bottleneck(m.fake, x_t, t, schedule, condition, layer=self.feature_layer).float())
        return logits

    # Regression on pairs --------------------------------------------------------------------------------------------

    def regress(self, run: Run, teacher: Teacher, full: Diffusion) -> Generator[Compute | Stage, Any, nn.Module]:
        """A one-step student trained on noise and the teacher's sample from it: the plain baseline, or a start."""
        process = teacher.process
        key = {
            "pairs": 2,
            "teacher": fingerprint(teacher.net),
            # Heads of attention, activations and the like are in no weight.
            "network": [type(teacher.net).__qualname__, _architecture(teacher.net)],
            "process": process.key(),
            "sampler": [full.sampler, self.teacher_steps, self.guidance_scale],
            # Batches of another size and sums over threads are rounded otherwise.
            "count": [self.regression_pairs, self.eval_batch_size],
            "seed": run.seed,
            "data": run.data.fingerprint if process.fields else None,
            "torch": torch.__version__,
            "device": run.world.device.type,
            "threads": torch.get_num_threads(),
        }
        stored = yield Compute(
            "pairs",
            lambda _: self.pairs(run, full),
            key=json.dumps(key, sort_keys=True),
            part=lambda _, share: self.pairs(run, full, share),
            form=lambda: self.pairs(run, full, 0.0),
        )
        facts = Facts({"noise": process.shape, "target": process.shape}, task="unlabelled")
        pairs = Split("pairs", facts, stored)
        net = trainable_copy(teacher.net)
        yield Stage(
            "regression",
            modules={"student": net},
            updates=[
                Update(
                    partial(self.regression_loss, process, self.times(process)[:1]),
                    {"student": self.regression_optimizer},
                    name="regression",
                )
            ],
            batches=pairs.batches(min(self.batch_size, len(pairs))),
            steps=self.regression_steps,
        )
        return net

    def pairs(self, run: Run, full: Diffusion, share: float = 1.0) -> dict[str, Tensor]:
        """Noise, the teacher's samples from it (of a share of it; else the noise), and what they are conditioned on."""
        process, device, count = full.process, run.world.device, self.regression_pairs
        full.net.to(device)
        # All draws come first, so that they do not depend on how many samples are made at once.
        found = {"noise": torch.randn(count, *process.shape)}
        if process.fields:
            # Conditions may be far larger than samples: what is kept is where they are.
            found["at"] = torch.randint(len(run.data.split("train")), (count,))
        elif process.classes is not None:
            found["labels"] = torch.randint(process.classes, (count,))
        targets = []
        sampled = round(share * count)
        for start in range(0, sampled, self.eval_batch_size):
            rows = slice(start, min(start + self.eval_batch_size, sampled))
            part = {name: value[rows].to(device) for name, value in found.items()}
            targets.append(full(part["noise"], self._looked_up(process, run, part)).cpu())
        targets.append(found["noise"][sampled:])
        return {**found, "target": torch.cat(targets)}

    def regression_loss(self, process: Process, time: Num[Tensor, "1"], m: Modules, batch: Batch, run: Run) -> Losses:
        """Squared error between the one-step sample and the teacher's from the same noise."""
        t = time.to(batch["noise"].device).expand(len(batch["noise"]))
        condition = self._looked_up(process, run, batch)
        x = process.denoise(m.student, process.schedule.start(batch["noise"], t), t, condition)
        return {"regression": denoising(x, batch["target"])}

    def _looked_up(self, process: Process, run: Run, given: dict[str, Tensor]) -> Condition:
        if process.fields:
            at = given["at"]
            given = run.data.split("train").batch(at, device=at.device)
        return process.condition(given)

    # Checks ---------------------------------------------------------------------------------------------------------

    def _check(self, process: Process) -> None:
        if self.guidance_scale != 1 and process.null is None and not process.fields:
            raise UserError(
                f"guidance_scale is {self.guidance_scale}, but the teacher has no class for 'no condition' to guide away from; "
                "use 1, a teacher trained with such a class, or say which it is with the teacher's 'null_class'."
            )
        self._check_times(process.schedule)

    def _check_times(self, schedule: NoiseSchedule) -> None:
        """Refuse times that are not in the teacher's table."""
        checks: dict[str, Callable[[], Any]] = {
            "conditioning_step" if self.student_steps is None else "student_steps": lambda: self._times(schedule),
            "t_range": lambda: schedule.draw(torch.zeros(1), *self.t_range),
            "gan_t_range": lambda: schedule.draw(torch.zeros(1), *self.gan_t_range),
            "teacher_steps": lambda: schedule.grid(self.teacher_steps),
        }
        for name, check in checks.items():
            try:
                check()
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


def _architecture(net: nn.Module) -> dict[str, Any]:
    """The config of a network of diffusers, without where it came from."""
    config: Mapping[str, Any] = getattr(net, "config", {})
    return {name: str(value) for name, value in config.items() if not name.startswith("_")}


def generated_condition(process: Process, batch: Batch) -> Condition:
    """What the generated samples of a batch are conditioned on."""
    return process.condition(
        {name.removeprefix(f"{GENERATED}/"): value for name, value in batch.items() if name.startswith(f"{GENERATED}/")}
    )
