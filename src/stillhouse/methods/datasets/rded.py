"""RDED: realistic crops that a trained network is sure of, several to an image, with its soft labels (arXiv 2312.03526)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from stillhouse.data import Batch
from stillhouse.engine import Compute, Optimizer, Paper, Run, Stages, measuring
from stillhouse.errors import UserError
from stillhouse.methods.datasets.condensation import image
from stillhouse.methods.datasets.relabelling import Relabelling
from stillhouse.models import logits
from stillhouse.modules.crops import crop_resized, random_crops, stitch
from stillhouse.modules.distilled import DistilledSet
from stillhouse.modules.soft_views import ViewPlan


class RDED(Relabelling):
    """Choose the crops of real images that an observer classifies best, stitch them, train on its soft labels of views.

    Of each of ``pool`` images of a class ``crops`` random squares are cut, and the one of least cross-entropy is kept; the
    best ``images_per_class * factor ** 2`` of these make the class's images, ``factor`` x ``factor`` to an image. Nothing is
    optimised.
    """

    name: ClassVar[str] = "rded"
    family: ClassVar[str] = "datasets"
    classic: ClassVar[bool] = True
    paper: ClassVar[Paper] = Paper(
        "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm",
        2024,
        arxiv="2312.03526",
        venue="CVPR 2024",
    )
    summary: ClassVar[str] = (
        "a small training set of real crops that a trained network is sure of, with its soft labels; minutes"
    )
    verified: ClassVar[Literal["official", "reference", "formula"]] = "official"

    pool: int = Field(
        300, ge=1, description="images of each class that are looked at, drawn at random; all if there are fewer"
    )
    crops: int = Field(5, ge=1, description="random crops of each image, of which the best is kept")
    factor: int = Field(
        2, ge=1, description="parts along each side of an image: 2 puts four crops in one; 1 at 32x32 in the paper"
    )
    smallest: float = Field(0.08, gt=0, le=1, description="least share of an image's area in a crop")
    select: Literal["realism", "random"] = Field(
        "realism", description="realism: by the observer's cross-entropy; random: the first that come (an ablation)"
    )
    eval_optimizer: Optimizer = Field(
        Optimizer(name="adamw", lr=1e-3, weight_decay=0.01, schedule="cosine", stretch=2.0),
        description="optimiser in scoring; as released its cosine is twice as long as the training, so it ends at half",
    )

    def plan(self) -> ViewPlan:
        """As given, or as released for this factor: crops of at least 1 / factor of the area, strips shuffled, CutMix."""
        return self.label_views or ViewPlan(smallest=1 / self.factor, strips=self.factor)

    def stages(self, run: Run) -> Stages:
        """Train the observer, choose, stitch, relabel, score."""
        facts, scale = run.data.facts, run.data.scale
        classes = self.check_data(run)
        self._check_pool(run)
        teacher, known = yield from self.ready(run)
        channels, height, width = image(facts)
        made = yield Compute(
            "images",
            lambda _: self._chosen(teacher, run),
            form=lambda: {
                "images": torch.zeros(classes * self.images_per_class, channels, height, width),
                "index": torch.zeros(classes, self._wanted, dtype=torch.long),
                "boxes": torch.zeros(classes, self._wanted, 4, dtype=torch.long),
                "score": torch.zeros(classes, self._wanted),
            },
        )
        labels = torch.arange(classes).repeat_interleave(self.images_per_class)
        provenance = {
            "method": self.name,
            "data": run.data.name,
            "seed": run.seed,
            "start": {"samples": made["index"].flatten().tolist(), "boxes": made["boxes"].flatten(0, 1).tolist()},
        }
        space: dict[str, Any] = {"mean": scale.mean, "std": scale.std} if scale is not None else {}
        distilled = DistilledSet(made["images"], labels, num_classes=classes, provenance=provenance, **space)
        scores, soft = yield from self.relabelled(run, distilled, teacher, "distilled")
        chosen = {"crops/cross-entropy": float(made["score"].mean())}
        return self.handed_over(run, distilled, scores, soft, {**known, **chosen})

    @property
    def _wanted(self) -> int:
        return self.images_per_class * self.factor**2

    def _check_pool(self, run: Run) -> None:
        _, height, width = image(run.data.facts)
        if min(height, width) < 2 * self.factor:
            raise UserError(
                f"factor is {self.factor}, which leaves crops of less than 2 pixels in images of {height}x{width}; use less."
            )
        if self.pool < self._wanted:
            raise UserError(
                f"pool is {self.pool}, but {self.images_per_class} images of {self.factor**2} crops need {self._wanted} of each "
                "class; raise pool."
            )
        for label, members in run.data.split("train").by_class().items():
            if len(members) < self._wanted:
                raise UserError(
                    f"images_per_class is {self.images_per_class} of {self.factor**2} crops each, but class {label} has only "
                    f"{len(members)} images for the {self._wanted} that this needs; use a smaller factor."
                )

    def _chosen(self, teacher: nn.Module, run: Run) -> dict[str, Tensor]:
        """The stitched images of all classes, with the sample, box and cross-entropy of each part."""
        split, (_, height, width) = run.data.split("train"), image(run.data.facts)
        found: dict[str, list[Tensor]] = {"images": [], "index": [], "boxes": [], "score": []}
        with measuring(teacher):
            for label, members in split.by_class().items():
                members = members[torch.randperm(len(members))[: self.pool]]
                real = split.batch(members)["pixel_values"]
                boxes = random_crops(self.crops * len(real), (height, width), smallest=self.smallest, ratio=1.0).view(
                    self.crops, len(real), 4
                )
                score = torch.stack([self._score(real, part, label, teacher, run) for part in boxes])
                if self.select == "realism":
                    place, which = best_crops(score, self._wanted)
                else:
                    place = torch.arange(self._wanted)
                    which = torch.zeros_like(place)
                parts = self._cut(real[place], boxes[which, place])
                found["images"].append(stitch(parts, (height, width), self.factor))
                found["index"].append(members[place])
                found["boxes"].append(boxes[which, place])
                found["score"].append(score[which, place])
        stacked = {name: torch.stack(tensors) for name, tensors in found.items()}
        return {**stacked, "images": stacked["images"].flatten(0, 1)}

    def _cut(self, images: Tensor, boxes: Tensor) -> Tensor:
        size = (images.shape[-2] // self.factor, images.shape[-1] // self.factor)
        return crop_resized(images, boxes, size)

    def _score(self, images: Tensor, boxes: Tensor, label: int, teacher: nn.Module, run: Run) -> Tensor:
        """Cross-entropy of the observer on one crop of each image, at the size of a part in a frame of zeros."""
        found = []
        for some, their in zip(torch.split(images, 256), torch.split(boxes, 256), strict=True):
            framed = padded(self._cut(some, their), (images.shape[-2], images.shape[-1])).to(run.world.device)
            own = logits(teacher, Batch(pixel_values=framed)).float()
            found.append(
                F.cross_entropy(own, own.new_full((len(own),), label, dtype=torch.long), reduction="none").cpu()
            )
        return torch.cat(found)


def best_crops(
    score: Float[Tensor, "crops images"], wanted: int
) -> tuple[Int[Tensor, " wanted"], Int[Tensor, " wanted"]]:
    """The images whose best crop has the least scores, best first, and which crop that is.

    >>> image, crop = best_crops(torch.tensor([[3.0, 1.0, 9.0], [2.0, 5.0, 8.0]]), 2)
    >>> image.tolist(), crop.tolist()
    ([1, 0], [0, 1])
    """
    least, which = score.min(0)
    place = least.argsort(stable=True)[:wanted]
    return place, which[place]


def padded(images: Float[Tensor, "batch channels height width"], size: tuple[int, int]) -> Tensor:
    """The images in the middle of a frame of zeros; an odd pixel goes below and to the right."""
    tall, wide = size[0] - images.shape[-2], size[1] - images.shape[-1]
    return F.pad(images, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2))
