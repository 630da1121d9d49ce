"""SRe2L: squeeze the data set into a network, recover images from it, relabel them by it (arXiv 2306.13092)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import (
    Compute,
    Later,
    Losses,
    Modules,
    Paper,
    Run,
    Stage,
    Stages,
    Update,
    Weight,
    adam,
    frozen_through,
)
from stillhouse.errors import UserError
from stillhouse.losses.inversion import batch_norm_matching, mean_norm, roughness
from stillhouse.methods.datasets.condensation import grid, image
from stillhouse.methods.datasets.relabelling import Relabelling
from stillhouse.models import Taps, batch_norms, logits
from stillhouse.modules.crops import crop_resized, random_crops
from stillhouse.modules.distilled import DistilledSet


class Recovered(DistilledSet):
    """A part of the set while it is recovered: after each step its pixels are cut to what pictures can have."""

    def after_step(self, run: Run) -> None:
        """Cut to [0, 1]."""
        self.cut()


class SRe2L(Relabelling):
    """Invert a trained network into images, by its labels and its batch norms, then train on its soft labels of crops.

    Recovering minimises ``CE(teacher(crop), class) + weight_bn R_bn + weight_tv R_tv + weight_l2 R_l2`` over pixels that
    start as noise, a batch of images at a time; R_bn compares the batch's statistics with those that the teacher's batch
    norms remember. No real image is needed.
    """

    name: ClassVar[str] = "sre2l"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "Squeeze, Recover and Relabel: Dataset Condensation at ImageNet Scale From A New Perspective",
        2023,
        arxiv="2306.13092",
        venue="NeurIPS 2023",
    )
    summary: ClassVar[str] = (
        "a small training set by inverting a trained network, with its soft labels of crops; for large data"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    images_per_class: int = Field(50, ge=1, description="images of each class in the tiny set (IPC)")
    num_steps: int = Field(4000, ge=1, description="steps in which a batch of images is recovered")
    batch_size: int = Field(
        100, ge=1, description="images recovered together, one of each class in turn; R_bn is of all of them"
    )
    lr_images: float = Field(0.25, gt=0, description="learning rate of the pixels (Adam, falling to 0 as a cosine)")
    betas: tuple[float, float] = Field((0.5, 0.9), description="decay rates of Adam")
    multi_crop: bool = Field(
        True, description="optimise random crops, not whole images (the release does not on CIFAR)"
    )
    smallest: float = Field(0.08, gt=0, le=1, description="least share of the area in such a crop")
    shared_crop: bool = Field(True, description="one crop for all images of a batch in a step, as released")
    flip: bool = Field(True, description="mirror crops half of the time; off where a mirror image means something else")
    jitter: int = Field(
        32, ge=0, description="largest shift right and down in each step, pixels coming in again opposite"
    )
    first_bn_factor: float = Field(10.0, ge=0, description="factor on the first batch norm in R_bn (released code)")
    weight_ce: Weight = Field(1.0, description="weight of the cross-entropy with each image's class")
    weight_bn: Weight = Field(0.01, description="weight of the batch norm term R_bn (alpha_BN)")
    weight_tv: Weight = Field(0.0, description="weight of the total variation R_tv, which the paper found not to help")
    weight_l2: Weight = Field(
        0.0, description="weight of the norm of the images R_l2, which the paper found not to help"
    )

    def stages(self, run: Run) -> Stages:
        """Squeeze, recover, relabel, score."""
        facts, scale = run.data.facts, run.data.scale
        classes = self.check_data(run)
        teacher, known = yield from self.ready(run)
        norms = [path for path, module in teacher.named_modules() if module in batch_norms(teacher)]
        kept = [path for path in norms if teacher.get_submodule(path).running_mean is not None]
        if not kept and self.weight_bn != 0:
            raise UserError(
                f"teacher: {type(teacher).__name__} has no batch norm that remembers statistics, so R_bn has nothing to match; "
                "use a network with batch norm, or weight_bn=0."
            )
        space: dict[str, Any] = {"mean": scale.mean, "std": scale.std} if scale is not None else {}
        # One image of each class, then the next of each, so that a batch has many classes.
        order = torch.arange(classes).repeat(self.images_per_class)
        parts: list[Recovered] = []
        taps = Taps(teacher, kept, side="input") if kept else None

        def build(name: str, labels: Tensor) -> Stage:
            noise = torch.randn(len(labels), *image(facts))
            part = Recovered(noise, labels, num_classes=classes, **space)
            part.cut()
            parts.append(part)
            optimizer = adam(self.lr_images, betas=self.betas, schedule="cosine")
            update = Update(partial(self.recover, taps), {"set.images": optimizer}, name="recover", couples=True)
            return Stage(
                name,
                {"set": part, "teacher": frozen_through(teacher)},
                [update],
                steps=self.num_steps,
                show=(lambda m, run: {"images": grid(m.set)}) if not name.rpartition("-")[2].strip("0") else None,
            )

        names = [f"recover/batch-{number}" for number in range(-(-len(order) // self.batch_size))]
        pairs = zip(names, torch.split(order, self.batch_size), strict=True)
        yield [Later(name, partial(build, name, labels)) for name, labels in pairs]
        if taps is not None:
            taps.close()
        images = torch.cat([part.images.detach().cpu() for part in parts])
        by_class = order.argsort(stable=True)
        provenance = {"method": self.name, "data": run.data.name, "seed": run.seed, "start": "noise"}
        distilled = DistilledSet(images[by_class], order[by_class], num_classes=classes, provenance=provenance, **space)
        agreed = yield Compute("agreement", lambda _: self._agreement(distilled, teacher, run), form=float)
        scores, soft = yield from self.relabelled(run, distilled, teacher, "distilled")
        return self.handed_over(run, distilled, scores, soft, {**known, "recovered/agreement": agreed})

    def recover(self, taps: Taps | None, m: Modules, batch: Batch, run: Run) -> Losses:
        """The terms of one step, on one random crop of each image."""
        images, generator = m.set.images, run.generator()
        size, device = (images.shape[-2], images.shape[-1]), images.device
        if self.multi_crop:
            count = 1 if self.shared_crop else len(images)
            boxes = random_crops(count, size, smallest=self.smallest, generator=generator)
            mirrored = torch.rand(count, generator=generator, device=device) < (0.5 if self.flip else 0.0)
            images = crop_resized(images, boxes.expand(len(images), 4), mirrored=mirrored.expand(len(images)))
        if self.jitter:
            down, right = torch.randint(self.jitter + 1, (2,), generator=generator, device=device).tolist()
            images = images.roll((down, right), (2, 3))
        found = logits(m.teacher, Batch(pixel_values=images))
        read = {} if taps is None else taps.take()

        def statistics() -> Tensor:
            norms: dict[str, Any] = {path: m.teacher.get_submodule(path) for path in read}
            layers = [(read[path], norm.running_mean, norm.running_var) for path, norm in norms.items()]
            return batch_norm_matching(layers, first=self.first_bn_factor)

        return {
            "ce": lambda: F.cross_entropy(found.float(), m.set.labels),
            "bn": statistics,
            "tv": lambda: roughness(images),
            "l2": lambda: mean_norm(images),
        }

    def _agreement(self, distilled: DistilledSet, teacher: nn.Module, run: Run) -> float:
        """Share of the recovered images that the teacher takes for what they are made to be."""
        right = 0
        with torch.no_grad():
            for images, labels in zip(
                *(torch.split(x, 256) for x in (distilled.images, distilled.labels)), strict=True
            ):
                found = logits(teacher, Batch(pixel_values=images.to(run.world.device)))
                right += int((found.argmax(1).cpu() == labels).sum())
        return right / len(distilled)
